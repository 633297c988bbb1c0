"""How stable ratings are, and how much they tell tasks apart: pure functions of arrays.

A cell's sampled ratings are x[t, s] over tasks t and rating seeds s, NaN where a rating is not valid. Its exact ratings
are masses p[t, v] over the options v. Each function reports a statistic that is not defined as missing, with its
reason. Intervals resample tasks, never seeds: they say how the number would move with other tasks of the same kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from prefs.estimates import (
    ROUNDING,
    Estimate,
    Interval,
    bootstrap_interval,
    excess,
    pearson_of_sums,
    ratio,
    resample_counts,
)

Floats = NDArray[np.float64]
Columns = NDArray[np.intp]

# Entries of the products of some pairs of seeds at a time: 32 MiB of float64.
BLOCK_ENTRIES = 2**22
MIN_TASKS = 3
ONE_SEED = "one rating seed"
NO_SEED = "no rating seeds"
NO_TASKS = "no tasks"
NO_RATINGS = "no valid ratings"
NO_PAIRS = "no tasks with two valid ratings"
FEW_TASKS = "fewer than 3 tasks with two valid ratings"
FEW_INFORMATIVE = "fewer than 3 tasks with a rating other than the mode"
NO_VARIANCE = "no variance in ratings"
NO_TASK_VARIANCE = "no variance between tasks"
ONE_PAIR = "fewer than 2 pairs of seeds with a defined r"
FEW_EXACT = "fewer than 3 tasks with an exact rating"


@dataclass(frozen=True)
class SeedPair:
    """The correlation of two rating seeds, by their columns; `r.n` is the number of tasks it is over."""

    first: int
    second: int
    r: Estimate


@dataclass(frozen=True)
class PairCorrelation:
    """A correlation of rating seeds, over all their pairs.

    Attributes
    ----------
    mean
        Mean over the pairs for which it is defined.
    sd
        Standard deviation over them (ddof = 1). The pairs share seeds, so it describes and is no standard error.
    pairs_defined, pairs_total
        Number of pairs with a defined correlation, and of all pairs: S(S - 1)/2.
    pairs
        Each pair's own.
    """

    mean: Estimate
    sd: Estimate
    pairs_defined: int
    pairs_total: int
    pairs: tuple[SeedPair, ...]


@dataclass(frozen=True)
class CrossSeed:
    """Cross-seed r, by Pearson and by Spearman."""

    pearson: PairCorrelation
    spearman: PairCorrelation


@dataclass(frozen=True)
class Modal:
    """A cell's most frequent rating.

    Attributes
    ----------
    rating
        The mode over all valid ratings, the smallest of several; None without any.
    share
        The share of valid ratings that equal it.
    ratings
        How many valid ratings there are.
    """

    rating: float | None
    share: Estimate
    ratings: int


@dataclass(frozen=True)
class Informative:
    """Cross-seed r where the answer is not merely the usual one.

    Attributes
    ----------
    r
        Pearson over the tasks with at least one of the pair's two ratings off the mode.
    d
        Discrimination rate: the share of tasks that are so, averaged over pairs.
    modal
        The cell's modal rating.
    """

    r: PairCorrelation
    d: Estimate
    modal: float | None


@dataclass(frozen=True)
class Intraclass:
    """One-way random-effects intraclass correlation: the between-task share of variance.

    Attributes
    ----------
    single
        ICC(1), of one rating. Negative where tasks differ less than their seeds do.
    mean
        ICC(1,k), of the mean of a task's k ratings.
    k
        Ratings a task; n0 where tasks have different numbers of valid ones. None where ICC(1) is missing.
    """

    single: Estimate
    mean: Estimate
    k: float | None


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
class SeedsNeeded:
    """The smallest number of seeds whose mean reaches a wanted r; None with a reason where none does."""

    seeds: int | None
    target_r: float
    n: int
    reason: str | None = None


@dataclass(frozen=True)
class NoiseCeiling:
    """The largest correlation, and R², that any predictor of a noisy target can reach."""

    r: Estimate
    r2: Estimate


def cross_seed(x: ArrayLike, bootstrap: int = 0, seed: int = 0) -> CrossSeed:
    """Pearson and Spearman correlation of every pair of seeds, over the tasks where both ratings are valid.

    Parameters
    ----------
    x
        [T, S] ratings, NaN where not valid.
    bootstrap
        Resamples of tasks for the interval of the mean Pearson r; 0 for none. A pair without variance in a resample
        is left out of that resample's mean, as it is from the cell's. Spearman has no interval.
    seed
        Of the resampling.
    """
    x, valid = _ratings(x)
    why = _why_no_cell(x)
    usable = valid.sum(axis=1) >= 2
    x = x[usable]
    pairs = _Pairs.of(x, _mode(x[valid[usable]]))
    r, n = pairs.correlate_all()
    why = why or (FEW_TASKS if n.max() < MIN_TASKS else NO_VARIANCE)
    # pandas correlates pairwise-complete columns and ranks within them; SciPy would omit a task from every pair.
    rho = pd.DataFrame(x).corr(method="spearman", min_periods=MIN_TASKS).to_numpy(dtype=np.float64)
    return CrossSeed(
        pearson=_over_pairs(pairs, r, n, len(x), why, FEW_TASKS, pairs.interval(r, bootstrap, seed)),
        spearman=_over_pairs(pairs, rho[pairs.first, pairs.second], n, len(x), why, FEW_TASKS),
    )


def informative(x: ArrayLike, bootstrap: int = 0, seed: int = 0) -> Informative:
    """Informative r and the discrimination rate d, averaged over pairs of seeds.

    A task is informative for a pair when at least one of its two ratings is not the cell's modal rating. A model that
    nearly always says 4 agrees with itself nearly always; informative r asks how well it does when it says otherwise.

    Parameters
    ----------
    x
        [T, S] ratings, NaN where not valid.
    bootstrap
        Resamples of tasks for the intervals of the mean r and of d; 0 for none. The mode stays the cell's.
    seed
        Of the resampling.

    Notes
    -----
    The mode is over all valid ratings of the cell, the smallest of several that are equally frequent. d of a pair is
    of the tasks where both its ratings are valid.
    """
    x, valid = _ratings(x)
    mode = _mode(x[valid])
    at_mode = x == mode if mode is not None else np.zeros_like(valid)
    why = _why_no_cell(x)
    usable = valid.sum(axis=1) >= 2
    x, valid, at_mode = x[usable], valid[usable], at_mode[usable]
    both, off = _Pairs.of(x, mode), _Pairs.of(x, mode, skip=at_mode)
    r, n = off.correlate_all()
    why_r = why or _why_not_informative(int(both.correlate_all()[1].max()), int(n.max()))
    off_mode = int((valid & ~at_mode).any(axis=1).sum())

    def rate(weights: Floats) -> Floats:
        return _mean_of_defined(ratio(off.counts(weights), both.counts(weights)))

    why_d = why or (None if len(x) else NO_PAIRS)
    return Informative(
        r=_over_pairs(off, r, n, off_mode, why_r, FEW_INFORMATIVE, off.interval(r, bootstrap, seed)),
        d=_estimate(rate, len(x), why_d, NO_PAIRS, bootstrap, seed),
        modal=mode,
    )


def _why_not_informative(both: int, off: int) -> str:
    """Why no pair has an informative r, from the largest numbers of its tasks, all and informative."""
    if both < MIN_TASKS:
        return FEW_TASKS
    return FEW_INFORMATIVE if off < MIN_TASKS else NO_VARIANCE


def intraclass(x: ArrayLike, bootstrap: int = 0, seed: int = 0) -> Intraclass:
    """ICC(1) and ICC(1,k): one-way random effects, for tasks with different numbers of valid ratings.

    With a tasks of k_t ratings each, N = Σ k_t, and the mean squares between and within tasks,

        MSB = Σ k_t (x̄_t - x̄)² / (a - 1),    MSW = ΣΣ (x_ts - x̄_t)² / (N - a),    n0 = (N - Σ k_t² / N) / (a - 1),
        ICC(1) = (MSB - MSW) / (MSB + (n0 - 1) MSW),    ICC(1,k) = (MSB - MSW) / MSB    at k = n0

    (Shrout & Fleiss 1979; n0 from Donner 1986, "A review of inference procedures for the intraclass correlation
    coefficient in the one-way random effects model"). Without NaN, n0 = S and these are the textbook's. A task with a
    single valid rating still counts towards MSB. Both are reported as they come, negative ones too.

    Parameters
    ----------
    x
        [T, S] ratings, NaN where not valid.
    bootstrap
        Resamples of tasks for the intervals; 0 for none.
    seed
        Of the resampling.
    """
    x, valid = _ratings(x)
    missing = _why_no_cell(x)
    if missing is None and (valid.sum(axis=1) >= 2).sum() < MIN_TASKS:
        missing = FEW_TASKS
    rated = valid.any(axis=1)
    parts = _anova_parts(x[rated], valid[rated])
    tasks = int(rated.sum())

    def single(counts: Floats) -> Floats:
        between, within, n0 = _mean_squares(counts @ parts)
        return ratio(between - within, between + (n0 - 1) * within)

    def mean(counts: Floats) -> Floats:
        between, within, _ = _mean_squares(counts @ parts)
        return ratio(between - within, between)

    icc1 = _estimate(single, tasks, missing, NO_VARIANCE, bootstrap, seed)
    missing = icc1.reason
    return Intraclass(
        single=icc1,
        mean=_estimate(mean, tasks, missing, NO_TASK_VARIANCE, bootstrap, seed),
        k=float(_mean_squares(np.ones((1, tasks)) @ parts)[2][0]) if missing is None else None,
    )


def _anova_parts(x: Floats, valid: NDArray[np.bool_]) -> Floats:
    """[T, 6] per task with a rating: 1, k, k², Σx, (Σx)²/k, Σ(x - x̄_t)²; sums of these are all a resample needs."""
    z = np.where(valid, x - (_mode(x[valid]) or 0.0), 0.0)
    k = valid.sum(axis=1).astype(np.float64)
    total = z.sum(axis=1)
    deviation = np.where(valid, z - (total / k)[:, None], 0.0)
    return np.stack([np.ones_like(k), k, k * k, total, total * total / k, (deviation**2).sum(axis=1)], axis=1)


def _mean_squares(sums: Floats) -> tuple[Floats, Floats, Floats]:
    """MSB, MSW and n0, each [R], from the sums [R, 6] of `_anova_parts`; NaN without degrees of freedom."""
    a, ratings, squares, total, between, within = np.moveaxis(sums, 1, 0)
    n0 = ratio(ratings - ratio(squares, ratings), a - 1)
    return ratio(excess(between, ratio(total * total, ratings)), a - 1), ratio(within, ratings - a), n0


def modal(x: ArrayLike, bootstrap: int = 0, seed: int = 0) -> Modal:
    """The modal rating over all valid ratings of the cell (the smallest on ties), and its share of them.

    Parameters
    ----------
    x
        [T, S] ratings, NaN where not valid.
    bootstrap
        Resamples of tasks for the interval of the share; 0 for none. The mode stays the cell's.
    seed
        Of the resampling.
    """
    x, valid = _ratings(x)
    mode = _mode(x[valid])
    rated = valid.any(axis=1)
    parts = np.stack([(x[rated] == mode).sum(axis=1), valid[rated].sum(axis=1)], axis=1).astype(np.float64)

    def share(counts: Floats) -> Floats:
        hits, ratings = np.moveaxis(counts @ parts, 1, 0)
        return ratio(hits, ratings)

    missing = (NO_TASKS if len(x) == 0 else NO_RATINGS) if mode is None else None
    return Modal(
        mode, _estimate(share, int(rated.sum()), missing, NO_RATINGS, bootstrap, seed), ratings=int(valid.sum())
    )


def exact_summary(p: ArrayLike, values: ArrayLike) -> ExactSummary:
    """Mean, variance and valid mass of exact ratings.

    Parameters
    ----------
    p
        [T, V] probability of each option, not renormalised. A row of NaN is a task without an exact rating.
    values
        [V] the options' numbers.
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


def predicted_r(m: ArrayLike, w: ArrayLike, k: int = 1, bootstrap: int = 0, seed: int = 0) -> Estimate:
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
    bootstrap
        Resamples of tasks for the interval; 0 for none.
    seed
        Of the resampling.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    m, w = _exact(m, w)
    # From the values' own middle, which keeps the sums below from cancelling.
    z = m - m.mean() if len(m) else m
    if len(m) and _variance(m) == 0:
        z = np.zeros_like(m)
    parts = np.stack([np.ones_like(z), z, z * z, w], axis=1)

    def predicted(counts: Floats) -> Floats:
        n, total, squares, noise = np.moveaxis(counts @ parts, 1, 0)
        signal = ratio(excess(squares, ratio(total * total, n)), n - 1)
        return ratio(signal, signal + ratio(noise, n) / k)

    return _estimate(predicted, len(m), FEW_EXACT if len(m) < MIN_TASKS else None, NO_VARIANCE, bootstrap, seed)


def seeds_needed(m: ArrayLike, w: ArrayLike, target_r: float) -> SeedsNeeded:
    """The smallest k for which `predicted_r` of k-seed means reaches a wanted r.

    Solved from Var(m) / (Var(m) + mean(w)/k) >= r:  k >= mean(w)/Var(m) · r/(1 - r).

    Parameters
    ----------
    m, w
        [T] exact means and variances; tasks where either is NaN are left out.
    target_r
        The wanted correlation, between 0 and 1, both excluded.
    """
    if not 0 < target_r < 1:
        raise ValueError(f"target_r must be between 0 and 1, got {target_r}")
    m, w = _exact(m, w)
    if len(m) < MIN_TASKS:
        return SeedsNeeded(None, target_r, len(m), FEW_EXACT)
    signal, noise = _variance(m), float(w.mean())
    if signal == 0:
        return SeedsNeeded(None, target_r, len(m), NO_TASK_VARIANCE if noise > 0 else NO_VARIANCE)
    k = noise / signal * target_r / (1 - target_r)
    # Nine seeds that reach exactly .9 are enough, though in floating point 9 comes out as 9.000000000000002.
    return SeedsNeeded(max(1, math.ceil(k * (1 - ROUNDING))), target_r, len(m))


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
    if reliability.value is None:
        missing = Estimate.missing(reliability.reason or "no reliability", reliability.n)
        return NoiseCeiling(missing, missing)
    r2 = _map(reliability, lambda value: min(max(value, 0.0), 1.0))
    return NoiseCeiling(r=_map(r2, math.sqrt), r2=r2)


@dataclass(frozen=True)
class _Pairs:
    """Ratings laid out for sums over tasks of every pair of seeds: by seed, so that a seed's ratings are contiguous.

    Attributes
    ----------
    z
        [S, T] ratings less the cell's mode, 0 where not valid. Shifted by a rating, whole numbers stay whole numbers,
        and ratings without variance have a variance of exactly 0.
    seen
        [S, T] 1 where valid.
    skip
        [S, T] 1 at ratings whose tasks a pair leaves out when both of its ratings are such. Only ratings at the mode
        may be so marked: there z is 0, so leaving the task out changes the pair's count and none of its sums.
    first, second
        [P] the seeds of each pair.
    """

    z: Floats
    seen: Floats
    skip: Floats
    first: Columns
    second: Columns

    @classmethod
    def of(cls, x: Floats, mode: float | None, skip: NDArray[np.bool_] | None = None) -> _Pairs:
        valid = ~np.isnan(x)
        first, second = np.triu_indices(x.shape[1], k=1)
        return cls(
            z=_by_seed(np.where(valid, x - (mode or 0.0), 0.0)),
            seen=_by_seed(valid),
            skip=_by_seed(np.zeros_like(x) if skip is None else skip),
            first=first,
            second=second,
        )

    def counts(self, weights: Floats) -> Floats:
        """Tasks that each pair uses, [R, P], from how often each task counts, [R, T]."""
        return np.concatenate([weights @ self._used(a, b).T for a, b in self._blocks(1)], axis=1)

    def correlate(self, weights: Floats) -> tuple[Floats, Floats]:
        """Pearson r (NaN where not defined) and number of tasks of each pair, both [R, P], from weights [R, T]."""
        r, n = [], []
        for products in self._products():
            sums = (weights @ products.T).reshape(len(weights), 6, -1)
            used, *rest = np.moveaxis(sums, 1, 0)
            r.append(pearson_of_sums(used, *rest))
            n.append(used)
        return np.concatenate(r, axis=1), np.concatenate(n, axis=1)

    def correlate_all(self) -> tuple[Floats, Floats]:
        """Pearson r and number of tasks of each pair, both [P], over the tasks as they are."""
        r, n = self.correlate(np.ones((1, self.z.shape[1])))
        return r[0], n[0]

    def interval(self, r: Floats, bootstrap: int, seed: int) -> Interval:
        """Of the mean over pairs; none where r, [P], is not defined for any."""
        if np.isnan(r).all():
            return None, None
        return bootstrap_interval(
            lambda index: _mean_of_defined(self.correlate(resample_counts(index))[0]), self.z.shape[1], bootstrap, seed
        )

    def _products(self) -> Iterator[Floats]:
        """What is summed over tasks, [6B, T] for B pairs at a time: 1, x, y, x², y², xy where both are valid."""
        blocks = self._blocks(6)
        if len(blocks) == 1:
            yield self._only_products
        else:
            yield from (self._products_of(a, b) for a, b in blocks)

    @cached_property
    def _only_products(self) -> Floats:
        # Kept for all chunks of resamples, as making the products takes longer than drawing a chunk.
        return self._products_of(self.first, self.second)

    def _products_of(self, a: Columns, b: Columns) -> Floats:
        z_a, z_b = self.z[a], self.z[b]
        x, y = z_a * self.seen[b], z_b * self.seen[a]
        return np.concatenate([self._used(a, b), x, y, x * z_a, y * z_b, z_a * z_b])

    def _used(self, a: Columns, b: Columns) -> Floats:
        return self.seen[a] * self.seen[b] - self.skip[a] * self.skip[b]

    def _blocks(self, products: int) -> list[tuple[Columns, Columns]]:
        """The pairs, some at a time: the products of S² pairs of many tasks need not fit in memory together."""
        size = max(1, BLOCK_ENTRIES // max(1, products * self.z.shape[1]))
        starts = range(0, max(1, len(self.first)), size)
        return [(self.first[at : at + size], self.second[at : at + size]) for at in starts]


def _ratings(x: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2:
        raise ValueError(f"ratings must be [tasks, seeds], got shape {x.shape}")
    valid = np.isfinite(x)
    return np.where(valid, x, np.nan), valid


def _by_seed(x: NDArray[np.generic]) -> Floats:
    return np.ascontiguousarray(x.T, dtype=np.float64)


def _exact(m: ArrayLike, w: ArrayLike) -> tuple[Floats, Floats]:
    """The tasks whose mean and variance are both there."""
    m, w = np.asarray(m, dtype=np.float64), np.asarray(w, dtype=np.float64)
    if m.ndim != 1 or m.shape != w.shape:
        raise ValueError(f"means and variances must be one-dimensional and alike, got {m.shape} and {w.shape}")
    there = np.isfinite(m) & np.isfinite(w)
    return m[there], w[there]


def _variance(m: Floats) -> float:
    """Var(m) with ddof = 1; exactly 0 where the values differ by rounding only, as equal means of options may."""
    return float(m.var(ddof=1)) if np.ptp(m) > ROUNDING * np.abs(m).max() else 0.0


def _mode(valid: Floats) -> float | None:
    """The most frequent value, the smallest of several; None of nothing."""
    values, counts = np.unique(valid, return_counts=True)
    return float(values[counts.argmax()]) if len(values) else None


def _why_no_cell(x: Floats) -> str | None:
    if x.shape[1] < 2:
        return ONE_SEED if x.shape[1] else NO_SEED
    return None if len(x) else NO_TASKS


def _mean_of_defined(values: Floats) -> Floats:
    """Mean over the last axis without its NaN: [R] from [R, P]; NaN where there is nothing else."""
    defined = ~np.isnan(values)
    return ratio(np.where(defined, values, 0.0).sum(axis=-1), defined.sum(axis=-1).astype(np.float64))


def _over_pairs(
    pairs: _Pairs,
    r: Floats,
    n: Floats,
    tasks: int,
    why: str,
    too_few: str,
    interval: Interval = (None, None),
) -> PairCorrelation:
    """Correlations [P] of pairs with n[P] tasks each, summed up; `why` is the reason if none is defined."""
    each = tuple(
        SeedPair(int(a), int(b), _pair_estimate(float(value), int(used), too_few))
        for a, b, value, used in zip(pairs.first, pairs.second, r, n, strict=True)
    )
    defined = r[~np.isnan(r)]
    if len(defined) == 0:
        mean = sd = Estimate.missing(why, tasks)
    else:
        mean = Estimate(float(defined.mean()), *interval, n=tasks)
        sd = (
            Estimate(float(defined.std(ddof=1)), None, None, tasks)
            if len(defined) > 1
            else Estimate.missing(ONE_PAIR, tasks)
        )
    return PairCorrelation(mean, sd, len(defined), len(r), each)


def _pair_estimate(r: float, n: int, too_few: str) -> Estimate:
    if math.isnan(r):
        return Estimate.missing(too_few if n < MIN_TASKS else NO_VARIANCE, n)
    return Estimate(r, None, None, n)


def _estimate(
    statistic: Callable[[Floats], Floats],
    tasks: int,
    missing: str | None,
    undefined: str,
    bootstrap: int,
    seed: int,
) -> Estimate:
    """A statistic of how often each task counts, [R, T] -> [R]: of the tasks as they are, and its interval.

    `missing` is a reason known beforehand; `undefined` the one if the statistic is NaN.
    """
    if missing is not None:
        return Estimate.missing(missing, tasks)
    value = float(statistic(np.ones((1, tasks)))[0])
    if math.isnan(value):
        return Estimate.missing(undefined, tasks)
    low, high = bootstrap_interval(lambda index: statistic(resample_counts(index)), tasks, bootstrap, seed)
    return Estimate(value, low, high, tasks)


def _map(estimate: Estimate, function: Callable[[float], float]) -> Estimate:
    """An increasing function of an estimate and of its interval."""
    if estimate.value is None:
        return estimate
    low = None if estimate.low is None else function(estimate.low)
    high = None if estimate.high is None else function(estimate.high)
    return Estimate(function(estimate.value), low, high, estimate.n)
