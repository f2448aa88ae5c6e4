"""How alike are two recordings? Prints one markdown table, a column for each file.

    python data/compare.py data/sample.jsonl.gz [more.jsonl.gz ...]

The problem. A simulator is believed too easily. This file measures what matters to a market maker,
so that a simulated and a real recording can be laid side by side. Input: recordings, gzip lines
`<recv_ns> <message>`. The market is measured with a plain book of its own (two dicts), from order
book and trade messages alone; the fills are made by the project's own market maker, which is
played over each recording.

Definitions. Mid returns are logarithmic, in bps (1 bp = 1e-4), on a grid of 100 ms of the
exchange's time (`cts`). Volatility "at 10 s" is the root mean square of the overlapping returns of
10 s over the square root of 10. Depth "at 1 bp" is what rests within 1 bp of the mid, mean of the
two sides. A best price is "eaten" if in the 100 ms in which it got worse there was a print at it
or beyond. `markout` is side * (mid h later - fill price) / fill price in bps, negative: we were
run over; "±" is a 95 % interval in which the fills of one minute may go together.

The makers. Each has the default parameters and fees, an order of 0.01 BTC a side, and the fill
model `queue`. The one *at the touch* quotes so near to the mid that it rounds to the best bid and
the best ask. The other is *ours*, with the quotes of the program. Rules of fills: `queue`, a trade
ate the queue ahead of us; `through`, a trade went through our price; `book`, the other side's best
came to our price without one. '-': too little to say, fewer than 10 fills or a price at rest.

What it does not do. No check of the messages: a recording with lost messages gives nonsense.
"""
import contextlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import backtest  # noqa: E402
import feed  # noqa: E402
import marketmaker  # noqa: E402
from optimize import Distances  # noqa: E402

import numpy as np  # noqa: E402

STEP_MS = 100  # grid of the mid
BANDS_BPS = (1.0, 5.0)  # depth is measured within these of the mid
HORIZONS_S = (0.1, 1, 10)  # of markouts
MINUTE_NS = 60 * feed.NS
FEWEST = 10  # fills; of fewer nothing is said
TOUCH_BPS = 1e-3  # so near to the mid that a quote rounds to the best price
Columns = dict[str, np.ndarray]


# ---- Reading -----------------------------------------------------------------------
@dataclass
class Recording:
    """What is kept of one file; rows become arrays in `columns`."""

    books: list[tuple] = field(default_factory=list)  # one row a book message
    trades: list[tuple] = field(default_factory=list)  # T ms, taker side, price, size
    changed: list[int] = field(default_factory=list)  # levels in each delta


def load(path: Path) -> Recording:
    """Read one file; UserError without a book or trades. What is malformed is left out."""
    record, book = Recording(), {"b": {}, "a": {}}
    for _, text in feed.read_lines(path):
        with contextlib.suppress(*feed.MALFORMED):
            take_message(record, book, json.loads(text))
    if not record.changed or not record.trades:
        raise feed.UserError(f"{path} holds no book or no trades: nothing to compare")
    return record


def take_message(record: Recording, book: dict[str, dict], message: dict) -> None:
    """Keep what a message tells, and rebuild the book."""
    topic = message.get("topic", "")
    if topic.startswith("orderbook."):
        data = message["data"]
        if message["type"] == "snapshot":
            book.update(b={}, a={})
        else:
            record.changed.append(len(data["b"]) + len(data["a"]))
        apply_rows(book, data)
        cts = message.get("cts", message["ts"])  # without cts before December 2023
        record.books.append((cts, *measure(book)))
    elif topic.startswith("publicTrade."):
        record.trades += [(t["T"], 1 if t["S"] == "Buy" else -1, float(t["p"]), float(t["v"]))
                          for t in message["data"]]


def apply_rows(book: dict[str, dict[float, float]], data: dict) -> None:
    """Absolute sizes; 0 deletes."""
    for side in ("b", "a"):
        for price, size in data[side]:
            if float(size):
                book[side][float(price)] = float(size)
            else:
                book[side].pop(float(price), None)


def measure(book: dict[str, dict[float, float]]) -> list[float]:
    """Best prices, the size at one, and the depth of a side in each band."""
    bid, ask = max(book["b"]), min(book["a"])
    middle = (bid + ask) / 2
    near = [(abs(price / middle - 1) * 1e4, size) for side in book.values()
            for price, size in side.items()]
    depths = [sum(size for bps, size in near if bps <= band) / 2 for band in BANDS_BPS]
    return [bid, ask, (book["b"][bid] + book["a"][ask]) / 2, *depths]


def columns(record: Recording) -> Columns:
    """The rows as arrays, with the mid on a regular grid."""
    books, trades = np.array(record.books), np.array(sorted(record.trades))
    data = dict(zip(["cts", "bid", "ask", "touch"], books.T), depths=books[:, 4:])
    data.update(zip(["T", "side", "price", "size"], trades.T))
    data["mid"] = (data["bid"] + data["ask"]) / 2
    grid = np.arange(data["cts"][0], data["cts"][-1], STEP_MS)
    data["grid_mid"] = data["mid"][np.searchsorted(data["cts"], grid, side="right") - 1]
    data["changed"] = np.array(record.changed)
    return data


# ---- Statistics of the market ------------------------------------------------------
def returns_bps(data: Columns, step_ms: int, every_ms: int) -> np.ndarray:
    """Log returns of the mid over steps of this length, one begun so often."""
    prices, steps = np.log(data["grid_mid"]), step_ms // STEP_MS
    return ((prices[steps:] - prices[:-steps]) * 1e4)[::every_ms // STEP_MS]


def volatility(data: Columns, seconds: int) -> float:
    """Per square root of a second, from returns over so many seconds; nan without any."""
    moves = returns_bps(data, seconds * 1000, STEP_MS)
    return float(np.sqrt(np.mean(moves ** 2) / seconds)) if len(moves) else np.nan


def autocorrelation(values: np.ndarray, lag: int) -> float:
    """Of a series with itself `lag` places later."""
    values = values - values.mean()
    return float(np.mean(values[lag:] * values[:-lag]) / np.mean(values ** 2))


def kurtosis(values: np.ndarray) -> float:
    """Raw kurtosis: 3 for a normal law; nan for a price that never moved."""
    values = values - values.mean()
    spread = np.mean(values ** 2)
    return float(np.mean(values ** 4) / spread ** 2) if spread else np.nan


def eaten(data: Columns) -> float:
    """Share of the falls of the best bid, and rises of the best ask, with prints at it."""
    found = []
    for side, best in ((-1, data["bid"]), (1, data["ask"])):
        row = np.searchsorted(data["cts"], data["T"], side="left") - 1  # the push before it
        hits = (data["side"] == side) & (row >= 0) & (side * (data["price"] - best[row]) > -1e-6)
        was_hit = np.bincount(row[hits], minlength=len(best))[:-1] > 0
        found.append(was_hit[side * np.diff(best) > 1e-6])
    return float(np.concatenate(found).mean()) if sum(map(len, found)) else np.nan


# ---- Our market maker --------------------------------------------------------------
def quote_at_touch(*_: object) -> Distances:
    """A strategy that asks no questions."""
    return Distances(TOUCH_BPS, TOUCH_BPS)


MAKERS: dict[str, str | Callable] = {"at the touch": quote_at_touch, "ours": "lp"}


def play(recording: feed.Recording, tape: feed.Tape, strategy: Any) -> marketmaker.MarketMaker:
    """The market maker after a recording; nothing is written anywhere."""
    instrument = recording.parser.instrument
    parameters = marketmaker.choose_parameters({"fill_model": "queue"}, recording.start, instrument)
    maker = marketmaker.MarketMaker(parameters, instrument, strategy=strategy)
    for message in tape.messages():
        maker.hear(message)
    maker.finish()
    return maker


def fill_rows(path: Path) -> dict[str, str]:
    """How the makers' orders fill, and where the price goes then."""
    rows, recording = {}, feed.Recording(path)
    tape = feed.build_tape(recording.messages())
    for name, strategy in MAKERS.items():
        maker = play(recording, tape, strategy)
        fills = maker.account.fills
        markouts = backtest.measure_markouts(fills, tape, maker.instrument.tick_size)
        rules, n = Counter(fill.rule for fill in fills), len(fills)
        minutes = np.array([fill.time_ns // MINUTE_NS for fill in fills])
        say = len(fills) >= FEWEST
        rows[f"{name}: n of fills"] = f"{n}"
        shares = " / ".join(f"{rules[rule] / max(n, 1):.0%}" for rule in marketmaker.RULES[:3])
        rows[f"{name}: by queue / through / book"] = shares if say else "-"
        for seconds in HORIZONS_S:
            of_horizon = markouts[:, backtest.HORIZONS_S.tolist().index(seconds)]
            mean = backtest.estimate_mean(of_horizon, minutes) if say else "-"
            rows[f"{name}: markout at {seconds:g} s, bps"] = str(mean)
        if strategy is quote_at_touch:
            ratio = f"{rules['queue'] / max(rules['through'], 1):.1f}"
            rows[f"{name}: queue / through"] = ratio if say else "-"
    return rows


# ---- The table ---------------------------------------------------------------------
def market_rows(data: Columns) -> dict[str, str]:
    """Prices, book and trades."""
    span_s = (data["cts"][-1] - data["cts"][0]) / 1000
    tenth, second = returns_bps(data, STEP_MS, STEP_MS), returns_bps(data, 1000, 1000)
    moves, depths = np.abs(tenth[tenth != 0]), data["depths"].mean(axis=0)
    sizes, side = data["size"], data["side"]
    counts = np.bincount(((data["T"] - data["T"][0]) // 1000).astype(int))
    rows = {
        "span, s": f"{span_s:.0f}",
        "price, USDT": f"{data['mid'].mean():.0f}",
        "spread: mean, ticks": f"{np.mean(data['ask'] - data['bid']) / 0.1:.3f}",
        "volatility at 1 / 10 / 60 s, bps/sqrt(s)":
            " / ".join(f"{volatility(data, seconds):.2f}" for seconds in (1, 10, 60)),
        "kurtosis of 100 ms / 1 s returns": f"{kurtosis(tenth):.0f} / {kurtosis(second):.0f}",
        "100 ms / 1 s returns: share of zero":
            f"{np.mean(tenth == 0):.0%} / {np.mean(second == 0):.0%}",
        "100 ms moves: p50 / p90, bps": " / ".join(
            f"{v:.2f}" for v in (np.percentile(moves, (50, 90)) if len(moves) else ())),
        "best prices that got worse: eaten": f"{eaten(data):.0%}",
        "depth at 1 / 5 bps a side, BTC": " / ".join(f"{depth:.1f}" for depth in depths),
        "size at a best price, BTC": f"{data['touch'].mean():.1f}",
        "levels changed in a delta": f"{data['changed'].mean():.0f}",
        "prints /s": f"{len(sizes) / span_s:.1f}",
        "BTC traded /s": f"{sizes.sum() / span_s:.2f}",
        "size of a print: p50 / mean / p99, BTC":
            f"{np.median(sizes):.3f} / {sizes.mean():.3f} / {np.percentile(sizes, 99):.2f}",
        "sign autocorrelation: lag 1 / 10":
            f"{autocorrelation(side, 1):.2f} / {autocorrelation(side, 10):.2f}",
        "variance / mean of prints in 1 s": f"{counts.var() / counts.mean():.0f}",
    }
    return {name: re.sub(r"nan%?", "-", text) or "-" for name, text in rows.items()}


def run(files: list[Path]) -> None:
    """Measure the files and print the table."""
    tables = [market_rows(columns(load(path))) | fill_rows(path) for path in files]
    print("| | " + " | ".join(path.name.split(".")[0] for path in files) + " |")
    print("|---|" + "---:|" * len(files))
    for name in tables[0]:
        print(f"| {name} | " + " | ".join(table[name] for table in tables) + " |")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = feed.Arguments(prog="compare.py", description="Compare recordings in one table.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    return feed.exit_cleanly(lambda: run(parser.parse_args(arguments).files))


if __name__ == "__main__":
    sys.exit(main())
