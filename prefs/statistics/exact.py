"""Exact ratings: what the whole distribution over the options says about ratings, sampled ones included."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from prefs.statistics.estimates import (
    MIN_TASKS,
    NO_TASK_VARIANCE,
    NO_VARIANCE,
    ROUNDING,
    Estimate,
    Floats,
    Resamples,
    alike,
    centred,
    excess,
    known_mean,
    ratio,
    resampling,
)

FEW_EXACT = "fewer than 3 tasks with an exact rating"
NO_EXACT = "no task with an exact rating"
ONE_EXACT = "one task with an exact rating"
ONE_THOUGHT = "one thought a task: how much thoughts differ is not known (rating.thoughts=2 or more)"


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
    between
        [T], the part of `variance` that is between a thinking model's thoughts; 0 for one that answers at once.
    uncertainty
        [T], the variance of `mean` itself, which for a thinking model is over a few thoughts; else 0.

    Mean and variance are NaN where the valid mass is 0 or NaN. After a single thought, variance, between and
    uncertainty are NaN: nothing is known of other thoughts.
    """

    mean: Floats
    variance: Floats
    valid_mass: Floats
    between: Floats
    uncertainty: Floats


@dataclass(frozen=True)
class ExactMoments:
    """The exact ratings of a cell in four numbers, each an average over tasks.

    Attributes
    ----------
    mean, sd
        Of the tasks' exact means (SD with ddof = 1): how high the ratings are, and how far apart the tasks.
    noise
        Mean over tasks of the variance of one sampled rating.
    between
        The part of `noise` that is between a thinking model's thoughts; 0 for one that answers at once.
    valid_mass
        Mean over tasks of the probability that is on the options at all.
    """

    mean: Estimate
    sd: Estimate
    noise: Estimate
    between: Estimate
    valid_mass: Estimate


@dataclass(frozen=True)
class NoiseCeiling:
    """The largest correlation, and R², that any predictor of a noisy target can reach."""

    r: Estimate
    r2: Estimate


def exact_summary(p: ArrayLike, values: ArrayLike) -> ExactSummary:
    """Mean, variance and valid mass of the exact ratings of a model that answers at once; see `thought_summary`.

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
    mean, variance, mass = _moments(p, values, "tasks")
    return ExactSummary(mean, variance, mass, np.zeros_like(mean), np.zeros_like(mean))


def thought_summary(p: ArrayLike, values: ArrayLike) -> ExactSummary:
    """Exact ratings of a model that thinks, from the distribution after each of K thoughts: of their mixture.

    A sampled rating draws a thought and then an option, so by the law of total variance it varies by the mean of the
    variances after each thought, plus the variance between the thoughts' means. Thoughts count by their valid mass
    s_k, as they do among valid sampled ratings: with a_k = s_k / Σ s,

        m = Σ a_k m_k,   between = Σ a_k (m_k - m)² / (1 - Σ a_k²),   variance = Σ a_k w_k + between.

    The denominator makes `between` unbiased (it is K - 1 over K for equal weights); the mean of K thoughts has
    variance between · Σ a_k².

    Parameters
    ----------
    p
        [T, K, V] probability of each option after each thought, NaN where there was none. `valid_mass` is over the
        thoughts that ended.
    values
        [V], and errors, as for `exact_summary`.
    """
    m, w, mass = _moments(p, values, "tasks, thoughts")
    ended = np.isfinite(mass)
    s = np.where(np.isfinite(m), mass, 0.0)
    a = ratio(s, s.sum(axis=1, keepdims=True))
    mean = _weighted(a, m)
    effective = (a**2).sum(axis=1)
    between = ratio(_weighted(a, (m - mean[:, None]) ** 2), excess(np.ones_like(effective), effective))
    return ExactSummary(
        mean=mean,
        variance=_weighted(a, w) + between,
        valid_mass=ratio(np.where(ended, mass, 0.0).sum(axis=1), ended.sum(axis=1).astype(np.float64)),
        between=between,
        uncertainty=between * effective,
    )


def _moments(p: ArrayLike, values: ArrayLike, axes: str) -> tuple[Floats, Floats, Floats]:
    """Mean, variance and valid mass over the last axis of masses whose others are `axes`."""
    p, v = np.asarray(p, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if p.ndim != axes.count(",") + 2 or v.shape != p.shape[-1:]:
        raise ValueError(f"masses must be [{axes}, options] and values [options], got {p.shape} and {v.shape}")
    if (p < 0).any():
        raise ValueError("option masses must not be negative")
    mass = p.sum(axis=-1)
    q = ratio(p, mass[..., None])
    mean = q @ v
    return mean, (q * (v - mean[..., None]) ** 2).sum(axis=-1), mass


def _weighted(a: Floats, x: Floats) -> Floats:
    """Σ a·x over the last axis, without the x that do not count; NaN where no weight is known."""
    return np.where(a > 0, a * x, np.where(np.isnan(a), np.nan, 0.0)).sum(axis=-1)


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
    rated = np.isfinite(exact.mean)
    n = int(rated.sum())
    z = centred(exact.mean, rated)
    count, total, squares = draws.totals(rated, z, z * z)
    middle = float(exact.mean[rated].mean()) if n else 0.0
    unknown = ONE_THOUGHT if n else NO_EXACT
    return ExactMoments(
        mean=Estimate.of(middle + ratio(total, count), n, NO_EXACT),
        sd=Estimate.of(np.sqrt(_spread(count, total, squares)), n, ONE_EXACT if n else NO_EXACT),
        noise=known_mean(exact.variance, draws, unknown),
        between=known_mean(np.where(rated, exact.between, np.nan), draws, unknown),
        valid_mass=known_mean(exact.valid_mass, draws, NO_EXACT),
    )


def predicted_r(
    m: ArrayLike,
    w: ArrayLike,
    k: int = 1,
    draws: Resamples | None = None,
    uncertainty: ArrayLike | None = None,
) -> Estimate:
    """The cross-seed r to expect of sampled ratings, from exact ones: Var(m) / (Var(m) + mean(w)/k).

    Two seeds' ratings of task t are m_t plus independent noise of variance w_t, so over these tasks their covariance
    is expected to be Var(m) (ddof = 1) and each one's variance Var(m) + mean(w). Means of k seeds have noise w_t/k
    (Spearman 1910 and Brown 1910: the same as stepping r up for a test k times as long).

    Where the means are themselves over a few thoughts, Var(m) is larger than that of what they estimate by the mean
    of their own variance, which is taken off first (and nothing below 0 is left).

    Parameters
    ----------
    m, w
        [T] exact means and variances; tasks where either is NaN are left out.
    k
        Seeds in each of the two means that are correlated.
    draws
        Of the T tasks, for the interval.
    uncertainty
        [T] the variance of each m; None: 0.

    Raises
    ------
    ValueError
        If `k` is below 1, or the shapes differ.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    m, w = alike(m, w, "means and variances")
    known = np.isfinite(m) & np.isfinite(w)
    n = int(known.sum())
    if n < MIN_TASKS:
        return Estimate.missing(FEW_EXACT, n)
    own = np.zeros_like(m) if uncertainty is None else np.asarray(uncertainty, dtype=np.float64)
    z, noise, own = centred(m, known), np.where(known, w, 0.0), np.where(known, own, 0.0)
    count, total, squares, noise, own = resampling(draws, len(m)).totals(known, z, z * z, noise, own)
    signal = np.maximum(_spread(count, total, squares) - ratio(own, count), 0.0)
    return Estimate.of(ratio(signal, signal + ratio(noise, count) / k), n, NO_VARIANCE)


def reliability(exact: ExactSummary) -> Estimate:
    """How reliable exact means are as a target: 1 of a model that answers at once, less of one that thinks.

    The share of Var(m) that is not the means' own variance.
    """
    rated = int(np.isfinite(exact.mean).sum())
    if not exact.between.any():
        return Estimate(1.0, None, None, n=rated)
    share = predicted_r(exact.mean, exact.uncertainty, uncertainty=exact.uncertainty)
    if share.value is None and rated >= MIN_TASKS:
        return Estimate.missing(ONE_THOUGHT, share.n)
    return share


def seeds_needed(
    m: ArrayLike,
    w: ArrayLike,
    target_r: float,
    draws: Resamples | None = None,
    uncertainty: ArrayLike | None = None,
) -> Estimate:
    """The smallest k for which `predicted_r` of k-seed means reaches a wanted r; a whole number.

    Solved from Var(m) / (Var(m) + mean(w)/k) >= r:  k >= mean(w)/Var(m) · r/(1 - r). The upper end of the interval is
    infinite where resamples have no variance between tasks.

    Parameters
    ----------
    m, w, draws, uncertainty
        As for `predicted_r`.
    target_r
        The wanted correlation, between 0 and 1, both excluded.

    Raises
    ------
    ValueError
        If `target_r` is not between 0 and 1.
    """
    if not 0 < target_r < 1:
        raise ValueError(f"target_r must be between 0 and 1, got {target_r}")
    single = predicted_r(m, w, draws=draws, uncertainty=uncertainty)
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
        Of the target that the probe is scored on: `predicted_r` at k, or ICC(1,k), for the mean of k seeds;
        `reliability` for an exact mean. A value outside [0, 1] is clipped, and so is its interval.
    """
    r2 = reliability.map(lambda value: min(max(value, 0.0), 1.0))
    return NoiseCeiling(r=r2.map(math.sqrt), r2=r2)


def _spread(count: Floats, total: Floats, squares: Floats) -> Floats:
    """Variance (ddof = 1) from Σ1, Σz and Σz²; NaN below two tasks."""
    return ratio(excess(squares, ratio(total * total, count)), count - 1)
