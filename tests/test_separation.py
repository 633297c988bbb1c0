"""Separation of two conditions against scikit-learn and pingouin."""

from __future__ import annotations

import numpy as np
import pingouin
import pytest
from sklearn.metrics import roc_auc_score

from prefs.concepts.separation import ZERO, separation
from prefs.statistics.estimates import Resamples


def samples(n: int = 60, gap: float = 1.0, seed: int = 0):
    rng = np.random.default_rng(seed)
    common = rng.normal(size=n)
    return common + rng.normal(size=n) + gap, common + rng.normal(size=n)


def test_against_peers():
    a, b = samples()
    draws = Resamples.draw(len(a), 300)
    first, other = separation(np.stack([a, -a], 1) - 0.5, np.stack([b, -b], 1) - 0.5, draws)
    truth = np.repeat([1, 0], len(a))
    assert first["auc"].value == pytest.approx(roc_auc_score(truth, np.concatenate([a, b])))
    assert other["auc"].value == pytest.approx(1 - first["auc"].value)
    # Of paired samples pingouin's "cohen" is d_av, the root of the mean of both variances.
    assert first["d"].value == pytest.approx(pingouin.compute_effsize(a, b, paired=True, eftype="cohen"))
    assert first["accuracy"].value == pytest.approx(((a > 0.5).mean() + (b < 0.5).mean()) / 2)
    for estimate in first.values():
        assert estimate.low < estimate.value < estimate.high


def test_what_is_not_defined_says_why():
    draws = Resamples.draw(10, 20)
    nothing = separation(np.full((10, 1), np.nan), np.full((10, 1), np.nan), draws)[0]
    assert nothing["auc"].reason == nothing["d"].reason == ZERO
    few = separation(np.ones((2, 1)), np.zeros((2, 1)), Resamples.draw(2, 5))[0]
    assert few["auc"].reason == "fewer than 3 tasks (2)"
    constant = separation(np.ones((10, 1)), -np.ones((10, 1)), draws)[0]
    assert constant["auc"].value == constant["accuracy"].value == 1
    assert constant["d"].reason == "no variance within the conditions"
