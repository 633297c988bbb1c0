"""Refusal x rating: do refused tasks get lower ratings? Pure functions of arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from prefs.estimates import ROUNDING, Estimate, bootstrap_interval, pearson_of_sums, resample_counts

# A bootstrap over one or two refusals draws the same ones again and again, and looks far surer than it is.
MIN_GROUP = 5


@dataclass(frozen=True)
class RefusalRating:
    """One group's refusals and ratings.

    Every task is counted once: ``n + unrated + unjudged`` is the size of the group.

    Attributes
    ----------
    n
        Tasks with a rating and a verdict; everything below is of these.
    refused
        How many of them were refused.
    unrated
        Tasks left out because their rating is NaN.
    unjudged
        Tasks left out because they have a rating but no verdict.
    mean_refused, mean_not_refused
        Mean ratings; None where there is no such task.
    r
        Point-biserial correlation of refusal (1 = refused) and rating.
    """

    n: int
    refused: int
    unrated: int
    unjudged: int
    mean_refused: float | None
    mean_not_refused: float | None
    r: Estimate


def refusal_rating(
    refused: ArrayLike | Sequence[bool | None], rating: ArrayLike, bootstrap: int = 0, seed: int = 0
) -> RefusalRating:
    """Point-biserial r between being refused and the rating, for the tasks of one group.

    Parameters
    ----------
    refused
        [T], true or 1 where the completion is a refusal; None or NaN where there is no verdict.
    rating
        [T], NaN where there is no valid rating.
    bootstrap
        Resamples of tasks for the 95 % interval of r; 0 for none. There is none either with fewer than `MIN_GROUP`
        tasks on one side.
    seed
        Of the resampling.
    """
    verdict = np.asarray(refused, dtype=np.float64)
    x = np.asarray(rating, dtype=np.float64)
    if verdict.ndim != 1 or verdict.shape != x.shape:
        raise ValueError(f"refused and rating must be one-dimensional and alike, got {verdict.shape} and {x.shape}")
    rated, judged = np.isfinite(x), np.isfinite(verdict)
    used = rated & judged
    is_refused, x_used = verdict[used] != 0, x[used]
    return RefusalRating(
        n=int(used.sum()),
        refused=int(is_refused.sum()),
        unrated=int((~rated).sum()),
        unjudged=int((rated & ~judged).sum()),
        mean_refused=_mean(x_used[is_refused]),
        mean_not_refused=_mean(x_used[~is_refused]),
        r=_point_biserial(is_refused, x_used, bootstrap, seed),
    )


def _mean(x: NDArray[np.float64]) -> float | None:
    return float(x.mean()) if len(x) else None


def _point_biserial(is_refused: NDArray[np.bool_], x: NDArray[np.float64], bootstrap: int, seed: int) -> Estimate:
    n = len(x)
    reason = _undefined(is_refused, x)
    if reason:
        return Estimate.missing(reason, n)
    r = float(stats.pointbiserialr(is_refused, x).statistic)  # type: ignore[attr-defined]
    z, y = x - x.mean(), is_refused.astype(np.float64)
    products = np.stack([np.ones(n), z, y, z * z, y, z * y], axis=1)

    def resampled(index: NDArray[np.intp]) -> NDArray[np.float64]:
        sums = resample_counts(index) @ products
        return pearson_of_sums(*np.moveaxis(sums, 1, 0))

    smaller = min(int(is_refused.sum()), int((~is_refused).sum()))
    low, high = bootstrap_interval(resampled, n, bootstrap if smaller >= MIN_GROUP else 0, seed)
    return Estimate(r, low, high, n)


def _undefined(is_refused: NDArray[np.bool_], x: NDArray[np.float64]) -> str | None:
    if len(x) < 3:
        return "fewer than 3 tasks with a rating and a verdict"
    if not is_refused.any():
        return "no refusals"
    if is_refused.all():
        return "all refused"
    if np.ptp(x) <= ROUNDING * np.abs(x).max():
        return "no variance in ratings"
    return None
