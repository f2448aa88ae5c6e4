"""What a run is said to have earned: accounts, averages and intervals worked by hand."""

import json
import math
import re
from itertools import chain
from pathlib import Path

from backtest import estimate_mean, measure_drawdown, measure_sharpe
from feed import ASK
from market import FAR, WALL, beats, busy_market, calm, delta, lost, snapshot, trades, write
from test_backtest import CALM, FOUR, ROUGH, folder, near, play, play_fixed  # noqa: F401

import numpy as np
import pytest

NAN = math.nan


# ---- Four fills by pencil and paper ------------------------------------------------


@pytest.fixture
def four() -> dict:
    """Bought 0.5 at 49,998, sold 1 at 50,002, bought 0.25 and 0.75 at 49,998.5; the mid was
    50,000, 50,001 (twice), 49,999, and is 50,000 at the end.
    """
    return play_fixed(FOUR).metrics


def test_the_account_adds_up_as_on_paper(four):
    money = dict(
        spread_captured=1 + 1 + 0.625 + 0.375,  # 0.5 x 2, 1 x 1, 0.25 x 2.5, 0.75 x 0.5
        revaluation=0.5 + 0.5 + 0.5,  # 0.5 x 1, -0.25 x -2, 0.5 x 1
        gross=4.5,
        fees=24.9999,  # 4.9998 + 10.0004 + 2.499925 + 7.499775
        net=-20.4999,  # = cash -25,020.4999 + 0.5 x 50,000 at the end
    )
    for name, usdt in money.items():
        assert (four[f"{name}_usdt"], four[f"{name}_bps"]) == near((usdt, usdt / 12.49995)), name
    assert four["turnover_usdt"] == 24_999 + 50_002 + 12_499.625 + 37_498.875
    assert abs(four["residual_usdt"]) < 1e-9


def test_markouts_by_side_and_horizon_are_those_on_paper(four):
    effective = [2 / 49_998, 2.5 / 49_998.5, 0.5 / 49_998.5]  # bought, and no mid 1 s later moved
    later = [1 / 49_998, 1.5 / 49_998.5]  # 10 s; the last one's is after the end
    for horizon, bought, sold, excluded in (
        ("0 s", effective, [1 / 50_002], 0), ("0.1 s", effective, [1 / 50_002], 0),
        ("1 s", effective, [1 / 50_002], 0), ("10 s", later, [3 / 50_002], 1), ("60 s", [], [], 4),
    ):  # fmt: skip
        for side, values in (("bought", bought), ("sold", sold), ("both", bought + sold)):
            cell = four["markouts"][side][horizon]
            mean = near(1e4 * sum(values) / len(values)) if values else None
            assert (cell["mean"], cell["half_width"], cell["n"]) == (mean, None, len(values))
        assert cell["excluded"] == excluded


def test_orders_quotes_and_risk_are_those_on_paper(four):
    # Quoted at 11.5, 16.5, 21.5 and 26.5 s of 0.5 to 29.9; held -0.5, then 0.5 twice
    spreads = 5 * 4 / 5 + 5 * 5 / 5.0001 + 5 * 4 / 4.9999 + 3.4 * 4 / 5
    mean = (-0.5 * 5 + 0.5 * 8.4) / 29.4
    for name, value in dict(
        fills=4, taker_fills=0, orders_sent=8, orders_filled=3, fill_ratio=3 / 8,
        orders_refused=0, time_to_fill_s=2.4,  # 0.4, 1.4, 3.4, 3.4
        queue_at_arrival=1, queue_at_fill=1, queue_at_fill_excluded=0,  # 2, 2, 0, 0
        span_s=29.4, events=len(FOUR) + 1, bid_uptime=18.4 / 29.4, ask_uptime=18.4 / 29.4,
        quoted_spread_bps=spreads / 18.4, inventory_mean=mean,
        inventory_std=(0.25 * 13.4 / 29.4 - mean**2) ** 0.5, inventory_min=-0.5,
        inventory_max=0.5, at_limit=0,
        max_drawdown_usdt=20.9999, max_drawdown_s=18.4,  # from 11.5 to the end
    ).items():  # fmt: skip
        assert four[name] == near(value), name
    assert four["decisions"] == dict(fixed=4, last_good=0, default=0, none=3)
    assert (four["reasons"], four["refused"], four["outages"]) == ({"warming up": 3}, {}, [])
    assert four["sharpe_per_minute"] is four["sharpe_per_year"] is None
    assert four["max_drawdown_recovered"] is four["is_synthetic"] is False


def test_a_rebate_raises_the_net_by_just_what_it_is():
    rebated, free = (play_fixed(FOUR, maker_fee_bps=fee).metrics for fee in (-1.0, 0.0))
    assert rebated["net_usdt"] == near(free["net_usdt"] + 24.9999 / 2)


def test_inventory_is_marked_to_the_last_mid_of_all():
    """It comes after the last decision and the last whole second."""
    hit, fall = trades(12_000, (ASK, -5, 1)), delta(14_700, {-1: 0, -4: 0}, {-3: 5})
    metrics = play_fixed(calm(14_600, hit, fall)).metrics
    assert metrics["net_usdt"] == near(2 - 3 - 9.9996)  # the mid: 49,997


def test_taker_fills_are_in_the_account_and_in_no_markout():
    """Bought 1 at 49,998, the mid falls to 49,990.5: stopped, and closed level by level."""
    fall = delta(12_700, dict.fromkeys(WALL, 0) | {-20: 0.5, -22: 0.25, -30: 9}, {-18: 3})
    fees = dict(maker_fee_bps=0.0, taker_fee_bps=10.0)
    result = play_fixed(calm(30_500, trades(12_000, (ASK, -5, 1)), fall),
                        max_drawdown_usdt=3.0, **fees)  # fmt: skip
    assert result.traded[1:] == [(13_500, -20, -0.5), (13_500, -22, -0.25), (13_500, -30, -0.25)]
    m, proceeds = result.metrics, 0.5 * 49_990 + 0.25 * 49_989 + 0.25 * 49_985
    assert m["net_usdt"] == near(proceeds * (1 - 10e-4) - 49_998)
    assert m["spread_captured_usdt"] == near(2 - 0.5 * 0.5 - 0.25 * 1.5 - 0.25 * 5.5)
    assert (m["fills"], m["taker_fills"], m["markouts"]["both"]["0 s"]["n"]) == (4, 3, 1)


def test_no_room_for_one_more_order_is_the_limit():
    """Bought 1 of 2 at 12 s, and the other at 22 s: from the decision of 26.5 s on."""
    hits = trades(12_000, (ASK, -9, 1)), trades(22_000, (ASK, -9, 1))
    for limit, share in ((2, 3 / 29), (2.875, 3 / 29), (3, 0)):
        metrics = play_fixed(calm(30_000, *hits), max_inventory=limit).metrics
        assert metrics["inventory_max"] == 2 and metrics["at_limit"] == near(share)


# ---- Markouts and intervals --------------------------------------------------------


@pytest.mark.parametrize("last_ms, is_known", [(22_000, True), (21_999, False)])
def test_a_markout_takes_the_mid_after_the_last_book_message_up_to_then(last_ms, is_known):
    """Bought at 49,998 at 12 s; the mid rises just in time for 0.1 s, and too late for 1 s."""
    rises = delta(12_100, {}, {1: 0, 3: 5}), delta(13_001, {}, {3: 0}), delta(last_ms)
    metrics = play_fixed(calm(12_000, trades(12_000, (ASK, -9, 1)), *rises)).metrics
    means = [metrics["markouts"]["bought"][h]["mean"] for h in ("0.1 s", "1 s", "10 s", "60 s")]
    gained = [2.5, 2.5, 2.75 if is_known else None, None]  # the mid: 50,000.5, then 50,000.75
    assert means == [usdt and near(1e4 * usdt / 49_998) for usdt in gained]


def test_the_interval_treats_the_values_of_a_cluster_as_one_event():
    # deviations from the mean 2 are -2, 0, 1, 1; sums by cluster -2 and 2; G = 2, n = 4:
    # SE = sqrt(2 (4 + 4)) / 4 = 1; t of 1 degree of freedom at 97.5 % is 12.706
    e = estimate_mean(np.array([0.0, 2.0, 3.0, 3.0, NAN]), np.array([7, 7, 9, 9, 9]))
    assert (e.mean, e.n, e.excluded) == (2, 4, 1)
    assert e.half_width == pytest.approx(12.706, abs=1e-3)
    alone = estimate_mean(np.array([1.0, 3.0]), np.array([7, 7]))
    assert alone.mean == 2 and math.isnan(alone.half_width)


# ---- Risk --------------------------------------------------------------------------


def test_sharpe_and_its_interval_follow_the_formula():
    # mean 0, variance (9 + 1 + 1 + 9) / 4 = 5; the means of the ten parts are 1 and -1 by turns,
    # in deviations +-1/sqrt(5), with a standard deviation of sqrt(10/9) that: SE = 1/sqrt(45)
    for shift, sharpe in ((0, 0), (1, 1 / math.sqrt(4 * 20 / 19))):
        net = np.array([3.0, -1.0, 1.0, -3.0] * 5) if not shift else np.array([3.0, -1.0] * 10)
        m = measure_sharpe(net, 240)
        half = 0 if shift else 2.262 / math.sqrt(45)  # parts that are alike leave no doubt
        bounds = [m[f"sharpe_per_minute{bound}"] for bound in ("", "_low", "_high")]
        assert bounds == pytest.approx([sharpe, sharpe - half, sharpe + half])
    assert m["sharpe_minutes"] == 20


def test_the_minutes_of_a_hole_do_not_exist():
    """Two files of 5 minutes, three days apart; one more whose book is lost for 3 minutes."""
    day, later = write(Path("a.gz"), calm(300_000), **CALM), 3 * 86_400_000
    after = [snapshot(later + 500, WALL, FAR), *beats(later + 1500, later + 300_000)]
    other = write(Path("b.gz"), after, **CALM)
    two = play(day, "--data", day, other, "--strategy", "fixed").metrics
    assert (two["sharpe_minutes"], two["holes"]) == (8, 1) and two["sharpe_per_year"] is None
    assert two["span_s"] == near(2 * 299) and two["bid_uptime"] == near((288 + 298) / 598)
    hit, gone = trades(100_000, (ASK, -9, 1)), lost(101_000)
    lines = calm(101_000, hit, gone, snapshot(280_500, WALL, FAR), *beats(281_500, 500_000))
    one = play_fixed(lines).metrics
    assert (one["sharpe_minutes"], one["holes"], one["holes_s"]) == (3, 1, 180)
    known = [cell["n"] for cell in one["markouts"]["bought"].values()]
    assert known == [1, 1, 0, 0, 0]  # at 0 and 0.1 s; the others lie in the hole


def test_sharpe_is_annualised_from_three_days_on_and_there_is_none_of_minutes_that_are_alike():
    short, long = (measure_sharpe(np.array([1.0, -1, 2]), days * 86_400) for days in (2.99, 3))
    assert math.isnan(short["sharpe_per_year"])
    assert long["sharpe_per_year"] == pytest.approx(long["sharpe_per_minute"] * 525_600**0.5)
    for net in ([], [1.0, 2.0], [3.0, 3.0, 3.0, 3.0]):
        assert math.isnan(measure_sharpe(np.array(net), 240)["sharpe_per_minute"])


@pytest.mark.parametrize("net, depth, lasted_s, is_back", [
    ([0, 5, 4, 5, 1, 2, 5, 6], 4, 30, True),  # from the last moment at the peak to the first back
    ([0, 3, -1, 1], 4, 20, False),  # to the end of the data
    ([-2, -1, 0, 1], 2, 20, True),  # a loss from the start is one from 0
    ([0, 1, 1, 2], 0, 0, True),
])  # fmt: skip
def test_the_deepest_drawdown_and_how_long_it_lasted(net, depth, lasted_s, is_back):
    assert measure_drawdown(np.arange(len(net)) * 10.0, np.array(net, float)) == {
        "max_drawdown_usdt": depth, "max_drawdown_s": lasted_s, "max_drawdown_recovered": is_back,
    }  # fmt: skip


def test_the_base_spread_and_its_terms_weigh_each_decision_by_the_time_it_holds():
    result = play(write(Path("market.gz"), busy_market(7, 60), **ROUGH))
    metrics, times_ms = result.metrics, [row["ms"] for row in (*result.log, result.equity[-1])]
    held_ms, spreads = np.diff(times_ms), [row["base_spread_bps"] for row in result.log]
    known = [k for k, spread in enumerate(spreads) if spread]
    average = np.average([float(spreads[k]) for k in known], weights=held_ms[known])
    terms = [metrics[f"{name}_spread_bps"] for name in ("volatility", "liquidity", "depth")]
    assert metrics["base_spread_bps"] == near(average) == near(sum(terms)) and 0 not in terms


# ---- Table -------------------------------------------------------------------------


def numbers_in(table: str) -> list[tuple[float, float]]:
    """Numbers of a text, and half a unit of their last digit; percents as shares."""
    numbers = []
    for text, percent in re.findall(r"([-+]?[\d,]*\.?\d+(?:e-?\d+)?)(%?)", table):
        mantissa, _, exponent = text.replace(",", "").partition("e")
        half = 0.5 * 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
        numbers.append(tuple(x / (100 if percent else 1)
                             for x in (float(text.replace(",", "")), half * 1.001)))  # fmt: skip
    return numbers


def test_the_table_holds_every_number_of_the_metrics():
    market = write(Path("market.gz"), busy_market(7, 400), **ROUGH)
    result = play(market, "--outages", "2")
    metrics, numbers = result.metrics, numbers_in(result.table)
    assert metrics["outages"] and metrics["fills"] > 20

    def missing(name: str, value) -> set[str]:
        if isinstance(value, dict):
            return set().union(*(missing(f"{name} {key}", part) for key, part in value.items()))
        is_number = isinstance(value, float | int) and not isinstance(value, bool)
        is_told = not is_number or any(abs(value - x) <= half for x, half in numbers)
        return set() if is_told else {name}

    told_of_all = [metrics["markouts"][side].values() for side in ("bought", "sold")]
    told_of_all.append(rule["markout"] for rule in metrics["rules"].values())
    for cell in chain(*told_of_all):  # what is left out of a mean is told of all together
        del cell["excluded"]
    assert missing("", metrics) == {" span_s"}  # it is told as two times of day


@pytest.mark.parametrize("lines", [calm(30_000), calm(3000), calm(500)], ids=len)
def test_what_cannot_be_said_is_a_dash_in_the_table_and_null_in_the_file(lines):
    result = play_fixed(lines)
    metrics, table = result.metrics, result.table
    assert re.search(r"Sharpe ratio per minute +- +- to - from 0 minutes", table)
    assert "- (0)" in table and "nan" not in table and "inf" not in table
    assert metrics["time_to_fill_s"] is metrics["net_bps"] is metrics["sharpe_per_minute"] is None
    assert (metrics["net_usdt"], metrics["max_drawdown_usdt"]) == (0, 0)
    json.loads(Path("out/metrics.json").read_text(), parse_constant=pytest.fail)
