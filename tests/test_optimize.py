"""optimize.py against closed forms, brute force and numbers worked by hand."""

import doctest
import itertools
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.optimize import linprog

import optimize
from optimize import (
    Distances,
    Parameters,
    base_spread_function,
    build_program,
    change_parameters,
    choose_distances,
    cost_function,
    get_optimization_frequency,
    solve_program,
    solve_quote,
    validate_parameters,
)

H = optimize.STEP
NAN, INF = math.nan, math.inf
ALPHAS = (0.1, 0.3, 1.0, 2.2, 5.0)
QS = [i / 10 for i in range(-10, 11)]
D_MINS = (1 / 64, 8 / 64, 17 / 64, 40 / 64, 1.0)  # 17/64 and more: the edge binds
GRID = list(itertools.product(QS, ALPHAS, D_MINS))
EVERYWHERE = pytest.mark.parametrize("alpha", ALPHAS)


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


def lean_of(solution):
    return solution.bid_distance - solution.ask_distance


@EVERYWHERE
@pytest.mark.parametrize("d_min", D_MINS)
def test_answer_is_near_the_known_one_in_distance_and_in_cost(alpha, d_min):
    for q in QS:
        answer = solve_quote(q, alpha, 1.0, d_min)[:2]
        known = known_answer(q, alpha, 1.0, d_min)
        assert answer == pytest.approx(known, abs=H), q
        cost, least = (cost_function(*d, q, alpha, 1.0) for d in (answer, known))
        assert least * (1 - 1e-9) <= cost <= least * 1.002, q


@pytest.mark.parametrize("beta", [0.1, 0.5, 3.0])
@pytest.mark.parametrize("q, d_min", [(0.3, 1 / 64), (-0.75, 1 / 64), (1, 17 / 64)])
def test_distances_depend_on_the_ratio_of_alpha_and_beta_only(beta, q, d_min):
    answer = solve_quote(q, 1.3 * beta, beta, d_min)
    unit = solve_quote(q, 1.3, 1.0, d_min)
    assert answer[:2] == pytest.approx(unit[:2], abs=1e-9)
    assert answer.cost == pytest.approx(beta * unit.cost)


@pytest.mark.parametrize("q", QS[11:])
@pytest.mark.parametrize("alpha, d_min", [(0.3, 1 / 64), (1, 17 / 64), (5, 40 / 64)])
def test_short_is_the_exact_mirror_image_of_long(q, alpha, d_min):
    long, short = solve_quote(q, alpha, 1.0, d_min), solve_quote(-q, alpha, 1.0, d_min)
    assert short == long._replace(
        bid_distance=long.ask_distance,
        ask_distance=long.bid_distance,
        bid_edge_price=long.ask_edge_price,
        ask_edge_price=long.bid_edge_price,
        inventory_price=-long.inventory_price,
    )


@EVERYWHERE
@pytest.mark.parametrize("d_min", D_MINS)
def test_flat_inventory_is_quoted_symmetrically(alpha, d_min):
    half = max(0.5, d_min)
    assert solve_quote(0.0, alpha, 1.0, d_min)[:2] == (half, half)


def test_flat_inventory_has_no_marginal_cost():
    assert solve_quote(0.0, 1.0, 1.0, 8 / 64).inventory_price == 0


@pytest.mark.parametrize("alpha, d_min", [(0.3, 1 / 64), (1, 17 / 64), (5, 40 / 64)])
def test_lean_never_falls_as_inventory_grows(alpha, d_min):
    leans = [lean_of(solve_quote(i / 20, alpha, 1.0, d_min)) for i in range(-20, 21)]
    assert leans == sorted(leans) and leans[0] < 0 < leans[-1]


@pytest.mark.parametrize("d_min", D_MINS)
def test_lean_never_falls_as_inventory_risk_weighs_more(d_min):
    for q in QS[11:]:
        leans = [lean_of(solve_quote(q, alpha, 1.0, d_min)) for alpha in (0, *ALPHAS)]
        assert leans == sorted(leans) and leans[0] == 0, q


# ---- The program against brute force -----------------------------------------------


def piecewise_cost(d_b, d_a, q, alpha, beta=1.0):
    """The program's own cost, by interpolation instead of chords."""

    def square(x, step):
        grid = step * np.arange(-200, 201)
        return np.interp(x, grid, grid**2)

    price_risk = square(d_b, H) + square(d_a, H)
    return alpha * square(q - d_b + d_a, H / math.sqrt(2)) + beta * price_risk


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


@pytest.mark.parametrize("q, alpha, d_min", GRID[::7])
def test_no_other_quote_is_cheaper(q, alpha, d_min):
    answer = solve_quote(q, alpha, 1.0, d_min)
    own = piecewise_cost(*answer[:2], q, alpha)
    assert own == pytest.approx(answer.cost, abs=1e-9)
    assert least_cost(q, alpha, d_min, d_min) == pytest.approx(own, abs=1e-9)


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
        assert left - 1e-6 <= price <= right + 1e-6
        assert not smooth or right - left < 1e-6


# ---- The matrices ------------------------------------------------------------------


def test_rows_stand_in_the_order_of_the_docstring():
    q, h_r = 0.3, H / math.sqrt(2)
    rows = [([-1, -1, 0, 0, 0], -1)]
    for u in h_r * np.arange(-46, 46):  # -1 to 1, rounded outward to the grid
        k = 2 * u + h_r
        rows.append(([-k, k, -1, 0, 0], u * (u + h_r) - k * q))
    rows += [([2 * u + H, 0, 0, -1, 0], u * (u + H)) for u in H * np.arange(64)]
    rows += [([0, 2 * u + H, 0, 0, -1], u * (u + H)) for u in H * np.arange(64)]
    program = build_program(q, alpha=2.0, beta=3.0, d_min=0.25)
    assert program.c.tolist() == [0, 0, 2, 3, 3]
    assert program.A_ub.shape == (221, 5) and program.b_ub.shape == (221,)
    np.testing.assert_allclose(program.A_ub, [a for a, _ in rows], atol=1e-12)
    np.testing.assert_allclose(program.b_ub, [b for _, b in rows], atol=1e-12)
    assert program.bounds.tolist() == [[0.25, 2]] * 2 + [[0, INF]] * 3


@pytest.mark.parametrize(
    "rows, x, step, end", [(slice(1, 93), 1, H / 2**0.5, 1), (slice(93, 157), 0, H, 2)]
)
def test_chords_meet_the_square_on_the_grid_and_never_pass_below_it(rows, x, step, end):
    program = build_program(0.0, 1.0, 1.0, 0.0)

    def excess(at):  # of the highest chord over the square
        chords = np.outer(at, program.A_ub[rows, x]) - program.b_ub[rows]
        return chords.max(axis=1) - at**2

    assert np.abs(excess(step * np.arange(end // step + 1))).max() < 1e-12
    between = excess(np.linspace(0, end, 1001))
    assert between.min() > -1e-12 and between.max() <= step**2 / 4 + 1e-12


# ---- Rounding and memory -----------------------------------------------------------


class Solver:
    """Counts its calls; gives the answers it was told to, then the true ones."""

    def __init__(self, *answers):
        self.answers, self.calls = list(answers), 0

    def __call__(self, *program, bounds):
        self.calls += 1
        if not self.answers:
            return linprog(*program, bounds=bounds)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def answer_of(*x, status=0):
    """What linprog returns, reduced to what is read."""
    return SimpleNamespace(
        x=np.array(x),
        status=status,
        message="as told",
        fun=1.0,
        ineqlin=SimpleNamespace(marginals=np.zeros(221)),
        lower=SimpleNamespace(marginals=np.zeros(5)),
    )


def test_edge_is_rounded_up_so_that_it_is_never_undercut():
    assert solve_quote(1.0, 5.0, 1.0, 0.2501).ask_distance == 17 / 64
    assert solve_quote(1.0, 5.0, 1.0, 0.25).ask_distance == 16 / 64


def test_same_rounded_inputs_are_solved_once():
    solver = Solver()
    for q, d_min in [(0.3, 0.25), (0.301, 0.25), (-0.3, 0.25), (0.3, 0.24)]:
        solve_quote(q, 1.0, 1.0, d_min, solver)
    assert solver.calls == 1
    for q, d_min in [(0.305, 0.25), (0.3, 0.26)]:
        solve_quote(q, 1.0, 1.0, d_min, solver)
    assert solver.calls == 3


def test_failed_solve_is_not_remembered():
    solver = Solver(answer_of(status=4))
    first, *others = [solve_quote(0.3, 1.0, 1.0, 0.25, solver) for _ in range(3)]
    assert first.failure and math.isnan(first.bid_distance)
    assert others == [solve_quote(0.3, 1.0, 1.0, 0.25)] * 2
    assert solver.calls == 2


def test_day_of_seconds_needs_a_few_hundred_solves():
    rng = np.random.default_rng(7)
    half_orders = rng.integers(-20, 21, 86_400)
    d_min = 0.5 / np.maximum(0.5, 2.2 * np.exp(0.2 * rng.standard_normal(86_400)))
    always_feasible = answer_of(1.5, 1.5, 9, 9, 9)
    solver = Solver(*[always_feasible] * 1000)
    for q, edge in zip((half_orders / 20).tolist(), d_min.tolist()):
        solve_quote(q, 1.0, 1.0, edge, solver)
    asked = {*zip(np.abs(half_orders).tolist(), np.ceil(d_min * 64).tolist())}
    assert solver.calls == len(asked) < 1000


# ---- Fallback ----------------------------------------------------------------------

SOUND = dict(q=0.3, ema_volatility=0.4, liquidity=3.0, depth_musd=1.0)
LAST_GOOD = Distances(1.5, 0.9, "lp")
BAD_VALUES = [
    ({key: value}, None, f"{word} is {value}")
    for key, word in [
        ("ema_volatility", "volatility"),
        ("liquidity", "liquidity"),
        ("depth_musd", "depth"),
    ]
    for value in (NAN, INF, -0.1)
]
BAD_VALUES += [({"q": q}, None, f"inventory is {q}") for q in (1.1, -1.1, NAN)]
BAD_VALUES += [pytest.param({"ema_volatility": 1e308}, None, "spread")]
BAD_ANSWERS = [
    *[({}, answer_of(status=i), f"solver status {i}: as told") for i in (1, 2, 3, 4)],
    ({}, ValueError("no"), "solver raised ValueError: no"),
    ({}, answer_of(0.5, 0.5, NAN, 9, 9), "not finite"),
    ({}, answer_of(0.5, 0.5), "not finite"),  # wrong shape
    ({}, answer_of(0.499, 0.499, 9, 9, 9), "breaks a constraint"),  # spread
    ({}, answer_of(0.9, 0.1, 9, 9, 9), "breaks a constraint"),  # edge
    ({}, answer_of(2.1, 0.9, 9, 9, 9), "breaks a constraint"),  # d_max
    ({}, answer_of(0.5, 0.5, 0.08, 9, 9), "breaks a constraint"),  # inventory: 0.09
    ({}, answer_of(0.5, 0.5, 9, 9, 0.24), "breaks a constraint"),  # price: 0.25
]


@pytest.mark.parametrize("market, answer, reason", BAD_VALUES + BAD_ANSWERS)
@pytest.mark.parametrize(
    "last_good, age_s, source, distances",
    [
        (LAST_GOOD, 0.0, "last_good", (1.5, 0.9)),
        (LAST_GOOD, 2.999, "last_good", (1.5, 0.9)),
        pytest.param(LAST_GOOD, 3.0, "default", (4, 4)),
        (LAST_GOOD, 3.001, "default", (4, 4)),
        (LAST_GOOD, NAN, "default", (4, 4)),
        (None, 0.0, "default", (4, 4)),
    ],
)
def test_every_failure_falls_back(
    market, answer, reason, last_good, age_s, source, distances
):
    parameters = Parameters(fallback_max_age_s=3, default_spread_bps=8)
    solver = Solver(answer) if answer else linprog
    found = choose_distances(
        parameters, **{**SOUND, **market}, last_good=last_good, last_good_age_s=age_s,
        solver=solver,
    )  # fmt: skip
    assert (found.source, found.bid_bps, found.ask_bps) == (source, *distances)
    assert reason in found.reason
    assert answer is None or solver.calls == 1


def test_program_quotes_while_all_is_sound():
    found = choose_distances(Parameters(), **SOUND, last_good=LAST_GOOD)
    spread, lean = 0.4 * math.sqrt(10) + 1 / 4 + 1 / 2, 0.3 / 1.5
    assert (found.source, found.reason) == ("lp", "")
    assert found.bid_bps == pytest.approx(spread * (1 + lean) / 2, abs=H * spread)
    assert found.ask_bps == pytest.approx(spread * (1 - lean) / 2, abs=H * spread)


def test_quote_is_never_nearer_than_the_edge():
    for q, sigma in itertools.product(QS, (0.0, 0.3, 3.0)):
        found = choose_distances(Parameters(alpha=5), q, sigma, 50.0, 50.0)
        assert found.source == "lp"
        assert min(found.bid_bps, found.ask_bps) >= 0.5 * (1 - 1e-9)


def test_real_solver_reports_an_impossible_program_as_a_failure():
    too_near = np.array([[0.25, 0.4]] * 2 + [[0, INF]] * 3)  # 0.8 at most: no spread
    solution = solve_program(build_program(0.3, 1, 1, 0.25)._replace(bounds=too_near))
    assert solution.failure.startswith("solver status 2")


# ---- Base spread, cost, frequency --------------------------------------------------


def test_base_spread_is_the_sum_of_its_three_terms():
    terms = base_spread_function(Parameters(), 0.4, liquidity=3.0, depth_musd=1.0)
    assert terms == pytest.approx((1.264911, 0.25, 0.5, 0.5), abs=1e-6)  # 0.4 sqrt(10)
    assert terms.total_bps == pytest.approx(2.014911, abs=1e-6)


def test_each_coefficient_of_the_base_spread_counts_in_its_own_term():
    parameters = Parameters(gamma=2, delta=3, zeta=10, horizon_s=9)
    terms = base_spread_function(parameters, 0.25, liquidity=0.5, depth_musd=4.0)
    assert terms[:3] == (3.0, 2.0, 2.0)  # 2*2*0.25*3, 3/1.5, 10/5


def test_nervous_illiquid_or_thin_market_is_quoted_wider_and_none_below_the_floor():
    def spread(sigma=0.4, liquidity=3.0, depth=1.0):
        return base_spread_function(Parameters(), sigma, liquidity, depth).total_bps

    assert spread(sigma=0.5) > spread() > spread(sigma=0.3)
    assert spread(liquidity=2.0) > spread() > spread(liquidity=4.0)
    assert spread(depth=0.5) > spread() > spread(depth=2.0)
    assert spread(0.0, 1e6, 1e6) == 0.5


def test_cost_is_inventory_risk_plus_price_risk():
    assert cost_function(0.75, 0.25, 0.25, 2, 4) == 2.625  # 2*(-0.25)^2 + 4*0.625
    costs = cost_function(np.array([1.0, 0.5]), np.array([0.5, 1.0]), 1.0, 1, 1)
    assert costs.tolist() == [1.5, 3.5]  # 0.25 + 1.25, 2.25 + 1.25


@pytest.mark.parametrize(
    "move_bps, volatility, seconds",
    [
        (1, 1.0, 1),
        (1, 2.0, 0.25),
        (3, 2.0, 2.25),
        (1, 0.5, 4),
        (1, 0.4, 5),
        (1, 4.0, 0.1),
        (1, 0.0, 5),
        (1, NAN, 5),
        (1, INF, 0.1),
    ],
)
def test_next_solve_is_due_when_the_price_may_have_moved(move_bps, volatility, seconds):
    due = get_optimization_frequency(Parameters(requote_move_bps=move_bps), volatility)
    assert due == pytest.approx(seconds)


# ---- Parameters --------------------------------------------------------------------

TABLE = {  # default, lowest, highest; None: a rule of its own
    "alpha": (1, 0, 10),
    "beta": (1, 0.1, 10),
    "gamma": (0.5, 0, 5),
    "delta": (1, 0, 20),
    "zeta": (1, 0, 20),
    "min_half_spread_bps": (0.5, 0.01, 100),
    "default_spread_bps": (10, 0.02, 500),
    "horizon_s": (10, 0.1, 3600),
    "half_life_s": (30, 1, 3600),
    "requote_move_bps": (1, 0.05, 50),
    "depth_band_bps": (1, 0.1, 100),
    "order_qty": (0.01, None, None),
    "max_inventory": (0.1, None, None),
    "max_depth_share": (0.05, 0, 1),
    "maker_fee_bps": (2, -5, 100),
    "taker_fee_bps": (5.5, -5, 100),
    "order_latency_ms": (100, 0, 60_000),
    "feed_latency_ms": (100, 0, 60_000),
    "clock_offset_ms": (0, -86_400_000, 86_400_000),
    "stale_after_s": (5, 0.5, 60),
    "fallback_max_age_s": (5, 0, 60),
    "max_mark_gap_bps": (50, 1, 1000),
    "max_drawdown_usdt": (None, None, None),
    "fill_model": ("queue", None, None),
}
RANGES = [(name, *row[1:]) for name, row in TABLE.items() if row[1] is not None]
FIXED = {"maker_fee_bps", "taker_fee_bps", "order_latency_ms", "feed_latency_ms"}
FIXED |= {"max_inventory", "clock_offset_ms", "fill_model"}


def flag(name):
    return "--" + name.replace("_", "-")


def refusal(**changes):
    with pytest.raises(ValueError) as error:
        validate_parameters(Parameters(**changes), lot_size=0.001)
    return str(error.value)


def test_defaults_are_those_of_the_table_and_are_valid():
    defaults = {name: row[0] for name, row in TABLE.items()}
    assert vars(validate_parameters(Parameters(), lot_size=0.001)) == defaults


@pytest.mark.parametrize("name, low, high", RANGES)
def test_value_outside_its_range_is_refused_with_rule_and_remedy(name, low, high):
    fitting = {"default_spread_bps": 500, "min_half_spread_bps": 0.01}
    for limit in (low, high):
        validate_parameters(Parameters(**{**fitting, name: limit}))
    for value, remedy in [(low - (abs(low) or 1), "raise"), (1.5 * high, "lower")]:
        message = refusal(**{name: value})
        shape = rf"{name} = (\S+) must lie in (\S+) to (\S+): {remedy} {flag(name)}"
        numbers = re.fullmatch(shape, message).groups()
        assert [float(number) for number in numbers] == [value, low, high]


def test_refused_value_is_shown_to_its_last_digit():
    assert "alpha = 10.0000001 must" in refusal(alpha=10.0000001)


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", ["order_qty", "max_inventory", "max_drawdown_usdt"])
def test_quantity_or_loss_limit_must_be_above_zero(name, value):
    message = f"{name} = {value} must be above 0: raise {flag(name)}"
    assert refusal(**{name: value}) == message


@pytest.mark.parametrize("value", [True, "1", NAN, INF, None, [1]])
@pytest.mark.parametrize("name", sorted({*TABLE} - {"max_drawdown_usdt", "fill_model"}))
def test_value_that_is_no_finite_number_is_refused(name, value):
    assert refusal(**{name: value}) == (
        f"{name} = {value!r} is not a finite number: set {flag(name)} to one"
    )


def test_integer_too_large_for_a_float_is_refused():
    assert "alpha" in refusal(alpha=10**400)


def test_all_wrong_values_are_named_in_one_line():
    message = refusal(alpha=-1, max_drawdown_usdt="off", fill_model="hope")
    names = [part.split(" = ")[0] for part in message.split("; ")]
    assert names == ["alpha", "max_drawdown_usdt", "fill_model"]
    assert "'hope' is none of queue, touch, through: set --fill-model" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "changes, part",
    [
        (dict(default_spread_bps=0.9), "twice min_half_spread_bps = 0.5: raise --defa"),
        (dict(max_inventory=0.009), "at least order_qty = 0.01: raise --max-inventory"),
        (dict(order_qty=0.0009), "at least one lot of 0.001: raise --order-qty"),
    ],
)
def test_values_must_fit_each_other_and_the_lot(changes, part):
    assert part in refusal(**changes)


def test_values_that_just_fit_each_other_are_accepted():
    just = Parameters(default_spread_bps=1, max_inventory=0.01)
    assert validate_parameters(just, lot_size=0.01) is just
    validate_parameters(Parameters(order_qty=0.3, max_inventory=1), lot_size=0.1 * 3)


def test_changes_are_validated_as_a_whole():
    changes = dict(order_qty=0.2, max_inventory=0.4)  # valid together only
    both = change_parameters(Parameters(gamma=2), changes)
    assert both == Parameters(gamma=2, **changes)
    with pytest.raises(ValueError, match=r"max_inventory = 0\.1 must be at least"):
        change_parameters(Parameters(), dict(order_qty=0.2))


def test_unknown_parameter_suggests_the_nearest_name():
    with pytest.raises(ValueError, match=r"aplha is not .*: did you mean alpha\?"):
        change_parameters(Parameters(), {"aplha": 1})
    with pytest.raises(ValueError, match=r"xyz is not .*: see --help"):
        change_parameters(Parameters(), {"xyz": 1})


@pytest.mark.parametrize("name", TABLE)
def test_only_a_parameter_that_is_not_fixed_changes_while_running(name):
    now = Parameters(max_drawdown_usdt=50.0)
    value = "touch" if name == "fill_model" else 1.01 * getattr(now, name) + 0.01
    changed = change_parameters(now, {name: value})
    assert getattr(changed, name) == value
    if name not in FIXED:
        assert change_parameters(now, {name: value}, running=True) == changed
        return
    assert change_parameters(now, {name: getattr(now, name)}, running=True) == now
    with pytest.raises(ValueError, match=f"{name} cannot change .*: restart"):
        change_parameters(now, {name: value}, running=True)
