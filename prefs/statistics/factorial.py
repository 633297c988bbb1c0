"""How two crossed conditions move the ratings of the same tasks: a within-task (repeated-measures) two-way design.

Tasks t are random, the levels c of the first factor and r of the second are fixed, and each task has one value in each
cell of the design, y[t, c, r] (Winer, Brown & Michels 1991, "Statistical Principles in Experimental Design", 3rd
edition, chapter 7). What tasks differ by as a whole drops out of everything here but the standard deviation.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from prefs.statistics.estimates import ROUNDING, Estimate, Floats, Resamples, excess, ratio, resampling

MIN_TASKS = 3
FEW_COMPLETE = "fewer than 3 tasks with all their ratings"
NEVER_BESIDE = "no level of the other factor has ratings at both levels"
INCOMPLETE = "a cell of the design has no ratings"
ONE_LEVEL = "one of the factors has one level"
ALL_ALIKE = "tasks do not differ"
NO_VARIATION = "no variation within tasks"
Pair = tuple[int, int]


@dataclass(frozen=True)
class Contrast:
    """A difference of cell means.

    Attributes
    ----------
    first, second
        Of a main effect: the two levels that it is the difference of, and the levels of the other factor that it is
        averaged over (those with ratings at both). Of an interaction: two levels of each.
    points
        The difference, in the unit of the ratings.
    standardised
        Divided by the standard deviation over tasks.
    """

    first: tuple[int, ...]
    second: tuple[int, ...]
    points: Estimate
    standardised: Estimate


@dataclass(frozen=True)
class Shares:
    """Shares of the variation within tasks, which add up to 1: of each factor, their interaction, and the residual."""

    first: Estimate
    second: Estimate
    interaction: Estimate
    residual: Estimate


@dataclass(frozen=True)
class Factorial:
    """What two factors do to the ratings of the same tasks.

    Attributes
    ----------
    first, second
        Main effects of each factor: every two of its levels.
    interaction
        Of the outermost levels of both factors; None where one has a single level.
    shares
        Of the sum of squares within tasks.
    second_over_first
        By how much the second factor's outermost contrast is larger than the first's, both without their signs.
    n, left_out
        Tasks used, and tasks left out because a value is missing in a cell that has any.
    """

    first: tuple[Contrast, ...]
    second: tuple[Contrast, ...]
    interaction: Contrast | None
    shares: Shares
    second_over_first: Estimate
    n: int
    left_out: int


def factorial(y: ArrayLike, draws: Resamples | None = None) -> Factorial:
    """Main effects, interaction and shares of variation, of the tasks that have all their values.

    A main effect of levels a and b of the first factor is the mean over tasks and over the levels r of the second of
    ``y[t, a, r] - y[t, b, r]``; the interaction is ``(y[a, c] - y[a, d]) - (y[b, c] - y[b, d])``. They are divided by
    the root of the mean over cells of the variance over tasks, so that all have one unit (d_av: Cumming 2012,
    "Understanding the New Statistics", chapter 11). Intervals resample tasks, each with all its values.

    Parameters
    ----------
    y
        [T, C, R] value of each task at each level of the first and of the second factor; NaN where there is none. A
        cell without any value is absent: what does not need it is computed without it.
    draws
        Of the T tasks, for intervals.

    Raises
    ------
    ValueError
        If `y` has not three axes, or a factor no level, or `draws` are of other tasks.
    """
    y = np.asarray(y, dtype=np.float64)
    if y.ndim != 3 or 0 in y.shape[1:]:
        raise ValueError(f"y must be [tasks, levels of the first factor, levels of the second], got {y.shape}")
    draws = resampling(draws, len(y))
    finite = np.isfinite(y)
    present = np.asarray(finite.any(axis=0))
    complete = (finite | ~present).all(axis=(1, 2)) & present.any()
    n, left_out = int(complete.sum()), int((~complete).sum())
    # Tasks left out have no part in a resample, which then is of as many of the others as were drawn.
    y, draws = y[complete], Resamples(draws.times[:, complete])
    within = _Within(y, present, draws)
    _, levels_first, levels_second = y.shape
    first = [within.main(pair, axis=0) for pair in itertools.combinations(range(levels_first), 2)]
    second = [within.main(pair, axis=1) for pair in itertools.combinations(range(levels_second), 2)]
    outer = (0, levels_first - 1), (0, levels_second - 1)
    crossed = levels_first > 1 and levels_second > 1
    return Factorial(
        first=tuple(first),
        second=tuple(second),
        interaction=within.interaction(*outer) if crossed else None,
        shares=within.shares(),
        second_over_first=within.second_over_first(*outer) if crossed else Estimate.missing(ONE_LEVEL, n),
        n=n,
        left_out=left_out,
    )


class _Within:
    """Values [n, C, R] of complete tasks less each task's mean, and their resamples; absent cells count as 0."""

    def __init__(self, y: Floats, present: np.ndarray, draws: Resamples) -> None:
        self.present, self.n, self.shape = present, len(y), y.shape
        there = np.where(present, y, 0.0)
        count = max(int(present.sum()), 1)
        z = np.where(present, y - there.sum(axis=(1, 2), keepdims=True) / count, 0.0)
        # Exact ratings that are the same come out of sums that round differently.
        self.z = np.where(np.abs(z) > ROUNDING * np.abs(there).max(initial=0.0), z, 0.0)
        self.draws = draws
        self.tasks = draws.times.sum(axis=1).astype(np.float64)
        sums = draws.sums(self.z.reshape(len(y), present.size))
        self.means = ratio(sums, self.tasks[:, None]).reshape(-1, *present.shape)
        self.sd = np.sqrt(self._variances(there).mean(axis=1, where=present.ravel())) if present.any() else None

    def _variances(self, y: Floats) -> Floats:
        """[1 + B, C·R] variance over tasks of each cell."""
        flat = y.reshape(self.n, self.present.size)
        flat = flat - (flat.mean(axis=0) if self.n else 0.0)  # near the mean, which keeps the sums from cancelling
        sums, squares = self.draws.sums(flat), self.draws.sums(flat**2)
        n = self.tasks[:, None]
        return ratio(excess(n * squares, sums**2), n * (n - 1))

    def main(self, pair: Pair, axis: int) -> Contrast:
        weights = self._main_weights(pair, axis)
        others = tuple(int(level) for level in np.flatnonzero(weights.any(axis=axis)))
        levels = (pair, others) if axis == 0 else (others, pair)
        return Contrast(*levels, *self._estimates(self._values(weights), NEVER_BESIDE))

    def interaction(self, first: Pair, second: Pair) -> Contrast:
        cells = np.ix_(first, second)
        weights = np.zeros(self.shape[1:])
        weights[cells] = [[1.0, -1.0], [-1.0, 1.0]]
        values = self._values(weights if self.present[cells].all() else np.zeros_like(weights))
        return Contrast(first, second, *self._estimates(values, INCOMPLETE))

    def second_over_first(self, first: Pair, second: Pair) -> Estimate:
        of = [self._values(self._main_weights(pair, axis)) for axis, pair in enumerate((first, second))]
        if self.n < MIN_TASKS:
            return Estimate.missing(FEW_COMPLETE, self.n)
        return Estimate.of(np.abs(of[1]) - np.abs(of[0]), self.n, NEVER_BESIDE)

    def _main_weights(self, pair: Pair, axis: int) -> Floats:
        """[C, R] weights of a main effect; all 0 where no level of the other factor has both."""
        both = np.take(self.present, pair, axis=axis).all(axis=axis)
        beside = both / max(int(both.sum()), 1)
        signs = np.zeros(self.present.shape[axis])
        signs[list(pair)] = 1.0, -1.0
        return np.outer(signs, beside) if axis == 0 else np.outer(beside, signs)

    def _values(self, weights: Floats) -> Floats:
        """[1 + B] of a contrast; NaN where it has no weights."""
        return np.tensordot(self.means, weights, axes=2) if weights.any() else np.full(len(self.tasks), np.nan)

    def _estimates(self, values: Floats, undefined: str) -> tuple[Estimate, Estimate]:
        if self.n < MIN_TASKS or self.sd is None:
            none = Estimate.missing(FEW_COMPLETE, self.n)
            return none, none
        unknown = undefined if np.isnan(values[0]) else ALL_ALIKE
        return Estimate.of(values, self.n, undefined), Estimate.of(ratio(values, self.sd), self.n, unknown)

    def shares(self) -> Shares:
        if self.n < MIN_TASKS:
            return Shares(*[Estimate.missing(FEW_COMPLETE, self.n)] * 4)
        if not self.present.all():
            return Shares(*[Estimate.missing(INCOMPLETE, self.n)] * 4)
        whole, effects, by_task = _sums_of_squares(self.z, self.means, self.draws, self.tasks)
        # A task drawn twice is not two tasks: on average a resample has in each effect 1/n more of the effect's
        # interaction with tasks, and in that 1/n less.
        effects[1:] = np.maximum(effects[1:] - by_task[1:] / (self.n - 1), 0.0)
        levels = np.array(self.shape[1:])
        several = (levels[0] > 1, levels[1] > 1, bool((levels > 1).all()))
        first, second, interaction = (
            Estimate.of(ratio(part, whole), self.n, NO_VARIATION) if there else Estimate.missing(ONE_LEVEL, self.n)
            for part, there in zip(effects.T, several, strict=True)
        )
        residual = Estimate.of(ratio(excess(whole, effects.sum(axis=1)), whole), self.n, NO_VARIATION)
        return Shares(first, second, interaction, residual)


def _sums_of_squares(z: Floats, means: Floats, draws: Resamples, tasks: Floats) -> tuple[Floats, Floats, Floats]:
    """Sums of squares of the first factor, the second and their interaction, of values less each task's mean.

    Returns
    -------
    whole
        [1 + B] the sum of squares within tasks: all of the following.
    effects
        [1 + B, 3].
    by_task
        [1 + B, 3] of each effect's interaction with tasks.
    """
    margins = _margins(means)
    effects = tasks[:, None] * margins
    per_task = draws.sums(np.concatenate([(z**2).sum(axis=(1, 2))[:, None], _margins(z)], axis=1))
    return per_task[:, 0], effects, np.maximum(per_task[:, 1:] - effects, 0.0)


def _margins(values: Floats) -> Floats:
    """[K, 3] from [K, C, R] of mean 0: squares of the first factor's, the second's and the interaction's deviations."""
    _, first, second = values.shape
    rows, columns = values.mean(axis=2, keepdims=True), values.mean(axis=1, keepdims=True)
    within = values - rows - columns
    return np.stack(
        [second * (rows**2).sum(axis=(1, 2)), first * (columns**2).sum(axis=(1, 2)), (within**2).sum(axis=(1, 2))],
        axis=1,
    )
