"""Do two measurements, or two judges, of the same tasks agree? With intervals over tasks."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from prefs.statistics.estimates import ROUNDING, Estimate, Resamples, pearson_of_sums, ratio, resampling

MIN_TASKS = 3
FEW_TASKS = "fewer than 3 tasks with both"
NO_VARIANCE = "no variance in ratings"
NO_VERDICTS = "no task with two verdicts"
ONE_VERDICT = "both judges give all tasks the same verdict"


def correlation(x: ArrayLike, y: ArrayLike, draws: Resamples | None = None) -> Estimate:
    """Pearson correlation over tasks.

    Of two templates' or two raters' exact means it says whether they order the tasks alike. Exact means carry no
    sampling noise, so a low correlation is a difference in what is measured and not an unstable measurement.

    Parameters
    ----------
    x, y
        [T]; tasks where either is NaN are left out.
    draws
        Of the T tasks, for the interval.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"measurements must be one-dimensional and alike, got {x.shape} and {y.shape}")
    return correlations(x, y[:, None], draws)[0]


def correlations(x: ArrayLike, ys: ArrayLike, draws: Resamples | None = None) -> list[Estimate]:
    """`correlation` of x [T] with each column of ys [T, C]: resampled together, in far less time.

    Raises
    ------
    ValueError
        If the shapes do not fit.
    """
    x, ys = np.asarray(x, dtype=np.float64), np.asarray(ys, dtype=np.float64)
    if x.ndim != 1 or ys.ndim != 2 or len(x) != len(ys):
        raise ValueError(f"measurements must be [tasks] and [tasks, columns], got {x.shape} and {ys.shape}")
    found: dict[int, Estimate] = {}
    parts: dict[int, np.ndarray] = {}
    for column, y in enumerate(ys.T):
        both = np.isfinite(x) & np.isfinite(y)
        n = int(both.sum())
        if n < MIN_TASKS:
            found[column] = Estimate.missing(FEW_TASKS, n)
            continue
        a, b = _from_the_middle(x, both), _from_the_middle(y, both)
        if a is None or b is None:
            found[column] = Estimate.missing(NO_VARIANCE, n)
        else:
            parts[column] = np.stack([both.astype(np.float64), a, b, a * a, b * b, a * b], axis=1)
    if parts:
        sums = resampling(draws, len(x)).sums(np.concatenate(list(parts.values()), axis=1))
        for at, (column, each) in enumerate(parts.items()):
            r = pearson_of_sums(*np.moveaxis(sums[:, 6 * at : 6 * at + 6], 1, 0))
            found[column] = Estimate.of(r, int(each[:, 0].sum()), NO_VARIANCE)
    return [found[column] for column in range(ys.shape[1])]


def cohen_kappa(a: ArrayLike, b: ArrayLike, draws: Resamples | None = None) -> Estimate:
    """Cohen's κ of two judges' yes and no: (p_o - p_e) / (1 - p_e), agreement beyond what their shares alone give.

    Cohen 1960, "A coefficient of agreement for nominal scales": p_o is the share of tasks on which they agree, and p_e
    what is expected of independent judges with the same shares of yes. Not defined where both always say the same one.

    Parameters
    ----------
    a, b
        [T] 1 for yes, 0 for no; tasks where either is NaN are left out.
    draws
        Of the T tasks, for the interval.

    Raises
    ------
    ValueError
        If the shapes differ, or a verdict is not 0, 1 or NaN.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"verdicts must be one-dimensional and alike, got {a.shape} and {b.shape}")
    for verdicts in (a, b):
        if not np.isin(verdicts[~np.isnan(verdicts)], (0, 1)).all():
            raise ValueError("verdicts must be 0, 1 or NaN")
    both = np.isfinite(a) & np.isfinite(b)
    n = int(both.sum())
    if n == 0:
        return Estimate.missing(NO_VERDICTS, 0)
    yes, other = np.where(both, a, 0.0), np.where(both, b, 0.0)
    parts = np.stack([both.astype(np.float64), yes, other, np.where(both, a == b, 0.0)], axis=1)
    count, by_a, by_b, agreed = np.moveaxis(resampling(draws, len(a)).sums(parts), 1, 0)
    expected = by_a * by_b + (count - by_a) * (count - by_b)
    return Estimate.of(ratio(agreed * count - expected, count * count - expected), n, ONE_VERDICT)


def _from_the_middle(x: np.ndarray, used: np.ndarray) -> np.ndarray | None:
    """x less its mean over the used tasks and 0 for the others; None where the values differ by rounding only."""
    values = x[used]
    if np.ptp(values) <= ROUNDING * np.abs(values).max():
        return None
    return np.where(used, x - values.mean(), 0.0)
