"""What probes predict: exact means, means over seeds, one seed, or a yes and no; with the most that can be reached."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prefs.models.types import Sampling
from prefs.probes.scores import Scores
from prefs.statistics.estimates import Estimate
from prefs.statistics.exact import ceiling, predicted_r, reliability
from prefs.statistics.measured import Measured, valid_means
from prefs.statistics.sampled import intraclass

# The target that is not of ratings.
UTILITY = "utility"
NO_CEILING = "no ceiling is known for a target of yes and no"


@dataclass(frozen=True, eq=False)
class TaskUtilities:
    """Utilities [n] of a cell's tasks (NaN: none), and their reliability."""

    values: np.ndarray
    reliability: Estimate


@dataclass(frozen=True, eq=False)
class Target:
    """One target of a cell.

    Attributes
    ----------
    key
        Its name in the config.
    name
        Its name in tables: ``mean of 4 seeds``.
    values
        [n], NaN where a task has none; 0 or 1 where it is ``binary``.
    ceiling
        The noise ceiling: the largest R² that any predictor can reach.
    shares
        [n, V] how much of the rating is each option, in rising order of value (NaN: none); None where binary.
    """

    key: str
    name: str
    values: np.ndarray
    ceiling: Estimate
    binary: bool = False
    shares: np.ndarray | None = None

    @property
    def observed(self) -> np.ndarray:
        """[n] bool."""
        return np.isfinite(self.values)

    def main(self, scores: Scores) -> Estimate:
        """The score that matters for it: AUC of a yes and no, R² of numbers."""
        return scores.auc if self.binary else scores.r2


def alike(values: np.ndarray) -> bool:
    """Whether finite values are the same but for rounding, or there are none."""
    return not len(values) or float(np.ptp(values)) <= 1e-9 * float(np.abs(values).max())


def targets_of(
    measured: Measured,
    sampling: Sampling,
    wanted: tuple[str, ...],
    threshold: str | float = "midpoint",
    utilities: TaskUtilities | None = None,
) -> list[Target]:
    """The targets wanted, of those that these ratings have.

    Parameters
    ----------
    measured
        n tasks.
    sampling
        How the ratings were sampled: at temperature 1 exact ratings say how noisy they are.
    wanted
        Of ``exact``, ``sampled``, ``single``, ``utility``, ``good``, ``refused``.
    threshold
        What a ``good`` rating lies above: ``midpoint`` of the scale, ``median`` of the ratings, or a number.
    utilities
        Of the same tasks, where they were chosen between.
    """
    order = np.argsort(measured.values)
    scale = np.array(measured.values)[order]
    known = measured.exact is not None and measured.sampling_known and sampling.temperature == sampling.top_p == 1
    found: list[Target] = []
    for key in wanted:
        if key == "exact" and measured.exact is not None and measured.mass is not None:
            total = measured.mass.sum(axis=1, keepdims=True)
            shares = np.divide(measured.mass, total, out=np.full(measured.mass.shape, np.nan), where=total > 0)
            best = ceiling(reliability(measured.exact)).r2
            found.append(Target(key, "exact", measured.exact.mean, best, shares=shares[:, order]))
        elif key in ("sampled", "single") and measured.sampled.shape[1]:
            seeds = measured.sampled.shape[1] if key == "sampled" else 1
            if key == "single" and "sampled" in wanted and measured.sampled.shape[1] == 1:
                continue  # the same
            ratings = measured.sampled[:, :seeds]
            found.append(_sampled(measured, ratings, key, scale, known=known))
        elif key == UTILITY and utilities is not None:
            found.append(Target(key, UTILITY, utilities.values, ceiling(utilities.reliability).r2))
        elif key == "good":
            values = measured.task_means
            cut = _cut(values, scale, threshold)
            good = np.where(np.isfinite(values), (values > cut).astype(float), np.nan)
            found.append(Target(key, f"rated above {cut:.4g}", good, _no_ceiling(good), binary=True))
        elif key == "refused":
            found.append(Target(key, "refused", measured.refused, _no_ceiling(measured.refused), binary=True))
    return found


def _sampled(measured: Measured, ratings: np.ndarray, key: str, scale: np.ndarray, *, known: bool) -> Target:
    seeds = ratings.shape[1]
    count = np.isfinite(ratings).sum(axis=1)
    if known and measured.exact is not None:
        # Known noise: the mean of a task's k valid ratings varies by w/k.
        noise = np.divide(measured.exact.variance, count, out=np.full(len(count), np.nan), where=count > 0)
        reliable = predicted_r(measured.exact.mean, noise, uncertainty=measured.exact.uncertainty)
    elif key == "single":
        reliable = intraclass(measured.sampled).single
    else:
        reliable = intraclass(ratings).mean
    given = (ratings[:, :, None] == scale).sum(axis=1)
    shares = np.divide(given, count[:, None], out=np.full(given.shape, np.nan), where=count[:, None] > 0)
    name = f"mean of {seeds} seeds" if seeds > 1 else "one seed"
    return Target(key, name, valid_means(ratings), ceiling(reliable).r2, shares=shares)


def _cut(values: np.ndarray, scale: np.ndarray, threshold: str | float) -> float:
    if threshold == "midpoint":
        return float(scale[0] + scale[-1]) / 2
    if threshold == "median":
        return float(np.nanmedian(values)) if np.isfinite(values).any() else float("nan")
    return float(threshold)


def _no_ceiling(values: np.ndarray) -> Estimate:
    return Estimate.missing(NO_CEILING, int(np.isfinite(values).sum()))
