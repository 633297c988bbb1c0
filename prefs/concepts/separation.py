"""How well a projection tells the two conditions of the same tasks apart."""

from __future__ import annotations

import numpy as np

from prefs.probes.scores import score
from prefs.statistics.estimates import Estimate, Floats, Resamples, excess, ratio

ZERO = "the two conditions' means are equal"


def separation(first: Floats, second: Floats, draws: Resamples) -> list[dict[str, Estimate]]:
    """For each of C columns, by name; a resample draws tasks, and both of a task's vectors with it.

    ``auc`` is how often a vector of the first condition lies further along than one of the second, ties by half; ``d``
    is `cohens_d`; ``accuracy`` is the share of vectors on their side of the threshold that the training tasks set.

    Parameters
    ----------
    first, second
        [n, C] projections of the same tasks, less the threshold; NaN where there is no direction.
    draws
        Resamples of the n tasks.
    """
    n = len(first)
    both = Resamples(np.tile(draws.times, (1, 2)))
    scores = score(np.concatenate([first, second]), np.repeat([1.0, 0.0], n), both, binary=True)
    columns = []
    for a, b, scored in zip(first.T, second.T, scores, strict=True):
        if n < 3 or not (np.isfinite(a).all() and np.isfinite(b).all()):
            reason = f"fewer than 3 tasks ({n})" if n < 3 else ZERO
            columns.append(dict.fromkeys(("auc", "d", "accuracy"), Estimate.missing(reason, n)))
            continue
        right = ((a > 0).astype(float) + (b < 0)) / 2
        accuracy = Estimate.of(draws.sums(right[:, None])[:, 0] / n, n, "no share")
        columns.append({"auc": scored.auc, "d": cohens_d(a, b, draws), "accuracy": accuracy})
    return columns


def cohens_d(first: Floats, second: Floats, draws: Resamples) -> Estimate:
    """Cohen's d of two conditions [n] each: (mean - mean) / √((s² + s²) / 2), with s² over n - 1.

    Cohen (1988), *Statistical Power Analysis for the Behavioral Sciences*, 2.5.2; for the same tasks under both
    conditions this is d_av of Lakens (2013), which does not shrink with their correlation.
    """
    n = len(first)
    centred = np.stack([first - first.mean(), second - second.mean()], axis=1)
    total, squares = np.split(draws.sums(np.concatenate([centred, centred**2], axis=1)), 2, axis=1)
    variance = excess(squares, total**2 / n) / (n - 1)
    gap = (total[:, 0] - total[:, 1]) / n + first.mean() - second.mean()
    return Estimate.of(ratio(gap, np.sqrt(variance.mean(axis=1))), n, "no variance within the conditions")
