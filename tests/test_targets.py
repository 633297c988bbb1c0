"""What a probe is trained on, and the most it can reach."""

from __future__ import annotations

import numpy as np
import pytest

from prefs.models.types import Sampling
from prefs.probes.targets import targets_of
from prefs.statistics.measured import Measured
from prefs.statistics.sampled import intraclass

SAMPLED = Sampling(1.0, 1.0, 8)
# Options out of order: shares are in rising order of value.
VALUES = (3.0, 1.0, 2.0)
MASS = np.array([[0.5, 0.3, 0.1], [0.1, 0.6, 0.2], [0.2, 0.2, 0.4], [0.6, 0.0, 0.3]])
RATINGS = np.array([[3.0, np.nan], [1.0, 1.0], [np.nan, np.nan], [2.0, 3.0]])


def measured(*, exact: bool = True, sampled: np.ndarray = RATINGS) -> Measured:
    refused = np.array([1.0, 0.0, np.nan, 0.0])
    says = ("good", "bad", "middling")
    return Measured(tuple("abcd"), ("A",) * 4, says, VALUES, sampled, MASS if exact else None, refused)


def test_exact_means_have_no_noise_and_the_whole_distribution():
    (target,) = targets_of(measured(), SAMPLED, ("exact",))
    mean = MASS @ np.array(VALUES) / MASS.sum(1)
    np.testing.assert_allclose(target.values, mean)
    np.testing.assert_allclose(target.shares @ np.array([1.0, 2.0, 3.0]), mean)
    np.testing.assert_allclose(target.shares.sum(1), 1)
    assert target.ceiling.value == 1
    assert not target.binary


def test_seed_means_and_one_seed_with_ceilings_from_exact_ratings():
    many, one = targets_of(measured(), SAMPLED, ("sampled", "single"))
    assert (many.name, one.name) == ("mean of 2 seeds", "one seed")
    np.testing.assert_array_equal(many.values, [3.0, 1.0, np.nan, 2.5])
    np.testing.assert_array_equal(one.values, [3.0, 1.0, np.nan, 2.0])
    np.testing.assert_array_equal(many.shares[3], [0.0, 0.5, 0.5])
    np.testing.assert_array_equal(many.observed, [True, True, False, True])
    values = np.array(VALUES)
    p = MASS / MASS.sum(1, keepdims=True)
    mean, variance = p @ values, p @ values**2 - (p @ values) ** 2
    rated = [0, 1, 3]
    for target, k in ((many, np.array([1, 2, 2])), (one, np.array([1, 1, 1]))):
        spread = mean[rated].var(ddof=1)
        assert target.ceiling.value == pytest.approx(spread / (spread + (variance[rated] / k).mean()))


def test_without_exact_ratings_ceilings_come_from_the_seeds():
    rng = np.random.default_rng(0)
    ratings = rng.integers(1, 4, size=(4, 1)) + rng.integers(0, 2, size=(4, 3)) * 0.0 + np.array([[0, 1, 0]])
    many, one = targets_of(measured(exact=False, sampled=ratings.astype(float)), SAMPLED, ("sampled", "single"))
    agreement = intraclass(ratings.astype(float))
    assert many.ceiling.value == pytest.approx(min(max(agreement.mean.value, 0), 1))
    assert one.ceiling.value == pytest.approx(min(max(agreement.single.value, 0), 1))


@pytest.mark.parametrize("threshold", ["midpoint", "median", 2.4])
def test_good_is_above_a_threshold(threshold):
    (target,) = targets_of(measured(), SAMPLED, ("good",), threshold)
    mean = MASS @ np.array(VALUES) / MASS.sum(1)
    cut = {"midpoint": 2.0, "median": np.median(mean)}.get(threshold, threshold)
    assert target.values.tolist() == (mean > cut).astype(float).tolist()
    assert target.name == f"rated above {cut:.4g}"
    assert target.binary
    assert target.ceiling.reason == "no ceiling is known for a target of yes and no"


def test_refused_is_the_judges_word():
    (target,) = targets_of(measured(), SAMPLED, ("refused",))
    np.testing.assert_array_equal(target.values, [1.0, 0.0, np.nan, 0.0])
    assert target.binary
