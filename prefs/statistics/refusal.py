"""Refusal x rating: do refused tasks get lower ratings? Pure functions of arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefs.statistics.agreement import correlation
from prefs.statistics.estimates import Estimate, Floats, Resamples, ratio, resampling

# A bootstrap over one or two refusals draws the same ones again and again, and looks far surer than it is.
MIN_GROUP = 5
FEW_TASKS = "fewer than 3 tasks with a rating and a verdict"
NO_REFUSALS = "no refusals"
ALL_REFUSED = "all refused"


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
        Mean ratings; missing where there is no such task.
    r
        Point-biserial correlation of refusal (1 = refused) and rating.
    """

    n: int
    refused: int
    unrated: int
    unjudged: int
    mean_refused: Estimate
    mean_not_refused: Estimate
    r: Estimate


def refusal_rating(
    refused: ArrayLike | Sequence[bool | None], rating: ArrayLike, draws: Resamples | None = None
) -> RefusalRating:
    """Point-biserial r between being refused and the rating, for the tasks of one group.

    Parameters
    ----------
    refused
        [T], true or 1 where the completion is a refusal; None or NaN where there is no verdict.
    rating
        [T], NaN where there is no valid rating.
    draws
        Of the T tasks, for intervals of r and of both means. There are none with fewer than `MIN_GROUP` tasks on one
        side (of a mean: on its own side).

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    verdict = np.asarray(refused, dtype=np.float64)
    x = np.asarray(rating, dtype=np.float64)
    if verdict.ndim != 1 or verdict.shape != x.shape:
        raise ValueError(f"refused and rating must be one-dimensional and alike, got {verdict.shape} and {x.shape}")
    rated, judged = np.isfinite(x), np.isfinite(verdict)
    used = rated & judged
    is_refused = used & (verdict != 0)
    is_not = used & ~is_refused
    smaller = min(int(is_refused.sum()), int(is_not.sum()))
    return RefusalRating(
        n=int(used.sum()),
        refused=int(is_refused.sum()),
        unrated=int((~rated).sum()),
        unjudged=int((rated & ~judged).sum()),
        mean_refused=_mean(x, is_refused, draws, NO_REFUSALS),
        mean_not_refused=_mean(x, is_not, draws, ALL_REFUSED),
        r=_point_biserial(is_refused, x, used, draws if smaller >= MIN_GROUP else None),
    )


def _mean(x: Floats, chosen: NDArray[np.bool_], draws: Resamples | None, undefined: str) -> Estimate:
    n = int(chosen.sum())
    parts = np.stack([np.where(chosen, x, 0.0), chosen.astype(np.float64)], axis=1)
    total, count = np.moveaxis(resampling(draws if n >= MIN_GROUP else None, len(x)).sums(parts), 1, 0)
    return Estimate.of(ratio(total, count), n, undefined)


def _point_biserial(
    is_refused: NDArray[np.bool_], x: Floats, used: NDArray[np.bool_], draws: Resamples | None
) -> Estimate:
    n, refusals = int(used.sum()), int(is_refused.sum())
    if n < 3:
        return Estimate.missing(FEW_TASKS, n)
    if refusals in (0, n):
        return Estimate.missing(ALL_REFUSED if refusals else NO_REFUSALS, n)
    # The point-biserial correlation is Pearson's with a variable of 0 and 1.
    return correlation(is_refused.astype(np.float64), np.where(used, x, np.nan), draws)
