"""How sure a number is: bootstrap over prompts, paired tests, Holm's correction, the length-controlled win rate, agreement.

A prompt is the unit everywhere: what the same prompt gave twice (two orders, several judge runs) is averaged first, since
it is no new evidence. Nothing here knows what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

__all__ = [
    "Interval",
    "LengthControlled",
    "agreement",
    "bootstrap",
    "fit_logistic",
    "holm",
    "is_point",
    "length_controlled",
    "mean_interval",
    "paired_p_value",
]

RESAMPLES = 2000
EXACT = 14  # prompts up to which all 2^n signs are tried
RANDOM_SIGNS = 9_999  # beyond that
DRAWN = 1_111  # of them at a time
RIDGE = 1e-3  # keeps the model finite where one side, or the longer one, always wins; at 100 prompts it moves nothing one reads

Statistic = Callable[[np.ndarray], np.ndarray]  # (R, P) how often each prompt comes in R samples -> (R, K)


class Interval(NamedTuple):
    """A number and the ends of its interval."""

    value: float
    low: float
    high: float


def is_point(low: float, high: float) -> bool:
    """Tell whether an interval is none: a bootstrap of one prompt, or of equal ones, cannot know what it did not see."""
    return math.isclose(low, high, rel_tol=1e-9, abs_tol=1e-9)


class LengthControlled(NamedTuple):
    """A win rate at equal length, and phi: the log-odds that far more text earns, 0.76 of it for one standard deviation more."""

    win_rate: Interval
    length_effect: Interval


def bootstrap(
    statistic: Statistic, num_prompts: int, *, seed: int = 0, level: float = 0.95, resamples: int = RESAMPLES
) -> list[Interval]:
    """Return the K statistics with their bootstrap intervals over prompts (percentiles of the draws).

    The percentiles are those of "expanded" intervals (Hesterberg, arXiv 1411.5279, section 4.3): Student's t in place of
    the normal, and sqrt(n / (n - 1)), since plain ones are too narrow for few prompts. One prompt, or equal ones, give points.
    """
    from scipy.stats import norm, t

    values = statistic(np.ones((1, num_prompts)))[0]
    if num_prompts < 2:
        return [Interval(float(value), float(value), float(value)) for value in values]
    rng = np.random.default_rng(seed)
    draws = statistic(rng.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=resamples))
    tail = norm.cdf(np.sqrt(num_prompts / (num_prompts - 1)) * t.ppf((1 - level) / 2, num_prompts - 1))
    ends = np.quantile(draws, [tail, 1 - tail], axis=0)
    return [Interval(float(v), float(low), float(high)) for v, low, high in zip(values, *ends, strict=True)]


def mean_interval(
    values: Sequence[float] | np.ndarray, *, seed: int = 0, level: float = 0.95, resamples: int = RESAMPLES
) -> Interval:
    """Return the mean of one value a prompt (P,) with its bootstrap interval."""
    array = np.asarray(values, dtype=float)
    assert array.ndim == 1 and len(array) and np.isfinite(array).all(), array
    column = array[:, None]
    return bootstrap(lambda n: n @ column / len(array), len(array), seed=seed, level=level, resamples=resamples)[0]


def paired_p_value(differences: Sequence[float] | np.ndarray, *, seed: int = 0) -> float:
    """Return the two-sided p-value of "the mean difference is 0": how often random signs give a mean as far from it.

    differences (P,), one a prompt. Exact up to EXACT prompts, else 10,000 random signs, the observed ones counted among them.
    """
    array = np.asarray(differences, dtype=float)
    assert array.ndim == 1 and len(array) and np.isfinite(array).all(), array
    as_far = abs(array.sum()) - 1e-9 * np.abs(array).sum()
    if len(array) <= EXACT:
        signs = 1 - 2 * (np.arange(2 ** len(array))[:, None] >> np.arange(len(array)) & 1)
        return float((np.abs(signs @ array) >= as_far).mean())
    rng, hits = np.random.default_rng(seed), 1
    for _ in range(RANDOM_SIGNS // DRAWN):  # all at once are gigabytes for ten thousand prompts
        signs = rng.choice([-1, 1], size=(DRAWN, len(array)))
        hits += int((np.abs(signs @ array) >= as_far).sum())
    return hits / (RANDOM_SIGNS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for having asked so many questions at once (Holm, 1979).

    p_(i) -> max over j <= i of min(1, (m - j + 1) p_(j)), in sorted order: none of m true nulls is rejected at level a
    with more probability than a, however the tests depend on each other.
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return [float(one) for one in adjusted]


# --- the length-controlled win rate ---


def length_controlled(
    preferences: Sequence[float] | np.ndarray,
    length_differences: Sequence[float] | np.ndarray,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> LengthControlled:
    """Return the win rate that is predicted for texts of equal length (AlpacaEval 2, arXiv 2404.04475, section 3).

    logit P(win) = theta + phi * tanh(d / std(d)), d the student's characters less the other's; the win rate at d = 0 is
    sigmoid(theta). *Here:* without the paper's term for the instruction's difficulty, which was estimated from many models
    on AlpacaEval's own 805 prompts, and without its penalties: a ridge of RIDGE only keeps separated data finite.
    preferences (P,) in [0, 1], a tie 0.5; std is of all prompts, also in the resamples of the interval.
    """
    won, difference = np.asarray(preferences, dtype=float), np.asarray(length_differences, dtype=float)
    assert won.shape == difference.shape and won.ndim == 1, (won.shape, difference.shape)
    assert ((won >= 0) & (won <= 1)).all(), won
    spread = difference.std(ddof=1) if len(difference) > 1 else 0.0
    x = np.tanh(difference / spread) if spread > 0 else np.zeros(len(difference))
    start = fit_logistic(x, won, np.ones((1, len(won))))

    def fits(times: np.ndarray) -> np.ndarray:
        weights = fit_logistic(x, won, times, start=start)
        return np.stack([_sigmoid(weights[:, 0]), weights[:, 1]], axis=1)

    found = bootstrap(fits, len(won), seed=seed, resamples=resamples)
    if (won == won[0]).all():  # what varies between the draws is how far the ridge lets them run
        found = [Interval(one.value, one.value, one.value) for one in found]
    return LengthControlled(*found)


def fit_logistic(
    x: np.ndarray, y: np.ndarray, times: np.ndarray, ridge: float = RIDGE, start: np.ndarray | None = None
) -> np.ndarray:
    """Fit logit E[y] = a + b x to y in [0, 1] by cross-entropy with weights `times` (R, P); return (R, 2) of (a, b).

    Minimises sum_p times_p CE(y_p, sigmoid(a + b x_p)) + ridge (a^2 + b^2) / 2 by Newton's method, R fits at once,
    from `start` (1, 2) or 0.
    """
    powers = np.stack([np.ones_like(x), x, x * x], axis=1)  # (P, 3)
    weights = np.tile(np.zeros(2) if start is None else start[0], (len(times), 1))
    for _ in range(100):
        p = _sigmoid(weights @ powers[:, :2].T)
        gradient = (times * (p - y)) @ powers[:, :2] + ridge * weights
        moments = (times * p * (1 - p)) @ powers
        curvature = moments[:, [[0, 1], [1, 2]]] + (ridge + 1e-12) * np.eye(2)
        step = np.linalg.solve(curvature, gradient[:, :, None])[:, :, 0]
        weights -= step / np.maximum(1.0, np.abs(step).max(1, keepdims=True))  # far out a whole step overshoots
        if np.abs(step).max() < 1e-9:
            break
    return weights


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -z))


# --- agreement ---


def agreement(readings: np.ndarray, *, nominal: bool) -> float:
    """Return Krippendorff's alpha of several readings of the same things: 1 is agreement, 0 what chance would give.

    readings (things, runs), NaN where there is none. alpha = 1 - D_o / D_e: the disagreement within a thing over that
    between any two readings, each 0 or 1 (`nominal`), or the squared difference. NaN if nothing was read twice, or if
    all readings are equal, where chance cannot be told from agreement. Krippendorff, Content Analysis (2004), chapter 11.
    """
    assert readings.ndim == 2, readings.shape
    twice = readings[np.isfinite(readings).sum(1) >= 2]
    rows = [row[np.isfinite(row)] for row in twice]
    if not rows:
        return float("nan")
    observed = sum(_disagreement(row, nominal) / (len(row) - 1) for row in rows)
    everything = np.concatenate(rows)
    expected = _disagreement(everything, nominal) / (len(everything) - 1)
    return float(1 - observed / expected) if expected > 0 else float("nan")


def _disagreement(values: np.ndarray, nominal: bool) -> float:
    """Sum over ordered pairs of the disagreement of two values."""
    kinds, counts = np.unique(values, return_counts=True)
    between = np.not_equal.outer(kinds, kinds) if nominal else np.subtract.outer(kinds, kinds) ** 2
    return float(counts @ between @ counts)
