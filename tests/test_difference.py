"""Differences of means against plain sums by hand, and what each number beside them means."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_vectors import residuals, tensors

from prefs.concepts.difference import difference_of_means, project, shuffled_vector
from prefs.probes.features import NotFinite
from prefs.probes.probe import Site
from prefs.statistics.estimates import Resamples

N, LAYERS, D = 30, 3, 12


def pair(n: int = N, shift: float = 0.5, seed: int = 0, d: int = D):
    """Vectors under two conditions: the first lies `shift` further along dimension 4 at layer 1 only."""
    second = residuals(n, LAYERS, d, seed).double()
    first = second + 0.1 * torch.randn(n, LAYERS, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    first[:, 1, 4] += shift
    return first.float(), second.float()


def found(first, second, *, folds=None, splits=20, resamples=50, flips=200, seed=0):
    n = len(first)
    folds = np.arange(n) % 3 if folds is None else folds
    return difference_of_means(
        tensors(first),
        tensors(second),
        folds,
        splits=splits,
        draws=Resamples.draw(n, resamples),
        flips=flips,
        seed=seed,
    )


def test_the_vector_is_the_difference_of_the_means_and_each_fold_is_left_out_of_its_own():
    first, second = pair()
    each = found(first, second)
    by_hand = first.double().mean(0) - second.double().mean(0)
    torch.testing.assert_close(each.vector.double(), by_hand, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(each.norm, by_hand.norm(dim=-1), rtol=1e-4)
    for fold in range(3):
        kept = torch.from_numpy(np.arange(N) % 3 != fold)
        a, b = first[kept].double().mean(0), second[kept].double().mean(0)
        unit = (a - b) / (a - b).norm(dim=-1, keepdim=True)
        torch.testing.assert_close(each.direction[fold].double(), unit, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(each.threshold[fold], (unit * (a + b) / 2).sum(-1), rtol=1e-3, atol=1e-2)
    norms = (first.double().norm(dim=-1) + second.double().norm(dim=-1)).mean(0) / 2
    np.testing.assert_allclose(each.activation_norm, norms, rtol=1e-5)


def test_halves_and_resamples_agree_where_there_is_a_vector_and_only_there():
    each = found(*pair(shift=2.0))
    assert each.halves.shape == (20, LAYERS)
    assert each.resampled.shape == (51, LAYERS)
    np.testing.assert_allclose(each.resampled[0], 1, rtol=1e-5)
    assert each.halves[:, 1].mean() > 0.95
    assert abs(each.halves[:, 0].mean()) < 0.4
    assert np.quantile(each.resampled[1:, 1], 0.025) > 0.95


def test_exchanged_conditions_are_a_null_that_a_real_difference_exceeds():
    each = found(*pair(shift=2.0))
    assert (each.flipped[:, 1] < each.norm[1]).all()
    # Where there is no difference, the norm lies anywhere among the flipped ones.
    p = []
    for seed in range(40):
        null = found(*pair(n=12, shift=0.0, seed=seed), splits=1, resamples=0, flips=99)
        p.append((null.flipped[:, 0] >= null.norm[0]).mean())
    assert 0.3 < np.mean(p) < 0.7


def test_a_shuffled_vector_has_lost_what_the_conditions_differ_by():
    first, second = pair(shift=50.0)
    vector = shuffled_vector(tensors(first), tensors(second), Site(1, "rating"), seed=3)
    assert abs(float(vector[4])) < 1
    assert not torch.equal(vector, shuffled_vector(tensors(first), tensors(second), Site(1, "rating"), seed=4))


def test_projections_are_measured_from_the_middle_along_the_direction_that_was_asked_for():
    first, second = pair(shift=5000.0)
    each = found(first, second)
    fit = np.arange(N) % 3
    along = project(tensors(first), each, fit)
    assert along.shape == (N, LAYERS)
    row, site = 7, 1
    unit, middle = each.direction[fit[row], site].double(), each.threshold[fit[row], site]
    np.testing.assert_allclose(along[row, site], float(first[row, site].double() @ unit - middle), rtol=1e-5)
    assert (project(tensors(second), each, fit)[:, 1] < 0).mean() > 0.9
    assert (along[:, 1] > 0).mean() > 0.9


def test_equal_conditions_have_no_direction():
    first, _ = pair()
    each = found(first, first)
    assert not each.vector.any()
    assert not each.direction.any()
    assert np.isnan(each.halves).all()
    assert np.isnan(project(tensors(first), each, np.full(N, 3))).all()


def test_blocks_of_sites_and_of_tasks_change_nothing(monkeypatch):
    first, second = pair(n=40)
    whole = found(first, second)
    monkeypatch.setattr("prefs.concepts.difference.BLOCK_BYTES", 1)
    monkeypatch.setattr("prefs.concepts.difference.ROWS", 7)
    parts = found(first, second)
    torch.testing.assert_close(parts.vector, whole.vector, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(parts.halves, whole.halves, atol=1e-4)
    fit = np.full(40, 3)
    np.testing.assert_allclose(project(tensors(first), parts, fit), project(tensors(first), whole, fit), atol=0.05)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), st.integers(0, 5))
def test_exchanging_the_conditions_turns_the_vector_round(n, seed):
    first, second = pair(n=n, seed=seed)
    folds = np.arange(n) % 2
    one, other = (
        found(*each, folds=folds, splits=3, resamples=3, flips=3) for each in ((first, second), (second, first))
    )
    torch.testing.assert_close(one.vector, -other.vector)
    np.testing.assert_allclose(one.halves, other.halves, atol=1e-5)


def test_what_does_not_fit_is_refused():
    first, second = pair()
    with pytest.raises(ValueError, match="same tasks"):
        found(first, second[:-1])
    with pytest.raises(ValueError, match="no halves"):
        found(first[:1], second[:1], folds=np.array([0]))
    first[3, 2, 0] = torch.nan
    with pytest.raises(NotFinite) as caught:
        found(first, second)
    assert caught.value.site == Site(2, "rating")
