"""Sampled ratings: how stable they are over rating seeds, and how much they tell tasks apart.

A cell's sampled ratings are x[t, s] over tasks t and rating seeds s, NaN where a rating is not valid: [T, S], or a
ValueError. Each function reports a statistic that is not defined as missing, with its reason. Intervals are by
resampling tasks (`draws` of the T tasks; None: no intervals), never seeds: they say how the number would move with
other tasks of the same kind.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefs.statistics.estimates import (
    MIN_TASKS,
    NO_TASK_VARIANCE,
    NO_VARIANCE,
    Booleans,
    Estimate,
    Floats,
    Resamples,
    excess,
    mean_of_defined,
    pearson_of_sums,
    ratio,
    resampling,
)

# Entries of the tables of some pairs of seeds, over all resamples, at a time: 64 MiB of float64.
TABLE_ENTRIES = 2**23
# Of more different ratings than this (means over seeds, say) no table is made.
MANY_LEVELS = 128
ONE_SEED = "one rating seed"
NO_SEED = "no rating seeds"
NO_TASKS = "no tasks"
NO_RATINGS = "no valid ratings"
NO_PAIRS = "no tasks with two valid ratings"
FEW_TASKS = "fewer than 3 tasks with two valid ratings"
FEW_INFORMATIVE = "fewer than 3 tasks with a rating other than the mode"
ONE_PAIR = "fewer than 2 pairs of seeds with a defined r"


@dataclass(frozen=True)
class PairCorrelation:
    """A correlation of rating seeds, over all their pairs.

    Attributes
    ----------
    mean
        Mean over the pairs for which it is defined.
    sd
        Standard deviation over them (ddof = 1). The pairs share seeds, so it describes and is no standard error.
    pairs
        Each pair's own, by the columns of its seeds; its ``n`` is the number of tasks it is over.
    """

    mean: Estimate
    sd: Estimate
    pairs: Mapping[tuple[int, int], Estimate]

    @property
    def pairs_defined(self) -> int:
        return sum(r.defined for r in self.pairs.values())


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

    The mode is over all valid ratings of the cell, the smallest of several that are equally frequent, and stays the
    cell's in resamples. d of a pair is of the tasks where both its ratings are valid. Intervals are of the means over
    pairs and of d; a pair without variance in a resample is left out of that resample's mean, as it is from the cell's.
    """
    x, valid = _ratings(x)
    pairs = _pairs(x, resampling(draws, len(x)))
    both, off = pairs.both[0], pairs.off[0]
    why = _why_no_cell(x)
    why_r = why or (FEW_TASKS if both.max(initial=0) < MIN_TASKS else NO_VARIANCE)
    why_off = FEW_INFORMATIVE if why_r == NO_VARIANCE and off.max(initial=0) < MIN_TASKS else why_r
    twice = valid.sum(axis=1) >= 2
    n, n_off = int(twice.sum()), int((valid & (x != _mode(x[valid])))[twice].any(axis=1).sum())
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
    """
    x, valid = _ratings(x)
    k = valid.sum(axis=1).astype(np.float64)
    rated = int((k > 0).sum())
    missing = _why_no_cell(x) or (FEW_TASKS if (k >= 2).sum() < MIN_TASKS else None)
    if missing is not None:
        return Intraclass(Estimate.missing(missing, rated), Estimate.missing(missing, rated), None)
    # Counted from the mode. A task without a valid rating adds nothing to any sum.
    z = np.where(valid, x - (_mode(x[valid]) or 0.0), 0.0)
    total = z.sum(axis=1)
    mean = np.divide(total, k, out=np.zeros_like(k), where=k > 0)
    deviation = np.where(valid, z - mean[:, None], 0.0)
    a, ratings, squares, total, between, within = resampling(draws, len(x)).totals(
        k > 0, k, k * k, total, total * mean, (deviation**2).sum(axis=1)
    )
    msb = ratio(excess(between, ratio(total * total, ratings)), a - 1)
    msw = ratio(within, ratings - a)
    n0 = ratio(ratings - ratio(squares, ratings), a - 1)
    single = Estimate.of(ratio(msb - msw, msb + (n0 - 1) * msw), rated, NO_VARIANCE)
    undefined = NO_TASK_VARIANCE if single.reason is None else single.reason
    return Intraclass(
        single=single,
        mean=Estimate.of(ratio(msb - msw, msb), rated, undefined),
        k=float(n0[0]) if single.defined else None,
    )


def modal(x: ArrayLike, draws: Resamples | None = None) -> Modal:
    """The modal rating over all valid ratings of the cell (the smallest on ties), and its share of them.

    In resamples the mode stays the cell's.
    """
    x, valid = _ratings(x)
    mode = _mode(x[valid])
    rated = int(valid.any(axis=1).sum())
    if mode is None:
        return Modal(None, Estimate.missing(NO_RATINGS if len(x) else NO_TASKS, rated), 0)
    share = Estimate.of(_shares(x, valid, np.array([mode]), draws)[:, 0], rated, NO_RATINGS)
    return Modal(mode, share, int(valid.sum()))


def distribution(x: ArrayLike, values: ArrayLike, draws: Resamples | None = None) -> tuple[Estimate, ...]:
    """The share of each of these values [V] among the valid ratings."""
    x, valid = _ratings(x)
    shares = _shares(x, valid, np.asarray(values, dtype=np.float64), draws)
    rated = int(valid.any(axis=1).sum())
    return tuple(Estimate.of(share, rated, NO_RATINGS) for share in shares.T)


def _shares(x: Floats, valid: Booleans, values: Floats, draws: Resamples | None) -> Floats:
    """[1 + B, V] share of each value among the valid ratings."""
    hits = [(x == value).sum(axis=1) for value in values]
    sums = resampling(draws, len(x)).sums(np.stack([*hits, valid.sum(axis=1)], axis=1).astype(np.float64))
    return ratio(sums[:, :-1], sums[:, -1:])


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
    pairs = {}
    for pair, value, used in zip(itertools.combinations(range(seeds), 2), observed.tolist(), n.tolist(), strict=True):
        reason = None if not math.isnan(value) else too_few if used < MIN_TASKS else NO_VARIANCE
        pairs[pair] = Estimate(None if reason else value, None, None, int(used), reason)
    defined = observed[~np.isnan(observed)]
    if len(defined) == 0:
        missing = Estimate.missing(why, tasks)
        return PairCorrelation(missing, missing, pairs)
    sd = Estimate.missing(ONE_PAIR, tasks)
    if len(defined) > 1:
        sd = Estimate(float(defined.std(ddof=1)), None, None, tasks)
    return PairCorrelation(Estimate.of(mean_of_defined(r), tasks, why), sd, pairs)


class _Pairs(NamedTuple):
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


def _pairs(x: Floats, draws: Resamples) -> _Pairs:
    """From how often each two ratings occur together: all of these are functions of that table."""
    valid = ~np.isnan(x)
    levels, codes = np.unique(x[valid], return_inverse=True)
    level = np.full(x.shape, -1, dtype=np.int64)
    level[valid] = codes
    mode = _mode(x[valid]) or 0.0
    mode_level = int(np.searchsorted(levels, mode))
    # From the mode, so that ratings without variance have a variance of exactly 0, and the tasks where both ratings
    # are the mode add nothing to any sum but the count.
    values = levels - mode
    first, second = (level[:, column].T for column in np.triu_indices(x.shape[1], k=1))
    size, resamples = len(levels), len(draws.times)
    by_table = size <= MANY_LEVELS
    width = max(1, TABLE_ENTRIES // max(1, resamples * size * size)) if by_table else 1
    blocks = []
    for start in range(0, len(first), width):
        a, b = first[start : start + width], second[start : start + width]
        if by_table:
            together = np.where((a >= 0) & (b >= 0), a * size + b, -1)
            tables = draws.tally(together, size * size).reshape(resamples, len(a), size, size)
            blocks.append(_of_tables(tables, values, mode_level))
        else:
            blocks.append(_of_pair(a[0], b[0], values, mode_level, draws))
    if not blocks:
        return _Pairs(*np.empty((5, resamples, 0)))
    return _Pairs(*(np.concatenate(column, axis=1) for column in zip(*blocks, strict=True)))


def _of_tables(tables: Floats, values: Floats, mode: int) -> _Pairs:
    """From tables [R, P, V, V] over levels with these values, [V]."""
    rows, columns = tables.sum(axis=3), tables.sum(axis=2)
    both = rows.sum(axis=2)
    off = both - (tables[:, :, mode, mode] if len(values) else 0.0)
    xy = np.einsum("rpij,i,j->rp", tables, values, values, optimize=True)
    sums = rows @ values, columns @ values, rows @ values**2, columns @ values**2, xy
    ranks, other = _centred_ranks(rows), _centred_ranks(columns)
    nothing = np.zeros_like(both)
    by_rank = (
        (ranks**2 * rows).sum(axis=2),
        (other**2 * columns).sum(axis=2),
        ((tables @ other[..., None])[..., 0] * ranks).sum(axis=2),
    )
    spearman = pearson_of_sums(both, nothing, nothing, *by_rank)
    return _Pairs(both, off, pearson_of_sums(both, *sums), spearman, pearson_of_sums(off, *sums))


def _of_pair(a: NDArray[np.int64], b: NDArray[np.int64], values: Floats, mode: int, draws: Resamples) -> _Pairs:
    """[R, 1] each, from one pair's levels [T], where a table of all would be too large."""
    both = (a >= 0) & (b >= 0)
    a, b, draws = a[both], b[both], draws.only(both)
    x, y, off = values[a], values[b], (a != mode) | (b != mode)
    n, n_off, *sums = draws.totals(np.ones(len(x)), off, x, y, x * x, y * y, x * y)
    by_rank = np.empty((3, len(n)))
    for resample, times in enumerate(draws.times.astype(np.float64)):
        # In each resample the ranks are others.
        ranks, other = (_centred_ranks(np.bincount(level, times, len(values)).astype(float))[level] for level in (a, b))
        by_rank[:, resample] = (times * ranks) @ ranks, (times * other) @ other, (times * ranks) @ other
    nothing = np.zeros_like(n)
    spearman = pearson_of_sums(n, nothing, nothing, *by_rank)
    columns = n, n_off, pearson_of_sums(n, *sums), spearman, pearson_of_sums(n_off, *sums)
    return _Pairs(*(column[:, None] for column in columns))


def _centred_ranks(counts: Floats) -> Floats:
    """Rank of each level, [..., V], among so many tasks at each, less the mean rank; ties share their mean rank."""
    upto = counts.cumsum(axis=-1)
    return upto - (counts + upto[..., -1:]) / 2 if counts.shape[-1] else counts
