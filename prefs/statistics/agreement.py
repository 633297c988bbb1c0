"""Do two measurements of the same tasks agree? Their correlation over tasks, with its interval."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from prefs.statistics.estimates import ROUNDING, Estimate, Resamples, pearson_of_sums, resampling

MIN_TASKS = 3
FEW_TASKS = "fewer than 3 tasks with both"
NO_VARIANCE = "no variance in ratings"


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
    both = np.isfinite(x) & np.isfinite(y)
    n = int(both.sum())
    if n < MIN_TASKS:
        return Estimate.missing(FEW_TASKS, n)
    a, b = _from_the_middle(x, both), _from_the_middle(y, both)
    if a is None or b is None:
        return Estimate.missing(NO_VARIANCE, n)
    parts = np.stack([both.astype(np.float64), a, b, a * a, b * b, a * b], axis=1)
    return Estimate.of(pearson_of_sums(*np.moveaxis(resampling(draws, len(x)).sums(parts), 1, 0)), n, NO_VARIANCE)


def _from_the_middle(x: np.ndarray, used: np.ndarray) -> np.ndarray | None:
    """x less its mean over the used tasks and 0 for the others; None where the values differ by rounding only."""
    values = x[used]
    if np.ptp(values) <= ROUNDING * np.abs(values).max():
        return None
    return np.where(used, x - values.mean(), 0.0)
