"""optimize.py, second half: the search, and what it is worth, on noise and known truths."""

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from threading import Event

import optimize
from optimize import block_length, draw_best_of_chance, draw_positions, sharpe_score

import numpy as np
import pytest
from scipy.signal import lfilter
from scipy.stats import chisquare

rng_of = np.random.default_rng


def remember(innovations, rho=0.3):
    """AR(1) along the first axis, its variance that of the innovations."""
    return math.sqrt(1 - rho**2) * lfilter([1], [1, -rho], innovations, axis=0)


def noise(rng, n, columns):
    """Heavy tails, memory, variance 1, and nothing to be earned."""
    return remember(rng.standard_t(4, size=(n, columns)) / math.sqrt(2))


# ---- A grid, a finer one, and trials -----------------------------------------------


def test_grid_is_every_combination_the_last_name_changing_fastest():
    points = optimize.expand_grid({"alpha": [1, 2], "beta": [3], "gamma": [4, 5, 6]})
    assert [tuple(p.values()) for p in points] == list(product([1, 2], [3], [4, 5, 6]))
    assert optimize.expand_grid({}) == [{}] and optimize.expand_grid({"alpha": []}) == []


@pytest.mark.parametrize(
    "values, best, limits, finer",
    [
        ([1, 2, 4], 2, (0, 9), [1.5, 2, 3]),  # half the way to either side
        ([1, 2, 4], 1, (0, 9), [0.5, 1, 1.5]),  # from an edge as far outward
        ([1, 2, 4], 4, (0, 4.5), [3, 4, 4.5]),  # but not beyond the limit
        ([0, 1], 0, (0, 9), [0, 0.5]),  # of which there is only one
    ],
)
def test_finer_grid_goes_half_the_way_to_the_neighbours(values, best, limits, finer):
    grid, centre = {"alpha": values, "delta": [7]}, {"alpha": best, "delta": 7}
    points = optimize.finer_grid(grid, centre, {"alpha": limits, "delta": (0, 9)})
    assert points == {"alpha": finer, "delta": [7]}


@pytest.mark.parametrize("end", ["a trial fails", "a stop", "nobody listens"])
def test_trials_come_as_they_end_and_what_has_not_begun_at_the_end_is_cancelled(end):
    gate, played, stops = Event(), [], iter([False, False, True])

    def play(k):
        played.append(k)
        if k == 1:
            gate.wait(10)
        return 1 / (k - 100)

    first = 100 if end == "a trial fails" else 0
    with ThreadPoolExecutor(1) as executor:
        trials = optimize.run_trials(play, [first, *range(1, 9)], executor, lambda: next(stops))
        if first == 100:
            with pytest.raises(ZeroDivisionError):
                next(trials)
        else:
            assert next(trials) == (0, -0.01)
            assert end != "a stop" or list(trials) == []  # 1 still waits at the gate
            trials.close()
        gate.set()
    assert set(played) <= {first, 1}


# ---- Block length ------------------------------------------------------------------


def block_length_in_loops(x):
    """Politis and White (2004), as corrected in 2009, from the papers: sums written out."""
    n, average = len(x), sum(x) / len(x)
    K = max(5, math.ceil(math.sqrt(math.log10(n))))
    furthest = min(math.ceil(math.sqrt(n)) + K, n - 1)

    def R(lag):
        return sum((x[i] - average) * (x[i + lag] - average) for i in range(n - lag)) / n

    def is_silent_after(m):
        level = 2 * math.sqrt(math.log10(n) / n)
        return all(abs(R(m + k) / R(0)) <= level for k in range(1, K + 1))

    lags = range(1, furthest - K + 1)
    M = next((min(2 * m, furthest) for m in lags if is_silent_after(m)), furthest)
    g = total = 0.0
    for k in range(-M, M + 1):
        h = min(1, 2 * (1 - abs(k) / M))
        g += h * abs(k) * R(abs(k))
        total += h * R(abs(k))
    longest = math.ceil(min(3 * math.sqrt(n), n / 3))
    return min(max((2 * g**2 / (2 * total**2) * n) ** (1 / 3), 1), longest)


SERIES = {
    "white noise": rng_of(1).normal(size=500),
    "short memory": remember(rng_of(2).normal(size=700)),
    "long memory": remember(rng_of(3).normal(size=700), 0.8),
    "alternating": remember(rng_of(4).normal(size=500), -0.6),
    "at the upper limit": remember(rng_of(12).normal(size=400), -0.97),
    "trend, which is never silent": np.arange(300.0),
    "two": np.array([1.0, 2]),
}


@pytest.mark.parametrize("name", SERIES)
def test_block_length_is_that_of_the_papers(name):
    x = SERIES[name]
    assert block_length(x) == pytest.approx(block_length_in_loops(x.tolist()), rel=1e-9)
    assert block_length(1e6 * x - 1e4) == pytest.approx(block_length(x))  # no unit, no level


def test_block_of_what_never_changes_is_one_and_the_common_one_is_the_mean():
    x, still = SERIES["long memory"], np.full(700, 0.1)
    assert block_length(still) == 1
    both = block_length(np.column_stack([x, still]))
    assert both == pytest.approx((block_length(x) + 1) / 2)


# ---- Resampling --------------------------------------------------------------------


def positions_of(n, block, count, seed=0):
    return np.array(list(draw_positions(n, block, count, rng_of(seed))))


@pytest.mark.parametrize("block", [1.0, 4.0, 17.5])
def test_positions_go_on_from_each_to_the_next_with_jumps_as_often_as_asked(block):
    n = 200
    drawn = positions_of(n, block, 5000)
    assert drawn.min() == 0 and drawn.max() == n - 1
    went_on = drawn[:, 1:] == (drawn[:, :-1] + 1) % n  # the first follows the last
    share = 1 - 1 / block + 1 / (block * n)  # a jump may lead to the next one
    assert went_on.mean() == pytest.approx(share, abs=0.005)
    # whether it goes on does not depend on whether it did: blocks are geometric
    twice = (went_on[:, 1:] & went_on[:, :-1]).mean()
    assert twice == pytest.approx(share**2, abs=0.005)
    # at every step, every period is equally likely (the rows are independent)
    for column in (0, 1, n - 1):
        assert chisquare(np.bincount(drawn[:, column], minlength=n)).pvalue > 0.001


def test_measures_are_those_of_the_resampled_table_at_the_same_positions():
    x = noise(rng_of(9), 1000, 6) + np.arange(-2, 4) / 10
    drawn = x[positions_of(1000, block_length(x), 450, seed=3)]
    for name, values in optimize.bootstrap(x, 450, rng_of(3)).items():
        measured = [optimize.measure_paths(drawn[:, :, k])[name] for k in range(6)]
        assert values == pytest.approx(np.array(measured)), name


def test_paths_are_measured_as_by_hand():
    x = np.array([[2.0, -3, 4], [-3, 1, 1], [0, 0, 0]])
    measured = optimize.measure_paths(x)
    assert measured["net_usdt"].tolist() == [3, -1, 0]
    assert measured["max_drawdown_usdt"].tolist() == [3, 3, 0]  # from the start at 0, too
    # mean 1, squares 1 + 16 + 9 of 2; mean -1/3, squares (64 + 16 + 16)/9 of 2
    assert measured["sharpe"] == pytest.approx([1 / math.sqrt(13), -1 / math.sqrt(48), 0])
    scores = sharpe_score(np.array([3.0, -3.0, 3.0]), np.array([0.0, -1e-30, 4.0]))
    assert scores.tolist() == [0, 0, 1.5]


# ---- Sharpe ratios: published values, and worked by hand ---------------------------


@pytest.mark.parametrize(
    "trials, skew, kurtosis, reference, confidence",
    [(100, -3, 10, 0.1132, 0.9004), (46, -3, 10, 0.1004, 0.9505), (88, 0, 3, None, 0.9505)],
)
def test_deflated_sharpe_ratio_is_the_published_one(trials, skew, kurtosis, reference, confidence):
    sharpe, variance = 2.5 / math.sqrt(250), 0.5 / 250  # a year's 2.5 and 1/2, a day
    assert reference in (None, round(optimize.best_sharpe_by_luck(variance, trials), 4))
    error = math.sqrt((1 - skew * sharpe + (kurtosis - 1) / 4 * sharpe**2) / 1249)  # Mertens'
    assert round(optimize.deflated_sharpe(sharpe, error, variance, trials), 4) == confidence


SKEWED = 1.5 - rng_of(7).exponential(size=(400, 1000))  # mean 1/2, variance 1, skew -2
TOGETHER = noise(rng_of(3), 200, 600) - 0.3  # minutes go together


@pytest.mark.parametrize("x, truth, rel", [(SKEWED, 0.5, 0.06), (TOGETHER, -0.3, 0.08)])
def test_error_of_the_sharpe_ratio_is_what_samples_show_and_covers_95_percent(x, truth, rel):
    sharpe = sharpe_score(x.mean(axis=0), x.var(axis=0, ddof=1))
    errors = np.array([optimize.sharpe_error(column) for column in x.T])
    assert sharpe.std() == pytest.approx(np.sqrt(np.mean(errors**2)), rel=rel)
    assert 0.92 < (np.abs(sharpe - truth) < optimize.PARTS_95 * errors).mean() < 0.98


# ---- A search among configurations without skill, and with one that has it ---------


def search(x, rng):
    """The best of 960 periods: its column, DSR, and how often luck does as well."""
    sharpe = sharpe_score(x.mean(axis=0), x.var(axis=0, ddof=1))
    best = int(sharpe.argmax())
    error, variance = optimize.sharpe_error(x[:, best]), sharpe.var(ddof=1)
    dsr = optimize.deflated_sharpe(sharpe[best], error, variance, x.shape[1])
    luck = draw_best_of_chance(x, sharpe_score, 200, rng)
    return best, dsr, (luck >= sharpe[best]).mean()


@pytest.mark.parametrize("common", [0.0, 0.7])
def test_best_of_noise_is_not_taken_for_skill(common):
    said = []
    for seed in range(50):
        rng = rng_of(seed)
        x = math.sqrt(1 - common) * noise(rng, 960, 100)
        x += math.sqrt(common) * noise(rng, 960, 1)  # the market, which all share
        said.append(search(x, rng)[1:])
    dsr, luck = np.array(said).T
    assert (dsr < 0.95).mean() > 0.85 and (luck < 0.05).mean() < 0.15
    assert 0.3 < dsr.mean() < 0.7 and 0.3 < luck.mean() < 0.6  # nor for bad luck


def test_skill_of_03_standard_deviations_a_period_is_seen_and_believed():
    for seed in range(10):
        x = noise(rng_of(seed), 960, 100)
        x[:, 17] += 0.3
        best, dsr, luck = search(x, rng_of(seed))
        assert best == 17 and dsr > 0.95 and luck < 0.05


def test_chance_depends_on_correlation_but_not_on_what_was_earned():
    def chance(x):
        return draw_best_of_chance(x, lambda mean, _: mean, 100, rng_of(6))

    single, many = noise(rng_of(5), 300, 1), noise(rng_of(5), 300, 30)
    same = chance(np.repeat(single, 30, axis=1))
    assert same == pytest.approx(chance(single), abs=1e-12)  # thirty times the same: one try
    assert chance(many).mean() > same.mean() + same.std()
    assert chance(many + np.arange(30)) == pytest.approx(chance(many), abs=1e-9)


def test_configuration_that_hardly_trades_does_not_make_luck_of_the_others():
    x = noise(rng_of(0), 960, 20)
    plain = draw_best_of_chance(x, sharpe_score, 200, rng_of(1)).max()
    x[:, 0] = 0
    x[100, 0] = -0.37  # one loss: a resample without it is all above the mean
    assert draw_best_of_chance(x, sharpe_score, 200, rng_of(1)).max() < 1.5 * plain
