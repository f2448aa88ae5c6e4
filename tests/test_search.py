"""Searching for parameters, and what a search is worth: noise, known truths, brute force."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from statistics import NormalDist
from threading import Event

import numpy as np
import pytest
from scipy.signal import lfilter
from scipy.stats import chisquare, rankdata

import optimize
from optimize import (
    best_sharpe_by_luck,
    block_length,
    bootstrap,
    common_block_length,
    deflated_sharpe,
    draw_best_of_chance,
    draw_means,
    draw_overfitting_by_chance,
    draw_positions,
    expand_grid,
    interval_of,
    measure_paths,
    net_score,
    overfitting_probability,
    probabilistic_sharpe,
    refine,
    run_trials,
    shape_of,
    sharpe_error,
    sharpe_score,
)

RHO = 0.3  # what a period keeps of the one before
IN_SAMPLE, OUT_OF_SAMPLE, TRIALS = 960, 480, 120
RESAMPLES = 300


def rng_of(seed):
    return np.random.default_rng(seed)


def remember(innovations, rho=RHO):
    """AR(1) along the first axis, its variance that of the innovations."""
    return math.sqrt(1 - rho**2) * lfilter([1], [1, -rho], innovations, axis=0)


def noise(rng, n, columns):
    """Heavy tails, memory, variance 1, and nothing to be earned."""
    return remember(rng.standard_t(4, size=(n, columns)) / math.sqrt(2))


def sharpe_of(x):
    return sharpe_score(x.mean(axis=0), x.var(axis=0, ddof=1))


def search(x, rng):
    """What is said of the best in sample: its column, DSR, share of luck, net later on."""
    seen, later = x[:IN_SAMPLE], x[IN_SAMPLE:]
    sharpe = sharpe_of(seen)
    best = int(sharpe.argmax())
    variance, shape = sharpe.var(ddof=1), shape_of(seen[:, best])
    dsr = deflated_sharpe(sharpe[best], variance, len(sharpe), IN_SAMPLE, *shape)
    luck = draw_best_of_chance(seen, sharpe_score, RESAMPLES, rng)
    drawn = bootstrap(later[:, [best]], RESAMPLES, rng)["net_usdt"][0]
    return best, dsr, (luck >= sharpe[best]).mean(), interval_of(drawn)


# ---- A search among configurations without skill, and with one that has it ---------


@pytest.fixture(scope="module")
def found_in_noise():
    """What is said in 100 markets without skill, by the share of variance in common."""
    found = {0.0: [], 0.7: []}
    for seed in range(100):
        rng = rng_of(seed)
        own = noise(rng, IN_SAMPLE + OUT_OF_SAMPLE, TRIALS)
        shared = noise(rng, IN_SAMPLE + OUT_OF_SAMPLE, 1)
        for common, said in found.items():
            x = math.sqrt(1 - common) * own + math.sqrt(common) * shared
            said.append(search(x, rng)[1:])
    return found


@pytest.mark.parametrize("common", [0.0, 0.7])
def test_best_of_noise_is_not_taken_for_skill(found_in_noise, common):
    dsr, luck, intervals = zip(*found_in_noise[common])
    doubted = sum(value < 0.95 for value in dsr)
    mistaken = sum(share < 0.05 for share in luck)
    honest = sum(low <= 0 <= high for low, high in intervals)
    assert doubted >= 90, f"DSR below 0.95 in {doubted} of 100"
    assert mistaken <= 10, f"luck below 5 % in {mistaken} of 100"
    assert honest >= 88, f"0 in the interval out of sample in {honest} of 100"


def test_skill_of_03_standard_deviations_a_period_is_found_and_believed():
    """0.3 is nine times the error of a mean of 960 independent periods; SR0 is near 0.13."""
    count = 0
    for seed in range(20):
        rng = rng_of(seed)
        x = noise(rng, IN_SAMPLE + OUT_OF_SAMPLE, TRIALS)
        x[:, 17] += 0.3
        best, dsr, luck, (low, _) = search(x, rng)
        overfit = overfitting_probability(x[:IN_SAMPLE], sharpe_score)
        count += best == 17 and dsr > 0.95 and luck < 0.05 and low > 0 and overfit < 0.2
    assert count >= 19


def test_overfitting_of_noise_scatters_around_one_half():
    drawn = [
        overfitting_probability(noise(rng_of(seed), 480, 20), sharpe_score) for seed in range(100)
    ]
    assert np.mean(drawn) == pytest.approx(0.5, abs=0.05)
    assert np.std(drawn) > 0.1 and min(drawn) < 0.3 and max(drawn) > 0.7


def test_overfitting_by_chance_scatters_around_one_half_even_where_there_is_skill():
    x = noise(rng_of(1), 480, 20)
    x[:, 3] += 0.3
    drawn = draw_overfitting_by_chance(x, sharpe_score, 100, rng_of(2))
    assert overfitting_probability(x, sharpe_score) < 0.05
    assert drawn.shape == (100,) and drawn.std() > 0.1
    assert drawn.mean() == pytest.approx(0.5, abs=0.05)


def test_chance_does_not_depend_on_what_was_earned():
    x = noise(rng_of(3), 300, 12)
    best = draw_best_of_chance(x, sharpe_score, 50, rng_of(4))
    richer = draw_best_of_chance(x + np.arange(12), sharpe_score, 50, rng_of(4))
    assert richer == pytest.approx(best, rel=1e-6)


def test_chance_has_one_try_only_where_all_configurations_are_the_same():
    x = noise(rng_of(5), 300, 1)
    one = draw_best_of_chance(x, net_score, 50, rng_of(6))
    same = draw_best_of_chance(np.repeat(x, 30, axis=1), net_score, 50, rng_of(6))
    other = draw_best_of_chance(noise(rng_of(5), 300, 30), net_score, 50, rng_of(6))
    assert same == pytest.approx(one, abs=1e-12)
    assert other.mean() > same.mean() + same.std()


# ---- Sharpe ratios: golden values, and worked by hand ------------------------------


@pytest.mark.parametrize(
    "trials, skew, kurtosis, reference, confidence",
    [(100, -3, 10, 0.1132, 0.9004), (46, -3, 10, 0.1004, 0.9505), (88, 0, 3, None, 0.9505)],
)
def test_deflated_sharpe_ratio_is_the_published_one(trials, skew, kurtosis, reference, confidence):
    sharpe, variance = 2.5 / math.sqrt(250), 0.5 / 250  # a year's 2.5 and 1/2, a day
    assert reference in (None, round(best_sharpe_by_luck(variance, trials), 4))
    dsr = deflated_sharpe(sharpe, variance, trials, 1250, skew, kurtosis)
    assert round(dsr, 4) == confidence


def test_probabilistic_sharpe_ratio_is_the_closed_form_for_the_normal_shape():
    for sharpe, n in itertools.product((-0.3, 0.01, 0.2, 0.5), (30, 101, 5000)):
        z = sharpe * math.sqrt(n - 1) / math.sqrt(1 + sharpe**2 / 2)
        assert probabilistic_sharpe(sharpe, 0, n, 0, 3) == pytest.approx(NormalDist().cdf(z))
    # 0.2 sqrt(100) / sqrt(1.02) = 1.9803; excess kurtosis: 0.2 sqrt(100) / sqrt(0.99) = 2.0101
    assert round(probabilistic_sharpe(0.2, 0, 101, 0, 3), 4) == 0.9762
    assert round(probabilistic_sharpe(0.2, 0, 101, 0, 0), 4) == 0.9778
    assert probabilistic_sharpe(0.2, 0.2, 101, 1, 9) == 0.5


def test_shape_is_skew_and_raw_kurtosis():
    # once in four: (1 - 2p)/sqrt(pq) = 2/sqrt(3), 1/(pq) - 3 = 7/3
    assert shape_of(np.array([0, 0, 0, 1.0])) == pytest.approx((2 / math.sqrt(3), 7 / 3))


def test_error_of_the_sharpe_ratio_is_what_skewed_samples_show():
    n, shift = 400, 1.5  # minus an exponential plus 1.5: mean 1/2, variance 1, skew -2
    x = shift - rng_of(7).exponential(size=(n, 3000))
    assert sharpe_of(x).std() == pytest.approx(sharpe_error(0.5, n, -2, 9), rel=0.05)


@pytest.mark.parametrize("trials", [10, 100, 1000])
def test_luck_is_the_mean_of_the_best_of_so_many_normals(trials):
    best = rng_of(8).normal(0, 0.3, size=(2000, trials)).max(axis=1)
    assert best_sharpe_by_luck(0.09, trials) == pytest.approx(best.mean(), rel=0.03)


def test_one_trial_needs_no_luck():
    assert best_sharpe_by_luck(0.09, 1) == 0
    plain = probabilistic_sharpe(0.1, 0, 500, -1, 5)
    assert deflated_sharpe(0.1, 0.09, 1, 500, -1, 5) == plain


def test_sharpe_ratio_of_what_never_changes_is_zero():
    scores = sharpe_score(np.array([0.0, 3.0, -3.0, 3.0]), np.array([0.0, 0.0, -1e-30, 4.0]))
    assert scores.tolist() == [0, 0, 0, 1.5]


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

    M = furthest
    for m in range(1, furthest - K + 1):  # the smallest positive one
        if is_silent_after(m):
            M = min(2 * m, furthest)
            break
    g = total = 0.0
    for k in range(-M, M + 1):
        h = min(1, 2 * (1 - abs(k) / M))
        g += h * abs(k) * R(abs(k))
        total += h * R(abs(k))
    longest = math.ceil(min(3 * math.sqrt(n), n / 3))
    return min(max((2 * g**2 / (2 * total**2) * n) ** (1 / 3), 1), longest)


def normals(seed, n):
    return rng_of(seed).normal(size=n)


SERIES = {
    "white noise": normals(1, 500),
    "short memory": remember(normals(2, 700)),
    "long memory": remember(normals(3, 700), 0.8),
    "alternating": remember(normals(4, 500), -0.6),
    "at the upper limit": remember(normals(12, 400), -0.97),
    "moving average": np.convolve(normals(5, 503), np.ones(4), "valid"),
    "heavy tails": noise(rng_of(6), 400, 1)[:, 0] + 100,
    "random walk": normals(7, 150).cumsum(),
    "trend, which is never silent": np.arange(300.0),
    "steps": np.repeat(normals(8, 40), 10),
    "short": normals(9, 30),
    "shorter": normals(10, 12),
    "tiny": normals(11, 5),
    "three": np.array([1.0, 2, 4]),
    "two": np.array([1.0, 2]),
}


@pytest.mark.parametrize("name", SERIES)
def test_block_length_is_that_of_the_papers(name):
    expected = block_length_in_loops(SERIES[name].tolist())
    assert block_length(SERIES[name]) == pytest.approx(expected, rel=1e-9)


def test_block_length_does_not_depend_on_unit_or_level():
    x = SERIES["short memory"]
    assert block_length(1e6 * x - 1e4) == pytest.approx(block_length(x))


def test_block_is_short_for_white_noise_and_grows_with_memory():
    mean = {
        rho: np.mean([block_length(remember(normals(seed, 1440), rho)) for seed in range(40)])
        for rho in (0, 0.3, 0.6, 0.9)
    }
    assert 1 <= mean[0] < 2
    assert mean[0.3] > 2 * mean[0] and mean[0.6] > 1.5 * mean[0.3] and mean[0.9] > 2 * mean[0.6]
    # of AR(1), g / sum of R = 2 rho / (1 - rho^2)
    optimum = {rho: ((2 * rho / (1 - rho**2)) ** 2 * 1440) ** (1 / 3) for rho in mean}
    assert all(0.75 < mean[rho] / optimum[rho] < 1.25 for rho in (0.3, 0.6, 0.9))


def test_block_of_what_never_changes_is_one_and_the_common_one_is_the_mean():
    x, still = SERIES["long memory"], np.full(700, 0.1)
    assert block_length(still) == 1
    both = common_block_length(np.column_stack([x, still]))
    assert both == pytest.approx((block_length(x) + 1) / 2)


# ---- Resampling --------------------------------------------------------------------


def positions_of(n, block, count, seed=0):
    return np.concatenate(list(draw_positions(n, block, count, rng_of(seed))))


@pytest.mark.parametrize("block", [1.0, 4.0, 17.5])
def test_positions_go_on_from_each_to_the_next_with_jumps_as_often_as_asked(block):
    n = 200
    drawn = positions_of(n, block, 5000)
    assert drawn.min() == 0 and drawn.max() == n - 1
    went_on = drawn[:, 1:] == (drawn[:, :-1] + 1) % n
    share = 1 - 1 / block + 1 / (block * n)  # a jump may lead to the next one
    assert went_on.mean() == pytest.approx(share, abs=0.005)
    # whether it goes on does not depend on whether it did: blocks are geometric
    twice = (went_on[:, 1:] & went_on[:, :-1]).mean()
    assert twice == pytest.approx(share**2, abs=0.005)


def test_first_position_follows_the_last():
    drawn = positions_of(20, 50.0, 2000)
    after_last = drawn[:, 1:][drawn[:, :-1] == 19]
    # a period is rarely the last by chance: 49 of 50 go on, to the first
    assert (after_last == 0).mean() == pytest.approx(0.98 + 0.02 / 20, abs=0.01)


@pytest.mark.parametrize("column", [0, 1, 30, 59])
def test_every_position_is_equally_likely_at_every_step(column):
    drawn = positions_of(60, 8.0, 12_000, seed=1)[:, column]  # rows are independent
    assert chisquare(np.bincount(drawn, minlength=60)).pvalue > 0.001


def test_positions_are_those_of_the_seed():
    first, again, other = (positions_of(50, 5.0, 30, seed) for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()


@pytest.mark.parametrize("n, sizes", [(1000, [200, 200, 50]), (300_000, [1, 1]), (7, [450])])
def test_chunks_lose_no_row(n, sizes):
    chunks = draw_positions(n, 5.0, sum(sizes), rng_of(0))
    assert [part.shape for part in chunks] == [(size, n) for size in sizes]


def test_means_are_those_of_the_resampled_table():
    x = noise(rng_of(9), 1000, 6) + np.arange(6)
    drawn = x[positions_of(1000, 5.0, 450, seed=3)]
    means = draw_means(x, 5.0, 450, rng_of(3))
    assert means == pytest.approx(drawn.mean(axis=1), abs=1e-12)


def test_bootstrap_measures_the_resampled_table_strategy_by_strategy():
    x = noise(rng_of(10), 1000, 3) + [0, 0.1, -0.1]
    drawn = x[positions_of(1000, common_block_length(x), 450, seed=4)]
    measured = bootstrap(x, 450, rng_of(4))
    for name, values in measured.items():
        assert values.shape == (3, 450), name
        for k in range(3):
            assert values[k] == pytest.approx(measure_paths(drawn[:, :, k])[name]), name


def test_strategies_are_resampled_together():
    x = noise(rng_of(11), 500, 1)
    net = bootstrap(np.hstack([x, x, x + 0.25]), 100, rng_of(5))["net_usdt"]
    assert net[0].std() > 1
    assert (net[0] == net[1]).all()
    assert net[2] - net[0] == pytest.approx(500 * 0.25)


def test_interval_of_the_mean_covers_the_truth_about_as_often_as_it_says():
    count = 0
    for seed in range(1000):
        rng = rng_of(seed)
        x = remember(rng.normal(size=(1440, 1)))
        low, high = interval_of(draw_means(x, common_block_length(x), 200, rng))
        count += low <= 0 <= high
    assert 880 <= count <= 970, f"{count} of 1,000"


def test_interval_is_the_middle_95_percent():
    assert interval_of(rng_of(0).permutation(1001)) == (25, 975)


def paths_in_loops(x):
    level = peak = drawdown = 0.0
    for change in x:
        level += change
        peak = max(peak, level)
        drawdown = max(drawdown, peak - level)
    mean = sum(x) / len(x)
    variance = sum((change - mean) ** 2 for change in x) / (len(x) - 1)
    return {
        "net_usdt": level,
        "sharpe": mean / math.sqrt(variance) if variance else 0,
        "max_drawdown_usdt": drawdown,
    }


def test_paths_are_measured_as_by_hand():
    x = normals(12, 240).reshape(2, 3, 40)
    x[0, 0], x[1, 1], x[1, 2] = 0, -np.abs(x[1, 1]), np.abs(x[1, 2])
    measured = measure_paths(x)
    for place in np.ndindex(2, 3):
        by_hand = paths_in_loops(x[place].tolist())
        assert {name: values[place] for name, values in measured.items()} == pytest.approx(by_hand)


def test_drawdown_counts_from_the_start_at_zero():
    drawdown = measure_paths(np.array([[-3, 1, 1.0], [2, -3, 4], [1, 1, 1]]))["max_drawdown_usdt"]
    assert drawdown.tolist() == [3, 3, 0]


# ---- Probability of overfitting, by brute force ------------------------------------


def overfitting_in_loops(x, score, blocks):
    """CSCV as in the paper: rows of every half, best in one, logit of its rank in the other."""
    n, N = x.shape
    ends = [k * n // blocks for k in range(blocks + 1)]
    pieces = [list(range(a, b)) for a, b in itertools.pairwise(ends)]
    logits = []
    for half in itertools.combinations(range(blocks), blocks // 2):
        inside = [i for k in half for i in pieces[k]]
        outside = sorted(set(range(n)) - set(inside))
        scores = [score(x[inside, c].mean(), x[inside, c].var()) for c in range(N)]
        ranks = rankdata([score(x[outside, c].mean(), x[outside, c].var()) for c in range(N)])
        w = ranks[scores.index(max(scores))] / (N + 1)
        logits.append(math.log(w / (1 - w)))
    return np.mean([logit <= 0 for logit in logits])


@pytest.mark.parametrize(
    "n, N, blocks, score",
    [
        (40, 10, 4, sharpe_score),
        (87, 11, 8, sharpe_score),  # blocks of 10 and 11 periods
        (87, 11, 8, net_score),
        (87, 11, 8, lambda mean, variance: np.sin(99 * mean + 99 * variance)),  # of both, exactly
        (125, 10, 12, sharpe_score),
    ],
)
def test_overfitting_probability_is_that_of_brute_force(n, N, blocks, score):
    x = noise(rng_of(n), n, N)
    x[:, 0] += 0.1
    value = overfitting_probability(x, score)
    assert 0 < value < 1
    assert value == overfitting_in_loops(x, score, blocks)


def test_ties_share_their_rank_and_the_first_of_the_best_is_taken():
    values = []
    for seed in range(20):
        x = rng_of(seed).integers(-1, 2, size=(43, 10)).astype(float)
        x[:, 5:] = x[:, :5]  # of every configuration a twin
        values.append(overfitting_probability(x, net_score))
        assert values[-1] == overfitting_in_loops(x, net_score, 4)
    assert len(set(values)) > 3


def test_middle_rank_counts_as_overfitted():
    # all are the same: rank (N + 1)/2, w exactly one half
    assert overfitting_probability(np.repeat(noise(rng_of(0), 60, 1), 10, axis=1), net_score) == 1


def test_overfitting_is_unknown_for_too_few_configurations_or_periods():
    x = noise(rng_of(1), 40, 10)
    assert not math.isnan(overfitting_probability(x, sharpe_score))
    assert math.isnan(overfitting_probability(x[:39], sharpe_score))
    assert math.isnan(overfitting_probability(x[:, :9], sharpe_score))


# ---- Grid and refinement -----------------------------------------------------------


def test_grid_is_every_combination_the_last_name_changing_fastest():
    points = expand_grid({"alpha": [1, 2], "beta": [3], "gamma": [4, 5, 6]})
    assert [tuple(p.values()) for p in points] == list(itertools.product([1, 2], [3], [4, 5, 6]))
    assert all(list(point) == ["alpha", "beta", "gamma"] for point in points)
    assert expand_grid({}) == [{}] and expand_grid({"alpha": []}) == []


GRID = {"alpha": [0.5, 1.0, 2.0, 4.0], "gamma": [0.25, 0.5, 1.0], "zeta": [0.0, 5.0, 10.0]}
LIMITS = {"alpha": (0.0, 8.0), "gamma": (0.0, 4.0), "zeta": (0.0, 16.0)}
OPTIMUM = {"alpha": 1.3, "gamma": 0.6, "zeta": 7.0}
GAP = {"alpha": 1.0, "gamma": 0.5, "zeta": 5.0}  # to the next point of the grid


def smooth(point):
    """Highest at OPTIMUM; the parameters depend on each other."""
    z = [(point[name] - OPTIMUM[name]) / GAP[name] for name in point]
    return 3 - sum(u * u for u in z) - 0.8 * z[0] * z[-1] - 0.1 * z[0] ** 4


def best_of(grid, score):
    return max(expand_grid(grid), key=score)


def refined(score, grid, start=None, limits=LIMITS, steps=200):
    """All points the search asks for."""
    points = []

    def listen(point):
        points.append(point)
        return score(point)

    refine(listen, start or best_of(grid, score), grid, limits, steps)
    return points


@pytest.mark.parametrize("names", [["gamma"], ["alpha", "zeta"], ["alpha", "gamma", "zeta"]])
def test_refinement_finds_the_optimum_between_the_points_of_the_grid(names):
    grid = {name: GRID[name] for name in names}
    points = refined(smooth, grid)
    assert points[0] == best_of(grid, smooth) and len(points) < 100
    best = max(points, key=smooth)
    assert all(abs(best[name] - OPTIMUM[name]) < 0.02 * GAP[name] for name in names)


def test_parameters_count_alike_whatever_their_units():
    grid = {"alpha": GRID["alpha"], "zeta": GRID["zeta"]}
    larger = {"alpha": grid["alpha"], "zeta": [1024 * z for z in grid["zeta"]]}
    limits = {**LIMITS, "zeta": (0, 1024 * LIMITS["zeta"][1])}
    same = refined(lambda p: smooth({**p, "zeta": p["zeta"] / 1024}), larger, limits=limits)
    assert [{**p, "zeta": p["zeta"] / 1024} for p in same] == refined(smooth, grid)


def test_first_steps_go_half_the_way_to_the_next_point_and_back_from_the_last():
    for start, step in [((0.5, 0.25), (0.75, 0.375)), ((2.0, 1.0), (3.0, 0.75))]:
        grid = {"alpha": GRID["alpha"], "gamma": GRID["gamma"]}
        points = refined(smooth, grid, start=dict(zip(grid, start)), steps=2)
        (a, g), (further_a, further_g) = start, step
        assert [tuple(p.values()) for p in points] == [(a, g), (further_a, g), (a, further_g)]


@pytest.mark.parametrize("sign", [1, -1])
def test_refinement_stays_within_the_limits_and_reaches_them(sign):
    grid = {"alpha": GRID["alpha"], "zeta": GRID["zeta"]}
    points = refined(lambda p: sign * (p["alpha"] + p["zeta"]), grid)
    for name in grid:
        low, high = LIMITS[name]
        values = [point[name] for point in points]
        assert low <= min(values) and max(values) <= high
        assert (high if sign > 0 else low) in values


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9, 20])
def test_refinement_never_takes_more_steps_than_allowed(steps):
    assert len(refined(smooth, GRID, steps=steps)) == 1 + steps  # the start is no step


def test_refinement_has_nothing_to_do_without_steps_or_choice():
    assert refined(smooth, GRID, steps=0) == []
    assert refined(smooth, {"alpha": [1.0], "gamma": [0.5, 0.5]}) == []


def test_refinement_leaves_alone_what_the_grid_does_not_vary():
    points = refined(smooth, {"alpha": GRID["alpha"], "gamma": [0.5], "zeta": GRID["zeta"]})
    assert len(points) > 10 and {point["gamma"] for point in points} == {0.5}
    assert all(list(point) == ["alpha", "gamma", "zeta"] for point in points)


def test_refinement_of_what_is_flat_ends():
    assert 4 < len(refined(lambda point: 0.0, GRID, steps=10_000)) < 100


# ---- Trials ------------------------------------------------------------------------


def test_every_trial_comes_once_with_the_place_of_its_configuration():
    with ThreadPoolExecutor(3) as executor:
        results = list(run_trials(lambda x: x * x, range(10, 50), executor))
        assert list(run_trials(abs, [], executor)) == []
    assert sorted(results) == [(x - 10, x * x) for x in range(10, 50)]


def test_trials_come_as_they_end():
    gate = Event()
    with ThreadPoolExecutor(2) as executor:
        trials = run_trials(lambda k: k or gate.wait(10), [0, 5], executor)
        assert next(trials) == (1, 5)
        gate.set()
        assert list(trials) == [(0, True)]


@pytest.fixture
def gated():
    """play(k) notes k and answers; but 1 waits until the gate opens, and 100 fails."""
    gate, played = Event(), []

    def play(k):
        played.append(k)
        if k == 1:
            gate.wait(10)
        return 1 / (k - 100)

    yield gate, played, play
    gate.set()


def test_stop_ends_the_search_and_cancels_what_has_not_begun(gated):
    gate, played, play = gated
    is_stopped = Event()
    with ThreadPoolExecutor(1) as executor:
        trials = run_trials(play, range(9), executor, is_stopped.is_set)
        assert next(trials) == (0, -0.01)
        is_stopped.set()
        assert list(trials) == []  # without waiting for the second
        gate.set()
    assert set(played) <= {0, 1}


def test_stop_is_heard_while_a_trial_lasts(gated, monkeypatch):
    monkeypatch.setattr(optimize, "POLL_S", 0.01)
    gate, played, play = gated
    answers = iter([False, False, True])
    with ThreadPoolExecutor(1) as executor:
        assert list(run_trials(play, range(1, 9), executor, lambda: next(answers))) == []
        gate.set()
    assert set(played) <= {1}


def test_failure_of_a_trial_is_raised_and_cancels_the_rest(gated):
    gate, played, play = gated
    with ThreadPoolExecutor(1) as executor:
        with pytest.raises(ZeroDivisionError):
            list(run_trials(play, [100, 1, 2, 3], executor))
        gate.set()
    assert set(played) <= {100, 1}


def test_search_that_nobody_listens_to_any_more_is_cancelled(gated):
    gate, played, play = gated
    with ThreadPoolExecutor(1) as executor:
        trials = run_trials(play, range(9), executor)
        next(trials)
        trials.close()
        gate.set()
    assert set(played) <= {0, 1}


def test_configuration_that_hardly_trades_does_not_make_luck_of_the_others():
    x = noise(rng_of(0), 960, 20)
    plain = draw_best_of_chance(x, sharpe_score, 200, rng_of(1)).max()
    for trickle in (0, 1e-3):
        x[:, 0] *= trickle
        x[100, 0] = -0.37  # one loss: a resample without it is all above the mean
        assert draw_best_of_chance(x, sharpe_score, 200, rng_of(1)).max() < 1.5 * plain


def test_refinement_goes_not_even_a_rounding_error_beyond_the_limits():
    heard = []
    refine(lambda p: heard.append(p["beta"]) or -p["beta"], {"beta": 1.0},
           {"beta": [0.3, 1.0, 3.0]}, {"beta": (0.1, 10.0)}, 100)  # fmt: skip
    assert min(heard) == 0.1


def test_nothing_comes_after_stop_even_of_what_ended_together():
    stopped, heard = [], []
    with ThreadPoolExecutor(4) as executor:
        trials = run_trials(abs, range(50), executor, lambda: bool(stopped))
        for k, _ in trials:
            heard.append(k)
            stopped.append(True)
    assert len(heard) == 1
