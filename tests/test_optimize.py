"""optimize.py, first half: against closed forms, brute force and numbers worked by hand."""

import doctest
import math
from dataclasses import replace
from functools import partial
from itertools import product
from types import SimpleNamespace

import optimize
from optimize import FIELDS, Distances, Parameters, choose_distances, solve_quote

import numpy as np
import pytest
from scipy.optimize import linprog

H = optimize.STEP
NAN, INF = math.nan, math.inf
ALPHAS = (0.0, 0.1, 0.3, 1.0, 2.2, 5.0)
QS = [i / 10 for i in range(-10, 11)]
D_MINS = (1 / 64, 8 / 64, 17 / 64, 40 / 64, 1.0)  # 17/64 and more: the edge binds
EVERY_PAIR = pytest.mark.parametrize("alpha, d_min", list(product(ALPHAS, D_MINS)))


def test_docstring_examples_run():
    result = doctest.testmod(optimize)
    assert result.attempted >= 5 and result.failed == 0


# ---- The program against its known answers -----------------------------------------


def known_answer(q, alpha, beta, d_min):
    """The quadratic program solved by hand, under its spread and edge constraints."""
    lean = alpha * abs(q) / (alpha + beta / 2)
    far, near = (1 + lean) / 2, (1 - lean) / 2
    if near < d_min:
        near = d_min
        far = max(1 - d_min, d_min, alpha * (abs(q) + d_min) / (alpha + beta))
    return (far, near) if q >= 0 else (near, far)


@EVERY_PAIR
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_answer_is_near_the_known_one_in_distance_and_in_cost(alpha, beta, d_min):
    weights = alpha * beta, beta  # only their ratio matters
    for q in QS:
        answer = solve_quote(q, *weights, d_min)[:2]
        known = known_answer(q, *weights, d_min)
        assert answer == pytest.approx(known, abs=H), q
        cost, least = (optimize.cost_function(*d, q, *weights) for d in (answer, known))
        assert least * (1 - 1e-9) <= cost <= least * 1.002, q


@EVERY_PAIR
def test_short_is_the_exact_mirror_image_of_long_and_flat_of_itself(alpha, d_min):
    for q in QS[10:]:
        long, short = (solve_quote(sign * q, alpha, 1.0, d_min) for sign in (1, -1))
        bid, ask, cost, spread_price, bid_price, ask_price, inventory_price = long
        mirror = (ask, bid, cost, spread_price, ask_price, bid_price, -inventory_price)
        assert short == mirror or q == 0
    flat = solve_quote(0.0, alpha, 1.0, d_min)
    assert flat[:2] == (max(0.5, d_min),) * 2 and flat.inventory_price == 0


# ---- The program against brute force -----------------------------------------------


def piecewise_cost(d_b, d_a, q, alpha):
    """The program's own cost at beta = 1, by interpolation instead of chords."""

    def square(x, step):
        grid = step * np.arange(-200, 201)
        return np.interp(x, grid, grid**2)

    return alpha * square(q - d_b + d_a, H / math.sqrt(2)) + square(d_b, H) + square(d_a, H)


def least_cost(q, alpha, low_b, low_a, spread=1.0):
    """The exact minimum: it lies where two lines, kinks or limits, cross; try all."""
    grid = np.arange(0, 2 + H / 2, H)
    bids, asks = np.append(grid, low_b), np.append(grid, low_a)
    leans = q - H / math.sqrt(2) * np.arange(-100, 151)
    crossings = [
        (bids[:, None], asks),
        (bids[:, None], bids[:, None] - leans),
        (asks[:, None] + leans, asks[:, None]),
        (bids, spread - bids),
        (spread - asks, asks),
        ((spread + leans) / 2, (spread - leans) / 2),
    ]
    pairs = [np.broadcast_arrays(*crossing) for crossing in crossings]
    d_b, d_a = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1))
    limits = [d_b - low_b, d_a - low_a, 2 - d_b, 2 - d_a, d_b + d_a - spread]
    feasible = np.min(limits, axis=0) >= -1e-12
    return piecewise_cost(d_b[feasible], d_a[feasible], q, alpha).min()


@pytest.mark.parametrize("q, alpha, d_min", list(product(QS, ALPHAS, D_MINS))[::7])
def test_no_other_quote_is_cheaper(q, alpha, d_min):
    answer = solve_quote(q, alpha, 1.0, d_min)
    cost = piecewise_cost(*answer[:2], q, alpha)
    assert cost == pytest.approx(answer.cost, abs=1e-9)
    assert least_cost(q, alpha, d_min, d_min) == pytest.approx(cost, abs=1e-9)


@pytest.mark.parametrize(
    "q, alpha, d_min, smooth",
    [
        (0.25, 1.0, 8 / 64, True),  # only the spread binds
        (-0.35, 2.2, 1 / 64, True),
        (0.8, 1.0, 17 / 64, True),  # the ask stands on its edge,
        (-0.8, 1.0, 17 / 64, True),  # the bid,
        (0.8, 1.0, 41 / 64, True),  # the ask, while the spread is slack
        (0.3, 2.0, 1 / 64, False),  # a quote on the grid: left and right differ
        (0.0, 1.0, 1.0, False),
    ],
)
def test_multipliers_are_the_derivatives_of_the_least_cost(q, alpha, d_min, smooth):
    """The least cost is convex: a multiplier lies between its left and right slope."""
    answer, step = solve_quote(q, alpha, 1.0, d_min), 1e-5
    for price, cost in [
        (answer.spread_price, lambda e: least_cost(q, alpha, d_min, d_min, 1 + e)),
        (answer.bid_edge_price, lambda e: least_cost(q, alpha, d_min + e, d_min)),
        (answer.ask_edge_price, lambda e: least_cost(q, alpha, d_min, d_min + e)),
        (answer.inventory_price, lambda e: least_cost(q + e, alpha, d_min, d_min)),
    ]:
        left, right = (cost(0) - cost(-step)) / step, (cost(step) - cost(0)) / step
        assert left - 1e-6 <= price <= right + 1e-6 and (not smooth or right - left < 1e-6)


# ---- Rounding, memory, fallback ----------------------------------------------------


class Solver:
    """Counts its calls; gives one prepared answer, if any, then those of linprog."""

    def __init__(self, answer=None):
        self.answer, self.calls = answer, 0

    def __call__(self, *program, bounds):
        self.calls += 1
        answer, self.answer = self.answer, None
        if isinstance(answer, Exception):
            raise answer
        return answer or linprog(*program, bounds=bounds)


def answer_of(*x, status=0):
    """An answer as of linprog, right or wrong."""
    return SimpleNamespace(x=np.array(x), status=status, message="as prepared")


def test_same_rounded_inputs_are_solved_once():
    solver = Solver()
    inputs = [(0.3, 0.25), (0.301, 0.25), (-0.3, 0.25), (0.3, 0.24), (0.305, 0.25), (0.3, 0.26)]
    for (q, d_min), calls in zip(inputs, (1, 1, 1, 1, 2, 3)):
        solve_quote(q, 1.0, 1.0, d_min, solver)
        assert solver.calls == calls


@pytest.mark.parametrize("q", [-0.3, 0, 0.3])
def test_failed_solve_is_not_remembered(q):
    solver = Solver(answer_of(status=4))
    with pytest.raises(RuntimeError, match="solver status 4: as prepared"):
        solve_quote(q, 1.0, 1.0, 0.25, solver)
    others = [solve_quote(q, 1.0, 1.0, 0.25, solver) for _ in range(2)]
    assert others == [solve_quote(q, 1.0, 1.0, 0.25)] * 2 and solver.calls == 2


SOUND = dict(q=0.3, volatility=0.4, liquidity=3.0, depth_musd=1.0)


def choose(p, solver=linprog, q=0.0, volatility=0.0, liquidity=0.0, depth_musd=0.0, **fallback):
    """The strategy lp on a market of three numbers."""
    market = SimpleNamespace(volatility=volatility, liquidity=liquidity, depth_musd=depth_musd)
    lp = partial(optimize.quote_by_program, solver=solver)
    return choose_distances(lp, "lp", p, market, q, **fallback)


BEYOND = [
    (0.5, 0.5, NAN, 9, 9),
    (0.499, 0.499, 9, 9, 9),  # spread
    (0.9, 0.1, 9, 9, 9),  # edge
    (2.1, 0.9, 9, 9, 9),  # d_max
    (0.5, 0.5, 0.08, 9, 9),  # inventory: 0.09
    (0.5, 0.5, 9, 9, 0.24),  # price: 0.25
]
FAILURES = [
    *[({k: x}, None, f"ValueError: {k} is {x}") for k in [*SOUND][1:] for x in (NAN, INF, -0.1)],
    *[({"q": q}, None, f"ValueError: inventory is {q} of its limit") for q in (1.1, -1.1, NAN)],
    ({}, answer_of(status=4), "RuntimeError: solver status 4: as prepared"),
    ({}, ValueError("no"), "ValueError: no"),
    *[({}, answer_of(*x), "RuntimeError: the solver's answer breaks a constraint") for x in BEYOND],
]


@pytest.mark.parametrize("market, answer, reason", FAILURES)
def test_failure_falls_back_on_the_last_good_distances_if_young(market, answer, reason):
    p = Parameters(fallback_max_age_s=3, default_spread_bps=8)
    default = (4, 4, None, None, f"lp failed: {reason}", "default")
    good = (1.5, 0.9, None, None, f"lp failed: {reason}", "last_good")
    for age_s, expected in [(2.999, good), (3.0, default), (NAN, default)]:
        fallback = dict(last_good=Distances(1.5, 0.9), last_good_age_s=age_s)
        assert choose(p, Solver(answer), **SOUND | market, **fallback) == expected
    assert choose(p, Solver(answer), **SOUND | market) == default


@pytest.mark.parametrize("answer", [
    (1.0, NAN), (0.0, 1.0), (-1.0, 1.0), (1.0, INF), (1.0,), None, "no", (1.0, 1.0, 1.0), (1, 2j),
])  # fmt: skip
def test_whatever_a_strategy_returns_that_is_no_quote_falls_back_and_says_why(answer):
    quote = choose_distances(lambda *_: answer, "mine", Parameters(), None, 0.0)
    assert quote[:2] == (5, 5) and quote.source == "default" and quote.reason.startswith("mine ")


def test_program_quotes_while_all_is_sound():
    quote = choose(Parameters(), **SOUND, last_good=Distances(1.5, 0.9))
    spread_bps, lean = 0.4 * math.sqrt(10) + 1 / 4 + 1 / 2, 0.3 / 1.5
    assert quote[4:] == ("", "lp")
    assert quote.bid_bps == pytest.approx(spread_bps * (1 + lean) / 2, abs=H * spread_bps)
    assert quote.ask_bps == pytest.approx(spread_bps * (1 - lean) / 2, abs=H * spread_bps)


def test_quote_is_never_nearer_than_the_edge():
    for q, sigma in product(QS, (0.0, 0.3, 3.0)):
        quote = choose(Parameters(alpha=5), linprog, q, sigma, 50.0, 50.0)
        assert quote.source == "lp" and min(quote[:2]) >= 0.5 * (1 - 1e-9)


# ---- Base spread, cost, frequency --------------------------------------------------


def test_each_coefficient_of_the_base_spread_counts_in_its_own_term_above_a_floor():
    p = Parameters(gamma=2, delta=3, zeta=10, horizon_s=9, min_half_spread_bps=2.5)
    terms = optimize.base_spread_function(p, 0.25, liquidity=0.5, depth_musd=4.0)
    assert terms == (3, 2, 2, 2.5) and terms.total_bps == 7  # 2*2*0.25*3, 3/1.5, 10/5
    assert optimize.base_spread_function(p, 0.0, 9.0, 9.0).total_bps == 2.5  # not 0.3 + 1
    p = replace(p, liquidity_scale_musd=0.25, depth_scale_musd=1.0)
    assert optimize.base_spread_function(p, 0.25, 0.5, 4.0) == (3, 1, 2, 2.5)  # 3/(1 + 2)


def test_cost_is_inventory_risk_plus_price_risk():
    costs = optimize.cost_function(np.array([0.75, 1]), np.array([0.25, 0.5]), 0.25, 2, 4)
    assert costs.tolist() == [2.625, 5.125]  # 2*(-0.25)^2 + 4*0.625, 2*(-0.25)^2 + 4*1.25


def test_next_solve_is_due_when_the_price_may_have_moved():
    due_s = [
        optimize.get_optimization_frequency(Parameters(requote_move_bps=move_bps), volatility)
        for move_bps in (1, 3)
        for volatility in (0.0, NAN, 0.4, 0.5, 2.0, 4.0, INF)
    ]
    assert due_s == [5, 5, 5, 4, 0.25, 0.1, 0.1, 5, 5, 5, 5, 2.25, 0.5625, 0.1]


# ---- Parameters --------------------------------------------------------------------

FIXED = {"max_inventory", "maker_fee_bps", "taker_fee_bps", "order_latency_ms"}
FIXED |= {"feed_latency_ms", "clock_offset_ms", "fill_model"}
REFUSED = [
    ("alpha", -1, "must lie in 0 to 10: raise"),
    ("alpha", 10.0000001, "must lie in 0 to 10: lower"),
    ("clock_offset_ms", 86_400_001, "must lie in -86400000 to 86400000: lower"),
    ("order_qty", 0, "must be above 0: raise"),
    ("max_drawdown_usdt", -1, "must be above 0: raise"),
    ("order_qty", 0.0009, "must be at least the least order, 0.001: raise"),
    ("default_spread_bps", 0.9, "must be at least twice min_half_spread_bps = 0.5: raise"),
    ("max_inventory", 0.009, "must be at least order_qty = 0.01: raise"),
    ("fill_model", "hope", "is none of queue, touch, through: set"),
    *[("gamma", x, "is not a finite number: set") for x in (True, "1", NAN, INF, None, 10**400)],
]


def refusal(running=False, **changes):
    """What is said against these changes; empty if they are made."""
    now = Parameters(max_drawdown_usdt=50.0)
    try:
        changed = optimize.change_parameters(now, changes, 0.001, running)
    except ValueError as error:
        return str(error)
    assert vars(changed) == vars(now) | changes
    return ""


@pytest.mark.parametrize("name, value, rule", REFUSED)
def test_refusal_names_the_value_the_rule_and_the_remedy(name, value, rule):
    flag = "--" + name.replace("_", "-")
    assert refusal(**{name: value}).startswith(f"{name} = {value!r} {rule} {flag}")


def test_all_wrong_values_are_named_in_one_line_and_an_unknown_name_with_the_nearest():
    message = refusal(alpha=-1, max_drawdown_usdt="off", fill_model="hope")
    names = [part.split(" = ")[0] for part in message.split("; ")]
    assert names == ["alpha", "max_drawdown_usdt", "fill_model"] and "\n" not in message
    assert refusal(aplha=1) == "aplha is not a parameter: did you mean alpha?"
    assert refusal(xyz=1) == "xyz is not a parameter: see --help for the names"


def test_limits_are_allowed_and_values_may_fit_only_just_or_only_together():
    assert not refusal() and not refusal(alpha=0, beta=0.1, gamma=5, max_drawdown_usdt=None)
    assert not refusal(default_spread_bps=1) and not refusal(max_inventory=0.01)
    assert not refusal(order_qty=0.2, max_inventory=0.2)
    assert refusal(order_qty=0.2).startswith("max_inventory = 0.1 must be at least order_qty")
    three_lots = Parameters(order_qty=0.3, max_inventory=1)
    assert optimize.change_parameters(three_lots, {}, lot_size=0.1 * 3) == three_lots


@pytest.mark.parametrize("name", FIELDS)
def test_only_a_parameter_that_is_not_fixed_changes_while_running(name):
    default = FIELDS[name].default
    value = "touch" if name == "fill_model" else 1.01 * (default or 1)
    assert not refusal(**{name: value})
    assert not refusal(running=True, **{name: 50.0 if default is None else default})
    said = f"{name} cannot change while running: restart with the new value"
    assert refusal(running=True, **{name: value}) == (said if name in FIXED else "")
