"""What a run is said to have earned: accounts, averages and intervals worked by hand."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest

from backtest import (
    DECISION,
    FEW,
    HORIZONS_S,
    NS,
    Fill,
    Result,
    changes_by_minute,
    draw_figure,
    estimate_mean,
    format_table,
    measure,
    measure_drawdown,
    measure_markouts,
    measure_sharpe,
    result_rows,
    thin,
    time_mean,
)
from marketmaker import State
from optimize import Parameters

START_NS = 1_767_225_600 * NS  # 2026-01-01 00:00:00 UTC, a whole minute
DAY_S = 86_400


def fill(second, side, price, mid_price, fee=0.1, **changes):
    """One unit, filled some seconds after the start, of an order that arrived 2 s before."""
    time_ns = START_NS + round(second * NS)
    made = Fill(
        time_ns, time_ns, side, price, 1.0, fee, mid_price, 0.0, 5.0, False, time_ns - 2 * NS
    )
    return made._replace(**changes)


def decision(t_s, **given):
    """A row of DECISION, a sound market without a position unless given otherwise."""
    usual = dict.fromkeys(DECISION, 0.0) | dict(mid=100.0, bid=99.0, ask=101.0)
    terms = dict(volatility_bps=3.0, liquidity_bps=2.0, depth_bps=1.0, base_bps=6.0)
    row = usual | terms | {"t_s": t_s} | given
    return [row[name] for name in DECISION]


def result_of(decisions, fills=(), state=None, span_s=None, markouts=None, **changes):
    decisions = np.array(decisions, float).reshape(-1, len(DECISION))
    span_s = span_s or (decisions[-1, 0] if len(decisions) else 0)
    if markouts is None:
        markouts = np.full((len(fills), len(HORIZONS_S)), np.nan)
    given = dict(
        decisions=decisions, fills=list(fills), markouts=markouts, state=state or State(),
        counts=Counter({"lp": 3, "none": 1, "": 3, "warming up": 1}),
        order_counts=Counter({"sent": 8, "refused: would take": 2}), parameters=Parameters(),
        coin="BTC", title="BTCUSDT by hand", is_synthetic=False, first_ns=START_NS,
        last_ns=START_NS + round(span_s * NS), events=1234, outages=[],
        options={"impact_bps": 0.5, "participation": 1.0, "peer_rules": False},
    )  # fmt: skip
    return Result(**{**given, **changes})


def four_fills(fee=0.1):
    """Buy 1 at 99 (mid 100), buy 1 at 101 (mid 102), sell 1 at 105 (104), sell 1 at 97 (98).

    cash      -99 - 101 + 105 + 97 = 2, less 4 fees
    captured  (100 - 99) + (102 - 101) + (105 - 104) + (97 - 98) = 2
    held      1 from 100 to 102: 2;  2 from 102 to 104: 4;  1 from 104 to 98: -6;  sum 0
    """
    fills = [
        fill(1, 1, 99.0, 100.0, fee),
        fill(2, 1, 101.0, 102.0, fee),
        fill(70, -1, 105.0, 104.0, fee),
        fill(80, -1, 97.0, 98.0, fee),
    ]
    state = State(mid_price=100.0)
    for made in fills:
        state.revalue(made.mid_price)
        state.settle(made)
    return fills, state


# ---- Account -----------------------------------------------------------------------


def test_four_fills_add_up_as_on_paper():
    fills, state = four_fills()
    m = measure(result_of([decision(0), decision(100)], fills, state))
    assert m["gross_usdt"] == pytest.approx(2.0)
    assert m["fees_usdt"] == pytest.approx(0.4)
    assert m["net_usdt"] == pytest.approx(1.6)
    assert m["spread_captured_usdt"] == pytest.approx(2.0)
    assert m["revaluation_usdt"] == pytest.approx(0.0)
    assert m["residual_usdt"] == pytest.approx(0.0, abs=1e-9)
    assert m["turnover_usdt"] == pytest.approx(402.0)
    assert m["gross_bps"] == pytest.approx(2 / 402 * 1e4)
    assert m["fills"] == 4 and m["time_to_fill_s"] == 2.0 and m["queue_at_arrival"] == 5.0


def test_a_rebate_raises_net_and_is_called_a_rebate():
    fills, state = four_fills(fee=-0.1)
    result = result_of([decision(0), decision(100)], fills, state)
    m = measure(result)
    assert m["net_usdt"] == pytest.approx(2.4) and m["net_usdt"] > m["gross_usdt"]
    assert m["fees_usdt"] == pytest.approx(-0.4)
    (line,) = [row for row in format_table(m, result).splitlines() if "rebates" in row]
    assert line.split()[:3] == ["rebates", "received", "+0.40"]


def test_two_fills_of_one_order_count_once_in_the_fill_ratio():
    part = fill(1, 1, 99.0, 100.0)
    later = part._replace(time_ns=part.time_ns + NS)  # of the same order
    m = measure(result_of([decision(0), decision(9)], [part, later, fill(5, -1, 101.0, 100.0)]))
    assert (m["fills"], m["orders_filled"], m["fill_ratio"]) == (3, 2, 2 / 8)
    assert m["refused"] == {"would take": 2}


def test_taker_fills_and_unseen_queues_stay_out_of_the_medians():
    fills = [
        fill(1, 1, 99.0, 100.0, queue_at_arrival=math.inf, queue_ahead=0.5),
        fill(2, 1, 99.0, 100.0, queue_at_arrival=7.0, queue_ahead=1.5),
        fill(3, -1, 90.0, 100.0, is_taker=True, queue_at_arrival=0.0),
    ]
    m = measure(result_of([decision(0), decision(9)], fills))
    assert (m["queue_at_arrival"], m["queue_at_arrival_excluded"]) == (7.0, 1)
    assert (m["queue_at_fill"], m["queue_at_fill_excluded"]) == (1.0, 0)
    assert m["taker_fills"] == 1 and m["markouts"]["both"]["0 s"]["fills"] == 2
    assert m["markouts"]["sold"]["0 s"]["mean_bps"] is None


# ---- Markouts ----------------------------------------------------------------------


def test_markouts_take_the_mid_after_the_last_book_message_and_end_with_the_data():
    book_ns = np.array([0, 500, 1050, 2000, 12_000]) * 1_000_000
    mids = np.array([100.0, 101.0, 99.0, 102.0, 103.0])
    times_ns = np.array([1000, 1950, 2000]) * 1_000_000
    markouts = measure_markouts(
        times_ns, np.array([1, -1, 1]), np.array([100.0, 100.0, 100.0]), book_ns, mids
    )
    # 0.1 s later: 99 from 1050 ms on; 1 s: 102 at exactly 2000 ms; 10 s: still 102; 60 s: none
    assert markouts[0, :3] == pytest.approx([-100, 200, 200])
    assert markouts[1, :3] == pytest.approx([-200, -200, -200])  # sold, and it rose
    assert markouts[2, 2] == pytest.approx(300)  # 12000 ms is the last message: still known
    assert np.isnan(markouts[:, 3]).all()


def test_markouts_before_the_first_book_message_and_without_a_book_are_unknown():
    at = np.array([0]), np.array([1]), np.array([100.0])
    late = measure_markouts(*at, np.array([5 * NS, 90 * NS]), np.array([100.0, 101.0]))
    assert np.isnan(late[0, :2]).all() and late[0, 2:] == pytest.approx([0, 0])
    empty = np.array([], int)
    assert np.isnan(measure_markouts(*at, empty, empty)).all()
    assert measure_markouts(empty, empty, empty, empty, empty).shape == (0, len(HORIZONS_S))


def test_interval_treats_the_fills_of_a_minute_as_one_event():
    # deviations from the mean 2 are -2, 0, 1, 1; sums by cluster -2 and 2; G = 2, n = 4:
    # SE = sqrt(2 (4 + 4)) / 4 = 1; t of 1 degree of freedom at 97.5 % is 12.706
    cell = estimate_mean(np.array([0.0, 2.0, 3.0, 3.0, np.nan]), np.array([7, 7, 9, 9, 9]))
    assert (cell["mean_bps"], cell["fills"], cell["clusters"], cell["excluded"]) == (2, 4, 2, 1)
    assert cell["high_bps"] - 2 == pytest.approx(12.706, abs=1e-3)
    assert 2 - cell["low_bps"] == pytest.approx(12.706, abs=1e-3)


def test_interval_of_single_fills_is_the_textbook_one():
    values = np.random.default_rng(1).normal(size=500)
    cell = estimate_mean(values, np.arange(500))
    error = values.std(ddof=1) / math.sqrt(500)
    assert (cell["high_bps"] - cell["mean_bps"]) / error == pytest.approx(1.9647, abs=1e-4)


def test_one_minute_of_fills_gives_a_mean_and_no_interval():
    m = measure(result_of([decision(0), decision(9)], [fill(1, 1, 99.0, 100.0)]))
    cell = m["markouts"]["bought"]["0 s"]
    assert cell["mean_bps"] == pytest.approx(1 / 99 * 1e4)  # the effective half spread
    assert cell["high_bps"] is None
    assert m["markouts"]["both"]["60 s"]["excluded"] == 1


def test_markouts_of_bought_and_sold_are_told_apart():
    fills, state = four_fills()
    markouts = np.array([[1.0] * 4, [3.0] * 4, [-5.0] * 4, [-7.0, -7.0, -7.0, np.nan]])
    result = result_of([decision(0), decision(100)], fills, state, markouts=markouts)
    m = measure(result)["markouts"]
    assert [m[side]["1 s"]["mean_bps"] for side in ("bought", "sold", "both")] == [2, -6, -2]
    assert m["sold"]["60 s"]["fills"] == m["sold"]["60 s"]["excluded"] == 1


# ---- Risk --------------------------------------------------------------------------


def test_changes_by_minute_take_the_last_decision_up_to_each_whole_minute():
    # data begin at 00:00:20, so the whole minutes are at 40, 100 and 160 s
    t_s, net = np.array([10, 40, 41, 99, 101, 160]), np.array([1.0, 2.0, 3.0, 4.0, 5.0, 7.0])
    assert changes_by_minute(START_NS + 20 * NS, t_s, net).tolist() == [2, 3]


def test_minutes_before_the_first_decision_count_from_zero():
    assert changes_by_minute(START_NS, np.array([30.0, 60.0]), np.array([1.0, 4.0])) == [4]


def test_sharpe_and_its_error_follow_the_formula():
    # mean 1, deviations -1 -1 -1 3: sr = 1 / sqrt(12 / 3); with the variance 12 / 4 = 3,
    # skew (-3 + 27) / 4 / 3^1.5 = 2 / sqrt(3), raw kurtosis (3 + 81) / 4 / 9 = 7 / 3
    m = measure_sharpe(np.array([0.0, 0.0, 0.0, 4.0]), span_s=240)
    error = math.sqrt((1 - 2 / math.sqrt(3) * 0.5 + (7 / 3 - 1) / 4 * 0.5**2) / 3)
    assert (m["sharpe_per_minute"], m["sharpe_minutes"]) == (pytest.approx(0.5), 4)
    assert m["sharpe_per_minute_high"] == pytest.approx(0.5 + 1.96 * error)
    assert m["sharpe_per_minute_low"] == pytest.approx(0.5 - 1.96 * error)


def test_sharpe_does_not_see_a_constant_added_to_equity():
    rng = np.random.default_rng(2)
    t_s, net = np.arange(0.0, 3601.0), rng.normal(size=3601).cumsum()
    plain, raised = (
        measure_sharpe(changes_by_minute(START_NS, t_s, net + constant), 3600)
        for constant in (0.0, 1000.0)
    )
    assert raised == pytest.approx(plain, nan_ok=True)


def test_sharpe_is_annualised_from_three_days_on():
    changes = np.array([1.0, -1.0, 2.0])
    short, long = (measure_sharpe(changes, days * DAY_S) for days in (2.99, 3))
    assert math.isnan(short["sharpe_per_year"])
    assert long["sharpe_per_year"] == pytest.approx(long["sharpe_per_minute"] * 525_600**0.5)
    rows = [decision(float(t), gross=float(t % 7)) for t in range(0, 600, 30)]
    for days, is_shown in ((1, False), (4, True)):
        result = result_of(rows, span_s=days * DAY_S)
        assert ("per year" in format_table(measure(result), result)) == is_shown


def test_drawdown_begins_at_its_peak_and_ends_when_the_peak_is_back():
    t_s, net = np.arange(8.0), np.array([0.0, 5, 4, 5, 1, 2, 5, 6])
    assert measure_drawdown(t_s, net) == {
        "max_drawdown_usdt": 4, "max_drawdown_s": 3, "max_drawdown_recovered": True,
    }  # fmt: skip


def test_drawdown_that_never_recovers_lasts_to_the_end():
    found = measure_drawdown(np.arange(4.0) * 10, np.array([0.0, 3.0, -1.0, 1.0]))
    assert found == {
        "max_drawdown_usdt": 4, "max_drawdown_s": 20, "max_drawdown_recovered": False,
    }  # fmt: skip


def test_a_loss_from_the_start_is_a_drawdown_from_zero():
    assert measure_drawdown(np.arange(2.0), np.array([-2.0, -1.0]))["max_drawdown_usdt"] == 2


# ---- Averages over time ------------------------------------------------------------


def test_averages_weigh_each_decision_by_the_time_it_holds():
    nan = math.nan
    rows = [  # held for 10 s, 30 s, 60 s, and the end
        decision(0, bid=nan, base_bps=nan, inventory=0.0),
        decision(10, bid=99.0, ask=101.0, base_bps=4.0, inventory=0.1),
        decision(40, bid=98.0, ask=102.0, base_bps=8.0, inventory=-0.05),
        decision(100, bid=nan, ask=nan, base_bps=nan, inventory=0.3),
    ]
    m = measure(result_of(rows))
    assert (m["bid_uptime"], m["ask_uptime"]) == pytest.approx((0.9, 1.0))
    assert m["quoted_spread_bps"] == pytest.approx((30 * 200 + 60 * 400) / 90)
    assert m["base_spread_bps"] == pytest.approx((30 * 4 + 60 * 8) / 90)
    assert m["volatility_spread_bps"] == pytest.approx(3)
    assert m["inventory_mean"] == pytest.approx((30 * 0.1 - 60 * 0.05) / 100, abs=1e-12)
    assert m["inventory_std"] == pytest.approx(math.sqrt((30 * 0.01 + 60 * 0.0025) / 100))
    assert (m["inventory_min"], m["inventory_max"]) == (-0.05, 0.3)
    assert m["at_limit"] == pytest.approx(0.3)  # order 0.01, limit 0.1: only at 0.1


def test_room_for_exactly_one_more_order_is_not_at_the_limit():
    m = measure(result_of([decision(0, inventory=0.09), decision(10)]))
    assert m["at_limit"] == 0


def test_mean_over_no_time_is_unknown():
    assert math.isnan(time_mean(np.array([3.0]), np.array([0.0])))
    assert math.isnan(time_mean(np.array([np.nan, 1.0]), np.array([0.0, 5.0])))


# ---- Nothing to tell ---------------------------------------------------------------

EMPTY = {
    "no decision": [],
    "one decision": [decision(0)],
    "no quote": [decision(t, **dict.fromkeys(DECISION[2:4] + DECISION[7:], math.nan))
                 for t in (0, 90, 400)],
    "all unknown": [decision(t, **dict.fromkeys(DECISION[1:], math.nan)) for t in (0, 90, 400)],
    "nothing changes": [decision(float(t)) for t in range(0, 600, 20)],
}  # fmt: skip


@pytest.mark.parametrize("case", EMPTY)
def test_where_nothing_can_be_said_the_table_shows_a_dash(case):
    result = result_of(EMPTY[case], counts=Counter(), order_counts=Counter())
    m = measure(result)
    assert m["sharpe_per_minute"] is None and m["max_drawdown_usdt"] == 0
    assert m["fill_ratio"] is None and m["time_to_fill_s"] is None
    assert m["net_bps"] is None
    table = format_table(m, result)
    assert "nan" not in table and "None" not in table
    assert "- (0)" in table


def test_metrics_are_valid_json_without_nan():
    fills, state = four_fills()
    outage = dict(start_ns=START_NS, end_ns=START_NS + 30 * NS, fills=1, net_usdt=np.float64(-2))
    result = result_of([decision(0), decision(100)], fills, state, outages=[outage])
    m = measure(result)
    assert json.loads(json.dumps(m, allow_nan=False)) == m


# ---- Table and picture -------------------------------------------------------------


def test_no_line_of_the_table_is_wider_than_100_columns():
    fills, state = four_fills()
    state.turnover *= 1e6
    counts = Counter({f"reason {k} " + "so long " * 20: k for k in range(1, 20)}) + Counter(lp=9)
    outage = dict(start_ns=START_NS, end_ns=START_NS + 30 * NS, fills=1, net_usdt=-2.5)
    result = result_of(
        [decision(0), decision(100)], fills * 500, state, counts=counts, outages=[outage],
        title="long " * 40,
    )  # fmt: skip
    table = format_table(measure(result), result)
    assert max(map(len, table.splitlines())) <= 100
    assert "11 more" in table and "outage 2026-01-01 00:00:00" in table and "net -2.50" in table


def test_table_names_synthetic_data_units_and_frictions():
    fills, state = four_fills()
    result = result_of([decision(0), decision(100)], fills, state, is_synthetic=True)
    table = format_table(measure(result), result)
    for words in ("SYNTHETIC", "USDT", "bps", "BTC", "impact_bps", "would take", "warming up",
                  "2026-01-01 00:00:00 to 2026-01-01 00:01:40 UTC, 1,234 events"):  # fmt: skip
        assert words in table
    result.is_synthetic = False
    assert "SYNTHETIC" not in format_table(measure(result), result)


def test_thinned_rows_keep_the_extremes_of_every_column():
    rng = np.random.default_rng(3)
    rows = np.column_stack([np.arange(50_000.0), rng.normal(size=(50_000, 3))])
    rows[20_000:30_000, 3] = rows[::7, 1] = np.nan
    few = thin(rows, by_last=[2])
    assert len(few) < FEW and (np.diff(few[:, 0]) >= 0).all()
    assert (few[0, 0], few[-1, 0]) == (0, 49_999)
    known = rows[np.isfinite(rows[:, 1]), 1]
    assert (few[:, 1].min(), few[:, 1].max()) == (known.min(), known.max())
    assert few[-1, 2] == rows[-1, 2]
    assert np.isnan(few[:, 3]).any()  # a gap stays a gap
    assert thin(rows[:FEW], by_last=[2]).shape == (FEW, 4)


@pytest.mark.parametrize("case", ["four fills", "a day", "no quote", "one decision"])
def test_picture_is_written_whole_and_nothing_else(case, tmp_path):
    fills, state = four_fills()
    if case == "four fills":
        result = result_of([decision(0), decision(100)], fills, state)
    elif case == "a day":
        rows = np.tile(decision(0), (20_000, 1))
        rows[:, 0] = np.linspace(0, DAY_S, 20_000)
        result = result_of(rows, fills, state)
    else:
        result = result_of(EMPTY[case])
    draw_figure(result_rows(result, measure(result)), "", tmp_path / "result.png", shared=4)
    assert [path.name for path in tmp_path.iterdir()] == ["result.png"]
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
