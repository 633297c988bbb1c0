"""How good held-out predictions are, by target and layer, and what knowing only a task's origin would have given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from sklearn.metrics import mean_absolute_error, r2_score

from prefs.statistics.estimates import Estimate

# A spread below this share of the values' size is rounding, not variance.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Scores:
    """Held-out predictions against targets, over all the held-out tasks pooled.

    ``r2`` is 1 - sum (y - prediction)^2 / sum (y - mean y)^2 with the pooled mean, so a fold whose mean is off pays for
    it. ``r2_fold_sd`` is the SD (ddof 1) over folds of the R2 within each, against its own mean; its n counts folds.
    """

    r2: Estimate
    pearson: Estimate
    spearman: Estimate
    mae: Estimate
    r2_fold_sd: Estimate


@dataclass(frozen=True)
class ProbeScore:
    """The scores of one target's probe at one layer."""

    target: str
    layer: int
    scores: Scores


@dataclass(frozen=True, eq=False)
class OriginBaseline:
    """Predictions [n] from the origin alone (NaN where there was nothing to train on), and their pooled R2."""

    predictions: np.ndarray
    r2: Estimate


def evaluate(
    out_of_fold: np.ndarray,
    targets: np.ndarray,
    folds: np.ndarray,
    *,
    names: Sequence[str],
    layers: Sequence[int],
) -> tuple[ProbeScore, ...]:
    """Score every target at every layer.

    Parameters
    ----------
    out_of_fold
        [T, L, n] predictions, each by a fit that did not train on the task.
    targets
        [n, T], NaN for tasks without.
    folds
        [n].
    names, layers
        T target names and L layer numbers.

    Returns
    -------
    tuple
        T x L scores, layers within targets.

    Raises
    ------
    ValueError
        If the shapes do not agree.
    """
    out_of_fold, targets, folds = np.asarray(out_of_fold), np.asarray(targets), np.asarray(folds)
    expected = (len(names), len(layers), len(folds))
    if out_of_fold.shape != expected or targets.shape != (len(folds), len(names)):
        got = f"predictions {list(out_of_fold.shape)} and targets {list(targets.shape)}"
        raise ValueError(f"{len(names)} targets, {len(layers)} layers and {len(folds)} tasks do not fit {got}")
    return tuple(
        ProbeScore(name, layer, score(out_of_fold[t, at], targets[:, t], folds))
        for t, name in enumerate(names)
        for at, layer in enumerate(layers)
    )


def score(predictions: np.ndarray, y: np.ndarray, folds: np.ndarray) -> Scores:
    """Score the predictions [n] of one target [n]; tasks without a target or a prediction are left out."""
    predictions, y, folds = _kept(predictions, y, folds)
    n = len(y)
    reason = _undefined(y, "target")
    if reason is not None:
        gone = Estimate.missing(reason, n)
        return Scores(r2=gone, pearson=gone, spearman=gone, mae=_mae(predictions, y), r2_fold_sd=gone)

    flat = _undefined(predictions, "prediction")
    return Scores(
        r2=_value(r2_score(y, predictions), n),
        pearson=Estimate.missing(flat, n) if flat else _value(np.asarray(stats.pearsonr(predictions, y))[0], n),
        spearman=Estimate.missing(flat, n) if flat else _value(np.asarray(stats.spearmanr(predictions, y))[0], n),
        mae=_mae(predictions, y),
        r2_fold_sd=_fold_sd(predictions, y, folds),
    )


def origin_mean_baseline(y: np.ndarray, origins: Sequence[str], folds: np.ndarray) -> OriginBaseline:
    """Predict each task by the mean of its origin over the tasks of the other folds.

    A task whose origin has no task in the other folds gets the mean of all of theirs. A probe that does no better has
    found which data set a task comes from and nothing else.

    Parameters
    ----------
    y
        [n], NaN for tasks without.
    origins, folds
        [n].
    """
    y, folds, origin = np.asarray(y, dtype=np.float64), np.asarray(folds), np.asarray(origins)
    if not len(y) == len(origin) == len(folds):
        raise ValueError(f"got {len(y)} targets, {len(origin)} origins and {len(folds)} folds: give one of each a task")
    predictions = np.full(len(y), np.nan)
    observed = np.isfinite(y)
    for fold in np.unique(folds):
        held_out, training = folds == fold, observed & (folds != fold)
        if not training.any():
            continue
        predictions[held_out] = y[training].mean()
        for name in np.unique(origin[training]):
            predictions[held_out & (origin == name)] = y[training & (origin == name)].mean()
    return OriginBaseline(predictions, score(predictions, y, folds).r2)


def _fold_sd(predictions: np.ndarray, y: np.ndarray, folds: np.ndarray) -> Estimate:
    within = [folds == fold for fold in np.unique(folds)]
    r2 = [r2_score(y[rows], predictions[rows]) for rows in within if _undefined(y[rows], "target") is None]
    if len(r2) < 2:
        return Estimate.missing("fewer than 2 folds with 3 tasks and a target that varies", len(r2))
    return _value(np.std(r2, ddof=1), len(r2))


def _mae(predictions: np.ndarray, y: np.ndarray) -> Estimate:
    if len(y) < 3:
        return Estimate.missing(f"fewer than 3 tasks ({len(y)})", len(y))
    return _value(mean_absolute_error(y, predictions), len(y))


def _undefined(values: np.ndarray, what: str) -> str | None:
    if len(values) < 3:
        return f"fewer than 3 tasks ({len(values)})"
    if np.ptp(values) <= ROUNDING * np.abs(values).max():
        return f"the {what} is constant"
    return None


def _kept(predictions: np.ndarray, y: np.ndarray, folds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    predictions, y = np.asarray(predictions, dtype=np.float64), np.asarray(y, dtype=np.float64)
    folds = np.asarray(folds)
    if not predictions.shape == y.shape == folds.shape:
        got = f"{list(predictions.shape)}, {list(y.shape)} and {list(folds.shape)}"
        raise ValueError(f"predictions, targets and folds must be as many; got {got}")
    keep = np.isfinite(predictions) & np.isfinite(y)
    return predictions[keep], y[keep], folds[keep]


def _value(value: float | np.floating, n: int) -> Estimate:
    return Estimate(float(value), None, None, n)
