"""What cross-validation brings of one target: scores, predictions and probes, or the reason why there are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from prefs.probes.probe import Probe
from prefs.probes.scores import Scores, permutation_p
from prefs.probes.targets import Target
from prefs.statistics.estimates import LEVEL, Estimate

MIN_TASKS = 3


@dataclass(frozen=True, eq=False)
class Nothing:
    """A target that no probe was trained for, and why."""

    target: Target
    reason: str


@dataclass(frozen=True, eq=False)
class CrossValidated:
    """Probes of one target at S sites.

    Attributes
    ----------
    rows
        [m] the tasks that have the target, of all that have vectors.
    folds
        [m].
    by_site
        S scores; the penalty of each fold was chosen by the others.
    null
        [S, B] the main score with shuffled targets, penalties chosen anew for each.
    chosen_sites
        [k] the site that each fold's training tasks chose.
    predictions
        [m] of each task by the probe that the other folds chose: site and penalty.
    chosen, chosen_null, p
        The scores of those, [B] the same with shuffled targets, and the p-value of the first against the second.
    within
        Scores of the same for the target less its origin's mean; None where that has no meaning.
    final
        The probe of all tasks, at the site and penalty that these choose. Its own score is not among the above: they
        are what the same way of choosing and training gives on new tasks.
    final_directions
        [S, d] directions of the probes of all tasks at all sites; None for forms without.
    by_fold
        k probes, each of the site its fold's training tasks chose.
    """

    target: Target
    rows: np.ndarray
    folds: np.ndarray
    by_site: Sequence[Scores]
    null: np.ndarray
    chosen_sites: np.ndarray
    predictions: np.ndarray
    chosen: Scores
    chosen_null: np.ndarray
    p: float | None
    within: Scores | None
    final: Probe
    final_directions: torch.Tensor | None
    final_penalty: float | None
    by_fold: Sequence[Probe]

    def main(self, scores: Scores) -> Estimate:
        """The score that matters for this target: AUC of a yes and no, R² of numbers."""
        return self.target.main(scores)

    def site_p(self, site: int) -> float | None:
        """The p-value of one site."""
        return p_value(self.main(self.by_site[site]), self.null[site])

    def null_band(self) -> tuple[np.ndarray, np.ndarray]:
        """[S] the lower and upper end of the middle 95 % of scores with shuffled targets; NaN without any."""
        if not self.null.shape[1]:
            nothing = np.full(len(self.null), np.nan)
            return nothing, nothing
        low, high = np.nanquantile(self.null, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)
        return low, high


def p_value(score: Estimate, null: np.ndarray) -> float | None:
    """The p-value of a score against those of shuffled targets; None where there is no score, or none of them."""
    return None if score.value is None or not len(null) else permutation_p(score.value, null)
