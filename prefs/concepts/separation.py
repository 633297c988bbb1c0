"""How well a projection tells the two conditions of the same tasks apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prefs.probes.scores import score
from prefs.statistics.estimates import Estimate, Floats, Resamples, excess, ratio

ZERO = "the two conditions' means are equal"


@dataclass(frozen=True)
class Separation:
    """Of n tasks, each under both conditions, at one site.

    Attributes
    ----------
    auc
        How often a vector of the first condition lies further along than one of the second, ties by half.
    d
        Cohen's d: difference of the means over the root of the mean of the two variances (Cohen 1988, 2.5.2).
    accuracy
        Share of vectors on their side of the threshold that the training tasks set.
    """

    n: int
    auc: Estimate
    d: Estimate
    accuracy: Estimate


def separation(first: Floats, second: Floats, draws: Resamples) -> list[Separation]:
    """For each of C columns. A resample draws tasks, and both of a task's vectors with it.

    Parameters
    ----------
    first, second
        [n, C] projections of the same tasks, less the threshold; NaN where there is no direction.
    draws
        Resamples of the n tasks.
    """
    n, columns = first.shape
    both = Resamples(np.tile(draws.times, (1, 2)))
    of_auc = score(np.concatenate([first, second]), np.repeat([1.0, 0.0], n), both, binary=True)
    found = []
    for column in range(columns):
        a, b = first[:, column], second[:, column]
        if n < 3 or not (np.isfinite(a).all() and np.isfinite(b).all()):
            none = Estimate.missing(f"fewer than 3 tasks ({n})" if n < 3 else ZERO, n)
            found.append(Separation(n, none, none, none))
            continue
        right = ((a > 0).astype(float) + (b < 0)) / 2
        accuracy = Estimate.of(draws.sums(right[:, None])[:, 0] / n, n, "no share")
        found.append(Separation(n, of_auc[column].auc, cohens_d(a, b, draws), accuracy))
    return found


def cohens_d(first: Floats, second: Floats, draws: Resamples) -> Estimate:
    """Cohen's d of two conditions [n] each: (mean - mean) / √((s² + s²) / 2), with s² over n - 1.

    Cohen (1988), *Statistical Power Analysis for the Behavioral Sciences*, 2.5.2; for the same tasks under both
    conditions this is d_av of Lakens (2013), which does not shrink with their correlation.
    """
    n = len(first)
    centred = [each - each.mean() for each in (first, second)]
    sums = draws.sums(np.stack([*centred, *(each**2 for each in centred)], axis=1))
    total, squares = sums[:, :2], sums[:, 2:]
    variance = excess(squares, total**2 / n) / (n - 1)
    gap = (total[:, 0] - total[:, 1]) / n + first.mean() - second.mean()
    return Estimate.of(ratio(gap, np.sqrt(variance.mean(axis=1))), n, "no variance within the conditions")
