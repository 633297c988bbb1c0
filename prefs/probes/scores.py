"""How good held-out predictions are: R², Pearson, Spearman, MAE and AUC, with intervals by resampling tasks.

Everything here takes predictions of tasks that a probe did not train on, and knows nothing of probes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from prefs.statistics.estimates import Estimate, Floats, Resamples, excess, pearson_of_sums, ratio, resampling

# A spread below this share of the values' size is rounding, not variance.
ROUNDING = 1e-9
# Entries of one block of work: 32 MiB of float64.
BLOCK_ENTRIES = 2**22
# Of one block of resamples by tasks where AUC reads it in the order of the predictions: 4 MiB, near the processor.
SORTED_ENTRIES = 2**19


@dataclass(frozen=True)
class Scores:
    """Held-out predictions against a target, over all the held-out tasks pooled.

    Attributes
    ----------
    r2
        1 - Σ (y - prediction)² / Σ (y - mean y)² with the pooled mean, so a fold whose mean is off pays for it.
    pearson, spearman
        Correlations: blind to a prediction's mean and scale.
    mae
        Mean of abs(y - prediction), in the target's units.
    auc
        Of a binary target: how often a positive is predicted above a negative, ties by half.
    """

    r2: Estimate
    pearson: Estimate
    spearman: Estimate
    mae: Estimate
    auc: Estimate


def score(predictions: ArrayLike, y: ArrayLike, draws: Resamples | None, *, binary: bool = False) -> list[Scores]:
    """Score C columns of held-out predictions of one target, each column by itself.

    Tasks without a target, or without a prediction in a column, are left out of that column. Intervals are 95 %
    percentile bootstraps over tasks, with the predictions as they are: they say how much the score depends on which
    tasks were held out, not on which were trained on. In each resample R² uses that resample's own mean. Spearman's is
    the Pearson correlation of the ranks that the tasks have among all of them: resamples are not ranked anew, which
    would take a sort each and change the interval by little.

    Parameters
    ----------
    predictions
        [n, C], NaN where there is none.
    y
        [n], NaN for tasks without a target.
    draws
        Resamples of the n tasks; None for no intervals.
    binary
        Whether y is 0 or 1, and AUC has a meaning.

    Raises
    ------
    ValueError
        If shapes do not agree, or a binary target has other values.
    """
    predictions, y = np.asarray(predictions, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if predictions.ndim != 2 or y.shape != predictions.shape[:1]:
        raise ValueError(f"predictions {list(predictions.shape)} do not fit targets {list(y.shape)}: give [n, C], [n]")
    if binary:
        _check_binary(y)
    draws = resampling(draws, len(y))
    kept = np.isfinite(predictions) & np.isfinite(y)[:, None]
    # Columns that leave out the same tasks are scored together; nearly always that is all of them.
    same: dict[bytes, list[int]] = {}
    for column in range(predictions.shape[1]):
        same.setdefault(kept[:, column].tobytes(), []).append(column)
    scores: dict[int, Scores] = {}
    width = max(1, BLOCK_ENTRIES // (8 * max(1, len(y))))
    for columns in same.values():
        rows = kept[:, columns[0]]
        drawn = draws if rows.all() else Resamples(draws.times[:, rows])
        for start in range(0, len(columns), width):
            block = columns[start : start + width]
            scores |= zip(block, _score(predictions[rows][:, block], y[rows], drawn, binary), strict=True)
    return [scores[column] for column in range(predictions.shape[1])]


def r2_columns(predictions: ArrayLike, y: ArrayLike) -> Floats:
    """R² of many targets at many sites, without intervals: what a permutation null is made of.

    Parameters
    ----------
    predictions
        [n, S, T]: of target t by the probe of site s that was trained on t.
    y
        [n, T].

    Returns
    -------
    numpy.ndarray
        [S, T], NaN where R² is not defined: fewer than 3 tasks, or a constant target.
    """
    predictions, y = _checked_columns(predictions, y)
    scores = np.full(predictions.shape[1:], np.nan)
    if len(y) < 3:
        return scores
    away = y - y.mean(axis=0)
    varies = np.ptp(y, axis=0) > ROUNDING * np.abs(y).max(axis=0)
    total = np.where(varies, np.einsum("nt,nt->t", away, away), 0.0)
    for sites in _site_blocks(predictions):
        error = y[:, None] - predictions[:, sites].astype(np.float64)
        scores[sites] = 1 - ratio(np.einsum("nst,nst->st", error, error), total)
    return scores


def auc_columns(predictions: ArrayLike, y: ArrayLike) -> Floats:
    """AUC of many binary targets at many sites, without intervals.

    From the ranks of the positives, the Mann-Whitney statistic. Shapes are as for `r2_columns`.

    Returns
    -------
    numpy.ndarray
        [S, T], NaN where AUC is not defined: fewer than 3 tasks, or one class only.

    Raises
    ------
    ValueError
        If shapes do not agree, or a target has values other than 0 and 1.
    """
    predictions, y = _checked_columns(predictions, y)
    _check_binary(y)
    positives = y.sum(axis=0)
    pairs = positives * (len(y) - positives) * (len(y) >= 3)
    scores = np.full(predictions.shape[1:], np.nan)
    for sites in _site_blocks(predictions):
        ranks = np.asarray(rankdata(predictions[:, sites].astype(np.float64), axis=0))
        above = np.einsum("nst,nt->st", ranks, y) - positives * (positives + 1) / 2
        scores[sites] = ratio(above, pairs)
    return scores


def permutation_p(observed: float, null: ArrayLike) -> float:
    """How often shuffled targets score at least as well: (1 + #{null >= observed}) / (1 + B).

    Phipson & Smyth (2010), "Permutation p-values should never be zero": the targets as they are count as one of the
    permutations. A null that is above by less than rounding counts; one that is not defined (NaN) is left out. NaN
    where `observed` is.

    Parameters
    ----------
    observed
        The score of the targets as they are.
    null
        [B], those of shuffled targets.
    """
    if np.isnan(observed):
        return float("nan")
    null = np.asarray(null, dtype=np.float64)
    null = null[~np.isnan(null)]
    return float((1 + (null >= observed - ROUNDING * abs(observed)).sum()) / (1 + len(null)))


def p_value(score: Estimate, null: np.ndarray) -> float | None:
    """The `permutation_p` of a score; None where there is no score, or nothing shuffled."""
    return None if score.value is None or not len(null) else permutation_p(score.value, null)


def _score(predictions: Floats, y: Floats, draws: Resamples, binary: bool) -> list[Scores]:
    """`score` of columns [n, C] and a target [n] without NaN."""
    n, columns = predictions.shape
    no_auc = Estimate.missing("the target is not binary", n)
    if n < 3:
        few = Estimate.missing(f"fewer than 3 tasks ({n})", n)
        return [Scores(few, few, few, few, few if binary else no_auc)] * columns
    error = y[:, None] - predictions
    # One-pass sums cancel unless their terms are near zero.
    of_y = np.stack([y - y.mean(), rankdata(y) - (n + 1) / 2], axis=1)
    of_p = np.stack([predictions - predictions.mean(axis=0), rankdata(predictions, axis=0) - (n + 1) / 2], axis=1)
    crossed = of_y[:, :, None] * of_p
    parts = [np.ones((n, 1)), of_y, of_y**2, of_p, of_p**2, crossed, error**2, np.abs(error)]
    sums = draws.sums(np.concatenate([part.reshape(n, -1) for part in parts], axis=1))
    split = np.split(sums, np.cumsum([part[0].size for part in parts])[:-1], axis=1)
    # Each [1 + B, ...] over (value, rank) and columns.
    count, by, byy, bp, bpp, bxy, squared, absolute = (
        part.reshape(-1, *like.shape[1:]) for part, like in zip(split, parts, strict=True)
    )
    count = count[:, :1]
    spread = excess(byy[:, 0], by[:, 0] ** 2 / np.maximum(count[:, 0], 1))[:, None]
    r2 = 1 - ratio(squared, np.where(count >= 3, spread, 0.0))
    mae = ratio(absolute, count)
    r = pearson_of_sums(count[:, :, None], by[:, :, None], bp, byy[:, :, None], bpp, bxy)
    auc = _auc(predictions, y == 1, draws) if binary else None

    flat = Estimate.missing("the target is constant", n) if _constant(y) else None

    def correlated(values: Floats, column: int) -> Estimate:
        if _constant(predictions[:, column]):
            return flat or Estimate.missing("the prediction is constant", n)
        return flat or Estimate.of(values[:, column], n, "the prediction is constant")

    return [
        Scores(
            r2=flat or Estimate.of(r2[:, column], n, "the target is constant"),
            pearson=correlated(r[:, 0], column),
            spearman=correlated(r[:, 1], column),
            mae=Estimate.of(mae[:, column], n, "no error is defined"),
            auc=no_auc if auc is None else Estimate.of(auc[:, column], n, "the target has one class only"),
        )
        for column in range(columns)
    ]


def _auc(predictions: Floats, positive: NDArray[np.bool_], draws: Resamples) -> Floats:
    """AUC [1 + B, C] of predictions [n, C] in each resample; NaN in those with one class only.

    A column is sorted once. In every resample the count of drawn negatives below each positive is then a cumulative
    sum in that order; where predictions tie, the mean of those below and those up to it counts ties by half.
    """
    n, columns = predictions.shape
    negative = np.flatnonzero(~positive)
    orders = [negative[np.argsort(column[negative])] for column in predictions.T]
    # Where the positives stand among the negatives in order.
    ranks = [
        [np.searchsorted(column[order], column[positive], side) for side in ("left", "right")]
        for column, order in zip(predictions.T, orders, strict=True)
    ]
    auc = np.empty((len(draws.times), columns))
    size = max(1, SORTED_ENTRIES // max(1, n))
    for start in range(0, len(auc), size):
        # Tasks first, so that a task's counts in all of these resamples lie together.
        times = np.ascontiguousarray(draws.times[start : start + size].T, dtype=np.float64)
        pairs = times[positive].sum(axis=0) * times[negative].sum(axis=0)
        below = np.zeros((len(negative) + 1, times.shape[1]))
        for column, (order, (left, right)) in enumerate(zip(orders, ranks, strict=True)):
            np.cumsum(times[order], axis=0, out=below[1:])
            won = below[left] if np.array_equal(left, right) else (below[left] + below[right]) / 2
            auc[start : start + size, column] = ratio(np.einsum("nb,nb->b", times[positive], won), pairs)
    return auc


def _constant(values: Floats) -> bool:
    return bool(np.ptp(values) <= ROUNDING * np.abs(values).max())


def _site_blocks(predictions: NDArray[np.floating]) -> Iterator[slice]:
    n, sites, targets = predictions.shape
    size = max(1, BLOCK_ENTRIES // max(1, n * targets))
    return (slice(start, start + size) for start in range(0, sites, size))


def _checked_columns(predictions: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.floating], Floats]:
    predictions, y = np.asarray(predictions), np.asarray(y, dtype=np.float64)
    if predictions.ndim != 3 or y.shape != (predictions.shape[0], predictions.shape[2]):
        got = f"predictions {list(predictions.shape)} do not fit targets {list(y.shape)}"
        raise ValueError(f"{got}: give [n, S, T] and [n, T]")
    return predictions, y


def _check_binary(y: Floats) -> None:
    others = set(np.unique(y[np.isfinite(y)])) - {0.0, 1.0}
    if others:
        raise ValueError(f"a binary target is 0 or 1, got {min(others):g}")
