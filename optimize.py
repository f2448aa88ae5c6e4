"""What a quote should cost: the parameters, the base spread, and a linear program. In the
second half: the search for parameters, and what it costs to have searched.

The problem. A market maker bids below the mid price and offers above it. Far from the
mid it is rarely hit; close by it is hit by those who know more. Holding inventory is a
risk, so it leans: long, it bids further away and offers nearer, to be rid of it. How wide
to quote at least is read from the market (base spread S); where to put bid and ask, at
least S apart and neither inside its edge, is decided by a linear program.

Symbols (the README repeats this table, nothing else does):

  symbol    code                 meaning                                      unit
  q         q                    inventory / max_inventory, -1 to 1           -
  sigma     ema_volatility       volatility, smoothed                  bps/sqrt(s)
  tau       horizon_s            how long inventory is expected to be held    s
  L         liquidity            turnover per bp of mid movement        M USDT/bp
  D         depth_musd           mean of bid and ask depth near the mid    M USDT
  S         base_spread          base spread, bid to ask                      bps
  d_b, d_a  bid/ask_distance     distance of the quote from the mid           S
  s         d_b - d_a            lean: positive = would rather sell           S
  d_min     d_min                edge: min_half_spread_bps / S                S
  r, p_b, p_a                    epigraph variables of the three squares      -
  h         STEP                 step of the piecewise-linear squares         S
  alpha, beta                    weight of inventory risk, of price risk      -
  gamma, delta, zeta             spread per volatility, liquidity, depth      -, bps

Base spread:
  S = max(min_half_spread_bps, 2 gamma sigma sqrt(tau) + delta/(1+L) + zeta/(1+D))

  Its floor only keeps d_min at 1 or less. Where S is below twice the edge, the edge
  decides: the quote is 2 min_half_spread_bps wide.

Cost of a quote:
  C(d_b, d_a; q) = alpha (q - s)^2  +  beta (d_b^2 + d_a^2)
                   inventory risk      price risk

The linear program. Each square is replaced by its chords: x^2 between neighbouring
grid points u and v becomes (u + v) x - u v, exact at the grid points and never below
the square. The largest chord is convex, so "r is at least every chord" is a set of
rows. In the standard form of scipy.optimize.linprog, x = (d_b, d_a, r, p_b, p_a):

  minimise    c x           c = (0, 0, alpha, beta, beta)
  subject to  A_ub x <= b_ub, rows in this order:
    spread     1 row        -d_b - d_a                <= -1
    inventory  92 rows      -k d_b + k d_a - r        <= u v - k q      k = u + v
    bid price  64 rows      k d_b - p_b               <= u v
    ask price  64 rows      k d_a - p_a               <= u v
  bounds      d_min <= d_b, d_a <= 2,   r, p_b, p_a >= 0

The inventory chords cover -1 <= q - s <= 1 and go on straight beyond, where the cost has
no minimum (0 <= s <= q for every q >= 0); those of the distances cover 0 to 2.

The inventory term has the step h/sqrt(2), an irrational multiple of h: so for every
rational alpha/beta no slopes of the two terms tie, and the minimum is a single point.
S is factored out, so one program serves every price level and every spread.

Worked example: long a quarter of the limit, nothing else binding. The quadratic cost
has its minimum at s* = alpha q / (alpha + beta/2) = 1/6, d = (1 +- s*)/2; the program
comes within one step of it:

>>> solution = solve_quote(q=0.25, alpha=1.0, beta=1.0, d_min=0.125)
>>> round(solution.bid_distance, 3), round(solution.ask_distance, 3)
(0.581, 0.419)

The search. Values of every parameter are combined to a grid, and from its best point a
simplex looks for a better one. What it maximises is the caller's: any function. The best
of many looks good even where none is; so the second half also holds the statistics of
having searched, over x, the net of n periods (rows) of N configurations tried (columns):

  n, N      x.shape              periods, configurations tried
  SR        sharpe               mean / standard deviation of a period's net
  SR0       reference            the ratio that SR is held against
  V         variance             of the SR of all configurations tried
  g3, g4    skew, kurtosis       of a period's net; raw kurtosis, 3 for the normal
  b         block                mean length of the blocks resampled, periods

What this module does not do: it knows no exchange, no clock and no state. No paper was
found that quotes by a linear program; it is a design choice of this project, made
because its answer can be checked by hand and its multipliers can be read. The lean in
inventory goes back to Ho and Stoll (1981) and Avellaneda and Stoikov (2008). Sources of
the search stand at its functions.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product
from numbers import Real
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import linprog, minimize
from scipy.special import ndtr, ndtri

STEP = 1 / 32  # h: grid step of the squares; 1/16 misses the quadratic cost by 0.5 %
D_MAX = 2.0  # farthest quote, in units of S
Q_STEP = 1 / 200  # q is rounded to this before solving, so that answers are reused
D_MIN_STEP = 1 / 64  # d_min is rounded up to this, which moves an edge by up to S/64
FEASIBILITY = 1e-7  # by how much an answer may miss a row, in units of S
MIN_INTERVAL_S, MAX_INTERVAL_S = 0.1, 5.0  # between two optimizations
FILL_MODELS = ("queue", "touch", "through")
INF = math.inf
Number = float | np.ndarray


# ---- Parameters --------------------------------------------------------------------


def _number(default: float | None, low: float, high: float, help: str, fixed: bool = False) -> Any:
    """A parameter between low and high; a fixed one cannot change while running."""
    metadata = dict(low=low, high=high, help=help, fixed=fixed)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Parameters:
    """Everything that can be turned, with its unit, its range and its flag.

    The flag of `order_qty` is --order-qty. The help text of each is what --help shows.
    """

    alpha: float = _number(1.0, 0, 10, "weight of inventory risk: leans the quote")
    beta: float = _number(1.0, 0.1, 10, "weight of price risk: pulls both to the mid")
    gamma: float = _number(0.5, 0, 5, "base spread per unit of volatility")
    delta: float = _number(1.0, 0, 20, "base spread of an illiquid market, bps")
    zeta: float = _number(1.0, 0, 20, "base spread of a thin book, bps")
    min_half_spread_bps: float = _number(0.5, 0.01, 100, "edge: never nearer, bps")
    default_spread_bps: float = _number(10.0, 0.02, 500, "spread of the fallback, bps")
    horizon_s: float = _number(10.0, 0.1, 3600, "how long inventory is held, s")
    half_life_s: float = _number(30.0, 1, 3600, "memory of the volatility's EMA, s")
    requote_move_bps: float = _number(1.0, 0.05, 50, "drift that calls a new quote, bps")
    depth_band_bps: float = _number(1.0, 0.1, 100, "depth is counted this near, bps")
    order_qty: float = _number(0.01, 0, INF, "size of each quote, base coin")
    max_inventory: float = _number(0.1, 0, INF, "inventory limit, base coin", fixed=True)
    max_depth_share: float = _number(0.05, 0, 1, "largest quote, share of the depth")
    maker_fee_bps: float = _number(2.0, -5, 100, "maker fee, + we pay, bps", fixed=True)
    taker_fee_bps: float = _number(5.5, -5, 100, "taker fee, + we pay, bps", fixed=True)
    order_latency_ms: float = _number(100.0, 0, 60_000, "decision to exchange, ms", fixed=True)
    feed_latency_ms: float = _number(100.0, 0, 60_000, "exchange to us (archives), ms", fixed=True)
    clock_offset_ms: float = _number(
        0.0, -86_400_000, 86_400_000, "our clock minus the exchange's, ms", fixed=True
    )
    stale_after_s: float = _number(5.0, 0.5, 60, "book silence that pulls the quote, s")
    fallback_max_age_s: float = _number(5.0, 0, 60, "last good quote serves so long, s")
    max_mark_gap_bps: float = _number(50.0, 1, 1000, "mid to mark that pulls, bps")
    max_drawdown_usdt: float | None = _number(None, 0, INF, "loss from the peak that stops, USDT")
    fill_model: str = dataclasses.field(
        default="queue",
        metadata=dict(choices=FILL_MODELS, help="how paper orders fill", fixed=True),
    )


FIELDS = {field.name: field for field in dataclasses.fields(Parameters)}
ABOVE_ZERO = {"order_qty", "max_inventory", "max_drawdown_usdt"}  # 0 itself is refused


def validate_parameters(parameters: Parameters, lot_size: float = 0.0) -> Parameters:
    """The same parameters, or a ValueError that names each wrong value, rule, remedy.

    lot_size, in base coin, is the least that order_qty may be (0: not checked).
    """
    wrong = [fault for name in FIELDS if (fault := _fault(name, getattr(parameters, name)))]
    if not wrong:
        wrong = _joint_faults(parameters, lot_size)
    if wrong:
        raise ValueError("; ".join(wrong))
    return parameters


def _fault(name: str, value: Any) -> str:
    """What is wrong with one value by itself; empty if nothing is."""
    rule, flag = FIELDS[name].metadata, "--" + name.replace("_", "-")
    if "choices" in rule:
        if value in rule["choices"]:
            return ""
        choices = ", ".join(rule["choices"])
        return f"{name} = {value!r} is none of {choices}: set {flag} to one of them"
    if value is None and FIELDS[name].default is None:
        return ""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not (number and abs(value) <= sys.float_info.max):
        return f"{name} = {value!r} is not a finite number: set {flag} to one"
    low, high = rule["low"], rule["high"]
    if name in ABOVE_ZERO and value <= 0:
        return f"{name} = {value:g} must be above 0: raise {flag}"
    if not low <= value <= high:
        span = f"{low:.12g} to {high:.12g}" if high < INF else f"{low:.12g} or more"
        remedy = "raise" if value < low else "lower"
        return f"{name} = {value:.12g} must lie in {span}: {remedy} {flag}"
    return ""


def _joint_faults(p: Parameters, lot_size: float) -> list[str]:
    """Rules between two values, or between a value and the instrument."""
    wrong = []
    if p.default_spread_bps < 2 * p.min_half_spread_bps:
        wrong.append(
            f"default_spread_bps = {p.default_spread_bps:g} must be at least twice "
            f"min_half_spread_bps = {p.min_half_spread_bps:g}: raise --default-spread-bps"
        )
    if p.max_inventory < p.order_qty:
        wrong.append(
            f"max_inventory = {p.max_inventory:g} must be at least order_qty = "
            f"{p.order_qty:g}: raise --max-inventory or lower --order-qty"
        )
    if p.order_qty < lot_size * (1 - 1e-9):
        wrong.append(
            f"order_qty = {p.order_qty:g} must be at least one lot of {lot_size:g}: "
            "raise --order-qty"
        )
    return wrong


def change_parameters(
    parameters: Parameters, changes: Mapping[str, Any], lot_size: float = 0.0, running: bool = False
) -> Parameters:
    """Parameters with the named values changed, validated as a whole.

    While running, a fixed parameter must keep its value. ValueError as above.
    """
    for name, value in changes.items():
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1)
            hint = f"did you mean {near[0]}?" if near else "see --help for the names"
            raise ValueError(f"{name} is not a parameter: {hint}")
        if running and FIELDS[name].metadata.get("fixed") and value != getattr(parameters, name):
            raise ValueError(f"{name} cannot change while running: restart with the new value")
    return validate_parameters(dataclasses.replace(parameters, **changes), lot_size)


# ---- Base spread and cost ----------------------------------------------------------


class BaseSpread(NamedTuple):
    """Why the base spread is what it is, in bps: the terms, and the floor under them."""

    volatility_bps: float
    liquidity_bps: float
    depth_bps: float
    floor_bps: float

    @property
    def total_bps(self) -> float:
        """S, in bps."""
        return max(self.floor_bps, self.volatility_bps + self.liquidity_bps + self.depth_bps)


def base_spread_function(
    parameters: Parameters, ema_volatility: float, liquidity: float, depth_musd: float
) -> BaseSpread:
    """S = max(min_half_spread, 2 gamma sigma sqrt(tau) + delta/(1+L) + zeta/(1+D)).

    A nervous, illiquid or thin market is quoted wider. Units as in the symbol table.

    >>> base_spread_function(Parameters(horizon_s=4), 0.5, liquidity=1, depth_musd=3)
    BaseSpread(volatility_bps=1.0, liquidity_bps=0.5, depth_bps=0.25, floor_bps=0.5)
    """
    p = parameters
    return BaseSpread(
        volatility_bps=2 * p.gamma * ema_volatility * math.sqrt(p.horizon_s),
        liquidity_bps=p.delta / (1 + liquidity),
        depth_bps=p.zeta / (1 + depth_musd),
        floor_bps=p.min_half_spread_bps,
    )


def cost_function(
    bid_distance: Number, ask_distance: Number, q: Number, alpha: float, beta: float
) -> Number:
    """C = alpha (q - s)^2 + beta (d_b^2 + d_a^2) with s = d_b - d_a; scalars or arrays.

    >>> cost_function(0.5, 0.5, q=0.5, alpha=1, beta=1)
    0.75
    """
    lean = bid_distance - ask_distance
    return alpha * (q - lean) ** 2 + beta * (bid_distance**2 + ask_distance**2)


# ---- The linear program ------------------------------------------------------------


class Program(NamedTuple):
    """The standard form that the module's docstring writes out."""

    c: np.ndarray  # (5,)
    A_ub: np.ndarray  # (221, 5)
    b_ub: np.ndarray  # (221,)
    bounds: np.ndarray  # (5, 2)


class Solution(NamedTuple):
    """The answer in units of S, and what its constraints cost (multipliers).

    A failed solve has `failure` set and nothing else of use: trouble is data.
    """

    bid_distance: float = math.nan
    ask_distance: float = math.nan
    cost: float = math.nan  # C, the program's own piecewise cost
    spread_price: float = math.nan  # dC per unit more of required spread
    bid_edge_price: float = math.nan  # dC per unit more of d_min, bid
    ask_edge_price: float = math.nan  # the same, ask
    inventory_price: float = math.nan  # dC per unit more of q
    failure: str = ""


def _chords(low: float, high: float, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Slopes k = u + v and offsets u v of the chords of x^2 that cover [low, high]."""
    grid = step * np.arange(math.floor(low / step), math.ceil(high / step) + 1)
    return grid[:-1] + grid[1:], grid[:-1] * grid[1:]


@lru_cache
def _rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A_ub, b_ub at q = 0, and the change of b_ub per unit of q."""
    k_r, uv_r = _chords(-1, 1, STEP / math.sqrt(2))  # at the optimum 0 <= q - s <= 1
    k_p, uv_p = _chords(0, D_MAX, STEP)
    n, m = len(k_r), len(k_p)
    A = np.zeros((1 + n + 2 * m, 5))
    A[0, :2] = -1  # spread
    A[1 : 1 + n, :3] = np.column_stack((-k_r, k_r, -np.ones(n)))  # inventory
    for side, rows in enumerate((slice(1 + n, 1 + n + m), slice(1 + n + m, None))):
        A[rows, side] = k_p  # bid price, then ask price
        A[rows, 3 + side] = -1
    b = np.concatenate(([-1.0], uv_r, uv_p, uv_p))
    b_per_q = np.concatenate(([0.0], -k_r, np.zeros(2 * m)))
    return A, b, b_per_q


def build_program(q: float, alpha: float, beta: float, d_min: float) -> Program:
    """The program for q in [0, 1]; a negative q is the mirror image (solve_quote)."""
    A, b, b_per_q = _rows()
    bounds = np.array([[d_min, D_MAX]] * 2 + [[0, np.inf]] * 3)
    return Program(np.array([0, 0, alpha, beta, beta]), A, b + q * b_per_q, bounds)


def solve_program(program: Program, solver: Callable = linprog) -> Solution:
    """Solve one program; never raises: a failure, or an answer that is not finite and
    feasible, comes back as Solution(failure=...)."""
    try:
        result = solver(program.c, program.A_ub, program.b_ub, bounds=program.bounds)
        x = np.asarray(result.x if result.status == 0 else [], float)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        return Solution(failure=f"solver raised {type(error).__name__}: {error}")
    if result.status != 0:
        return Solution(failure=f"solver status {result.status}: {result.message}")
    if x.shape != program.c.shape or not np.isfinite(x).all():
        return Solution(failure="the solver's answer is not finite")
    low, high = program.bounds.T
    if (
        (program.A_ub @ x > program.b_ub + FEASIBILITY).any()
        or (x < low - FEASIBILITY).any()
        or (x > high + FEASIBILITY).any()
    ):
        return Solution(failure="the solver's answer breaks a constraint")
    slack_prices = result.ineqlin.marginals  # dC/db, never positive
    return Solution(
        bid_distance=round(float(x[0]), 12),  # beyond lies the solver's noise, which
        ask_distance=round(float(x[1]), 12),  # would spoil the mirror symmetry at q = 0
        cost=float(result.fun),
        spread_price=-float(slack_prices[0]),
        bid_edge_price=float(result.lower.marginals[0]),
        ask_edge_price=float(result.lower.marginals[1]),
        inventory_price=float(slack_prices @ _rows()[2]),
    )


class _NotSolved(Exception):
    """Carries a failure past the memo, which keeps good answers only."""


@lru_cache(maxsize=2048)
def _remembered(
    steps: int, alpha: float, beta: float, d_min: float, solver: Callable
) -> Solution:
    """The answer at q = steps x Q_STEP; for a negative q the mirror image."""
    if steps < 0:
        mirror = _remembered(-steps, alpha, beta, d_min, solver)
        return mirror._replace(
            bid_distance=mirror.ask_distance,
            ask_distance=mirror.bid_distance,
            bid_edge_price=mirror.ask_edge_price,
            ask_edge_price=mirror.bid_edge_price,
            inventory_price=-mirror.inventory_price,
        )
    solution = solve_program(build_program(steps * Q_STEP, alpha, beta, d_min), solver)
    if solution.failure:
        raise _NotSolved(solution.failure)
    if steps == 0:  # a kink: of its slopes take the middle, which favours no side
        return solution._replace(inventory_price=0.0)
    return solution


def solve_quote(
    q: float, alpha: float, beta: float, d_min: float, solver: Callable = linprog
) -> Solution:
    """The best quote at inventory q: rounded, mirrored, remembered.

    q is rounded to 1/200 and d_min up to 1/64, so that a day needs a few hundred
    solves of about 2 ms; solving for |q| and swapping the sides makes bid and ask
    exact mirror images.
    """
    d_min = min(math.ceil(d_min / D_MIN_STEP - 1e-9) * D_MIN_STEP, 1.0)
    try:
        return _remembered(round(q / Q_STEP), alpha, beta, d_min, solver)
    except _NotSolved as failure:
        return Solution(failure=str(failure))


# ---- From market to distances, with fallback ---------------------------------------


class Distances(NamedTuple):
    """How far from the mid to quote, in bps, where that comes from, and why."""

    bid_bps: float
    ask_bps: float
    source: str  # lp, last_good or default
    reason: str = ""  # why not lp
    base_spread: BaseSpread | None = None
    solution: Solution | None = None


def validate_market(q: float, sigma: float, liquidity: float, depth_musd: float) -> str:
    """What is wrong with the market's inputs; empty if nothing is."""
    if 0 <= sigma < INF and 0 <= liquidity < INF and 0 <= depth_musd < INF and -1 <= q <= 1:
        return ""
    for name, value in (("volatility", sigma), ("liquidity", liquidity), ("depth", depth_musd)):
        if not (math.isfinite(value) and value >= 0):
            return f"{name} is {value}"
    return f"inventory is {q} of its limit"


def choose_distances(
    parameters: Parameters,
    q: float,
    ema_volatility: float,
    liquidity: float,
    depth_musd: float,
    last_good: Distances | None = None,
    last_good_age_s: float = math.inf,
    solver: Callable = linprog,
) -> Distances:
    """The quote's distances: from the program, or down the ladder of fallbacks.

    1. lp: the inputs are sound and the solver's answer is finite and feasible;
    2. last_good: the last such answer, in bps, while younger than fallback_max_age_s;
    3. default: default_spread_bps, shared evenly.
    """
    p = parameters
    failure = validate_market(q, ema_volatility, liquidity, depth_musd)
    if not failure:
        terms = base_spread_function(p, ema_volatility, liquidity, depth_musd)
        spread = terms.total_bps
        failure = "" if math.isfinite(spread) else f"base spread is {spread}"
    if not failure:
        d_min = p.min_half_spread_bps / spread
        solution = solve_quote(q, p.alpha, p.beta, d_min, solver)
        failure = solution.failure
    if not failure:
        bid_bps, ask_bps = solution.bid_distance * spread, solution.ask_distance * spread
        return Distances(bid_bps, ask_bps, "lp", "", terms, solution)
    if last_good is not None and last_good_age_s < p.fallback_max_age_s:
        return last_good._replace(source="last_good", reason=failure)
    half = p.default_spread_bps / 2
    return Distances(half, half, "default", failure)


def get_optimization_frequency(parameters: Parameters, ema_volatility: float) -> float:
    """Seconds until the next optimization: (requote_move_bps / sigma)^2, the time in
    which the price diffuses that far, within 0.1 to 5 s.

    >>> get_optimization_frequency(Parameters(requote_move_bps=1), 0.5)
    4.0
    """
    if not ema_volatility * MAX_INTERVAL_S**0.5 > parameters.requote_move_bps:
        return MAX_INTERVAL_S  # calm, flat, or not measured yet
    return max(MIN_INTERVAL_S, (parameters.requote_move_bps / ema_volatility) ** 2)


# ---- Searching: a grid, then refinement from its best point ------------------------

POLL_S = 0.2  # how often a search looks whether it is to stop
SMALLEST_STEP = 0.02  # of half the distance between grid points, where refinement ends


def expand_grid(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values; those of the last name change fastest.

    >>> expand_grid({"alpha": [1, 2], "gamma": [0.5]})
    [{'alpha': 1, 'gamma': 0.5}, {'alpha': 2, 'gamma': 0.5}]
    """
    return [dict(zip(grid, values)) for values in product(*grid.values())]


def run_trials(
    play: Callable[[Any], Any],
    configurations: Sequence[Any],
    executor: Executor,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[int, Any]]:
    """(k, play(configurations[k])) as they come, played by any executor's workers.

    What play raises is raised here. Once is_stopped, nothing more comes.
    """
    waiting = {executor.submit(play, one): k for k, one in enumerate(configurations)}
    finished: SimpleQueue[Future] = SimpleQueue()
    for future in waiting:
        future.add_done_callback(finished.put)
    try:
        while waiting and not is_stopped():
            with suppress(Empty):
                future = finished.get(timeout=POLL_S)
                yield waiting.pop(future), future.result()
    except BrokenExecutor:
        waiting.clear()  # they fail by themselves; to cancel them meanwhile upsets the executor
        raise
    finally:
        for future in waiting:
            future.cancel()


def refine(
    score: Callable[[dict[str, float]], float],
    start: Mapping[str, float],
    grid: Mapping[str, Sequence[float]],
    limits: Mapping[str, tuple[float, float]],
    steps: int,
) -> None:
    """Look for a higher score near start, a point of the grid, in so many steps at most.

    Nelder and Mead's simplex, which asks for no slopes: a backtest has none, its fills
    come and go in jumps. One unit is half the way to the grid's next point, so that all
    parameters count alike. score hears of every point and keeps the best itself; start,
    which it hears of first, is no step.
    """
    names = [name for name in start if len(set(grid[name])) > 1]
    scale = np.array([_half_gap(sorted(set(grid[name])), start[name]) for name in names])
    origin = np.array([start[name] for name in names], float)
    if not names or steps < 1:
        return
    low, high = np.array([limits[name] for name in names], float).T

    def cost(x: np.ndarray) -> float:
        values = np.clip(origin + x * scale, low, high)  # not a rounding error beyond
        return -score({**start, **dict(zip(names, values.tolist()))})

    minimize(
        cost, np.zeros(len(names)), method="Nelder-Mead",
        bounds=np.sort(np.column_stack([low - origin, high - origin]) / scale[:, None], axis=1),
        options=dict(maxfev=steps + 1, xatol=SMALLEST_STEP, fatol=INF,
                     initial_simplex=np.vstack([np.zeros(len(names)), np.eye(len(names))])),
    )  # fmt: skip


def _half_gap(values: list[float], value: float) -> float:
    """Half the way to the next value; from the last one, back."""
    k = values.index(value)
    return (values[k + 1] - value if k + 1 < len(values) else values[k - 1] - value) / 2


# ---- Resampling: how sure is a result ----------------------------------------------
#
# x is the net of every period; columns are strategies, or configurations tried. The
# columns of a table are always resampled at the same positions: what they have in
# common, above all the market, stays in common.

CHUNK = 200_000  # positions drawn at a time
Score = Callable[[np.ndarray, np.ndarray], np.ndarray]  # of mean and variance of a period


def net_score(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Mean net of a period."""
    return mean


def sharpe_score(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Sharpe ratio of a period; 0 where nothing changes: nothing earned, nothing risked."""
    spread = np.sqrt(np.maximum(variance, 0))
    is_flat = spread <= 1e-6 * np.abs(mean) + 1e-12  # no more than rounding
    return np.where(is_flat, 0.0, mean / np.where(is_flat, 1.0, spread))


def block_length(x: np.ndarray) -> float:
    """Mean block, in periods, for the stationary bootstrap of the mean of x: (n,).

      b = (2 g^2 / d)^(1/3) n^(1/3),  from 1 to ceil(min(3 sqrt(n), n/3))
      g = sum_k h(k/m) |k| R(k)       d = 2 (sum_k h(k/m) R(k))^2       |k| <= m

    R autocovariance, h(x) = min(1, 2 (1 - |x|)). m is twice the first lag after which
    K = max(5, sqrt(log10 n)) autocorrelations in succession stay within
    2 sqrt(log10(n) / n), noise; at most sqrt(n) + K. Politis and White (2004), as corrected
    by Patton, Politis and White (2009).
    """
    n = len(x)
    deviations, quiet = x - x.mean(), max(5, math.ceil(math.sqrt(math.log10(n))))
    lags = min(math.ceil(math.sqrt(n)) + quiet, n - 1)
    R = np.array([deviations[k:] @ deviations[: n - k] for k in range(lags + 1)]) / n
    if R[0] <= 1e-18 * (1 + x.mean() ** 2):
        return 1.0
    is_loud = np.abs(R[1:]) > 2 * math.sqrt(math.log10(n) / n) * R[0]
    silence = [k for k in range(lags - quiet + 1) if not is_loud[k : k + quiet].any()]
    m = min(2 * max(silence[0], 1), lags) if silence else lags
    k = np.arange(1, m + 1)
    weighted = np.minimum(1, 2 * (1 - k / m)) * R[1 : m + 1]
    g, long_run = 2 * (weighted @ k), R[0] + 2 * weighted.sum()
    b = (abs(g / long_run) ** 2 * n) ** (1 / 3) if long_run else INF  # 2 g^2 / d = (g / sum)^2
    return float(min(max(b, 1.0), math.ceil(min(3 * math.sqrt(n), n / 3))))


def common_block_length(x: np.ndarray) -> float:
    """The mean of the columns' block lengths, for positions that serve them all."""
    return float(np.mean([block_length(column) for column in x.T]))


def draw_positions(
    n: int, block: float, count: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Stationary bootstrap of n periods, count times, in chunks: (chunk, n) positions.

    Begin anywhere; then, with probability 1/block, jump anywhere, else go on to the next
    period, the first one following the last. Politis and Romano (1994).
    """
    rows = max(1, CHUNK // n)
    for done in range(0, count, rows):
        chunk = min(rows, count - done)
        jumps = rng.random((chunk, n)) * block < 1
        jumps[:, 0] = True
        at = np.flatnonzero(jumps)  # where blocks begin
        shift = rng.integers(n, size=len(at)) - at % n
        positions = np.repeat(shift, np.diff(at, append=chunk * n)).reshape(chunk, n)
        positions += np.arange(n)
        positions[positions >= n] -= n
        yield positions


def draw_means(x: np.ndarray, block: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """The mean of every column in every resample: (count, N)."""
    n, means = len(x), []
    for positions in draw_positions(n, block, count, rng):
        rows = np.arange(len(positions))[:, None] * n
        times = np.bincount((positions + rows).ravel(), minlength=positions.size)
        means.append(times.reshape(positions.shape).astype(float) @ x / n)
    return np.concatenate(means)


def measure_paths(x: np.ndarray) -> dict[str, np.ndarray]:
    """Net, Sharpe ratio of a period and deepest drawdown along the last axis."""
    level = np.cumsum(x, axis=-1)
    peak = np.maximum(np.maximum.accumulate(level, axis=-1), 0)  # we start with 0
    return {
        "net_usdt": level[..., -1],
        "sharpe": sharpe_score(x.mean(axis=-1), x.var(axis=-1, ddof=1)),
        "max_drawdown_usdt": (peak - level).max(axis=-1),
    }


def bootstrap(x: np.ndarray, count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The measures of k strategies in count resamples of x, (n, k): (k, count) each.

    The same positions for all k, so that differences of two rows are paired.
    """
    block = common_block_length(x)
    drawn = [
        measure_paths(np.take(x.T, positions, axis=1))
        for positions in draw_positions(len(x), block, count, rng)
    ]
    return {name: np.concatenate([part[name] for part in drawn], axis=1) for name in drawn[0]}


def interval_of(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of resampled values."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


# ---- The price of having searched --------------------------------------------------
#
# The best of many configurations looks good even if none is. Three views of it, each
# over all that were tried: N configurations, n periods.

EULER = 0.5772156649015329
HALVES = 12  # blocks; they give 924 ways to choose half of them
LEAST_BLOCK, LEAST_TRIALS = 10, 10  # periods a block, configurations


def sharpe_error(sharpe: float, n: int, skew: float, kurtosis: float) -> float:
    """SE = sqrt((1 - g3 SR + (g4 - 1)/4 SR^2) / (n - 1)): g3 skew, g4 raw kurtosis (3 for
    the normal). It takes the periods as independent. Lo (2002), Mertens (2002).
    """
    return math.sqrt((1 - skew * sharpe + (kurtosis - 1) / 4 * sharpe**2) / (n - 1))


def shape_of(x: np.ndarray) -> tuple[float, float]:
    """Skew g3 and raw kurtosis g4 of x, which must not be constant."""
    z = (x - x.mean()) / x.std()
    return float((z**3).mean()), float((z**4).mean())


def probabilistic_sharpe(
    sharpe: float, reference: float, n: int, skew: float, kurtosis: float
) -> float:
    """PSR = Phi((SR - SR0) / SE): the confidence that the true ratio is above SR0."""
    return float(ndtr((sharpe - reference) / sharpe_error(sharpe, n, skew, kurtosis)))


def best_sharpe_by_luck(variance: float, trials: float) -> float:
    """SR0: the Sharpe ratio to expect of the best of so many trials without skill.

      SR0 = sqrt(V) ((1 - E) Phi^-1(1 - 1/N) + E Phi^-1(1 - 1/(N e)))

    V variance of the trials' ratios, E Euler's constant.
    """
    if trials <= 1:
        return 0.0
    first, second = ndtri(1 - 1 / trials), ndtri(1 - 1 / (trials * math.e))
    return math.sqrt(variance) * max(0.0, float((1 - EULER) * first + EULER * second))


def deflated_sharpe(
    sharpe: float, variance: float, trials: float, n: int, skew: float, kurtosis: float
) -> float:
    """DSR = PSR(SR0): the confidence that the true Sharpe ratio of the best is above what
    the best of N trials without skill shows. Ratios per period, none annualised. Bailey
    and Lopez de Prado (2014); their example:

    >>> daily = 2.5 / math.sqrt(250), 0.5 / 250
    >>> round(deflated_sharpe(*daily, trials=100, n=1250, skew=-3, kurtosis=10), 4)
    0.9004
    """
    reference = best_sharpe_by_luck(variance, trials)
    return probabilistic_sharpe(sharpe, reference, n, skew, kurtosis)


def draw_best_of_chance(
    x: np.ndarray, score: Score, count: int, rng: np.random.Generator
) -> np.ndarray:
    """The best score among N configurations like these, but without skill: (count,).

    Each column of x, (n, N), loses its mean and is resampled, all at the same positions,
    so that their correlation is kept; its variance stays that of x, since a resample may
    miss the few fills of one that hardly trades. The share of these maxima at or above
    the score of the best that was found says how often a search without skill ends as well:
    White's reality check (2000), not studentised for the net. A refinement is taken as it
    went; noise would have led it elsewhere.

    Blocks are twice as long as for a mean: short ones understate the variance, which a
    maximum of many shows. Measured on noise with an autocorrelation of 0.3, 960 periods: a
    share below 5 % then comes in 6 to 9 % of searches without skill, else in 8 to 12 %.
    """
    block = 2 * common_block_length(x)
    means = draw_means(x - x.mean(axis=0), block, count, rng)
    return score(means, x.var(axis=0, ddof=1)).max(axis=1)


def overfitting_probability(x: np.ndarray, score: Score) -> float:
    """PBO: how often the best in one half of the periods is at or below the middle in the
    other half. nan for fewer than 10 configurations or 40 periods.

    x, (n, N), is cut into 12 blocks (fewer, if they had less than 10 periods). Of every
    way to choose half of them: w = rank / (N + 1) of the chosen half's best in the other
    half; PBO = share of w <= 1/2. Bailey, Borwein, Lopez de Prado, Zhu (2017).
    """
    n, N = x.shape
    blocks = min(HALVES, n // LEAST_BLOCK // 2 * 2)
    if blocks < 4 or N < LEAST_TRIALS:
        return math.nan
    starts = np.arange(blocks) * n // blocks
    lengths = np.diff(np.append(starts, n))
    sums, squares = (np.add.reduceat(values, starts, axis=0) for values in (x, x**2))
    chosen = np.zeros((math.comb(blocks, blocks // 2), blocks))
    for row, half in zip(chosen, combinations(range(blocks), blocks // 2)):
        row[list(half)] = 1

    def scores(halves: np.ndarray) -> np.ndarray:
        periods = (halves @ lengths)[:, None]
        mean = halves @ sums / periods
        return score(mean, halves @ squares / periods - mean**2)

    best, other = scores(chosen).argmax(axis=1), scores(1 - chosen)
    of_best = other[np.arange(len(best)), best][:, None]
    rank = (other < of_best).sum(axis=1) + ((other == of_best).sum(axis=1) + 1) / 2
    return float((rank / (N + 1) <= 0.5).mean())


def draw_overfitting_by_chance(
    x: np.ndarray, score: Score, count: int, rng: np.random.Generator
) -> np.ndarray:
    """PBO of configurations like these, but without skill: (count,). A single figure says
    little, as these scatter widely.
    """
    centred, block = x - x.mean(axis=0), common_block_length(x)
    return np.array([
        overfitting_probability(centred[row], score)
        for positions in draw_positions(len(x), block, count, rng) for row in positions
    ])  # fmt: skip


# ---- An example --------------------------------------------------------------------


def main() -> None:
    """python optimize.py: how the quote leans with the inventory, at default parameters."""
    p = Parameters()
    terms = base_spread_function(p, ema_volatility=0.4, liquidity=0.5, depth_musd=0.7)
    print(f"base spread {terms.total_bps:.2f} bps, at a volatility of 0.4 bps/sqrt(s)")
    print("     q   bid, bps   ask, bps    cost C   dC/dq")
    for q in (-1.0, -0.5, 0.0, 0.5, 1.0):
        d = choose_distances(p, q, ema_volatility=0.4, liquidity=0.5, depth_musd=0.7)
        cost, slope = d.solution.cost, d.solution.inventory_price
        print(f"{q:6.2f} {d.bid_bps:10.3f} {d.ask_bps:10.3f} {cost:9.3f} {slope:7.3f}")


if __name__ == "__main__":
    main()
