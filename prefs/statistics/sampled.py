"""Sampled ratings: how stable they are over rating seeds, and how much they tell tasks apart.

A cell's sampled ratings are x[t, s] over tasks t and rating seeds s, NaN where a rating is not valid. Each function
reports a statistic that is not defined as missing, with its reason. Intervals resample tasks, never seeds: they say how
the number would move with other tasks of the same kind.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefs.statistics.estimates import (
    Estimate,
    Floats,
    Resamples,
    excess,
    mean_of_defined,
    pearson_of_sums,
    ratio,
    resampling,
)

Booleans = NDArray[np.bool_]

# Entries of the tables of some pairs of seeds, over all resamples, at a time: 64 MiB of float64.
TABLE_ENTRIES = 2**23
# Of more different ratings than this (means over seeds, say) no table is made.
MANY_LEVELS = 128
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
class Informative:
    """Cross-seed r where the answer is not merely the usual one.

    Attributes
    ----------
    r
        Pearson over the tasks with at least one of the pair's two ratings off the mode.
    d
        Discrimination rate: the share of tasks that are so, averaged over pairs.
    """

    r: PairCorrelation
    d: Estimate


@dataclass(frozen=True)
class CrossSeed:
    """What pairs of rating seeds say: cross-seed r by Pearson and by Spearman, informative r and d."""

    pearson: PairCorrelation
    spearman: PairCorrelation
    informative: Informative


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
class Intraclass:
    """One-way random-effects intraclass correlation: the between-task share of variance.

    Attributes
    ----------
    single
        ICC(1), of one rating: the discrimination ratio. Negative where tasks differ less than their seeds do.
    mean
        ICC(1,k), of the mean of a task's k ratings.
    k
        Ratings a task; n0 where tasks have different numbers of valid ones. None where ICC(1) is missing.
    """

    single: Estimate
    mean: Estimate
    k: float | None


def cross_seed(x: ArrayLike, draws: Resamples | None = None) -> CrossSeed:
    """Correlation of every pair of seeds, over the tasks where both ratings are valid.

    Pearson and Spearman (ties share their mean rank, ranked among the pair's own tasks); and Pearson over the pair's
    informative tasks, where at least one of the two ratings is not the cell's modal rating. A model that nearly always
    says 4 agrees with itself nearly always; informative r asks how well it does when it says otherwise.

    Parameters
    ----------
    x
        [T, S] ratings, NaN where not valid.
    draws
        Of the T tasks, for the intervals of the means over pairs and of d. A pair without variance in a resample is
        left out of that resample's mean, as it is from the cell's. The mode stays the cell's.

    Raises
    ------
    ValueError
        If `x` is not [tasks, seeds].

    Notes
    -----
    The mode is over all valid ratings of the cell, the smallest of several that are equally frequent. d of a pair is
    of the tasks where both its ratings are valid.
    """
    x, valid = _ratings(x)
    draws = resampling(draws, len(x))
    why = _why_no_cell(x)
    twice = valid.sum(axis=1) >= 2
    pairs = _Pairs.count(x, draws)
    both, off = pairs.both[0], pairs.off[0]
    most, most_off = int(both.max(initial=0)), int(off.max(initial=0))
    why_r = why or (FEW_TASKS if most < MIN_TASKS else NO_VARIANCE)
    why_off = why or (FEW_TASKS if most < MIN_TASKS else FEW_INFORMATIVE if most_off < MIN_TASKS else NO_VARIANCE)
    usual = x == _mode(x[valid])
    n, n_off = int(twice.sum()), int((valid & ~usual)[twice].any(axis=1).sum())
    d = mean_of_defined(ratio(pairs.off, pairs.both))
    return CrossSeed(
        pearson=_over_pairs(pairs.pearson, both, n, why_r, FEW_TASKS),
        spearman=_over_pairs(pairs.spearman, both, n, why_r, FEW_TASKS),
        informative=Informative(
            r=_over_pairs(pairs.informative, off, n_off, why_off, FEW_INFORMATIVE),
            d=Estimate.missing(why, n) if why else Estimate.of(d, n, NO_PAIRS),
        ),
    )


def intraclass(x: ArrayLike, draws: Resamples | None = None) -> Intraclass:
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
    draws
        Of the T tasks, for intervals.

    Raises
    ------
    ValueError
        If `x` is not [tasks, seeds].
    """
    x, valid = _ratings(x)
    rated = int(valid.any(axis=1).sum())
    missing = _why_no_cell(x)
    if missing is None and (valid.sum(axis=1) >= 2).sum() < MIN_TASKS:
        missing = FEW_TASKS
    if missing is not None:
        return Intraclass(Estimate.missing(missing, rated), Estimate.missing(missing, rated), None)
    between, within, n0 = _mean_squares(resampling(draws, len(x)).sums(_anova_parts(x, valid)))
    single = Estimate.of(ratio(between - within, between + (n0 - 1) * within), rated, NO_VARIANCE)
    undefined = NO_TASK_VARIANCE if single.reason is None else single.reason
    return Intraclass(
        single=single,
        mean=Estimate.of(ratio(between - within, between), rated, undefined),
        k=float(n0[0]) if single.defined else None,
    )


def modal(x: ArrayLike, draws: Resamples | None = None) -> Modal:
    """The modal rating over all valid ratings of the cell (the smallest on ties), and its share of them.

    Parameters
    ----------
    x
        [T, S] ratings, NaN where not valid.
    draws
        Of the T tasks, for the interval of the share. The mode stays the cell's.

    Raises
    ------
    ValueError
        If `x` is not [tasks, seeds].
    """
    x, valid = _ratings(x)
    mode = _mode(x[valid])
    rated = int(valid.any(axis=1).sum())
    if mode is None:
        return Modal(None, Estimate.missing(NO_RATINGS if len(x) else NO_TASKS, rated), 0)
    share = Estimate.of(_shares(x, valid, np.array([mode]), draws)[:, 0], rated, NO_RATINGS)
    return Modal(mode, share, int(valid.sum()))


def distribution(x: ArrayLike, values: ArrayLike, draws: Resamples | None = None) -> tuple[Estimate, ...]:
    """Share of each rating among the valid ones.

    Parameters
    ----------
    x
        [T, S] ratings, NaN where not valid.
    values
        [V] the ratings to count.
    draws
        Of the T tasks, for intervals.

    Returns
    -------
    tuple
        One share for each of `values`.

    Raises
    ------
    ValueError
        If `x` is not [tasks, seeds].
    """
    x, valid = _ratings(x)
    shares = _shares(x, valid, np.asarray(values, dtype=np.float64), draws)
    rated = int(valid.any(axis=1).sum())
    return tuple(Estimate.of(share, rated, NO_RATINGS) for share in shares.T)


def _shares(x: Floats, valid: Booleans, values: Floats, draws: Resamples | None) -> Floats:
    """[1 + B, V] share of each value among the valid ratings."""
    hits = [(x == value).sum(axis=1) for value in values]
    sums = resampling(draws, len(x)).sums(np.stack([*hits, valid.sum(axis=1)], axis=1).astype(np.float64))
    return ratio(sums[:, :-1], sums[:, -1:])


def _anova_parts(x: Floats, valid: Booleans) -> Floats:
    """[T, 6] per task: 1, k, k², Σx, (Σx)²/k, Σ(x - x̄_t)²; sums of these are all a resample needs.

    Ratings are counted from the mode. A task without a valid rating adds nothing.
    """
    z = np.where(valid, x - (_mode(x[valid]) or 0.0), 0.0)
    k = valid.sum(axis=1).astype(np.float64)
    total = z.sum(axis=1)
    mean = np.divide(total, k, out=np.zeros_like(k), where=k > 0)
    deviation = np.where(valid, z - mean[:, None], 0.0)
    return np.stack([(k > 0).astype(np.float64), k, k * k, total, total * mean, (deviation**2).sum(axis=1)], axis=1)


def _mean_squares(sums: Floats) -> tuple[Floats, Floats, Floats]:
    """MSB, MSW and n0, each [1 + B], from the sums of `_anova_parts`; NaN without degrees of freedom."""
    a, ratings, squares, total, between, within = np.moveaxis(sums, 1, 0)
    n0 = ratio(ratings - ratio(squares, ratings), a - 1)
    return ratio(excess(between, ratio(total * total, ratings)), a - 1), ratio(within, ratings - a), n0


@dataclass(frozen=True)
class _Pairs:
    """Every pair of seeds on the tasks as they are and on each resample: [1 + B, P] each.

    Attributes
    ----------
    both
        Tasks with two valid ratings.
    off
        Those of them with a rating off the mode.
    pearson, spearman, informative
        Correlations over these (the last: over `off`), NaN where not defined.
    """

    both: Floats
    off: Floats
    pearson: Floats
    spearman: Floats
    informative: Floats

    @classmethod
    def count(cls, x: Floats, draws: Resamples) -> _Pairs:
        """From how often each two ratings occur together: all of these are functions of that table."""
        valid = ~np.isnan(x)
        levels, codes = np.unique(x[valid], return_inverse=True)
        level = np.full(x.shape, -1, dtype=np.int64)
        level[valid] = codes
        mode = _mode(x[valid]) or 0.0
        at_mode = int(np.searchsorted(levels, mode))
        # From the mode, so that ratings without variance have a variance of exactly 0, and the tasks where both ratings
        # are the mode add nothing to any sum but the count.
        values = levels - mode
        first, second = np.triu_indices(x.shape[1], k=1)
        size = len(levels)
        by_table = size <= MANY_LEVELS
        block = max(1, TABLE_ENTRIES // max(1, len(draws.times) * size * size)) if by_table else 1
        parts = []
        for start in range(0, len(first), block):
            a, b = level[:, first[start : start + block]].T, level[:, second[start : start + block]].T
            if by_table:
                together = np.where((a >= 0) & (b >= 0), a * size + b, -1)
                tables = draws.tally(together, size * size).reshape(len(draws.times), len(a), size, size)
                parts.append(_of_tables(tables, values, at_mode))
            else:
                parts.append(_of_pair(a[0], b[0], values, at_mode, draws))
        if not parts:
            return cls(*np.empty((5, len(draws.times), 0)))
        return cls(*(np.concatenate(column, axis=1) for column in zip(*parts, strict=True)))


def _of_tables(tables: Floats, values: Floats, mode: int) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """The columns of `_Pairs` from tables [R, P, V, V] over levels with these values, [V]."""
    rows, columns = tables.sum(axis=3), tables.sum(axis=2)
    both = rows.sum(axis=2)
    off = both - (tables[:, :, mode, mode] if len(values) else 0.0)
    x, y = rows @ values, columns @ values
    xx, yy = rows @ values**2, columns @ values**2
    xy = np.einsum("rpij,i,j->rp", tables, values, values, optimize=True)
    ranks, other = _centred_ranks(rows), _centred_ranks(columns)
    nothing = np.zeros_like(both)
    by_rank = (
        (ranks**2 * rows).sum(axis=2),
        (other**2 * columns).sum(axis=2),
        ((tables @ other[..., None])[..., 0] * ranks).sum(axis=2),
    )
    return (
        both,
        off,
        pearson_of_sums(both, x, y, xx, yy, xy),
        pearson_of_sums(both, nothing, nothing, *by_rank),
        pearson_of_sums(off, x, y, xx, yy, xy),
    )


def _of_pair(
    a: NDArray[np.int64], b: NDArray[np.int64], values: Floats, mode: int, draws: Resamples
) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """The columns of `_Pairs`, [R, 1] each, from one pair's levels [T], where a table of all would be too large."""
    both = (a >= 0) & (b >= 0)
    a, b = a[both], b[both]
    x, y, used = values[a], values[b], Resamples(draws.times[:, both])
    off = (a != mode) | (b != mode)
    sums = used.sums(np.stack([np.ones(len(x)), off.astype(np.float64), x, y, x * x, y * y, x * y], axis=1))
    n, n_off, *rest = np.moveaxis(sums, 1, 0)
    ranked = np.empty((len(sums), 3))
    for row, times in enumerate(used.times):
        # In each resample the ranks are others.
        counts = times.astype(np.float64)
        ranks, other = (_centred_ranks(np.bincount(at, counts, len(values)).astype(np.float64))[at] for at in (a, b))
        ranked[row] = (counts * ranks) @ ranks, (counts * other) @ other, (counts * ranks) @ other
    nothing = np.zeros_like(n)
    columns = (
        n,
        n_off,
        pearson_of_sums(n, *rest),
        pearson_of_sums(n, nothing, nothing, *np.moveaxis(ranked, 1, 0)),
        pearson_of_sums(n_off, *rest),
    )
    n, n_off, pearson, spearman, informative = (column[:, None] for column in columns)
    return n, n_off, pearson, spearman, informative


def _centred_ranks(counts: Floats) -> Floats:
    """Rank of each level, [..., V], among so many tasks at each, less the mean rank; ties share their mean rank."""
    upto = counts.cumsum(axis=-1)
    return upto - (counts + upto[..., -1:]) / 2 if counts.shape[-1] else counts


def _ratings(x: ArrayLike) -> tuple[Floats, Booleans]:
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2:
        raise ValueError(f"ratings must be [tasks, seeds], got shape {x.shape}")
    valid = np.isfinite(x)
    return np.where(valid, x, np.nan), valid


def _mode(valid: Floats) -> float | None:
    """The most frequent value, the smallest of several; None of nothing."""
    values, counts = np.unique(valid, return_counts=True)
    return float(values[counts.argmax()]) if len(values) else None


def _why_no_cell(x: Floats) -> str | None:
    if x.shape[1] < 2:
        return ONE_SEED if x.shape[1] else NO_SEED
    return None if len(x) else NO_TASKS


def _over_pairs(r: Floats, n: Floats, tasks: int, why: str, too_few: str) -> PairCorrelation:
    """Correlations [1 + B, P] of pairs with n[P] tasks each, summed up; `why` is the reason if none is defined."""
    observed = r[0]
    seeds = round((1 + math.sqrt(1 + 8 * len(observed))) / 2)
    each = tuple(
        SeedPair(a, b, _pair_estimate(float(value), int(used), too_few))
        for (a, b), value, used in zip(itertools.combinations(range(seeds), 2), observed, n, strict=True)
    )
    defined = observed[~np.isnan(observed)]
    if len(defined) == 0:
        missing = Estimate.missing(why, tasks)
        return PairCorrelation(missing, missing, 0, len(each), each)
    sd = (
        Estimate(float(defined.std(ddof=1)), None, None, tasks)
        if len(defined) > 1
        else Estimate.missing(ONE_PAIR, tasks)
    )
    return PairCorrelation(Estimate.of(mean_of_defined(r), tasks, why), sd, len(defined), len(each), each)


def _pair_estimate(r: float, n: int, too_few: str) -> Estimate:
    if math.isnan(r):
        return Estimate.missing(too_few if n < MIN_TASKS else NO_VARIANCE, n)
    return Estimate(r, None, None, n)
