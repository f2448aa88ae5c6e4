"""The pictures of the README that no command of the program draws.

    python data/pictures.py    writes session, jump, program, inventory and timeline.png beside it

Panels are as in backtest.py. inventory.png plays a simulated path (experiments.py makes it),
session.png and timeline.png the sample; what they show is SYNTHETIC.
"""

import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))
import backtest  # noqa: E402
import experiments  # noqa: E402
import feed  # noqa: E402
import marketmaker as mm  # noqa: E402
import optimize as opt  # noqa: E402
from backtest import BLACK, BLUE, PINK, RED, SKY, Told  # noqa: E402
from feed import NS  # noqa: E402

import numpy as np  # noqa: E402

TICK, START_S = 0.1, 1_767_225_600  # USDT; where the sample's clock begins


def play(path: Path, **given: Any) -> backtest.Result:
    """A run over one recording."""
    return backtest.play(backtest.Setting((backtest.stamp_file(path),), (), given, "lp", {}))


def plot_jump(ax: Any) -> Told:
    """The half-spread before, at and after a jump of the mid."""
    seconds = range(-90, 120)
    now, average = experiments.follow_jump(seconds).T
    ax.step(seconds, now, BLACK, where="post", label="from the volatility of now")
    ax.step(seconds, average, RED, where="post", label="from its average")
    ax.set_xlim(-20, 110)
    return "Half the base spread", "bps", "seconds after a jump of the mid by 50 bps"


def plot_cost(ax: Any, q: float = 0.5) -> Told:
    """The cost of every lean at the width S, as it is and by coarse chords."""
    lean = np.linspace(-1, 1, 401)
    cost = opt.cost_function((1 + lean) / 2, (1 - lean) / 2, q, 1.0, 1.0)
    ax.plot(lean, cost, BLACK, label=f"C at q = {q:g}")
    grid = np.linspace(-1, 1, 9)
    at_grid = opt.cost_function((1 + grid) / 2, (1 - grid) / 2, q, 1.0, 1.0)
    ax.plot(grid, at_grid, SKY, marker="o", markersize=4,
            label="by 8 chords; the program has finer ones")  # fmt: skip
    best = opt.solve_quote(q, 1.0, 1.0, 1 / 64)
    s = best.bid_distance - best.ask_distance
    ax.axvline(s, color=RED, linestyle="--", label=f"the program: s = {s:.2f}")
    along = "lean s = d_b - d_a: right of 0 it would rather sell"
    return "Cost of a quote of width S", "cost", along


def plot_lean(ax: Any) -> Told:
    """How the quote leans with the inventory, and where an edge stops it."""
    qs = np.linspace(-1, 1, 201)
    for alpha, color in ((0.25, SKY), (1.0, BLACK), (4.0, RED)):
        solved = [opt.solve_quote(float(q), alpha, 1.0, 0.25) for q in qs]
        ax.plot(qs, [x.bid_distance for x in solved], color, label=f"bid, alpha {alpha:g}")
        ax.plot(qs, [x.ask_distance for x in solved], color, linestyle=":")
    ax.axhline(0.25, color="grey", linewidth=0.8)
    along = "inventory q, share of the limit; dotted: the ask; grey: the edge d_min"
    return "Distances from the mid", "S", along


def plot_inventory(ax: Any) -> Told:
    """One path, with and without a lean."""
    for alpha, color in ((0.0, RED), (1.0, BLACK)):
        c = play(experiments.PATHS[0], alpha=alpha).columns
        minutes = (c["time_ns"] - c["time_ns"][0]) / backtest.MINUTE_NS
        ax.step(minutes, c["inventory"], color, where="post", linewidth=0.9,
                label=f"alpha {alpha:g}")  # fmt: skip
    ax.axhline(0, color="grey", linewidth=0.6)
    return "Inventory, with the lean and without", "BTC", "minutes of path 1, SYNTHETIC"


def plot_life(ax: Any, fill: mm.Fill, tape: feed.Tape) -> Told:
    """The price around an order's life, by the exchange's clock."""
    book_s, trade_s = (x / NS - START_S for x in (tape.exch_ns[tape.is_book], tape.trade_ns))
    arrival_s, fill_s, later_s = (x / NS - START_S for x in (fill.arrival_ns, fill.time_ns,
                                                             fill.time_ns + NS))  # fmt: skip
    mids = tape.mid_ticks[tape.is_book] * TICK
    is_near = (trade_s > arrival_s - 1) & (trade_s < later_s + 1)
    sold = is_near & (tape.trade_level > 0)
    ax.scatter(trade_s[sold], tape.trade_level[sold] * TICK, s=12 * tape.trade_size[sold],
               color=SKY, label="sellers' trades")  # fmt: skip
    ax.step(book_s, mids, BLACK, where="post", linewidth=0.9, label="mid")
    ax.plot([arrival_s, fill_s], [fill.price] * 2, BLUE, linewidth=2, label="our bid stands")
    ax.plot(fill_s, fill.price, "^", color=BLUE, markersize=9, label="filled")
    mid_later = mids[np.searchsorted(book_s, later_s, "right") - 1]
    arrow = {"color": RED, "arrowstyle": "->"}
    ax.annotate("", (later_s, mid_later), (later_s, fill.price), arrowprops=arrow)
    markout = (mid_later / fill.price - 1) * 1e4
    ax.text(later_s + 0.1, fill.price, f"markout after 1 s:\n{markout:.2f} bps", color=RED)
    decided_s, heard_s = arrival_s - 0.1, fill.recv_ns / NS - START_S  # a latency of 100 ms
    for k, at_s in enumerate((decided_s, heard_s)):
        label = "" if k else "decided, heard (our clock)"
        ax.axvline(at_s, color=PINK, linestyle=":", label=label)
    ax.set_xlim(arrival_s - 1, later_s + 2)
    ax.set_ylim(mid_later - 3, fill.price + 14)
    return "One fill", "USDT", "seconds into the sample, by the exchange's clock"


def plot_queue(ax: Any, fill: mm.Fill, tape: feed.Tape) -> Told:
    """The queue ahead of the order, print by print of the trades that filled it."""
    level = round(fill.side * fill.price / TICK)
    prints = tape.trade_size[(tape.trade_level == level) & (tape.trade_ns == fill.time_ns)]
    queue = fill.queue_at_arrival - np.cumsum(np.append(0.0, prints))
    labels = ["on arrival", *(f"after a print\nof {size:g}" for size in prints)]
    ax.bar(range(len(queue)), queue.clip(0), 0.6, color=BLUE, label="ahead of us")
    for k, size in enumerate(queue):
        ax.text(k, max(size, 0) + 0.02, f"{size:.3f}" if size > 0 else "filled", ha="center")
    ax.set_xticks(range(len(queue)), labels)
    ax.set_ylim(0, 1.3)
    return "The queue ahead of our bid", "BTC", ""


def main() -> int:
    """Draw all of them; the exit status."""
    feed.Arguments(prog="pictures.py", description="Draws data/*.png anew.").parse_args()
    with ProcessPoolExecutor() as pool:
        experiments.make_paths(pool)

    # The first panels of a run, over the first twenty minutes of the sample.
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "first.jsonl"
        lines = takewhile(lambda line: line[0] <= (START_S + 1200) * NS, feed.read_lines(mm.SAMPLE))
        first.write_text("".join(f"{time_ns} {text}\n" for time_ns, text in lines))
        session = backtest.plot_run(play(first))[:3]
    # The 27th fill of the sample, which the README follows by hand.
    sample = play(mm.SAMPLE)
    life = {"fill": sample.fills[26], "tape": sample.setting.data.tapes[0]}
    timeline = [(3.0, partial(plot_life, **life)), (2.0, partial(plot_queue, **life))]

    for name, rows, title in (
        ("session", session, "BTCUSDT linear, SYNTHETIC sample: minutes since the start"),
        ("jump", [(2.6, plot_jump)], "Which volatility makes the spread?"),
        ("program", [(2.8, plot_cost), (2.8, plot_lean)], "The program"),
        ("inventory", [(2.6, plot_inventory)], "Inventory control"),
        ("timeline", timeline, "The life of an order, SYNTHETIC sample"),
    ):
        picture = backtest.draw_figure(rows, title, shared=3 * (name == "session"))
        (FOLDER / f"{name}.png").write_bytes(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
