"""Nine experiments on simulated markets: the tables of the README.

    python data/experiments.py [1 2 ... 9]      (all: some four minutes on 2 cores)

The problem. One path of the market proves nothing. Here every question is asked on the same
eight paths of two hours (simulate.py, seeds 1 to 8, kept in data/paths); the answer is a mean
over the paths ± its standard error, of differences path by path where two settings are compared.
All data are SYNTHETIC: they show what the program does at its defaults, not what it earns. Money
is in USDT over two hours of a path, inventory in BTC, spreads and markouts in bps.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import avellaneda_stoikov  # noqa: E402
import backtest  # noqa: E402
import marketmaker  # noqa: E402
import optimize as opt  # noqa: E402
import simulate  # noqa: E402
from compare import quote_at_touch  # noqa: E402
from feed import Arguments, exit_cleanly  # noqa: E402

import numpy as np  # noqa: E402

SEEDS, HOURS = range(1, 9), 2
SIMULATOR = hashlib.sha256(Path(simulate.__file__).read_bytes()).hexdigest()[:12]  # its text's
PATHS = [ROOT / "data" / "paths" / f"{SIMULATOR}-{HOURS}h-{seed}.jsonl.gz" for seed in SEEDS]
Runs = dict[str, np.ndarray]  # the metrics of a setting: (paths,) each
Column = Callable[[Runs, Runs], str]  # of a table: its cell, from a line's runs and the first's


# ---- Paths and runs ----------------------------------------------------------------
def make_paths(pool: Executor) -> None:
    """Simulate what is missing."""
    PATHS[0].parent.mkdir(exist_ok=True)
    missing = [seed for seed, path in zip(SEEDS, PATHS) if not path.exists()]
    for k, _ in enumerate(pool.map(make_path, missing), 1):
        print(f"  {k} of {len(missing)} paths simulated", file=sys.stderr, flush=True)


def make_path(seed: int) -> None:
    """What a worker does: the market of one seed."""
    simulate.record(PATHS[seed - 1], simulate.simulate(np.random.default_rng(seed), HOURS))


def play_one(path: Path, strategy: str | Callable, exchange: dict, given: dict) -> dict[str, Any]:
    """Likewise: the metrics of one run."""
    stamps = (backtest.stamp_file(path),)
    setting = backtest.Setting(stamps, (), given, strategy, exchange)
    return backtest.measure(backtest.play(setting))


def play(pool: Executor, strategy: str | Callable | Sequence = "lp",
         exchange: dict | None = None, **given: Any) -> Runs:  # fmt: skip
    """One setting on every path; strategy and parameters may be one for each path."""
    waiting = []
    for k, path in enumerate(PATHS):
        of_path = [v[k] if isinstance(v, list) else v for v in (strategy, *given.values())]
        mine = dict(zip(given, of_path[1:]))
        waiting.append(pool.submit(play_one, path, of_path[0], exchange or {}, mine))
    runs = [future.result() for future in waiting]
    return {name: np.array([run[name] for run in runs]) for name in runs[0]}


def with_error(x: np.ndarray) -> str:
    """Mean ± standard error over paths."""
    return f"{x.mean():+.2f} ± {x.std(ddof=1) / np.sqrt(len(x)):.2f}"


def mean(name: str, form: str) -> Column:
    """A column: the plain mean over the paths."""
    return lambda runs, _: format(runs[name].mean(), form)


def error(name: str, more: bool = False) -> Column:
    """A column: mean ± standard error, or that of what there is more of than in the first line."""
    return lambda runs, first: with_error(runs[name] - (first[name] if more else 0))


def markout(runs: Runs, _: Runs, rule: str = "") -> str:
    """A column: the markout after 1 s, over the paths that have fills (of a rule)."""
    of_rule = [rules[rule]["markout"] for rules in runs["rules"] if rule]
    cells = of_rule or [markouts["both"]["1 s"] for markouts in runs["markouts"]]
    known = np.array([cell.mean for cell in cells if cell.n])
    return with_error(known) if len(known) > 1 else "-"


GROSS, NET = error("gross_usdt"), error("net_usdt")
FILLS, WIDTH = mean("fills", ",.0f"), mean("quoted_spread_bps", ".2f")


def show(title: str, head: str, rows: list[list[Any]]) -> None:
    """A table with its title."""
    print(f"\n{title}", *backtest.align([head.split(" | "), *rows]), sep="\n", flush=True)


def compare(title: str, what: str, runs: dict[Any, Runs], columns: dict[str, Column]) -> None:
    """A table of settings, a line each."""
    first = next(iter(runs.values()))
    rows = [[name, *(cell(of, first) for cell in columns.values())] for name, of in runs.items()]
    show(title, " | ".join([what, *columns]), rows)


# ---- The experiments ---------------------------------------------------------------
def sweep(number: int, pool: Executor) -> None:
    """An experiment that varies one parameter."""
    title, name, tried, columns = SWEEPS[number]
    runs = {value: play(pool, **{name: value}) for value in tried}
    compare(f"{number}. {title}", name.removesuffix("_bps"), runs, columns)


SWEEPS = {  # title, parameter, what is tried, columns
    1: ("Inventory control: what does the lean do?", "alpha", (0.0, 0.25, 1.0, 4.0), {
        "sd of inventory": mean("inventory_std", ".4f"), "gross": GROSS,
        "sd over paths": lambda runs, _: f"{runs['gross_usdt'].std(ddof=1):.2f}",
        "more than at 0": error("gross_usdt", more=True), "drawdown": error("max_drawdown_usdt")}),
    2: ("The fee, 2 bps a fill: which edge earns it, and at which fee does each break even?",
        "min_half_spread_bps", (0.5, 1.0, 1.5, 2.0), {
        "fills": FILLS, "gross": GROSS, "fees": error("fees_usdt"), "net": NET,
        "break-even fee, bps": error("gross_bps")}),
    3: ("Width: what does a spread that follows volatility buy?",
        "gamma", (0.0, 0.25, 0.5, 1.0, 2.0), {"quoted spread": WIDTH,
        "fills": FILLS, "markout 1 s": markout, "gross": GROSS, "net": NET}),
    4: ("Staleness: a quote that waits for a larger move of the mid",
        "requote_move_bps", (0.25, 0.5, 1.0, 2.0, 5.0), {
        "orders": mean("orders_sent", ",.0f"), "fills": FILLS, "quoted spread": WIDTH,
        "captured, bps": error("spread_captured_bps"), "gross": GROSS}),
}  # fmt: skip


def follow_jump(seconds: range) -> np.ndarray:
    """Half the base spread, bps, around a jump at second 0, by both volatilities: (seconds, 2)."""
    market, halves, p = marketmaker.Market(), [], opt.Parameters()
    for second in seconds:
        mid_price = 65_000 * (1 + 50e-4 * (second >= 0)) + 2 * (second % 2)
        market.measure_second(second * 1_000_000_000, mid_price, 0.3, 0.1, p.half_life_s)
        halves.append([opt.base_spread_function(p, sigma, market.liquidity, 1.0).total_bps / 2
                       for sigma in (market.volatility, market.ema_volatility)])  # fmt: skip
    return np.array(halves)


def jump(pool: Executor) -> None:
    halves = follow_jump(range(-90, 70))
    rows = [[f"{k:+d}", *(f"{half:.2f}" for half in halves[90 + k])]
            for k in (-1, 0, 1, 2, 5, 10, 30, 59, 60)]  # fmt: skip
    show("5. A jump of 50 bps: half the base spread, bps, seconds after it, from",
         "seconds | the volatility of now | its average", rows)


def who_hit_me(pool: Executor) -> None:
    rows, kinds = [], {"our defaults": play(pool), "at the touch": play(pool, quote_at_touch)}
    for name, runs in kinds.items():
        for rule in marketmaker.RULES[:3]:
            count = sum(rules[rule]["fills"] for rules in runs["rules"])
            share = f"{count / runs['fills'].sum():.0%}"
            rows.append([name, rule, f"{count:,}", share, markout(runs, runs, rule)])
    show("6. Who hit me: fills by the rule that made them",
         "quote | rule | fills | share | markout 1 s", rows)


def wait_in_the_queue(pool: Executor) -> None:
    quote = partial(play, pool, quote_at_touch)
    runs = {model: quote(fill_model=model) for model in opt.FILL_MODELS}
    for ms in (5.0, 500.0):
        runs[f"queue, {ms:g} ms"] = quote(order_latency_ms=ms)
    runs["queue, a fifth of the rest"] = quote({"participation": 0.2})
    for qty in (0.01, 0.05):
        runs[f"impact 20, orders of {qty:g}"] = quote({"impact_bps": 20.0}, order_qty=qty)
    compare("7. The queue at the touch: what fill model, latency, share and impact make of it",
            "fills by", runs, {"fills": FILLS, "markout 1 s": markout, "gross": GROSS,
                               "net": NET, "gross, bps": error("gross_bps")})  # fmt: skip


def overfit(pool: Executor) -> None:
    grid = opt.expand_grid({"alpha": [0.25, 1, 4], "gamma": [0, 0.5, 2], "zeta": [0, 1, 4]})
    tried = pool.map(partial(play_one, PATHS[0], "lp", {}), grid)
    best = grid[int(np.argmax([run["gross_usdt"] for run in tried]))]
    gain = play(pool, **best)["gross_usdt"] - play(pool)["gross_usdt"]
    rows = [["on the path where it was chosen", f"{gain[0]:+.2f}"],
            ["on the seven others", with_error(gain[1:])]]  # fmt: skip
    show(f"8. Overfitting: the best of {len(grid)} by gross on path 1 ({opt.in_words(best)}),\n"
         "against the defaults", " | gross, more than the defaults", rows)


def with_fee(quote: Callable, p: opt.Parameters, market: Any, q: float) -> list[float]:
    """A strategy's distances, and the maker fee on top: what a fill brings is less by as much."""
    return [bps + p.maker_fee_bps for bps in quote(p, market, q)]


def compare_strategies(pool: Executor) -> None:
    # The rate of fills, a side and second, at fixed distances: ln rate = ln A - k d, path by path.
    distances = np.array([0.5, 1.0, 1.5, 2.0, 3.0])
    fixed = [play(pool, "fixed", default_spread_bps=2 * d, min_half_spread_bps=0.01)
             for d in distances]  # fmt: skip
    rates = np.array([runs["orders_filled"] for runs in fixed]) / (2 * HOURS * 3600)
    slopes, levels = np.polyfit(distances, np.log(np.maximum(rates, 1e-5)), 1)
    rows = [[f"{d:g}", f"{1e3 * r.mean():.2f}", f"{1e3 * np.exp(levels + slopes * d).mean():.2f}"]
            for d, r in zip(distances, rates)]  # fmt: skip
    show("9. Strategies. First the fit for Avellaneda-Stoikov: fills at fixed distances\n"
         f"A = {np.exp(levels).mean():.3f} a second, k = {-slopes.mean():.2f} per bp (means)",
         "distance, bps | fills in 1000 s | A exp(-k d)", rows)

    lp = play(pool)
    fitted = [partial(avellaneda_stoikov.quote, A=float(np.exp(level)), k=float(-slope))
              for level, slope in zip(levels, slopes)]  # fmt: skip
    others = {
        "lp": lp,
        "fixed, as wide": play(pool, "fixed", default_spread_bps=lp["quoted_spread_bps"].tolist()),
        "as, fitted": play(pool, fitted),
        "as, fitted, and the fee": play(pool, [partial(with_fee, quote) for quote in fitted]),
    }
    compare("and what each earns on the same paths", "strategy", others, {
        "spread": WIDTH, "fills": FILLS, "sd of inventory": mean("inventory_std", ".4f"),
        "gross": GROSS, "net": NET, "net, more than lp": error("net_usdt", more=True),
    })  # fmt: skip


EXPERIMENTS = [*(partial(sweep, number) for number in SWEEPS), jump, who_hit_me,
               wait_in_the_queue, overfit, compare_strategies]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = Arguments(prog="experiments.py", description="Experiments on SYNTHETIC paths.")
    parser.add_argument("numbers", type=int, nargs="*", help="which of 1 to 9 (default: all)")
    numbers = parser.parse_args(arguments).numbers or range(1, 10)
    if set(numbers) - set(range(1, 10)):
        parser.error("there are the experiments 1 to 9: name some of them")

    def run() -> None:
        with backtest.start_workers(os.cpu_count() or 1) as pool:
            make_paths(pool)
            print(f"SYNTHETIC data: {len(PATHS)} paths of {HOURS} h; mean ± its standard error")
            for number in numbers:
                print(f"  experiment {number}", file=sys.stderr, flush=True)
                EXPERIMENTS[number - 1](pool)

    return exit_cleanly(run)


if __name__ == "__main__":
    sys.exit(main())
