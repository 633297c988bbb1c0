"""What a statistic came out as, or why it did not; and its confidence interval by resampling tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Entries of one [resamples, tasks] array at a time, whatever the number of resamples: 16 MiB of float64. The C library
# reuses arrays of this size; those of 32 MiB and more are new pages each time, which doubles the time.
CHUNK_ENTRIES = 2**21
# Below this many resamples at a time, preparing a statistic's products would cost more than using them.
CHUNK_RESAMPLES = 16
# A difference smaller than this share of what it is the difference of is rounding, and counts as zero.
ROUNDING = 1e-12

Interval = tuple[float, float] | tuple[None, None]


@dataclass(frozen=True)
class Estimate:
    """A statistic of a cell: a value, or the reason why there is none.

    Attributes
    ----------
    value
        The statistic; None where it is not defined.
    low, high
        95 % interval; None where it was not computed or could not be.
    n
        How many tasks it was computed from.
    reason
        Why `value` is None; None where it is defined.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    reason: str | None = None

    @classmethod
    def missing(cls, reason: str, n: int) -> Estimate:
        """An estimate that is not defined, and why."""
        return cls(value=None, low=None, high=None, n=n, reason=reason)

    @property
    def defined(self) -> bool:
        return self.value is not None


def bootstrap_interval(
    statistic: Callable[[NDArray[np.intp]], NDArray[np.float64]],
    tasks: int,
    resamples: int,
    seed: int,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval over tasks (Efron & Tibshirani 1993, chapter 13).

    Parameters
    ----------
    statistic
        From the task indices of resamples, [R, T] in 0..T-1, to the statistic of each, [R]; NaN where it is not
        defined. It is called with some of the resamples at a time, so memory does not grow with their number.
    tasks
        T, the number of tasks to draw from, with replacement.
    resamples
        How many; 0 for no interval.
    seed
        Of the draws: the same seed gives the same interval.
    level
        The interval's nominal coverage.

    Returns
    -------
    tuple
        Lower and upper end. Resamples in which the statistic is not defined are left out; (None, None) when fewer
        than half of them are defined, because what is left then describes other data than the cell's.
    """
    if resamples <= 0 or tasks == 0:
        return None, None
    rng = np.random.default_rng(seed)
    chunk = max(CHUNK_RESAMPLES, CHUNK_ENTRIES // tasks)
    values = np.concatenate(
        [
            statistic(rng.integers(0, tasks, size=(min(chunk, resamples - done), tasks), dtype=np.intp))
            for done in range(0, resamples, chunk)
        ]
    )
    defined = values[np.isfinite(values)]
    if 2 * len(defined) < resamples:
        return None, None
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def resample_counts(index: NDArray[np.intp]) -> NDArray[np.float64]:
    """How often each resample drew each task: [R, T] from the indices [R, T].

    A sum over the drawn tasks is then a matrix product, ``counts @ products``, for all resamples at once.
    """
    resamples, tasks = index.shape
    flat = index + np.arange(resamples, dtype=np.intp)[:, None] * tasks
    return np.bincount(flat.ravel(), minlength=resamples * tasks).reshape(resamples, tasks).astype(np.float64)


def excess(whole: NDArray[np.float64], part: NDArray[np.float64]) -> NDArray[np.float64]:
    """``whole - part`` of quantities that cannot be negative, with differences of the size of rounding as exact zeros.

    Variances here are differences of sums, and "no variance" must be told from very little of it.
    """
    difference = whole - part
    return np.where(difference > ROUNDING * np.abs(whole), difference, 0.0)


def ratio(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    """``numerator / denominator``, NaN where the denominator is not positive."""
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0)


def pearson_of_sums(
    n: NDArray[np.float64],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    xx: NDArray[np.float64],
    yy: NDArray[np.float64],
    xy: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Pearson r from the sums Σ1, Σx, Σy, Σx², Σy², Σxy, elementwise; NaN for n < 3 or without variance.

    SciPy's `pearsonr` wants the observations; here one matrix product gives the sums of thousands of resamples. The
    caller subtracts something near the mean first, as these one-pass sums cancel otherwise.
    """
    spread = np.sqrt(excess(n * xx, x * x)) * np.sqrt(excess(n * yy, y * y))
    r = ratio(n * xy - x * y, np.where(n >= 3, spread, 0.0))
    return np.clip(r, -1.0, 1.0)
