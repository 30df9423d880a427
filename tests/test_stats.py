"""The statistics against truths computed another way: scipy, sklearn, known coefficients, published tables, simulation."""

import math
import tracemalloc

import numpy as np
import pytest
from scipy import optimize, special, stats
from sklearn.linear_model import LogisticRegression

from minigad.stats import (
    agreement,
    bootstrap,
    fit_logistic,
    holm,
    is_point,
    length_controlled,
    mean_interval,
    paired_p_value,
)

# --- intervals ---


def coverage(draw, truth, statistic, runs, seed=0):
    """The share of simulated evaluations whose interval holds the truth."""
    rng, held = np.random.default_rng(seed), 0
    for run in range(runs):
        interval = statistic(draw(rng), run)
        held += interval.low <= truth <= interval.high
    return held / runs


@pytest.mark.parametrize("num_prompts", [12, 60])
def test_interval_of_a_mean_holds_the_truth_19_times_in_20(num_prompts):
    """1,000 simulated evaluations: wins, ties and losses with known probabilities. 3 standard errors of 0.95 are 0.021."""

    def draw(rng):
        return rng.choice([1.0, 0.5, 0.0], p=[0.5, 0.2, 0.3], size=num_prompts)

    held = coverage(draw, 0.6, lambda values, seed: mean_interval(values, seed=seed, resamples=500), 1000)
    assert held == pytest.approx(0.95, abs=0.025)


def test_interval_has_the_width_of_theory():
    """For many prompts it is the normal interval; its level is what is asked for."""
    values = np.random.default_rng(0).normal(3.0, 2.0, size=2000)
    for level, z in ((0.95, 1.96), (0.5, 0.6745)):
        interval = mean_interval(values, level=level)
        assert interval.value == pytest.approx(values.mean())
        assert interval.high - interval.low == pytest.approx(2 * z * values.std() / math.sqrt(2000), rel=0.06)


def test_interval_of_one_prompt_is_a_point():
    assert mean_interval([0.25]) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize("values", [[0.4], [0.6] * 12, [0.1] * 7])
def test_equal_values_and_a_single_one_have_no_interval(values):
    """The bootstrap of twelve wins is twelve wins: shown as 95%, it would promise that the next one is no loss."""
    found = mean_interval(values)
    assert is_point(found.low, found.high)
    assert found.value == pytest.approx(values[0])
    assert not is_point(*mean_interval([*values, 0.3])[1:])
    assert not is_point(0.0, 1e-3)


def test_interval_is_a_function_of_its_seed():
    values = np.arange(10.0)
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1)
    assert mean_interval(values, seed=1) != mean_interval(values, seed=2)


def test_bootstrap_agrees_with_scipys_percentiles():
    """Against scipy's own bootstrap of another statistic, the ratio of two means; the expansion is small at 400 prompts."""
    rng = np.random.default_rng(3)
    a, b = rng.gamma(2.0, size=400), rng.gamma(3.0, size=400)
    mine = bootstrap(lambda times: ((times @ a) / (times @ b))[:, None], 400)[0]
    done = stats.bootstrap(
        (a, b),
        lambda a, b, axis: a.mean(axis) / b.mean(axis),
        paired=True,
        n_resamples=2000,
        method="percentile",
        rng=0,
    ).confidence_interval
    assert (mine.low, mine.high) == pytest.approx((done.low, done.high), abs=0.008)


# --- tests ---


@pytest.mark.parametrize("number", [5, 9])
def test_p_value_is_scipys_exact_one(number):
    rng = np.random.default_rng(number)
    a, b = rng.normal(0.5, 1.0, size=number), rng.normal(size=number)
    exact = stats.permutation_test((a, b), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=np.inf)
    assert paired_p_value(a - b) == pytest.approx(exact.pvalue)


def test_p_value_of_many_prompts_is_near_the_t_test():
    rng = np.random.default_rng(0)
    differences = rng.normal(0.15, 1.0, size=200)
    assert paired_p_value(differences) == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.01)
    assert paired_p_value(np.zeros(50)) == 1.0
    assert paired_p_value(np.ones(50)) == pytest.approx(1e-4)


def test_p_value_of_ten_thousand_prompts_takes_no_gigabytes():
    """numpy reports to tracemalloc. All signs at once would be 9,999 x 10,000 whole numbers: 0.8 GB, and twice that as floats."""
    differences = np.random.default_rng(0).normal(0.02, 1.0, size=10_000)
    tracemalloc.start()
    try:
        p = paired_p_value(differences)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.02)
    assert peak < 4e8, peak


def test_p_value_is_uniform_where_nothing_differs():
    """1,000 simulated comparisons of two equal students: p < 0.05 in one of twenty, p < 0.5 in half."""
    rng = np.random.default_rng(0)
    p = np.array([paired_p_value(rng.normal(size=13), seed=run) for run in range(1000)])
    assert (p < 0.05).mean() == pytest.approx(0.05, abs=0.022)
    assert (p < 0.5).mean() == pytest.approx(0.5, abs=0.05)


def test_holm_by_hand():
    """R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") is 0.03 0.06 0.06 0.02. In the given order, never above 1."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_keeps_the_error_of_the_family():
    """1,000 families of six true nulls, simulated: at most one in twenty has a rejection; uncorrected it is one in four."""
    p = np.random.default_rng(0).uniform(size=(1000, 6))
    assert np.mean([min(holm(family)) < 0.05 for family in p]) == pytest.approx(0.05, abs=0.021)
    assert np.mean(p.min(1) < 0.05) > 0.2


# --- length control ---


def example(num_prompts, theta, phi, seed=0, shift=40.0):
    """Verdicts drawn from the model itself; the student is longer, by `shift` characters on average."""
    rng = np.random.default_rng(seed)
    difference = rng.normal(shift, 60.0, size=num_prompts)
    p = special.expit(theta + phi * np.tanh(difference / difference.std(ddof=1)))
    return (rng.uniform(size=num_prompts) < p).astype(float), difference


def test_length_control_finds_known_coefficients():
    """The student loses at equal length (sigmoid(-0.4) = 0.401) and wins by length alone: the raw win rate says 0.545."""
    won, difference = example(20_000, -0.4, 1.5)
    found = length_controlled(won, difference, resamples=20)
    assert won.mean() == pytest.approx(0.545, abs=0.01)
    assert found.win_rate.value == pytest.approx(special.expit(-0.4), abs=0.015)
    assert found.length_effect.value == pytest.approx(1.5, abs=0.06)
    assert found.win_rate.low < special.expit(-0.4) < found.win_rate.high


def test_worked_example_of_two_lengths():
    """Eight prompts by hand. d = +-s, so tanh(d / std) = +-t: at +t three of four are won, at -t one of four.

    a + bt = log 3 and a - bt = -log 3, so a = 0 and b = log 3 / t: at equal length 50%, whatever length does.
    """
    difference, won = np.array([10.0] * 4 + [-10.0] * 4), np.array([1, 1, 1, 0, 1, 0, 0, 0.0])
    t = math.tanh(10 / difference.std(ddof=1))
    found = length_controlled(won, difference)
    assert found.win_rate.value == pytest.approx(0.5)
    assert found.length_effect.value == pytest.approx(math.log(3) / t, rel=2e-3)


def test_fit_is_that_of_sklearn_without_penalty():
    won, difference = example(300, 0.3, -0.8)
    x = np.tanh(difference / 60)
    theirs = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(x[:, None], won)
    mine = fit_logistic(x, won, np.ones((1, 300)), ridge=0.0)[0]
    assert mine == pytest.approx([theirs.intercept_[0], theirs.coef_[0, 0]], abs=1e-5)
    assert fit_logistic(x, won, np.ones((1, 300)))[0] == pytest.approx(mine, abs=1e-4)


def test_fit_of_ties_and_weights_is_that_of_a_general_minimiser():
    """Preferences of 0, 0.25, 0.5, ... are expected ones, and a prompt may come several times: scipy, from the likelihood."""
    rng = np.random.default_rng(5)
    x, y, times = rng.normal(size=80), rng.choice([0, 0.25, 0.5, 1.0], size=80), rng.integers(0, 4, size=(3, 80))
    for row, mine in zip(times, fit_logistic(x, y, times, ridge=0.0), strict=True):

        def loss(w, row=row):
            z = w[0] + w[1] * x
            return np.sum(row * (np.logaddexp(0, z) - y * z))

        assert mine == pytest.approx(optimize.minimize(loss, [0, 0], tol=1e-12).x, abs=1e-4)


def test_length_control_of_one_length_is_the_raw_win_rate():
    won = np.array([1, 1, 0, 1, 0.5])
    assert length_controlled(won, np.full(5, 7.0)).win_rate.value == pytest.approx(won.mean(), abs=1e-3)


@pytest.mark.parametrize("won", [np.ones(20), (np.arange(20) >= 10).astype(float)], ids=["always", "the longer one"])
def test_length_control_of_separated_data_is_finite(won):
    found = length_controlled(won, np.arange(20.0) - 9.5)
    assert np.isfinite([*found.win_rate, *found.length_effect]).all()
    assert is_point(*found.win_rate[1:]) == bool(won.all()), "equal verdicts know no interval at equal length either"
    assert found.win_rate.low <= found.win_rate.value <= found.win_rate.high + 1e-6
    assert found.win_rate.value == pytest.approx(1.0 if won.all() else 0.5, abs=0.01)


def test_length_controlled_interval_holds_the_truth():
    """1,000 simulated evaluations of 60 prompts at known coefficients (std is the sample's, as AlpacaEval's)."""
    held = 0
    for run in range(1000):
        won, difference = example(60, 0.4, 0.8, seed=run)
        interval = length_controlled(won, difference, seed=run, resamples=300).win_rate
        held += interval.low <= special.expit(0.4) <= interval.high
    assert held / 1000 == pytest.approx(0.95, abs=0.025)


# --- agreement ---

_ = math.nan
KRIPPENDORFF = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
        [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
    ]
).T


def test_alpha_of_krippendorffs_own_example():
    """Krippendorff (2011), Computing Krippendorff's Alpha-Reliability, example D: nominal 0.743, interval 0.849."""
    assert agreement(KRIPPENDORFF, nominal=True) == pytest.approx(0.743, abs=5e-4)
    assert agreement(KRIPPENDORFF, nominal=False) == pytest.approx(0.849, abs=5e-4)


def test_alpha_at_its_ends():
    """Equal runs agree, random ones do not, and one run, or one and the same verdict everywhere, says nothing."""
    assert agreement(np.array([[1, 1], [0, 0], [0.5, 0.5]]), nominal=True) == 1
    random = np.random.default_rng(0).choice([0, 1], size=(2000, 3))
    assert agreement(random, nominal=True) == pytest.approx(0, abs=0.05)
    assert math.isnan(agreement(np.array([[1.0], [0.0]]), nominal=True))
    assert math.isnan(agreement(np.ones((5, 2)), nominal=True))
