"""What a quote should cost, by a linear program; the search for parameters, and its price.

A market maker bids below the mid price and offers above it. Far from the mid it is rarely hit;
close by it is hit by those who know more. Holding inventory is a risk, so it leans: long, it bids
further away and offers nearer. How wide to quote is read from the market (base spread S); where to
put bid and ask, at least S apart and neither nearer than its edge, a linear program decides.

Symbols (the README repeats this table, nothing else does):

  symbol    code                 meaning                                      unit
  q         q                    inventory / max_inventory, -1 to 1           -
  sigma     volatility           of the mid, over the last minute      bps/sqrt(s)
  tau       horizon_s            how long inventory is expected to be held    s
  L         liquidity            turnover per bp of mid movement        M USDT/bp
  D         depth_musd           mean of bid and ask depth near the mid    M USDT
  L0, D0    liquidity/depth_scale_musd   usual values of L and D       (as L, D)
  S         base_spread          base spread, bid to ask                      bps
  d_b, d_a  bid/ask_distance     distance of the quote from the mid           S
  s         d_b - d_a            lean: positive = would rather sell           S
  d_min     d_min                edge: min_half_spread_bps / S                S
  r, p_b, p_a                    stand for the three squares of the cost      -
  h         STEP                 step of the piecewise-linear squares         S
  alpha, beta                    weight of inventory risk, of price risk      -
  gamma, delta, zeta             spread per volatility, if illiquid, if thin  -, bps

Base spread, from sigma; its EMA, which is late after a jump, only says how often to decide:
  S = max(min_half_spread_bps, 2 gamma sigma sqrt(tau) + delta/(1 + L/L0) + zeta/(1 + D/D0))
Its floor only keeps d_min at 1 or less; the width is more than S where the edges say so. S knows no
fee: a round trip costs twice the maker fee, and --min-half-spread-bps is where to ask for it.

Cost of a quote:
  C(d_b, d_a; q) = alpha (q - s)^2  +  beta (d_b^2 + d_a^2)
                   inventory risk      price risk
alpha leans the quote towards s = q and no further; beta resists, as a lean takes one quote away
from the mid. Only alpha/beta matters, and nothing at q = 0. Unless an edge binds, the width is S
and s = alpha q / (alpha + beta/2), with which the program agrees within h. Why then a program?
It was asked for; and it gives multipliers, and takes any further rule as a row.

The linear program. Each square is replaced by its chords: x^2 between neighbouring grid points u
and v becomes (u + v) x - u v. The largest chord is exact at the grid points, nowhere below the
square, and convex, so "r is at least every chord" is a set of rows. In the standard form of
scipy.optimize.linprog, x = (d_b, d_a, r, p_b, p_a):

  minimise    c x           c = (0, 0, alpha, beta, beta)
  subject to  A_ub x <= b_ub, rows in this order:
    spread     1 row        -d_b - d_a                <= -1
    inventory  92 rows      -k d_b + k d_a - r        <= u v - k q      k = u + v
    bid risk   64 rows      k d_b - p_b               <= u v
    ask risk   64 rows      k d_a - p_a               <= u v
  bounds      d_min <= d_b, d_a <= 2,   r, p_b, p_a >= 0

The inventory chords cover -1 <= q - s <= 1, enough since 0 <= s <= q at the minimum for every
q >= 0; those of the distances cover 0 to 2. Their steps are h/sqrt(2) and h: in a rational ratio
slopes of both could cancel over a stretch of quotes that cost the same. So the best quote is just
one, held by five rows or more: the spread's or an edge, one of each square, and a second of one
(of the inventory in solve_quote's example). S is factored out: one program for all spreads.

The best of a search looks good even where none is, hence the statistics at the end. They read x,
the net of n periods (rows) in N configurations (columns); SR is the Sharpe ratio of a period.
No paper was found that quotes by a linear program; the lean is Ho and Stoll's (1981).
"""

import argparse
import csv
import difflib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, wait
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

try:
    import numpy as np
    from numpy.random import Generator
    from scipy.optimize import linprog
    from scipy.special import ndtr, ndtri
except ImportError as error:
    sys.exit(f"error: {error}: pip install -r requirements.txt")

STEP = 1 / 32  # h: grid step of the squares; 1/16 misses the quadratic cost by 0.5 %
D_MAX = 2.0  # farthest quote, in units of S
Q_STEP = 1 / 200  # q is rounded to this before solving, so that answers are reused
D_MIN_STEP = 1 / 64  # d_min is rounded up to this, which moves an edge by up to S/64
FEASIBILITY = 1e-7  # by how much an answer may miss a row
MIN_INTERVAL_S, MAX_INTERVAL_S = 0.1, 5.0  # between two optimizations
FILL_MODELS = ("queue", "touch", "through")
INF = math.inf
PARTS, PARTS_95 = 10, 2.262  # of the periods, for a Sharpe ratio's error; their Student's t, 95 %
Number = float | np.ndarray
Program = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
Grid = Mapping[str, Sequence[Any]]  # the values to try, by name


# ---- Parameters --------------------------------------------------------------------


def _number(default: Any, low: Any, high: Any, help: str, fixed: bool = False, **more: Any) -> Any:
    """A parameter with its limits; where there is no upper one (INF), it must be above 0."""
    return field(default=default, metadata=dict(low=low, high=high, help=help, fixed=fixed, **more))


_fixed = partial(_number, fixed=True)  # it cannot change while the program runs


@dataclass(frozen=True)
class Parameters:
    """Everything that can be turned, with unit and range. Flags are named alike: --order-qty."""

    alpha: float = _number(1.0, 0, 10, "weight of inventory risk: leans up to q")
    beta: float = _number(1.0, 0.1, 10, "weight of price risk: resists the lean")
    gamma: float = _number(0.5, 0, 5, "base spread per unit of volatility")
    delta: float = _number(1.0, 0, 20, "base spread of an illiquid market, bps")
    zeta: float = _number(1.0, 0, 20, "base spread of a thin book, bps")
    liquidity_scale_musd: float = _number(1.0, 0, INF, "L0: usual liquidity, M USDT/bp")
    depth_scale_musd: float = _number(1.0, 0, INF, "D0: usual depth a side, M USDT")
    min_half_spread_bps: float = _number(0.5, 0.01, 100, "edge: never nearer, bps")
    default_spread_bps: float = _number(10.0, 0.02, 500, "spread of the fallback, bps")
    horizon_s: float = _number(10.0, 0.1, 3600, "how long inventory is held, s")
    half_life_s: float = _number(30.0, 1, 3600, "memory of the volatility's EMA, s")
    requote_move_bps: float = _number(1.0, 0.05, 50, "move that calls a new quote, bps")
    depth_band_bps: float = _number(1.0, 0.1, 100, "depth is counted this near, bps")
    order_qty: float = _number(0.01, 0, INF, "size of each quote, base coin")
    max_inventory: float = _fixed(0.1, 0, INF, "inventory limit, base coin")
    max_depth_share: float = _number(0.05, 0, 1, "largest quote, share of the depth")
    maker_fee_bps: float = _fixed(2.0, -5, 100, "maker fee, + we pay, bps")
    taker_fee_bps: float = _fixed(5.5, -5, 100, "taker fee, + we pay, bps")
    order_latency_ms: float = _fixed(100.0, 0, 60_000, "decision to exchange, ms")
    feed_latency_ms: float = _fixed(100.0, 0, 60_000, "exchange to us, of archives alone, ms")
    clock_offset_ms: float = _fixed(0.0, -864e5, 864e5, "our clock minus the exchange's, ms")
    stale_after_s: float = _number(5.0, 0.5, 60, "book silence that pulls the quote, s")
    fallback_max_age_s: float = _number(5.0, 0, 60, "last good quote serves so long, s")
    max_mark_gap_bps: float = _number(50.0, 1, 1000, "mid to mark that pulls, bps")
    max_drawdown_usdt: float | None = _number(None, 0, INF, "loss from the peak that stops, USDT")
    fill_model: str = _fixed("queue", None, None, "how paper orders fill", choices=FILL_MODELS)


FIELDS = {parameter.name: parameter for parameter in fields(Parameters)}


def _fault(name: str, value: Any) -> str:
    """The rule that a value by itself breaks, and the remedy; empty if it breaks none."""
    rule = FIELDS[name].metadata
    choices, low, high = rule.get("choices", ()), rule["low"], rule["high"]
    if value is FIELDS[name].default or value in choices:
        return ""
    if choices:
        return f"is none of {', '.join(choices)}: set"
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e308:
        return "is not a finite number: set"
    if high == INF and value <= 0:
        return "must be above 0: raise"
    if not low <= value <= high:
        return f"must lie in {low:.12g} to {high:.12g}: {'raise' if value < low else 'lower'}"
    return ""


def change_parameters(parameters: Parameters, changes: Mapping[str, Any], lot_size: float = 0.0,
                      running: bool = False) -> Parameters:  # fmt: skip
    """Parameters with some values changed; lot_size in base coin. ValueError that names each wrong
    value, rule and remedy, and for a fixed one if running.
    """
    for name, value in changes.items():
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1)
            hint = f"did you mean {near[0]}?" if near else "see --help for the names"
            raise ValueError(f"{name} is not a parameter: {hint}")
        if running and FIELDS[name].metadata["fixed"] and value != getattr(parameters, name):
            raise ValueError(f"{name} cannot change while running: restart with the new value")
    p = replace(parameters, **changes)
    faults = {name: fault for name, value in vars(p).items() if (fault := _fault(name, value))}
    if not faults:  # each is sound by itself; do they fit each other, and the lot?
        half = p.min_half_spread_bps
        for name, least, what in (
            ("default_spread_bps", 2 * half, f"twice min_half_spread_bps = {half:g}"),
            ("max_inventory", p.order_qty, f"order_qty = {p.order_qty:g}"),
            ("order_qty", lot_size * (1 - 1e-9), f"the least order, {lot_size:g}"),
        ):
            if getattr(p, name) < least:
                faults[name] = f"must be at least {what}: raise"
    if faults:
        words = (f"{name} = {getattr(p, name)!r} {fault} --{name.replace('_', '-')}"
                 for name, fault in faults.items())  # fmt: skip
        raise ValueError("; ".join(words))
    return p


def in_words(changes: Mapping[str, Any]) -> str:
    """As in "alpha 4, gamma 0.5"; off for what is not set."""
    words = {n: f"{v:g}" if isinstance(v, float | int) else v or "off" for n, v in changes.items()}
    return ", ".join(f"{name} {words[name]}" for name in FIELDS if name in words)


def differing(parameters: Parameters) -> dict[str, Any]:
    """The parameters that are not at their default."""
    return {n: v for n, v in asdict(parameters).items() if v != FIELDS[n].default}


# ---- Base spread and cost ----------------------------------------------------------


class BaseSpread(NamedTuple):
    """Why the base spread is what it is, in bps: the terms, and the floor under them."""

    volatility_bps: float
    liquidity_bps: float
    depth_bps: float
    floor_bps: float

    @property
    def total_bps(self) -> float:  # S
        return max(self.floor_bps, self.volatility_bps + self.liquidity_bps + self.depth_bps)


def base_spread_function(p: Parameters, volatility: float, liquidity: float,
                         depth_musd: float) -> BaseSpread:  # fmt: skip
    """The terms of S: a nervous, illiquid or thin market is quoted wider.

    >>> base_spread_function(Parameters(horizon_s=4), 0.5, liquidity=1, depth_musd=3)
    BaseSpread(volatility_bps=1.0, liquidity_bps=0.5, depth_bps=0.25, floor_bps=0.5)
    """
    return BaseSpread(
        volatility_bps=2 * p.gamma * volatility * math.sqrt(p.horizon_s),
        liquidity_bps=p.delta / (1 + liquidity / p.liquidity_scale_musd),
        depth_bps=p.zeta / (1 + depth_musd / p.depth_scale_musd),
        floor_bps=p.min_half_spread_bps,
    )


def cost_function(d_b: Number, d_a: Number, q: Number, alpha: float, beta: float) -> Number:
    """The cost C of a quote, quadratic as at the top of this file; scalars or arrays."""
    return alpha * (q - (d_b - d_a)) ** 2 + beta * (d_b**2 + d_a**2)


# ---- The linear program ------------------------------------------------------------


class Solution(NamedTuple):
    """The answer in units of S, and its multipliers: slopes of C, at a kink one of several."""

    bid_distance: float
    ask_distance: float
    cost: float  # C, the program's own piecewise cost
    spread_price: float  # dC per unit more of required spread
    bid_edge_price: float  # of d_min, for the bid
    ask_edge_price: float  # for the ask
    inventory_price: float  # of q


def _chords(low: float, high: float, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Slopes k = u + v and offsets u v of the chords of x^2 that cover [low, high]."""
    grid = step * np.arange(math.floor(low / step), math.ceil(high / step) + 1)
    return grid[:-1] + grid[1:], grid[:-1] * grid[1:]


def build_program(q: float, alpha: float, beta: float, d_min: float) -> Program:
    """c (5,), A_ub (221, 5), b_ub (221,), bounds (5, 2) of the standard form that the module's
    docstring writes out, for q in [0, 1]; a negative q is the mirror image (solve_quote).
    """
    k_r, uv_r = _chords(-1, 1, STEP / math.sqrt(2))
    k_p, uv_p = _chords(0, D_MAX, STEP)
    A_ub = np.vstack((  # columns d_b, d_a, r, p_b, p_a
        [-1, -1, 0, 0, 0],  # spread
        np.outer(k_r, [-1, 1, 0, 0, 0]) + [0, 0, -1, 0, 0],  # inventory
        np.outer(k_p, [1, 0, 0, 0, 0]) + [0, 0, 0, -1, 0],  # bid risk
        np.outer(k_p, [0, 1, 0, 0, 0]) + [0, 0, 0, 0, -1],  # ask risk
    ))  # fmt: skip
    b_ub = np.concatenate(([-1], uv_r - k_r * q, uv_p, uv_p))
    bounds = np.array([[d_min, D_MAX]] * 2 + [[0, INF]] * 3)
    return np.array([0, 0, alpha, beta, beta]), A_ub, b_ub, bounds


def solve_program(program: Program, solver: Callable = linprog) -> Solution:
    """Solve one program; RuntimeError without a sound answer, and whatever the solver raises."""
    c, A_ub, b_ub, bounds = program
    result = solver(c, A_ub, b_ub, bounds=bounds)
    if result.status != 0:
        raise RuntimeError(f"solver status {result.status}: {result.message}")
    # Check the answer against every row and bound; nan is neither within nor beyond.
    x, (low, high) = result.x, bounds.T
    is_within = (low - FEASIBILITY <= x) & (x <= high + FEASIBILITY)
    if not (is_within.all() and (A_ub @ x <= b_ub + FEASIBILITY).all()):
        raise RuntimeError("the solver's answer breaks a constraint")
    # A multiplier says how the least cost changes with the limit of its row, dC/db_ub. The limits
    # of the inventory rows, those with an r, move with q: by -k, which is also the weight of d_b.
    row_prices = result.ineqlin.marginals  # never positive
    move_per_q = np.where(A_ub[:, 2] < 0, A_ub[:, 0], 0.0)
    return Solution(
        bid_distance=round(float(x[0]), 12),  # subtle: beyond lies the solver's noise,
        ask_distance=round(float(x[1]), 12),  # which would spoil the symmetry at q = 0
        cost=float(result.fun),
        spread_price=-float(row_prices[0]),
        bid_edge_price=float(result.lower.marginals[0]),
        ask_edge_price=float(result.lower.marginals[1]),
        inventory_price=float(row_prices @ move_per_q),
    )


@lru_cache(maxsize=2048)
def _remembered(steps: int, alpha: float, beta: float, d_min: float, solver: Callable) -> Solution:
    """The answer at q = steps x Q_STEP, not below 0. What raises is not remembered."""
    return solve_program(build_program(steps * Q_STEP, alpha, beta, d_min), solver)


def solve_quote(q: float, alpha: float, beta: float, d_min: float,
                solver: Callable = linprog) -> Solution:  # fmt: skip
    """The best quote at inventory q; its sides swap exactly with the sign of q. As q is rounded
    to 1/200 and d_min up to 1/64, a day needs a few hundred solves of about 2 ms.

    >>> bid, ask, *_ = solve_quote(q=0.25, alpha=1.0, beta=1.0, d_min=0.125)  # s = 1/6
    >>> round(bid, 3), round(ask, 3)
    (0.581, 0.419)
    """
    steps = round(q / Q_STEP)
    d_min = min(math.ceil(d_min / D_MIN_STEP - 1e-9) * D_MIN_STEP, 1.0)
    solution = _remembered(abs(steps), alpha, beta, d_min, solver)
    if steps < 0:
        bid, ask, cost, spread_price, bid_price, ask_price, inventory_price = solution
        return Solution(ask, bid, cost, spread_price, ask_price, bid_price, -inventory_price)
    # At 0 the cost has a kink: of its slopes take the middle, which favours no side.
    return solution if steps else solution._replace(inventory_price=0.0)


# ---- From market to distances, with fallback ---------------------------------------
#
# A strategy is a function (parameters, market, q) -> (bid_bps, ask_bps): how far from the mid to
# bid and to offer. market has what is measured, such as volatility, liquidity and depth_musd.


class Distances(NamedTuple):
    """How far from the mid to quote, in bps, and how that was found."""

    bid_bps: float
    ask_bps: float
    base_spread: BaseSpread | None = None
    solution: Solution | None = None
    reason: str = ""  # why they are not the strategy's own
    source: str = ""  # the strategy's name, last_good or default


def quote_by_program(parameters: Parameters, market: Any, q: float,
                     solver: Callable = linprog) -> Distances:  # fmt: skip
    """The strategy `lp`: the base spread, placed by the program. It raises where it cannot."""
    p, inputs = parameters, (market.volatility, market.liquidity, market.depth_musd)
    for name, value in zip(("volatility", "liquidity", "depth_musd"), inputs):
        if not 0 <= value < INF:
            raise ValueError(f"{name} is {value}")
    if not -1 <= q <= 1:
        raise ValueError(f"inventory is {q} of its limit")
    base_spread = base_spread_function(p, *inputs)
    S = base_spread.total_bps
    solution = solve_quote(q, p.alpha, p.beta, p.min_half_spread_bps / S, solver)
    return Distances(solution.bid_distance * S, solution.ask_distance * S, base_spread, solution)


def choose_distances(strategy: Callable, source: str, parameters: Parameters, market: Any, q: float,
                     last_good: Distances | None = None,
                     last_good_age_s: float = INF) -> Distances:  # fmt: skip
    """The strategy's distances; where they are no quote, down a ladder of fallbacks."""
    try:
        distances = answer = strategy(parameters, market, q)
        if not isinstance(answer, Distances):
            bid_bps, ask_bps = answer
            distances = Distances(float(bid_bps), float(ask_bps))
        if 0 < distances.bid_bps < 1e4 and 0 < distances.ask_bps < 1e4:  # a bid above 0
            return distances._replace(source=source)
        failure = f"{source} quotes {answer}"
    except (Exception, SystemExit) as error:  # subtle: it may be anybody's code, and do anything
        failure = f"{source} failed: {type(error).__name__}: {error}"
    # The last good answer, in bps, while it is young; then the default spread, shared evenly.
    if last_good is not None and last_good_age_s < parameters.fallback_max_age_s:
        return last_good._replace(source="last_good", reason=failure)
    return quote_fixed(parameters, market, q)._replace(source="default", reason=failure)


def get_optimization_frequency(parameters: Parameters, ema_volatility: float) -> float:
    """How often: the seconds to the next one, in which the price diffuses by requote_move_bps."""
    if not ema_volatility * MAX_INTERVAL_S**0.5 > parameters.requote_move_bps:
        return MAX_INTERVAL_S  # calm, flat, or nan: not measured yet
    return max(MIN_INTERVAL_S, (parameters.requote_move_bps / ema_volatility) ** 2)


def quote_fixed(parameters: Parameters, market: Any, q: float) -> Distances:
    """The strategy `fixed`, the simplest there is: default_spread_bps, shared evenly."""
    return Distances(parameters.default_spread_bps / 2, parameters.default_spread_bps / 2)


STRATEGIES = {"lp": quote_by_program, "fixed": quote_fixed}


# ---- Searching: a grid, then a finer one around its best point ---------------------


def expand_grid(grid: Grid) -> list[dict[str, Any]]:
    """Every combination of the values; those of the last name change fastest."""
    return [dict(zip(grid, values)) for values in product(*grid.values())]


def finer_grid(grid: Grid, best: Mapping[str, float], limits: Mapping[str, tuple]) -> Grid:
    """The best point of a grid and those half the way to its neighbours, rounded to 4 digits
    and kept within the limits (a limit of 0 may itself be refused): around 4, the last of 1, 2
    and 4, they are 3, 4 and 5. One value stays alone.
    """
    finer = {}
    for name in grid:
        values, centre = sorted(set(grid[name])), best[name]
        if len(values) > 1:
            # One point more at each end, as far away as the last, so that all have neighbours.
            longer = [2 * values[0] - values[1], *values, 2 * values[-1] - values[-2]]
            k = longer.index(centre)
            halves = [float(f"{(centre + longer[j]) / 2:.4g}") for j in (k - 1, k + 1)]
            values = sorted({centre, *np.clip(halves, *limits[name]).tolist()})
        finer[name] = values
    return finer


def run_trials(play: Callable[[Any], Any], configurations: Sequence[Any], executor: Executor,
               is_stopped: Callable = lambda: False) -> Iterator[tuple[int, Any]]:  # fmt: skip
    """(k, play(configurations[k])) as they come, by an executor's workers. It raises what play
    raises, and BrokenExecutor if one dies; once is_stopped, what has not begun is cancelled.
    """
    waiting = {executor.submit(play, changes): k for k, changes in enumerate(configurations)}
    try:
        while waiting and not is_stopped():
            finished, _ = wait(waiting, 0.2, FIRST_COMPLETED)  # s: then look at is_stopped
            for future in finished:
                yield waiting.pop(future), future.result()
    except BrokenExecutor:
        waiting.clear()  # subtle: a dying executor fails them itself, and trips over cancelled ones
        raise
    finally:
        for future in waiting:
            future.cancel()


# ---- Resampling: how sure is a result ----------------------------------------------


def sharpe_score(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Sharpe ratio of a period; 0 where nothing changes, be it a constant gain."""
    deviation = np.sqrt(np.maximum(variance, 0))
    is_flat = deviation <= 1e-6 * np.abs(mean) + 1e-12  # no more than rounding
    return np.where(is_flat, 0.0, mean / np.where(is_flat, 1.0, deviation))


def block_length(x: np.ndarray) -> float:
    """Mean block, in periods, for the stationary bootstrap of the mean of x: (n,); of columns,
    (n, N), the mean of theirs.

      b = (n g^2 / s^2)^(1/3), from 1 to ceil(min(3 sqrt(n), n/3))
      g = sum_k h(k/m) |k| R(k)       s = sum_k h(k/m) R(k)       |k| <= m

    R autocovariance, h(x) = min(1, 2 (1 - |x|)). m is twice the first lag after which K
    autocorrelations in succession are noise, within 2 sqrt(log10(n) / n); at most
    sqrt(n) + K. Politis and White (2004), corrected by Patton, Politis and White (2009).
    """
    if x.ndim > 1:
        return float(np.mean([block_length(column) for column in x.T]))
    n, K = len(x), 5  # K: the papers' max(5, sqrt(log10 n)), for any n below 1e25
    lags = min(math.ceil(math.sqrt(n)) + K, n - 1)
    deviations = x - x.mean()
    R = np.array([deviations[k:] @ deviations[: n - k] for k in range(lags + 1)]) / n
    if R[0] <= 1e-18 * (1 + x.mean() ** 2):
        return 1.0  # nothing changes
    # The memory m: where do the autocorrelations fall silent?
    is_loud = np.abs(R[1:]) > 2 * math.sqrt(math.log10(n) / n) * R[0]
    silent = [k for k in range(lags - K + 1) if not is_loud[k : k + K].any()]
    m = min(2 * max(silent[0], 1), lags) if silent else lags
    # The two sums, each over k and -k at once.
    k = np.arange(1, m + 1)
    weighted = np.minimum(1, 2 * (1 - k / m)) * R[1 : m + 1]
    g, s = 2 * (weighted @ k), R[0] + 2 * weighted.sum()
    b = (abs(g / s) ** 2 * n) ** (1 / 3) if s else INF
    return float(min(max(b, 1.0), math.ceil(min(3 * math.sqrt(n), n / 3))))


def draw_positions(n: int, block: float, count: int, rng: Generator) -> Iterator[np.ndarray]:
    """Stationary bootstrap of n periods, count times: (n,) positions each.

    Begin anywhere; then, with probability 1/block, jump anywhere, else go on to the next
    period, the first one following the last. Politis and Romano (1994). All columns of a
    table share the positions, so that what they have in common stays in common.
    """
    at = np.arange(n)
    for _ in range(count):
        is_jump = rng.random(n) * block < 1
        is_jump[0] = True
        begins = np.maximum.accumulate(np.where(is_jump, at, 0))  # of the block of each period
        yield (rng.integers(n, size=n)[begins] + at - begins) % n


def measure_paths(x: np.ndarray) -> dict[str, np.ndarray]:
    """Net, Sharpe ratio of a period and deepest drawdown along the last axis."""
    level = np.cumsum(x, axis=-1)
    peak = np.maximum(np.maximum.accumulate(level, axis=-1), 0)  # we start with 0
    return {
        "net_usdt": level[..., -1],
        "sharpe": sharpe_score(x.mean(axis=-1), x.var(axis=-1, ddof=1)),
        "max_drawdown_usdt": (peak - level).max(axis=-1),
    }


def bootstrap(x: np.ndarray, count: int, rng: Generator) -> dict[str, np.ndarray]:
    """The measures of k strategies in count resamples of x, (n, k): (k, count) each."""
    draws = draw_positions(len(x), block_length(x), count, rng)
    drawn = [measure_paths(x[positions].T) for positions in draws]
    return {name: np.array([part[name] for part in drawn]).T for name in drawn[0]}


# ---- The price of having searched --------------------------------------------------


def sharpe_error(x: np.ndarray) -> float:
    """Standard error of the Sharpe ratio of a period; nan below two periods a part.

    To first order the ratio is SR + the mean of z - SR/2 (z^2 - 1), z = (x - mean)/deviation
    (Lo 2002, Mertens 2002). Neighbours may go together, so the error of that mean comes from the
    means of PARTS parts in time, std(means) / sqrt(PARTS). +- PARTS_95 of it covered 93 to 96 % on
    120 to 480 minutes of autocorrelation 0 to 0.4 (taken as independent, 77 to 95 %).
    """
    if len(x) < 2 * PARTS or x.std() <= 1e-9:
        return math.nan
    z = (x - x.mean()) / x.std()
    influence = z - x.mean() / x.std() / 2 * (z**2 - 1)
    means = [part.mean() for part in np.array_split(influence, PARTS)]
    return float(np.std(means, ddof=1)) / math.sqrt(PARTS)


def best_sharpe_by_luck(variance: float, trials: float) -> float:
    """SR0 = sqrt(V) ((1 - E) Phi^-1(1 - 1/N) + E Phi^-1(1 - 1/(N e))): the Sharpe ratio to
    expect of the best of N trials without skill. V variance of their ratios, E = 0.5772.
    """
    E, first, second = np.euler_gamma, ndtri(1 - 1 / trials), ndtri(1 - 1 / (trials * math.e))
    return math.sqrt(variance) * max(0.0, float((1 - E) * first + E * second))  # of one trial: 0


def deflated_sharpe(sharpe: float, error: float, variance: float, trials: float) -> float:
    """DSR = Phi((SR - SR0) / SE): the confidence that the true ratio is above what the best of as
    many trials, as scattered as these, shows by luck. No ratio is annualised. Bailey and Lopez
    de Prado (2014); their example, with skew -3 and kurtosis 10 over 1250 days:

    >>> daily = 2.5 / math.sqrt(250)
    >>> error = math.sqrt((1 + 3 * daily + (10 - 1) / 4 * daily**2) / 1249)
    >>> round(deflated_sharpe(daily, error, variance=0.5 / 250, trials=100), 4)
    0.9004
    """
    return float(ndtr((sharpe - best_sharpe_by_luck(variance, trials)) / error))


def draw_best_of_chance(x: np.ndarray, score: Callable, count: int, rng: Generator) -> np.ndarray:
    """The best score(mean, variance) of N configurations like those of x without skill: (count,).

    The columns lose their means and are resampled together, which keeps their correlation; their
    variances stay, as a resample may miss the few fills of one that hardly trades. The share of
    draws at or above the best score of the search says how often luck does as well: White's
    reality check (2000), not studentised. Blocks are twice as long as for a mean: of searches
    through noise of autocorrelation 0.3, 6 to 9 % then show a share below 5 % (else 8 to 12 %).
    """
    skill, draws = x.mean(axis=0), draw_positions(len(x), 2 * block_length(x), count, rng)
    means = np.array([x[positions].mean(axis=0) - skill for positions in draws])
    return score(means, x.var(axis=0, ddof=1)).max(axis=1)


# ---- One quote by hand -------------------------------------------------------------

STEPS = """\
mid {mid_price:.9g}, best bid {best_bid:.9g}, best ask {best_ask:.9g}, inventory {inventory:.9g}
1. Base spread S, bps
   volatility   2 gamma sigma sqrt(tau) = 2 x {gamma:g} x {volatility:.9g} x sqrt({horizon_s:g}) \
= {volatility_bps:.6f}
   liquidity    delta / (1 + L/L0) = {delta:g} / (1 + {liquidity:.9g} / {liquidity_scale_musd:g}) \
= {liquidity_bps:.6f}
   depth        D = ({bid_depth:.9g} + {ask_depth:.9g}) / 2 x mid / 10^6 = {D:.6f} M USDT
                zeta / (1 + D/D0) = {zeta:g} / (1 + {D:.6f} / {depth_scale_musd:g}) \
= {depth_bps:.6f}
   S            their sum, at least {floor_bps:g}: {S:.6f}
2. The linear program, solved for |q|; where q is below 0, its answers swap
   q            {inventory:.9g} / {max_inventory:g}, to the nearest 1/200: {q:g}
   d_min        {floor_bps:g} / S, up to the next 1/64: {edge}/64
   the rows that hold it, of {rows} with the edges:{binding}
   answer       d_b = {d_b:.6f}, d_a = {d_a:.6f}, lean s = {s:+.4f}
                without chords and edge, s = alpha q / (alpha + beta/2) = {free_s:+.4f}
   cost         {cost:.6f} by chords, {C:.6f} by squares
3. Prices, in steps of {tick:g}, by the decimals of the log
   bid          mid (1 - d_b S/10^4) = {bid:.4f}, down, below the best ask: {bid_step:.{digits}f}
   ask          mid (1 + d_a S/10^4) = {ask:.4f}, up, above the best bid: {ask_step:.{digits}f}
   quantity     {order_qty:g}, or {max_depth_share:g} of the depth of its side if that is less
The log says bid {log[bid_price]}, ask {log[ask_price]}. {log[reason]}"""


def explain(row: Mapping[str, str], p: Parameters) -> str:
    """The quote of a row of a decision log, step by step; ValueError if it is not lp's."""
    if row["source"] != "lp":
        raise ValueError(f"this decision is not lp's, but {row['source']}: {row['reason']}")
    v = {n: float(text) for n, text in row.items() if text and n not in ("source", "reason")}
    D, mid = (v["bid_depth"] + v["ask_depth"]) / 2 * v["mid_price"] * 1e-6, v["mid_price"]
    q = min(max(v["inventory"] / p.max_inventory, -1.0), 1.0)
    quote = quote_by_program(p, SimpleNamespace(**v, depth_musd=D), q)
    (d_b, d_a, cost, *_), S = quote.solution, quote.base_spread.total_bps
    q, edge = round(q / Q_STEP) * Q_STEP, math.ceil(p.min_half_spread_bps / S / D_MIN_STEP - 1e-9)

    # Which rows, edges below them, hold the answer? Each square stands on its highest chord.
    _, A_ub, b_ub, bounds = build_program(abs(q), p.alpha, p.beta, edge * D_MIN_STEP)
    A_ub, b_ub = np.vstack((A_ub, -np.eye(2, 5))), np.append(b_ub, -bounds[:2, 0])
    chords = A_ub[:, :2] @ (max(d_b, d_a), min(d_b, d_a)) - b_ub
    squares = [chords[A_ub[:, k] < 0].max() for k in (2, 3, 4)]
    binding = ""
    for k in np.flatnonzero(chords + A_ub[:, 2:] @ squares > -FEASIBILITY):
        terms = zip(A_ub[k], ("d_b", "d_a", "r", "p_b", "p_a"))
        words = " ".join(f"{weight:+.4f} {name}" for weight, name in terms if weight)
        binding += f"\n                {words} <= {b_ub[k]:+.4f}"
    tick = 10.0 ** -(digits := len(row["best_bid"].partition(".")[2]))
    bid, ask = mid * (1 - quote.bid_bps * 1e-4), mid * (1 + quote.ask_bps * 1e-4)
    return STEPS.format(
        log=row, **v, **vars(p), **quote.base_spread._asdict(), D=D, S=S, q=q, rows=len(b_ub),
        edge=edge, binding=binding, cost=cost,
        d_b=d_b, d_a=d_a, s=d_b - d_a, free_s=p.alpha * q / (p.alpha + p.beta / 2),
        C=cost_function(d_b, d_a, q, p.alpha, p.beta), tick=tick, digits=digits,
        bid=bid, bid_step=min(math.floor(bid / tick + 1e-9) * tick, v["best_ask"] - tick),
        ask=ask, ask_step=max(math.ceil(ask / tick - 1e-9) * tick, v["best_bid"] + tick),
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """python optimize.py --explain LOG.csv ROW; an error is one line, with status 2."""
    parser = argparse.ArgumentParser(description="One quote of a decision log, made by hand.")
    parser.add_argument("--explain", nargs="+", required=True, metavar=("LOG.csv", "ROW"),
                        help="a decision log, and which of its decisions, from 1 on")  # fmt: skip
    parser.add_argument("--params", type=Path, metavar="FILE.json", help="its parameters")
    options = parser.parse_args(arguments)
    try:
        path, row = options.explain if len(options.explain) > 1 else [*options.explain, 1]
        if not all(Path(file).is_file() for file in (path, options.params or path)):
            raise OSError("a log and parameters are regular files")
        rows = list(csv.DictReader(Path(path).read_text("utf-8-sig").splitlines()))
        changes = json.loads(options.params.read_text("utf-8-sig")) if options.params else {}
        p = change_parameters(Parameters(), {**changes})
        print(explain(dict(enumerate(rows, 1))[int(row)], p), flush=True)
    except Exception as error:  # subtle: of the text, its columns, its numbers, or of stdout
        sys.stdout = None
        parser.exit(2, f"error: {error!r:.200}: give a decision log, and a row that lp quoted\n")


if __name__ == "__main__":
    main()
