"""What a quote should cost: the parameters, the base spread, and a linear program.

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

What this module does not do: it knows no exchange, no clock and no state. No paper was
found that quotes by a linear program; it is a design choice of this project, made
because its answer can be checked by hand and its multipliers can be read. The lean in
inventory goes back to Ho and Stoll (1981) and Avellaneda and Stoikov (2008).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import linprog

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


@lru_cache(maxsize=100_000)
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
