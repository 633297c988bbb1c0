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

from prefs.statistics.estimates import (
    MIN_TASKS,
    ROUNDING,
    Booleans,
    Estimate,
    Floats,
    Resamples,
    excess,
    ratio,
    resampling,
)

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
    complete = np.asarray((finite | ~present).all(axis=(1, 2)) & present.any())
    design = _Design(y[complete], present, draws.only(complete))
    levels = present.shape
    crossed = min(levels) > 1
    outer = [(0, count - 1) for count in levels]
    first, second = (
        tuple(design.main(pair, axis) for pair in itertools.combinations(range(levels[axis]), 2)) for axis in (0, 1)
    )
    return Factorial(
        first=first,
        second=second,
        interaction=design.interaction(*outer) if crossed else None,
        shares=design.shares(),
        second_over_first=design.second_over_first(*outer) if crossed else Estimate.missing(ONE_LEVEL, design.n),
        n=design.n,
        left_out=len(y) - design.n,
    )


class _Design:
    """Values [n, C, R] of complete tasks less each task's mean, and their resamples; absent cells count as 0."""

    def __init__(self, y: Floats, present: Booleans, draws: Resamples) -> None:
        self.n, self.present, self.draws = len(y), present, draws
        y = np.where(present, y, 0.0)
        z = np.where(present, y - y.sum(axis=(1, 2), keepdims=True) / max(int(present.sum()), 1), 0.0)
        # Exact ratings that are the same come out of sums that round differently.
        self.z = np.where(np.abs(z) > ROUNDING * np.abs(y).max(initial=0.0), z, 0.0)
        self.tasks = draws.times.sum(axis=1).astype(np.float64)
        n = self.tasks[:, None]
        self.means = ratio(draws.sums(self.z.reshape(self.n, present.size)), n).reshape(-1, *present.shape)
        # The root of the mean over cells of the variance over tasks; near the mean, sums of squares do not cancel.
        flat = y.reshape(self.n, present.size)
        flat = flat - (flat.mean(axis=0) if self.n else 0.0)
        variances = ratio(excess(n * draws.sums(flat**2), draws.sums(flat) ** 2), n * (n - 1))
        kept = variances[:, present.ravel()]
        self.sd = np.sqrt(variances.mean(axis=1, where=present.ravel())) if kept.size else np.full(len(n), np.nan)

    def main(self, pair: Pair, axis: int) -> Contrast:
        weights = self._main_weights(pair, axis)
        others = tuple(int(level) for level in np.flatnonzero(weights.any(axis=axis)))
        return self._contrast(*((pair, others) if axis == 0 else (others, pair)), weights, NEVER_BESIDE)

    def interaction(self, first: Pair, second: Pair) -> Contrast:
        cells, weights = np.ix_(first, second), np.zeros(self.present.shape)
        if self.present[cells].all():
            weights[cells] = [[1.0, -1.0], [-1.0, 1.0]]
        return self._contrast(first, second, weights, INCOMPLETE)

    def second_over_first(self, first: Pair, second: Pair) -> Estimate:
        sizes = [np.abs(self._values(self._main_weights(pair, axis))) for axis, pair in enumerate((first, second))]
        return self._estimate(sizes[1] - sizes[0], NEVER_BESIDE)

    def _main_weights(self, pair: Pair, axis: int) -> Floats:
        """[C, R] weights of a main effect; all 0 where no level of the other factor has both."""
        both = np.take(self.present, pair, axis=axis).all(axis=axis)
        signs = np.zeros(self.present.shape[axis])
        signs[list(pair)] = 1.0, -1.0
        beside = both / max(int(both.sum()), 1)
        return np.outer(signs, beside) if axis == 0 else np.outer(beside, signs)

    def _values(self, weights: Floats) -> Floats:
        """[1 + B] of a contrast; NaN where it has no weights."""
        return np.tensordot(self.means, weights, axes=2) if weights.any() else np.full(len(self.tasks), np.nan)

    def _contrast(self, first: tuple[int, ...], second: tuple[int, ...], weights: Floats, undefined: str) -> Contrast:
        values = self._values(weights)
        unknown = undefined if np.isnan(values[0]) else ALL_ALIKE
        standardised = self._estimate(ratio(values, self.sd), unknown)
        return Contrast(first, second, self._estimate(values, undefined), standardised)

    def _estimate(self, values: Floats, undefined: str) -> Estimate:
        if self.n < MIN_TASKS:
            return Estimate.missing(FEW_COMPLETE, self.n)
        return Estimate.of(values, self.n, undefined)

    def shares(self) -> Shares:
        if self.n < MIN_TASKS or not self.present.all():
            return Shares(*[Estimate.missing(FEW_COMPLETE if self.n < MIN_TASKS else INCOMPLETE, self.n)] * 4)
        whole, effects, by_task = _sums_of_squares(self.z, self.means, self.draws, self.tasks)
        # A task drawn twice is not two tasks: on average a resample has in each effect 1/n more of the effect's
        # interaction with tasks, and in that 1/n less.
        effects[1:] = np.maximum(effects[1:] - by_task[1:] / (self.n - 1), 0.0)
        several = [count > 1 for count in self.present.shape]
        first, second, interaction = (
            Estimate.of(ratio(part, whole), self.n, NO_VARIATION) if varies else Estimate.missing(ONE_LEVEL, self.n)
            for part, varies in zip(effects.T, (*several, all(several)), strict=True)
        )
        residual = Estimate.of(ratio(excess(whole, effects.sum(axis=1)), whole), self.n, NO_VARIATION)
        return Shares(first, second, interaction, residual)


def _sums_of_squares(z: Floats, means: Floats, draws: Resamples, tasks: Floats) -> tuple[Floats, Floats, Floats]:
    """Of values less each task's mean: the sum of squares within tasks [1 + B], which is all of the following; those of
    the first factor, the second and their interaction [1 + B, 3]; and those of each one's interaction with tasks.
    """
    effects = tasks[:, None] * _margins(means)
    per_task = draws.sums(np.concatenate([(z**2).sum(axis=(1, 2))[:, None], _margins(z)], axis=1))
    return per_task[:, 0], effects, np.maximum(per_task[:, 1:] - effects, 0.0)


def _margins(values: Floats) -> Floats:
    """[K, 3] from [K, C, R] of mean 0: squares of the first factor's, the second's and the interaction's deviations."""
    _, first, second = values.shape
    rows, columns = values.mean(axis=2, keepdims=True), values.mean(axis=1, keepdims=True)
    squares = [(part**2).sum(axis=(1, 2)) for part in (rows, columns, values - rows - columns)]
    return np.stack([second * squares[0], first * squares[1], squares[2]], axis=1)
