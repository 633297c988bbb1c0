"""What a statistic came out as, or why it did not; and its confidence interval by resampling tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

Floats = NDArray[np.float64]
Booleans = NDArray[np.bool_]

LEVEL = 0.95
# Of fewer tasks nothing is said to vary, or to go with something else.
MIN_TASKS = 3
NO_VARIANCE = "no variance in ratings"
NO_TASK_VARIANCE = "no variance between tasks"
# A difference smaller than this share of what it is the difference of is rounding, and counts as zero.
ROUNDING = 1e-12
# Entries of one block of resamples, [block, tasks]: 16 MiB of float64, which stays near the processor.
BLOCK_ENTRIES = 2**21


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

    @classmethod
    def of(cls, values: Floats, n: int, undefined: str) -> Estimate:
        """A statistic from its values on the tasks as they are and on each resample, [1 + B].

        The interval is the percentile bootstrap's (Efron & Tibshirani 1993, chapter 13). Resamples in which the
        statistic is not defined (NaN) are left out; there is no interval when fewer than half of them are defined,
        because what is left then describes other data than the cell's.

        Parameters
        ----------
        values
            As `Resamples` orders them: the first is the statistic itself.
        n
            How many tasks it was computed from.
        undefined
            The reason to give where the first value is NaN.
        """
        value, resampled = float(values[0]), values[1:]
        if np.isnan(value):
            return cls.missing(undefined, n)
        defined = resampled[~np.isnan(resampled)]
        if len(defined) == 0 or 2 * len(defined) < len(resampled):
            return cls(value, None, None, n)
        low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return cls(value, float(low), float(high), n)

    @property
    def defined(self) -> bool:
        return self.value is not None

    def map(self, function: Callable[[float], float]) -> Estimate:
        """A monotone function of an estimate and of its interval."""
        if self.value is None:
            return self
        if self.low is None or self.high is None:
            return replace(self, value=function(self.value))
        low, high = sorted((function(self.low), function(self.high)))
        return Estimate(function(self.value), low, high, self.n)


@dataclass(frozen=True)
class Resamples:
    """The tasks of a cell as they are, and B times as many drawn from them with replacement.

    Statistics of the same tasks share one of these: drawing takes as long as many a statistic, and what is drawn
    together can be compared.

    Attributes
    ----------
    times
        [1 + B, T], how often each task counts. The first row is all ones: the tasks themselves. That one of more than
        255 tasks is drawn more than 255 times happens in none of 10^500 resamples.
    """

    times: NDArray[np.uint8]

    @classmethod
    def draw(cls, tasks: int, resamples: int, seed: int = 0) -> Resamples:
        """Draw `resamples` (0: none) of so many tasks; the same seed draws the same.

        Raises
        ------
        ValueError
            If a number is negative.
        """
        if tasks < 0 or resamples < 0:
            raise ValueError(f"tasks and resamples must not be negative, got {tasks} and {resamples}")
        times = np.ones((1 + resamples, tasks), dtype=np.uint8)
        rng = np.random.default_rng(seed)
        block = max(1, BLOCK_ENTRIES // max(1, tasks))
        for start in range(1, 1 + resamples if tasks else 1, block):
            rows = min(block, 1 + resamples - start)
            drawn = rng.integers(0, tasks, size=(rows, tasks))
            drawn += np.arange(rows)[:, None] * tasks
            times[start : start + rows] = np.bincount(drawn.ravel(), minlength=rows * tasks).reshape(rows, tasks)
        return cls(times)

    @classmethod
    def none(cls, tasks: int) -> Resamples:
        """Only the tasks themselves: statistics without intervals."""
        return cls.draw(tasks, 0)

    @property
    def tasks(self) -> int:
        return self.times.shape[1]

    def only(self, tasks: Booleans) -> Resamples:
        """Of some tasks [T]: a resample is of as many of them as were drawn, and the others have no part in it."""
        return Resamples(self.times[:, tasks])

    def sums(self, parts: Floats) -> Floats:
        """Sums over the drawn tasks, [1 + B, K], of what each task adds to them, [T, K]."""
        return np.concatenate([block.astype(np.float64) @ parts for block in self._blocks])

    def totals(self, *parts: NDArray[Any]) -> Iterator[Floats]:
        """The sum [1 + B] of each of the parts, [T]."""
        return iter(self.sums(np.stack(parts, axis=1).astype(np.float64)).T)

    def tally(self, codes: NDArray[np.int64], size: int) -> Floats:
        """How often each code occurs among the drawn tasks.

        Parameters
        ----------
        codes
            [P, T] in 0..size-1, or negative where a task has none.

        Returns
        -------
        numpy.ndarray
            [1 + B, P, size].
        """
        which, task = np.nonzero(codes >= 0)
        rows = which * size + codes[which, task]
        # One entry a task and row, however many codes there are. Counts are whole numbers: float32 holds them exactly.
        ones = np.ones(len(rows), dtype=np.float32)
        occurs = sparse.csr_array((ones, (rows, task)), shape=(len(codes) * size, self.tasks))
        counted = [
            (occurs @ np.ascontiguousarray(block.T, dtype=np.float32)).T.astype(np.float64) for block in self._blocks
        ]
        return np.concatenate(counted).reshape(len(self.times), len(codes), size)

    @cached_property
    def _blocks(self) -> list[NDArray[np.uint8]]:
        size = max(1, min(128, BLOCK_ENTRIES // max(1, self.tasks)))
        return [self.times[start : start + size] for start in range(0, len(self.times), size)]


def resampling(draws: Resamples | None, tasks: int) -> Resamples:
    """`draws`, or none where None.

    Raises
    ------
    ValueError
        If they are of another number of tasks.
    """
    if draws is None:
        return Resamples.none(tasks)
    if draws.tasks != tasks:
        raise ValueError(f"resamples of {draws.tasks} tasks do not fit {tasks}")
    return draws


def excess(whole: Floats, part: Floats) -> Floats:
    """``whole - part`` of quantities that cannot be negative, with differences of the size of rounding as exact zeros.

    Variances here are differences of sums, and "no variance" must be told from very little of it.
    """
    difference = whole - part
    return np.where(difference > ROUNDING * np.abs(whole), difference, 0.0)


def ratio(numerator: Floats, denominator: Floats) -> Floats:
    """``numerator / denominator``, NaN where the denominator is not positive."""
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0)


def pearson_of_sums(n: Floats, x: Floats, y: Floats, xx: Floats, yy: Floats, xy: Floats) -> Floats:
    """Pearson r from the sums Σ1, Σx, Σy, Σx², Σy², Σxy, elementwise; NaN for n < 3 or without variance.

    SciPy's `pearsonr` wants the observations; here one matrix product gives the sums of thousands of resamples. The
    caller subtracts something near the mean first, as these one-pass sums cancel otherwise.
    """
    spread = np.sqrt(excess(n * xx, x * x)) * np.sqrt(excess(n * yy, y * y))
    r = ratio(n * xy - x * y, np.where(n >= 3, spread, 0.0))
    return np.clip(r, -1.0, 1.0)


def known_mean(values: Floats, draws: Resamples, undefined: str) -> Estimate:
    """Mean of values [T] over the tasks for which they are known; missing, for the reason given, where none is."""
    known = np.isfinite(values)
    count, total = draws.totals(known, np.where(known, values, 0.0))
    return Estimate.of(ratio(total, count), int(known.sum()), undefined)


def mean_of_defined(values: Floats) -> Floats:
    """Mean over the last axis without its NaN: [R] from [R, P]; NaN where there is nothing else."""
    defined = ~np.isnan(values)
    return ratio(np.where(defined, values, 0.0).sum(axis=-1), defined.sum(axis=-1).astype(np.float64))


def centred(values: Floats, used: Booleans) -> Floats:
    """Values [T] less their mean over the used tasks, which keeps sums of squares from cancelling; 0 for other tasks.

    Values that differ by rounding only, as equal means of options may, are equal: 0 for all.
    """
    own = values[used]
    if len(own) == 0 or np.ptp(own) <= ROUNDING * np.abs(own).max():
        return np.zeros_like(values)
    return np.where(used, values - own.mean(), 0.0)


def alike(a: ArrayLike, b: ArrayLike, what: str) -> tuple[Floats, Floats]:
    """Two measurements [T] of the same tasks.

    Raises
    ------
    ValueError
        If their shapes differ; `what` they are.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"{what} must be one-dimensional and alike, got {a.shape} and {b.shape}")
    return a, b
