"""One cell's measurements as plain arrays: what every statistic, table and figure of a cell is made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from prefs.statistics.exact import ExactSummary, exact_summary, thought_summary

# The kind of a cell whose rater answers at once.
DIRECT = "direct"


@dataclass(frozen=True)
class Measured:
    """One cell as the arrays that statistics are made of, whether just measured or read back from a run folder.

    Attributes
    ----------
    tasks, origins
        [T] task ids, and where each is from.
    says, values
        [V] the template's options and what they are worth.
    sampled
        [T, S] sampled ratings, NaN where invalid.
    mass
        [T, V] probabilities of the options before renormalising, NaN for tasks that were not asked; None where exact
        ratings were not wanted. Of a rater that thinks, the mixture over its thoughts.
    refused
        [T] 1 where the completion is a refusal, 0 where not, NaN without a verdict.
    thinks
        Whether the rater thinks before it answers.
    by_thought
        [T, K, V] the probabilities after each of K thoughts, for a rater that thinks.
    """

    tasks: tuple[str, ...]
    origins: tuple[str, ...]
    says: tuple[str, ...]
    values: tuple[float, ...]
    sampled: np.ndarray
    mass: np.ndarray | None
    refused: np.ndarray
    thinks: bool = False
    by_thought: np.ndarray | None = None

    def only(self, rows: Sequence[int] | np.ndarray) -> Measured:
        """These tasks, in this order."""
        return Measured(
            tasks=tuple(self.tasks[row] for row in rows),
            origins=tuple(self.origins[row] for row in rows),
            says=self.says,
            values=self.values,
            sampled=self.sampled[rows],
            mass=None if self.mass is None else self.mass[rows],
            refused=self.refused[rows],
            thinks=self.thinks,
            by_thought=None if self.by_thought is None else self.by_thought[rows],
        )

    @property
    def kind(self) -> str:
        """Which kind of rating this is: of a rater that answers at once, or that thinks, and after how many thoughts
        its exact ratings are."""
        if not self.thinks:
            return DIRECT
        if self.by_thought is None:
            return "thinking"
        k = self.by_thought.shape[1]
        return "after one thought" if k == 1 else f"mixture of {k} thoughts"

    @cached_property
    def exact(self) -> ExactSummary | None:
        """Mean, variance and valid mass of each task's exact rating; None where exact ratings were not wanted."""
        if self.by_thought is not None:
            return thought_summary(self.by_thought, self.values)
        return None if self.mass is None else exact_summary(self.mass, self.values)

    @property
    def sampling_known(self) -> bool:
        """Whether exact ratings say how much sampled ones vary; after a single thought they do not."""
        return self.exact is not None and bool(np.isfinite(self.exact.variance[np.isfinite(self.exact.mean)]).all())

    @cached_property
    def seed_means(self) -> np.ndarray:
        """[T] mean of a task's valid sampled ratings, NaN without one."""
        return valid_means(self.sampled)

    @property
    def task_means(self) -> np.ndarray:
        """[T] the best there is of each task's rating: the exact mean, or else the mean over seeds."""
        return self.seed_means if self.exact is None else self.exact.mean


def valid_means(ratings: np.ndarray) -> np.ndarray:
    """[T] mean of the valid ones of ratings [T, S], NaN without one."""
    count = np.isfinite(ratings).sum(axis=1)
    return np.divide(np.nansum(ratings, axis=1), count, out=np.full(len(count), np.nan), where=count > 0)
