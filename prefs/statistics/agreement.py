"""Do two measurements, or two judges, of the same tasks agree? With intervals over tasks."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from prefs.statistics.estimates import (
    MIN_TASKS,
    NO_VARIANCE,
    Estimate,
    Resamples,
    alike,
    centred,
    pearson_of_sums,
    ratio,
    resampling,
)

FEW_TASKS = "fewer than 3 tasks with both"
NO_VERDICTS = "no task with two verdicts"
ONE_VERDICT = "both judges give all tasks the same verdict"


def correlation(x: ArrayLike, y: ArrayLike, draws: Resamples | None = None) -> Estimate:
    """Pearson correlation over tasks.

    Of two templates' or two raters' exact means it says whether they order the tasks alike. Exact means carry no
    sampling noise, so a low correlation is a difference in what is measured and not an unstable measurement.

    Parameters
    ----------
    x, y
        [T]; tasks where either is NaN are left out.
    draws
        Of the T tasks, for the interval.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    x, y = alike(x, y, "measurements")
    return correlations(x, y[:, None], draws)[0]


def correlations(x: ArrayLike, ys: ArrayLike, draws: Resamples | None = None) -> list[Estimate]:
    """`correlation` of x [T] with each column of ys [T, C]: resampled together, in far less time.

    Raises
    ------
    ValueError
        If the shapes do not fit.
    """
    x, ys = np.asarray(x, dtype=np.float64), np.asarray(ys, dtype=np.float64)
    if x.ndim != 1 or ys.ndim != 2 or len(x) != len(ys):
        raise ValueError(f"measurements must be [tasks] and [tasks, columns], got {x.shape} and {ys.shape}")
    both = np.isfinite(x)[:, None] & np.isfinite(ys)
    n = both.sum(axis=0)
    estimates = [Estimate.missing(FEW_TASKS if count < MIN_TASKS else NO_VARIANCE, int(count)) for count in n]
    parts = {}
    for column in np.flatnonzero(n >= MIN_TASKS):
        used = both[:, column]
        a, b = centred(x, used), centred(ys[:, column], used)
        if a.any() and b.any():
            parts[column] = np.stack([used.astype(np.float64), a, b, a * a, b * b, a * b], axis=1)
    if parts:
        sums = resampling(draws, len(x)).sums(np.concatenate(list(parts.values()), axis=1))
        for column, own in zip(parts, np.split(sums, len(parts), axis=1), strict=True):
            estimates[column] = Estimate.of(pearson_of_sums(*own.T), int(n[column]), NO_VARIANCE)
    return estimates


def cohen_kappa(a: ArrayLike, b: ArrayLike, draws: Resamples | None = None) -> Estimate:
    """Cohen's κ of two judges' yes and no: (p_o - p_e) / (1 - p_e), agreement beyond what their shares alone give.

    Cohen 1960, "A coefficient of agreement for nominal scales": p_o is the share of tasks on which they agree, and p_e
    what is expected of independent judges with the same shares of yes. Not defined where both always say the same one.

    Parameters
    ----------
    a, b
        [T] 1 for yes, 0 for no; tasks where either is NaN are left out.
    draws
        Of the T tasks, for the interval.

    Raises
    ------
    ValueError
        If the shapes differ, or a verdict is not 0, 1 or NaN.
    """
    a, b = alike(a, b, "verdicts")
    both = np.isfinite(a) & np.isfinite(b)
    if not all(np.isin(verdicts[~np.isnan(verdicts)], (0, 1)).all() for verdicts in (a, b)):
        raise ValueError("verdicts must be 0, 1 or NaN")
    if not both.any():
        return Estimate.missing(NO_VERDICTS, 0)
    count, by_a, by_b, agreed = resampling(draws, len(a)).totals(
        both, both & (a == 1), both & (b == 1), both & (a == b)
    )
    expected = by_a * by_b + (count - by_a) * (count - by_b)
    return Estimate.of(ratio(agreed * count - expected, count * count - expected), int(both.sum()), ONE_VERDICT)
