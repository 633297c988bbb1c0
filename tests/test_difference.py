"""Differences of means against plain sums by hand, and what difference number beside them means."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_vectors import residuals, tensors

from prefs.concepts.difference import difference_of_means, project
from prefs.statistics.estimates import Resamples

N, LAYERS, D = 30, 3, 12


def pair(n: int = N, shift: float = 0.5, seed: int = 0, d: int = D):
    """Vectors under two conditions: the first lies `shift` further along dimension 4 at layer 1 only."""
    second = residuals(n, LAYERS, d, seed).double()
    first = second + 0.1 * torch.randn(n, LAYERS, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    first[:, 1, 4] += shift
    return first.float(), second.float()


def extracted(first, second, *, folds=None, splits=20, resamples=50, flips=200, seed=0):
    n = len(first)
    folds = np.arange(n) % 3 if folds is None else folds
    return difference_of_means(
        tensors(first),
        tensors(second),
        folds,
        task=np.arange(n),
        splits=splits,
        draws=Resamples.draw(n, resamples),
        flips=flips,
        seed=seed,
    )


def test_the_vector_is_the_difference_of_the_means_and_each_fold_is_left_out_of_its_own():
    first, second = pair()
    difference = extracted(first, second)
    by_hand = first.double().mean(0) - second.double().mean(0)
    torch.testing.assert_close(difference.vector.double(), by_hand, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(difference.norm, by_hand.norm(dim=-1), rtol=1e-4)
    for fold in range(3):
        kept = torch.from_numpy(np.arange(N) % 3 != fold)
        a, b = first[kept].double().mean(0), second[kept].double().mean(0)
        unit = (a - b) / (a - b).norm(dim=-1, keepdim=True)
        torch.testing.assert_close(difference.direction[fold].double(), unit, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(difference.threshold[fold], (unit * (a + b) / 2).sum(-1), rtol=1e-3, atol=1e-2)
    norms = (first.double().norm(dim=-1) + second.double().norm(dim=-1)).mean(0) / 2
    np.testing.assert_allclose(difference.activation_norm, norms, rtol=1e-5)


def test_halves_and_resamples_agree_where_there_is_a_vector_and_only_there():
    difference = extracted(*pair(shift=2.0))
    assert difference.halves.shape == (20, LAYERS)
    assert difference.resampled.shape == (51, LAYERS)
    np.testing.assert_allclose(difference.resampled[0], 1, rtol=1e-5)
    assert difference.halves[:, 1].mean() > 0.95
    assert abs(difference.halves[:, 0].mean()) < 0.4
    assert np.quantile(difference.resampled[1:, 1], 0.025) > 0.95


def test_exchanged_conditions_are_a_null_that_a_real_difference_exceeds():
    difference = extracted(*pair(shift=2.0))
    assert (difference.flipped[:, 1] < difference.norm[1]).all()
    # Where there is no difference, the norm lies anywhere among the flipped ones.
    p = []
    for seed in range(40):
        null = extracted(*pair(n=12, shift=0.0, seed=seed), splits=1, resamples=0, flips=99)
        p.append((null.flipped[:, 0] >= null.norm[0]).mean())
    assert 0.3 < np.mean(p) < 0.7


def test_projections_are_measured_from_the_middle_along_the_direction_that_was_asked_for():
    first, second = pair(shift=5000.0)
    difference = extracted(first, second)
    fit = np.arange(N) % 3
    along = project(tensors(first), difference, fit)
    assert along.shape == (N, LAYERS)
    row, site = 7, 1
    unit, middle = difference.direction[fit[row], site].double(), difference.threshold[fit[row], site]
    np.testing.assert_allclose(along[row, site], float(first[row, site].double() @ unit - middle), rtol=1e-5)
    assert (project(tensors(second), difference, fit)[:, 1] < 0).mean() > 0.9
    assert (along[:, 1] > 0).mean() > 0.9


def test_equal_conditions_have_no_direction():
    first, _ = pair()
    difference = extracted(first, first)
    assert not difference.vector.any()
    assert not difference.direction.any()
    assert np.isnan(difference.halves).all()
    assert np.isnan(project(tensors(first), difference, np.full(N, 3))).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), st.integers(0, 5))
def test_exchanging_the_conditions_turns_the_vector_round(n, seed):
    first, second = pair(n=n, seed=seed)
    folds = np.arange(n) % 2
    one, other = (
        extracted(*conditions, folds=folds, splits=3, resamples=3, flips=3)
        for conditions in ((first, second), (second, first))
    )
    torch.testing.assert_close(one.vector, -other.vector)
    np.testing.assert_allclose(one.halves, other.halves, atol=1e-5)
