"""Exact ratings: what the whole distribution over the options says about ratings, sampled ones included."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from prefs.statistics.estimates import ROUNDING, Estimate, Floats, Resamples, excess, ratio, resampling

MIN_TASKS = 3
FEW_EXACT = "fewer than 3 tasks with an exact rating"
NO_EXACT = "no task with an exact rating"
ONE_EXACT = "one task with an exact rating"
NO_VARIANCE = "no variance in ratings"
NO_TASK_VARIANCE = "no variance between tasks"


@dataclass(frozen=True)
class ExactSummary:
    """Exact ratings of T tasks.

    Attributes
    ----------
    mean
        [T], m = Σ v·p / Σ p.
    variance
        [T], w = Σ (v - m)²·p / Σ p: how much a single sampled rating of this task varies.
    valid_mass
        [T], Σ p: how much of the probability is on the options at all.

    Mean and variance are NaN where the valid mass is 0 or NaN.
    """

    mean: Floats
    variance: Floats
    valid_mass: Floats


@dataclass(frozen=True)
class ExactMoments:
    """The exact ratings of a cell in four numbers, each an average over tasks.

    Attributes
    ----------
    mean, sd
        Of the tasks' exact means (SD with ddof = 1): how high the ratings are, and how far apart the tasks.
    noise
        Mean over tasks of the variance of one sampled rating.
    valid_mass
        Mean over tasks of the probability that is on the options at all.
    """

    mean: Estimate
    sd: Estimate
    noise: Estimate
    valid_mass: Estimate


@dataclass(frozen=True)
class NoiseCeiling:
    """The largest correlation, and R², that any predictor of a noisy target can reach."""

    r: Estimate
    r2: Estimate


def exact_summary(p: ArrayLike, values: ArrayLike) -> ExactSummary:
    """Mean, variance and valid mass of exact ratings.

    Parameters
    ----------
    p
        [T, V] probability of each option, not renormalised. A row of NaN is a task without an exact rating.
    values
        [V] the options' numbers.

    Raises
    ------
    ValueError
        If the shapes do not fit, or a probability is negative.
    """
    p, v = np.asarray(p, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if p.ndim != 2 or v.shape != p.shape[1:]:
        raise ValueError(f"masses must be [tasks, options] and values [options], got {p.shape} and {v.shape}")
    if (p < 0).any():
        raise ValueError("option masses must not be negative")
    mass = p.sum(axis=1)
    q = ratio(p, mass[:, None])
    mean = q @ v
    return ExactSummary(mean, (q * (v - mean[:, None]) ** 2).sum(axis=1), mass)


def exact_moments(exact: ExactSummary, draws: Resamples | None = None) -> ExactMoments:
    """Mean and SD of the exact means, mean sampling variance, mean valid mass.

    Parameters
    ----------
    exact
        Of T tasks; each number is over the tasks for which it is defined.
    draws
        Of the T tasks, for intervals.
    """
    draws = resampling(draws, len(exact.mean))
    rated, asked = np.isfinite(exact.mean), np.isfinite(exact.valid_mass)
    n = int(rated.sum())
    parts = _moment_parts(exact.mean, exact.variance)
    answered = np.stack([asked.astype(np.float64), np.where(asked, exact.valid_mass, 0.0)], axis=1)
    count, total, squares, noise = np.moveaxis(draws.sums(parts), 1, 0)
    centre = _centre(exact.mean[rated])
    return ExactMoments(
        mean=Estimate.of(centre + ratio(total, count), n, NO_EXACT),
        sd=Estimate.of(np.sqrt(_spread(count, total, squares)), n, ONE_EXACT if n else NO_EXACT),
        noise=Estimate.of(ratio(noise, count), n, NO_EXACT),
        valid_mass=Estimate.of(ratio(*np.moveaxis(draws.sums(answered), 1, 0)[::-1]), int(asked.sum()), NO_EXACT),
    )


def predicted_r(m: ArrayLike, w: ArrayLike, k: int = 1, draws: Resamples | None = None) -> Estimate:
    """The cross-seed r to expect of sampled ratings, from exact ones: Var(m) / (Var(m) + mean(w)/k).

    Two seeds' ratings of task t are m_t plus independent noise of variance w_t, so over these tasks their covariance
    is expected to be Var(m) (ddof = 1) and each one's variance Var(m) + mean(w). Means of k seeds have noise w_t/k
    (Spearman 1910 and Brown 1910: the same as stepping r up for a test k times as long).

    Parameters
    ----------
    m, w
        [T] exact means and variances; tasks where either is NaN are left out.
    k
        Seeds in each of the two means that are correlated.
    draws
        Of the T tasks, for the interval.

    Raises
    ------
    ValueError
        If `k` is below 1, or the shapes differ.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    m, w = _exact(m, w)
    n = int(np.isfinite(m).sum())
    if n < MIN_TASKS:
        return Estimate.missing(FEW_EXACT, n)
    count, total, squares, noise = np.moveaxis(resampling(draws, len(m)).sums(_moment_parts(m, w)), 1, 0)
    signal = _spread(count, total, squares)
    return Estimate.of(ratio(signal, signal + ratio(noise, count) / k), n, NO_VARIANCE)


def seeds_needed(m: ArrayLike, w: ArrayLike, target_r: float, draws: Resamples | None = None) -> Estimate:
    """The smallest k for which `predicted_r` of k-seed means reaches a wanted r; a whole number.

    Solved from Var(m) / (Var(m) + mean(w)/k) >= r:  k >= mean(w)/Var(m) · r/(1 - r). The upper end of the interval is
    infinite where resamples have no variance between tasks.

    Parameters
    ----------
    m, w
        [T] exact means and variances; tasks where either is NaN are left out.
    target_r
        The wanted correlation, between 0 and 1, both excluded.
    draws
        Of the T tasks, for the interval.

    Raises
    ------
    ValueError
        If `target_r` is not between 0 and 1.
    """
    if not 0 < target_r < 1:
        raise ValueError(f"target_r must be between 0 and 1, got {target_r}")
    single = predicted_r(m, w, draws=draws)
    if single.value == 0:
        return Estimate.missing(NO_TASK_VARIANCE, single.n)

    def seeds(r: float) -> float:
        k = (1 - r) / r * target_r / (1 - target_r) if r > 0 else math.inf
        # Nine seeds that reach exactly .9 are enough, though in floating point 9 comes out as 9.000000000000002.
        return float(max(1, math.ceil(k * (1 - ROUNDING)))) if math.isfinite(k) else math.inf

    return single.map(seeds)


def ceiling(reliability: Estimate) -> NoiseCeiling:
    """The best a predictor can do on a target of a given reliability: r = √reliability, R² = reliability.

    Let the target be y = τ + e: what is stable, and noise independent of everything a predictor sees. The reliability
    is rho = Var(τ)/Var(y), which is what the correlation of two measurements of y estimates. For a predictor f,

        corr(f, y) = cov(f, τ) / √(Var(f) Var(y)) = corr(f, τ) · √rho  <=  √rho,

    Spearman's attenuation formula (1904, "The proof and measurement of association between two things") for a
    predictor without error of its own. R² is largest at f = τ: 1 - Var(e)/Var(y) = rho.

    Parameters
    ----------
    reliability
        Of the target that the probe is scored on: `predicted_r` at k, or ICC(1,k), for the mean of k seeds; 1 for an
        exact mean. A value outside [0, 1] is clipped, and so is its interval.
    """
    r2 = reliability.map(lambda value: min(max(value, 0.0), 1.0))
    return NoiseCeiling(r=r2.map(math.sqrt), r2=r2)


def _exact(m: ArrayLike, w: ArrayLike) -> tuple[Floats, Floats]:
    """Means and variances, both NaN where either is."""
    m, w = np.asarray(m, dtype=np.float64), np.asarray(w, dtype=np.float64)
    if m.ndim != 1 or m.shape != w.shape:
        raise ValueError(f"means and variances must be one-dimensional and alike, got {m.shape} and {w.shape}")
    there = np.isfinite(m) & np.isfinite(w)
    return np.where(there, m, np.nan), np.where(there, w, np.nan)


def _centre(m: Floats) -> float:
    """The middle of the means: sums of squares are taken from there, which keeps them from cancelling."""
    return float(m.mean()) if len(m) else 0.0


def _moment_parts(m: Floats, w: Floats) -> Floats:
    """[T, 4] per task: 1, z, z², w, with z the mean from the middle; zeros for tasks without an exact rating.

    Means that differ by rounding only, as equal means of options may, are equal.
    """
    there = np.isfinite(m)
    rated = m[there]
    alike = len(rated) == 0 or np.ptp(rated) <= ROUNDING * np.abs(rated).max()
    z = np.zeros_like(m) if alike else np.where(there, m - _centre(rated), 0.0)
    return np.stack([there.astype(np.float64), z, z * z, np.where(there, w, 0.0)], axis=1)


def _spread(count: Floats, total: Floats, squares: Floats) -> Floats:
    """Variance (ddof = 1) from Σ1, Σz and Σz²; NaN below two tasks."""
    return ratio(excess(squares, ratio(total * total, count)), count - 1)
