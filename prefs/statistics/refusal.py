"""Refusal x rating: do refused tasks get lower ratings? Pure functions of arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from prefs.statistics.agreement import correlation
from prefs.statistics.estimates import MIN_TASKS, Booleans, Estimate, Resamples, alike, known_mean, resampling

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
    verdict, x = alike(np.asarray(refused, dtype=np.float64), rating, "refused and rating")
    rated, judged = np.isfinite(x), np.isfinite(verdict)
    used = rated & judged
    is_refused = used & (verdict != 0)
    is_not = used & ~is_refused
    n, refusals = int(used.sum()), int(is_refused.sum())

    def mean(chosen: Booleans, undefined: str) -> Estimate:
        certain = draws if chosen.sum() >= MIN_GROUP else None
        return known_mean(np.where(chosen, x, np.nan), resampling(certain, len(x)), undefined)

    if n < MIN_TASKS:
        r = Estimate.missing(FEW_TASKS, n)
    elif refusals in (0, n):
        r = Estimate.missing(ALL_REFUSED if refusals else NO_REFUSALS, n)
    else:  # the point-biserial correlation is Pearson's with a variable of 0 and 1
        certain = draws if min(refusals, n - refusals) >= MIN_GROUP else None
        r = correlation(is_refused.astype(np.float64), np.where(used, x, np.nan), certain)
    return RefusalRating(
        n=n,
        refused=refusals,
        unrated=int((~rated).sum()),
        unjudged=int((rated & ~judged).sum()),
        mean_refused=mean(is_refused, NO_REFUSALS),
        mean_not_refused=mean(is_not, ALL_REFUSED),
        r=r,
    )
