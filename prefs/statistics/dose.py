"""Dose and response: how ratings move with the coefficient of a steering vector. Pure functions of arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from prefs.statistics.estimates import Estimate, Floats, Resamples, known_mean

NO_SLOPE = "fewer than 2 coefficients"


def mean_of(values: Floats, draws: Resamples) -> Estimate:
    """The mean over tasks [T], without those that are NaN; missing where none is left."""
    return known_mean(values, draws, "no task has a rating")


def slope(responses: Floats, coefficients: ArrayLike, draws: Resamples) -> Estimate:
    """The mean over tasks of each task's least-squares slope of its ratings over the coefficients.

    With the same coefficients for every task that is the slope of the mean curve; its interval is over tasks, which
    are resampled with their whole curve (the random-coefficients view of repeated measures: Diggle et al. 2002,
    *Analysis of Longitudinal Data*, 5.2).

    Parameters
    ----------
    responses
        [T, D] ratings by task and dose; tasks with a NaN in them are left out.
    coefficients
        [D].
    draws
        Resamples of the T tasks.
    """
    x = np.asarray(coefficients, dtype=np.float64)
    if len(np.unique(x)) < 2:
        return Estimate.missing(NO_SLOPE, len(responses))
    centred = x - x.mean()
    # NaN passes through to the tasks that have one.
    return mean_of(responses @ centred / (centred @ centred), draws)
