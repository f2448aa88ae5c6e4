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
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
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
Runs = list[dict[str, Any]]  # the metrics of a setting, path by path
Column = Callable[[Runs], str]  # of a table


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
        print(f"  {k} of {len(commands)} paths simulated", file=sys.stderr, flush=True)


def play_one(path: Path, strategy: str | Callable, exchange: dict, given: dict) -> dict[str, Any]:
    """What a worker does: the metrics of one run."""
    stamps, steps = (backtest.stamp_file(path),), (None, None, None)
    setting = backtest.Setting(stamps, steps, given, strategy, exchange)
    return backtest.measure(backtest.play(setting))


def play(pool: ProcessPoolExecutor, strategy: str | Callable | Sequence = "lp",
         exchange: dict | None = None, **given: Any) -> Runs:  # fmt: skip
    """One setting on every path; strategy and parameters may be one for each path."""
    waiting = []
    for k, path in enumerate(PATHS):
        of_path = [v[k] if isinstance(v, list) else v for v in (strategy, *given.values())]
        mine = dict(zip(given, of_path[1:]))
        waiting.append(pool.submit(play_one, path, of_path[0], exchange or {}, mine))
    return [future.result() for future in waiting]


def values(runs: Runs, name: str) -> np.ndarray:
    """One metric, path by path."""
    return np.array([run[name] for run in runs], float)


def with_error(x: np.ndarray) -> str:
    """Mean ± standard error over the paths."""
    return f"{x.mean():+.2f} ± {x.std(ddof=1) / math.sqrt(len(x)):.2f}"


def mean(name: str, form: str) -> Column:
    """A column: the plain mean over the paths."""
    return lambda runs: format(values(runs, name).mean(), form)


def error(name: str) -> Column:
    """A column: mean ± standard error."""
    return lambda runs: with_error(values(runs, name))


def per_turnover(name: str) -> Column:
    """A column: bps of the turnover."""
    return lambda runs: with_error(values(runs, name) / values(runs, "turnover_usdt") * 1e4)


def less(name: str, others: Runs) -> Column:
    """A column: what there is more of than in other runs on the same paths."""
    return lambda runs: with_error(values(runs, name) - values(others, name))


def markout(runs: Runs, rule: str = "") -> str:
    """A column: the markout after 1 s, over the paths that have fills."""
    cells = [run["rules"][rule]["markout"] if rule else run["markouts"]["both"]["1 s"]
             for run in runs]  # fmt: skip
    known = np.array([cell.mean for cell in cells if cell.n])
    return with_error(known) if len(known) > 1 else "-"


GROSS, NET = error("gross_usdt"), error("net_usdt")
FILLS, WIDTH = mean("fills", ",.0f"), mean("quoted_spread_bps", ".2f")


def show(title: str, head: str, rows: list[list[Any]]) -> None:
    """A table with its title."""
    print(f"\n{title}", *backtest.align([head.split(" | "), *rows]), sep="\n", flush=True)


def compare(title: str, what: str, runs: dict[Any, Runs], columns: dict[str, Column]) -> None:
    """A table of settings, a line each."""
    rows = [[name, *(column(of) for column in columns.values())] for name, of in runs.items()]
    show(title, " | ".join([what, *columns]), rows)


# ---- The experiments ---------------------------------------------------------------


def control_inventory(pool: ProcessPoolExecutor) -> None:
    runs = {alpha: play(pool, alpha=alpha) for alpha in (0.0, 0.25, 1.0, 4.0)}
    compare("1. Inventory control: what does the lean do?", "alpha", runs, {
        "sd of inventory": mean("inventory_std", ".4f"), "gross": GROSS,
        "sd over paths": lambda runs: f"{values(runs, 'gross_usdt').std(ddof=1):.2f}",
        "more than at 0": less("gross_usdt", runs[0.0]), "drawdown": error("max_drawdown_usdt"),
    })  # fmt: skip


def pay_the_fee(pool: ProcessPoolExecutor) -> None:
    runs = {half: play(pool, min_half_spread_bps=half) for half in (0.5, 1.0, 1.5, 2.0)}
    compare("2. The fee, 2 bps a fill: which edge earns it, and at which fee does each break even?",
            "min_half_spread", runs, {
        "fills": FILLS, "gross": GROSS, "fees": error("fees_usdt"), "net": NET,
        "break-even fee, bps": per_turnover("gross_usdt"),
    })  # fmt: skip


def choose_a_width(pool: ProcessPoolExecutor) -> None:
    runs = {gamma: play(pool, gamma=gamma) for gamma in (0.0, 0.25, 0.5, 1.0, 2.0)}
    compare("3. Width: what does a spread that follows volatility buy?", "gamma", runs, {
        "quoted spread": WIDTH, "fills": FILLS, "markout 1 s": markout, "gross": GROSS, "net": NET,
    })  # fmt: skip


def grow_stale(pool: ProcessPoolExecutor) -> None:
    runs = {move: play(pool, requote_move_bps=move) for move in (0.25, 0.5, 1.0, 2.0, 5.0)}
    compare("4. Staleness: a quote that waits for a larger move of the mid", "requote_move", runs, {
        "orders": mean("orders_sent", ",.0f"), "fills": FILLS, "quoted spread": WIDTH,
        "captured, bps": per_turnover("spread_captured_usdt"), "gross": GROSS,
    })  # fmt: skip


def follow_jump(seconds: range) -> np.ndarray:
    """Half the base spread around a jump of 50 bps at second 0: (seconds, 2), bps, by the
    volatility of now and by its average.
    """
    market, halves, p = marketmaker.Market(), [], opt.Parameters()
    for second in seconds:
        mid_price = 65_000 * (1 + 50e-4 * (second >= 0)) + 2 * (second % 2)
        market.measure_second(second * feed.NS, mid_price, 0.3, 0.1, p.half_life_s)
        sigmas = market.volatility, market.ema_volatility
        halves.append([opt.base_spread_function(p, sigma, market.liquidity, 1.0).total_bps / 2
                       for sigma in sigmas])  # fmt: skip
    return np.array(halves)


def jump(pool: ProcessPoolExecutor) -> None:
    halves = follow_jump(range(-90, 70))
    rows = [[f"{k:+d}", *(f"{half:.2f}" for half in halves[90 + k])]
            for k in (-1, 0, 1, 2, 5, 10, 30, 59, 60)]  # fmt: skip
    show("5. A jump of 50 bps: half the base spread, bps, seconds after it, from",
         "seconds | the volatility of now | its average", rows)


def at_the_touch(p: opt.Parameters, market: Any, q: float) -> opt.Distances:
    """A strategy that quotes the best bid and the best ask."""
    return opt.Distances(1e-6, 1e-6)


def who_hit_me(pool: ProcessPoolExecutor) -> None:
    rows, kinds = [], {"our defaults": play(pool), "at the touch": play(pool, at_the_touch)}
    for name, runs in kinds.items():
        for rule in marketmaker.RULES[:3]:
            count = sum(run["rules"][rule]["fills"] for run in runs)
            share = count / values(runs, "fills").sum()
            rows.append([name, rule, f"{count:,}", f"{share:.0%}", markout(runs, rule)])
    show("6. Who hit me: fills by the rule that made them",
         "quote | rule | fills | share | markout 1 s", rows)


def wait_in_the_queue(pool: ProcessPoolExecutor) -> None:
    runs = {model: play(pool, at_the_touch, fill_model=model) for model in opt.FILL_MODELS}
    for ms in (5.0, 500.0):
        runs[f"queue, {ms:g} ms"] = play(pool, at_the_touch, order_latency_ms=ms)
    runs["queue, a fifth of the rest"] = play(pool, at_the_touch, {"participation": 0.2})
    for qty in (0.01, 0.05):
        runs[f"impact 20, orders of {qty:g}"] = play(
            pool, at_the_touch, {"impact_bps": 20.0}, order_qty=qty
        )
    compare("7. The queue at the touch: what fill model, latency, share and impact make of it",
            "fills by", runs, {
        "fills": FILLS, "markout 1 s": markout, "gross": GROSS, "net": NET,
        "gross, bps": per_turnover("gross_usdt"),
    })  # fmt: skip


def overfit(pool: ProcessPoolExecutor) -> None:
    grid = opt.expand_grid({"alpha": [0.25, 1.0, 4.0], "gamma": [0.0, 0.5, 2.0],
                            "zeta": [0.0, 1.0, 4.0]})  # fmt: skip
    work = [pool.submit(play_one, PATHS[0], "lp", {}, changes) for changes in grid]
    nets = [future.result()["gross_usdt"] for future in work]
    best = grid[int(np.argmax(nets))]
    gain = values(play(pool, **best), "gross_usdt") - values(play(pool), "gross_usdt")
    rows = [["on the path where it was chosen", f"{gain[0]:+.2f}"],
            ["on the seven others", with_error(gain[1:])]]  # fmt: skip
    show(f"8. Overfitting: the best of {len(grid)} by gross on path 1 ({opt.in_words(best)}),\n"
         "against the defaults", " | gross, more than the defaults", rows)


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
         "distance, bps | fills in 1000 s | A exp(-k d)", rows)

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
    compare("and what each earns on the same paths", "strategy", others, {
        "spread": WIDTH, "fills": FILLS, "sd of inventory": mean("inventory_std", ".4f"),
        "gross": GROSS, "net": NET, "net, more than lp": less("net_usdt", lp),
    })  # fmt: skip


EXPERIMENTS = (
    control_inventory, pay_the_fee, choose_a_width, grow_stale, jump, who_hit_me,
    wait_in_the_queue, overfit, compare_strategies,
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(description="Experiments on SYNTHETIC paths.")
    parser.add_argument("numbers", type=int, nargs="*", help="which of 1 to 9 (default: all)")
    numbers = parser.parse_args(arguments).numbers or range(1, 10)
    if not set(numbers) <= set(range(1, 10)):
        parser.error("there are the experiments 1 to 9: name some of them")
    with ProcessPoolExecutor() as pool:
        make_paths(pool)
        print(f"SYNTHETIC data: {len(PATHS)} paths of {HOURS} h; mean ± standard error over them")
        for number in numbers:
            print(f"  experiment {number}", file=sys.stderr, flush=True)
            EXPERIMENTS[number - 1](pool)
    return 0


if __name__ == "__main__":
    sys.exit(main())
