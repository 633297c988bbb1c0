"""Exact ratings: by hand, by their properties, and against what sampling gives."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from prefs.statistics.estimates import Estimate, Resamples
from prefs.statistics.exact import (
    exact_moments,
    exact_summary,
    predicted_r,
    reliability,
    seeds_needed,
    thought_summary,
)
from prefs.statistics.sampled import cross_seed, intraclass

nan = np.nan


def test_summary_and_moments_by_hand():
    exact = exact_summary([[0.1, 0.1, 0.2], [0, 0, 0.5], [0, 0, 0], [nan, nan, nan]], [1, 2, 3])
    np.testing.assert_allclose(exact.valid_mass, [0.4, 0.5, 0, nan])
    np.testing.assert_allclose(exact.mean, [2.25, 3, nan, nan])
    np.testing.assert_allclose(exact.variance, [0.6875, 0, nan, nan])
    got = exact_moments(exact)
    assert (got.mean.value, got.mean.n) == (pytest.approx(2.625), 2)
    assert got.sd.value == pytest.approx(np.std([2.25, 3], ddof=1))
    assert got.noise.value == pytest.approx(0.6875 / 2)
    assert (got.valid_mass.value, got.valid_mass.n) == (pytest.approx(0.3), 3)
    assert exact_moments(exact_summary([[0.5, 0.5]], [1, 2])).sd.reason == "one task with an exact rating"
    assert exact_moments(exact_summary(np.empty((0, 2)), [1, 2])).mean.reason == "no task with an exact rating"
    with pytest.raises(ValueError, match="negative"):
        exact_summary([[0.5, -0.5]], [1, 2])


def test_predicted_r_and_seeds_needed_by_hand():
    got = predicted_r([1, 2, 3, nan], [1, 2, 3, 4])  # Var(m) = 1, mean(w) = 2
    assert (got.value, got.n, got.low) == (pytest.approx(1 / 3), 3, None)
    assert predicted_r([1, 2, 3], [1, 2, 3], k=4).value == pytest.approx(2 / 3)
    # Var(m) = mean(w) = 1: r of k-seed means is k/(k + 1), so .9 takes exactly 9.
    assert [seeds_needed([1, 2, 3], [1, 1, 1], target).value for target in (0.9, 0.91)] == [9, 11]
    rounded = [0.3, 0.1 + 0.2, 0.3]
    assert predicted_r(rounded, [0, 0, 0]).reason == "no variance in ratings"
    assert seeds_needed(rounded, [1, 1, 1], 0.9).reason == "no variance between tasks"
    assert predicted_r([], []) == Estimate.missing("fewer than 3 tasks with an exact rating", 0)


masses = st.tuples(st.integers(3, 10), st.integers(2, 5)).flatmap(
    lambda shape: hnp.arrays(float, shape, elements=st.floats(0, 1, allow_subnormal=False))
)


@settings(max_examples=50)
@given(masses, st.floats(0.05, 0.95))
def test_seeds_needed_is_the_smallest(p, target):
    exact = exact_summary(p, np.arange(p.shape[1]))
    got = seeds_needed(exact.mean, exact.variance, target)
    if got.value is not None and got.value < 10**9:
        assert predicted_r(exact.mean, exact.variance, k=int(got.value)).value >= target - 1e-9
        if got.value > 1:
            assert predicted_r(exact.mean, exact.variance, k=int(got.value) - 1).value < target + 1e-9


@settings(max_examples=50)
@given(masses, st.floats(0.5, 10), st.floats(-10, 10), st.integers(1, 20), st.randoms(use_true_random=False))
def test_predicted_r_properties(p, scale, shift, k, random):
    values = np.arange(p.shape[1])
    exact = exact_summary(p, values)
    rated = exact.valid_mass > 0
    assert (exact.variance[rated] >= 0).all()
    assert ((exact.mean[rated] >= -1e-12) & (exact.mean[rated] <= values[-1] + 1e-12)).all()
    got = predicted_r(exact.mean, exact.variance, k, Resamples.draw(len(p), 10))
    assert got.defined == (got.reason is None)
    if not got.defined:
        return
    assert 0 <= got.value <= 1
    order = random.sample(range(len(p)), len(p))
    moved = exact_summary(p[order], scale * values + shift)
    again = predicted_r(moved.mean, moved.variance, k)
    if exact.mean[rated].var() > 1e-9 or exact.variance[rated].mean() > 1e-9:
        assert again.value == pytest.approx(got.value, abs=1e-6)


def draw(p: np.ndarray, values: np.ndarray, seeds: int, rng: np.random.Generator) -> np.ndarray:
    """Sampled ratings [T, S] from option probabilities [T, V]."""
    above = rng.random((len(p), seeds, 1)) > np.cumsum(p, axis=1)[:, None, :-1]
    return values[above.sum(axis=2)]


def test_predicted_r_is_the_cross_seed_r_of_many_seeds():
    # 400 tasks, 60 seeds: the mean over 1,770 pairs has a Monte Carlo error of about .002, and the mean of ratios
    # differs from the ratio of means by O(1/400). Hence .01.
    rng = np.random.default_rng(0)
    p, values = rng.dirichlet(np.full(5, 0.4), size=400), np.arange(1.0, 6.0)
    exact = exact_summary(0.8 * p, values)
    x = draw(p, values, 60, rng)
    assert cross_seed(x).pearson.mean.value == pytest.approx(predicted_r(exact.mean, exact.variance).value, abs=0.01)
    means = x.reshape(400, 15, 4).mean(axis=2)
    predicted = predicted_r(exact.mean, exact.variance, k=4).value
    assert cross_seed(means).pearson.mean.value == pytest.approx(predicted, abs=0.01)
    assert intraclass(means).single.value == pytest.approx(predicted, abs=0.01)


def test_thoughts_by_hand():
    """Two thoughts of equal mass, means 1 and 3 without variance of their own; one thought; two of unequal mass."""
    got = thought_summary(
        [[[0.5, 0, 0], [0, 0, 0.5]], [[0, 0.5, 0.5], [nan, nan, nan]], [[0.75, 0, 0], [0, 0, 0.25]]], [1, 2, 3]
    )
    np.testing.assert_allclose(got.mean, [2, 2.5, 1.5])
    np.testing.assert_allclose(got.between, [2, nan, (0.75 * 0.25 + 0.25 * 2.25) / (1 - 0.625)])
    np.testing.assert_allclose(got.variance, [2, nan, got.between[2]])
    np.testing.assert_allclose(got.uncertainty, [1, nan, got.between[2] * 0.625])
    np.testing.assert_allclose(got.valid_mass, [0.5, 1, 0.5])


def _thinker(tasks: int, thoughts: int, random: np.random.Generator) -> np.ndarray:
    """[tasks, thoughts, 5] distributions of a rater whose thoughts move it around each task's level."""
    level = random.normal(3, 0.6, size=(tasks, 1)) + random.normal(0, 0.5, size=(tasks, thoughts))
    p = np.exp(-((np.arange(1, 6) - level[..., None]) ** 2))
    return 0.9 * p / p.sum(axis=-1, keepdims=True)


def test_a_thinkers_sampled_ratings_vary_and_correlate_as_its_thoughts_predict():
    random = np.random.default_rng(0)
    p, v = _thinker(4000, 40, random), np.arange(1, 6)
    truth = thought_summary(p, v)
    # A sampled rating: a thought of its own, then an option after it.
    sampled = np.stack([[random.choice(v, p=q / q.sum()) for q in p[:, k]] for k in (0, 1)], axis=1).astype(float)
    few = thought_summary(p[:, 2:5], v)
    r = np.corrcoef(sampled.T)[0, 1]
    assert few.between.mean() == pytest.approx(truth.between.mean(), rel=0.03)
    assert few.variance.mean() == pytest.approx(truth.variance.mean(), rel=0.02)
    predicted = predicted_r(few.mean, few.variance, uncertainty=few.uncertainty).value
    assert predicted == pytest.approx(r, abs=0.03)
    # Taking three thoughts' means for the truth would promise too much.
    assert predicted_r(few.mean, few.variance).value > predicted + 0.04
    assert reliability(few).value == pytest.approx(np.corrcoef(few.mean, truth.mean)[0, 1] ** 2, abs=0.02)
    assert (
        seeds_needed(few.mean, few.variance, 0.9, uncertainty=few.uncertainty).value
        > seeds_needed(few.mean, few.variance, 0.9).value
    )
