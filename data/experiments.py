"""Nine experiments on simulated markets: the tables of the README.

    python data/experiments.py [1 2 ... 9]      (all: some five minutes on 2 cores)

The problem. One path of the market proves nothing: a result that is +3 on one is -4 on the
next. Here every question is asked on the same eight paths of two hours (simulate.py, seeds 1
to 8, kept in data/paths), and the answer is a mean over the paths with its standard error
(±). Where two settings are compared, they are compared path by path: what the market did to
both cancels. All data are SYNTHETIC: they show what the program does, not what it earns.

Units: money in USDT over two hours of a path, inventory in BTC, spreads and markouts in bps.
The market maker is marketmaker.py at its defaults, but for what an experiment says.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import backtest  # noqa: E402
import feed  # noqa: E402
import marketmaker  # noqa: E402
import optimize as opt  # noqa: E402

FOLDER = ROOT / "data" / "paths"
SEEDS, HOURS = range(1, 9), 2
PATHS = [FOLDER / f"seed-{seed}.jsonl.gz" for seed in SEEDS]
TOUCH = {"default_spread_bps": 0.02, "min_half_spread_bps": 0.01}  # a quote at the best prices
Runs = list[dict[str, Any]]  # the metrics of a setting, path by path


# ---- Paths and runs ----------------------------------------------------------------


def make_paths(pool: ProcessPoolExecutor) -> None:
    """Simulate what is missing."""
    FOLDER.mkdir(exist_ok=True)
    script = ROOT / "data" / "simulate.py"
    commands = [
        [sys.executable, script, "--out", path, "--hours", str(HOURS), "--seed", str(seed)]
        for seed, path in zip(SEEDS, PATHS) if not path.exists()
    ]  # fmt: skip
    for k, _ in enumerate(pool.map(partial(subprocess.run, check=True), commands), 1):
        progress(f"{k} of {len(commands)} paths simulated")


def progress(text: str) -> None:
    """How far we are, on stderr."""
    print(f"  {text}", file=sys.stderr, flush=True)


def play_one(path: Path, strategy: str | Callable, exchange: dict, given: dict) -> dict[str, Any]:
    """What a worker does: the metrics of one run."""
    stamps = (backtest.stamp_file(path),)
    setting = backtest.Setting(stamps, (None, None, None), given, strategy, exchange)
    return backtest.measure(backtest.play(setting))


def play(pool: ProcessPoolExecutor, strategy: str | Callable | Sequence = "lp",
         exchange: dict | None = None, **given: Any) -> Runs:  # fmt: skip
    """One setting on every path; strategy and parameters may be one for each path."""
    def of_path(k: int) -> tuple:
        mine = {n: v[k] if isinstance(v, list) else v for n, v in given.items()}
        return strategy[k] if isinstance(strategy, list) else strategy, exchange or {}, mine

    waiting = [pool.submit(play_one, path, *of_path(k)) for k, path in enumerate(PATHS)]
    return [future.result() for future in waiting]


def values(runs: Runs, name: str) -> np.ndarray:
    """One metric, path by path."""
    return np.array([run[name] for run in runs], float)


def mean_text(x: np.ndarray, digits: int = 2) -> str:
    """Mean ± standard error over the paths."""
    return f"{x.mean():+.{digits}f} ± {x.std(ddof=1) / math.sqrt(len(x)):.{digits}f}"


def markout(runs: Runs, rule: str | None = None) -> str:
    """The markout after 1 s, over the paths that have fills."""
    cells = [run["rules"][rule]["markout"] if rule else run["markouts"]["both"]["1 s"]
             for run in runs]  # fmt: skip
    known = np.array([cell.mean for cell in cells if cell.n])
    return mean_text(known) if len(known) > 1 else "-"


def show(title: str, head: list[str], rows: list[list[Any]]) -> None:
    """A table with its title."""
    print(f"\n{title}", *backtest.align([head, *rows]), sep="\n", flush=True)


# ---- The experiments ---------------------------------------------------------------


def control_inventory(pool: ProcessPoolExecutor) -> None:
    rows, free = [], play(pool, alpha=0.0)
    for alpha in (0.0, 0.25, 1.0, 4.0):
        runs = play(pool, alpha=alpha)
        gross = values(runs, "gross_usdt")
        rows.append([f"{alpha:g}", f"{values(runs, 'inventory_std').mean():.4f}",
                     mean_text(gross), f"{gross.std(ddof=1):.2f}",
                     mean_text(gross - values(free, "gross_usdt")),
                     mean_text(values(runs, "max_drawdown_usdt"))])  # fmt: skip
    show("1. Inventory control: what does the lean do?",
         ["alpha", "sd of inventory", "gross", "sd over paths", "more than at 0", "drawdown"], rows)


def pay_the_fee(pool: ProcessPoolExecutor) -> None:
    rows = []
    for half in (0.5, 1.0, 2.0, 3.0, 4.0):
        runs = play(pool, min_half_spread_bps=half)
        even = values(runs, "gross_usdt") / values(runs, "turnover_usdt") * 1e4
        rows.append([f"{half:g}", f"{values(runs, 'fills').mean():.0f}",
                     mean_text(values(runs, "gross_usdt")), mean_text(values(runs, "fees_usdt")),
                     mean_text(values(runs, "net_usdt")), mean_text(even)])  # fmt: skip
    show("2. The fee, 2 bps a fill: which edge earns it, and at which fee would each break even?",
         ["min_half_spread", "fills", "gross", "fees", "net", "break-even fee"], rows)


def choose_a_width(pool: ProcessPoolExecutor) -> None:
    rows = []
    for gamma in (0.0, 0.25, 0.5, 1.0, 2.0):
        runs = play(pool, gamma=gamma)
        rows.append([f"{gamma:g}", f"{values(runs, 'quoted_spread_bps').mean():.2f}",
                     f"{values(runs, 'fills').mean():.0f}", markout(runs),
                     mean_text(values(runs, "gross_usdt")),
                     mean_text(values(runs, "net_usdt"))])  # fmt: skip
    show("3. Width: what does a spread that follows volatility buy?",
         ["gamma", "quoted spread", "fills", "markout 1 s", "gross", "net"], rows)


def grow_stale(pool: ProcessPoolExecutor) -> None:
    rows = []
    for move in (0.25, 0.5, 1.0, 2.0, 5.0):
        runs = play(pool, requote_move_bps=move)
        captured = values(runs, "spread_captured_usdt") / values(runs, "turnover_usdt") * 1e4
        rows.append([f"{move:g}", f"{values(runs, 'orders_sent').mean():,.0f}",
                     f"{values(runs, 'fills').mean():.0f}", mean_text(captured),
                     f"{values(runs, 'quoted_spread_bps').mean() / 2:.2f}",
                     mean_text(values(runs, "gross_usdt"))])  # fmt: skip
    show("4. Staleness: a quote that waits for a larger move of the mid",
         ["requote_move", "orders", "fills", "captured, bps", "half spread", "gross"], rows)


def jump(pool: ProcessPoolExecutor) -> None:
    """A market that rests within a tick, and jumps by 50 bps after two minutes."""
    instrument, sigma_of = feed.Instrument(), {"now": "volatility", "average": "ema_volatility"}
    made: dict[str, dict[int, float]] = {}
    for name, attribute in sigma_of.items():
        def quote(p: Any, market: Any, q: float, attribute: str = attribute) -> opt.Distances:
            known = SimpleNamespace(volatility=getattr(market, attribute),
                                    liquidity=market.liquidity, depth_musd=market.depth_musd)
            return opt.quote_by_program(p, known, q)

        maker = marketmaker.MarketMaker(opt.Parameters(), instrument, strategy=quote)
        parser, rng, made[name] = feed.Parser(instrument), np.random.default_rng(1), {}
        for step in range(1850):
            tick = 650_000 + int(rng.integers(2)) + 3250 * (step >= 1200)
            sides = [[[f"{(tick - side * k - (side > 0)) / 10:.1f}", "2"] for k in range(60)]
                     for side in (1, -1)]  # fmt: skip
            data = dict(s="BTCUSDT", b=sides[0], a=sides[1], u=step + 1, seq=step)
            line = dict(topic="orderbook.200.BTCUSDT", type="snapshot", data=data)
            time_ms = 1_767_225_600_000 + 100 * step
            text = json.dumps(line | dict(ts=time_ms, cts=time_ms))
            maker.take(parser.parse(time_ms * feed.MS, text))
            made[name][step] = maker.decision.base_spread_bps / 2
    rows = [[f"{s:+d}", *(f"{of[1200 + 10 * s]:.2f}" for of in made.values())]
            for s in (-1, 0, 1, 2, 5, 10, 30, 59, 62)]  # fmt: skip
    show("5. A jump of 50 bps: half the base spread, bps, seconds after it, from\n"
         "the volatility of now and from its average", ["seconds", *made], rows)


def who_hit_me(pool: ProcessPoolExecutor) -> None:
    rows, kinds = [], {"our defaults": play(pool), "at the touch": play(pool, "fixed", **TOUCH)}
    for name, runs in kinds.items():
        total = values(runs, "fills").sum()
        for rule in marketmaker.RULES[:3]:
            count = sum(run["rules"][rule]["fills"] for run in runs)
            rows.append([name, rule, count, f"{count / total:.0%}", markout(runs, rule)])
    show("6. Who hit me: fills by the rule that made them",
         ["quote", "rule", "fills", "share", "markout 1 s"], rows)


def wait_in_the_queue(pool: ProcessPoolExecutor) -> None:
    rows, settings = [], [(m, {}, {"fill_model": m}) for m in opt.FILL_MODELS]
    settings += [("queue, 5 ms", {}, {"order_latency_ms": 5.0}),
                 ("queue, 500 ms", {}, {"order_latency_ms": 500.0}),
                 ("queue, a fifth of the rest", {"participation": 0.2}, {})]  # fmt: skip
    for name, exchange, given in settings:
        runs = play(pool, "fixed", exchange, **TOUCH, **given)
        rows.append([name, f"{values(runs, 'fills').mean():.0f}", markout(runs),
                     mean_text(values(runs, "gross_usdt")),
                     mean_text(values(runs, "net_usdt"))])  # fmt: skip
    show("7. The queue at the touch: what a fill model makes of the same quotes",
         ["fills by", "fills", "markout 1 s", "gross", "net"], rows)


def overfit(pool: ProcessPoolExecutor) -> None:
    grid = opt.expand_grid({"alpha": [0.25, 1.0, 4.0], "gamma": [0.0, 0.5, 2.0],
                            "zeta": [0.0, 1.0, 4.0]})  # fmt: skip
    work = [pool.submit(play_one, PATHS[0], "lp", {}, changes) for changes in grid]
    nets = [future.result()["gross_usdt"] for future in work]
    best = grid[int(np.argmax(nets))]
    gain = values(play(pool, **best), "gross_usdt") - values(play(pool), "gross_usdt")
    rows = [["on the path where it was chosen", f"{gain[0]:+.2f}"],
            ["on the seven others", mean_text(gain[1:])]]  # fmt: skip
    show(f"8. Overfitting: the best of {len(grid)} by gross on path 1 ({opt.in_words(best)}),\n"
         "against the defaults", ["", "gross, more than the defaults"], rows)


def with_fee(quote: Callable, p: opt.Parameters, market: Any, q: float) -> opt.Distances:
    """A strategy's distances, and the maker fee on top: what a fill brings is less by as much."""
    bid_bps, ask_bps, *_ = quote(p, market, q)
    return opt.Distances(bid_bps + p.maker_fee_bps, ask_bps + p.maker_fee_bps)


def compare_strategies(pool: ProcessPoolExecutor) -> None:
    # The rate of fills, a side and second, at fixed distances: ln rate = ln A - k d, path by path.
    distances = np.array([0.5, 1.0, 1.5, 2.0, 3.0])
    fixed = [play(pool, "fixed", default_spread_bps=2 * d, min_half_spread_bps=0.01)
             for d in distances]  # fmt: skip
    rates = np.array([values(runs, "orders_filled") for runs in fixed]) / (2 * HOURS * 3600)
    slopes, levels = np.polyfit(distances, np.log(np.maximum(rates, 1e-5)), 1)
    rows = [[f"{d:g}", f"{1e3 * r.mean():.2f}", f"{1e3 * np.exp(levels + slopes * d).mean():.2f}"]
            for d, r in zip(distances, rates)]  # fmt: skip
    show("9. Strategies. First the fit for Avellaneda-Stoikov: fills at fixed distances\n"
         f"A = {np.exp(levels).mean():.3f} a second, k = {-slopes.mean():.2f} per bp (means)",
         ["distance, bps", "fills in 1000 s", "A exp(-k d)"], rows)  # fmt: skip

    lp = play(pool)
    width = values(lp, "quoted_spread_bps")
    fitted = [partial(opt.quote_avellaneda_stoikov, A=float(np.exp(level)), k=float(-slope))
              for level, slope in zip(levels, slopes)]  # fmt: skip
    others = {
        "lp": lp,
        "fixed, as wide": play(pool, "fixed", default_spread_bps=width.tolist()),
        "as, fitted": play(pool, fitted),
        "as, fitted, and the fee": play(pool, [partial(with_fee, quote) for quote in fitted]),
    }
    rows = []
    for name, runs in others.items():
        rows.append([name, f"{values(runs, 'quoted_spread_bps').mean():.2f}",
                     f"{values(runs, 'fills').mean():.0f}",
                     f"{values(runs, 'inventory_std').mean():.4f}",
                     mean_text(values(runs, "gross_usdt")), mean_text(values(runs, "net_usdt")),
                     mean_text(values(lp, "net_usdt") - values(runs, "net_usdt"))])  # fmt: skip
    show("and what each earns on the same paths",
         ["strategy", "spread", "fills", "sd of inventory", "gross", "net", "lp's net - its"], rows)


EXPERIMENTS = [control_inventory, pay_the_fee, choose_a_width, grow_stale, jump, who_hit_me,
               wait_in_the_queue, overfit, compare_strategies]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(description="Experiments on SYNTHETIC paths.")
    parser.add_argument("numbers", type=int, nargs="*", help="which of 1 to 9 (default: all)")
    numbers = parser.parse_args(arguments).numbers or range(1, 10)
    if not set(numbers) <= set(range(1, 10)):
        parser.error(f"{[*numbers]}: there are the experiments 1 to 9: name some of them")
    with ProcessPoolExecutor() as pool:
        make_paths(pool)
        print(f"SYNTHETIC data: {len(PATHS)} paths of {HOURS} h; mean ± standard error over them")
        for number in numbers:
            progress(f"experiment {number}")
            EXPERIMENTS[number - 1](pool)
    return 0


if __name__ == "__main__":
    sys.exit(main())
