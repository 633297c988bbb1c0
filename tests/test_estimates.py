"""Estimates, and the bootstrap over tasks that their intervals come from."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from prefs import estimates
from prefs.estimates import Estimate, bootstrap_interval, excess, pearson_of_sums, ratio, resample_counts


def test_an_estimate_has_a_value_or_a_reason():
    missing = Estimate.missing("no refusals", 12)
    assert missing == Estimate(value=None, low=None, high=None, n=12, reason="no refusals")
    assert not missing.defined
    zero = Estimate(0.0, None, None, 12)
    assert zero.defined
    assert zero.reason is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        zero.value = 1.0  # type: ignore[misc]


def test_interval_of_a_mean_agrees_with_scipy():
    x = np.random.default_rng(0).normal(3, 1, size=200)
    low, high = bootstrap_interval(lambda index: x[index].mean(axis=1), len(x), 4000, seed=1)
    peer = stats.bootstrap(
        (x,), np.mean, vectorized=True, n_resamples=4000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert (low, high) == pytest.approx((peer.low, peer.high), abs=0.01)


def test_the_seed_gives_the_interval_whatever_the_chunks(monkeypatch):
    x = np.random.default_rng(0).normal(size=50)
    asked: list[int] = []

    def mean(index):
        asked.append(len(index))
        return x[index].mean(axis=1)

    whole = bootstrap_interval(mean, 50, 101, seed=3)
    monkeypatch.setattr(estimates, "CHUNK_ENTRIES", 50 * 20)
    assert bootstrap_interval(mean, 50, 101, seed=3) == whole
    assert asked == [101, 20, 20, 20, 20, 20, 1]
    assert bootstrap_interval(mean, 50, 101, seed=4) != whole


def test_undefined_resamples_are_left_out_up_to_half():
    def defined_in(share):
        def statistic(index):
            values = np.full(len(index), 7.0)
            values[round(share * len(index)) :] = np.nan
            return values

        return bootstrap_interval(statistic, 10, 100, seed=0)

    assert defined_in(1) == (7.0, 7.0)
    assert defined_in(0.5) == (7.0, 7.0)
    assert defined_in(0.49) == (None, None)
    assert defined_in(0) == (None, None)


def test_no_interval_without_tasks_or_resamples():
    assert bootstrap_interval(lambda index: index[:, 0] * 1.0, 0, 100, 0) == (None, None)
    assert bootstrap_interval(lambda index: index[:, 0] * 1.0, 10, 0, 0) == (None, None)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_counts_sum_what_indices_gather(resamples, tasks, seed):
    rng = np.random.default_rng(seed)
    index, x = rng.integers(0, tasks, size=(resamples, tasks)), rng.normal(size=tasks)
    counts = resample_counts(index)
    assert counts.shape == (resamples, tasks)
    np.testing.assert_allclose(counts @ x, x[index].sum(axis=1), atol=1e-12)


def test_excess_takes_rounding_for_zero():
    whole = np.array([1.0, 1.0, 1.0, 0.0])
    part = np.array([1.0 - 1e-15, 1.0 + 1e-15, 0.5, 0.0])
    np.testing.assert_array_equal(excess(whole, part), [0, 0, 0.5, 0])


def test_ratio_is_nan_over_nothing():
    np.testing.assert_array_equal(ratio(np.array([1.0, 0.0, 1.0]), np.array([2.0, 0.0, -1.0])), [0.5, np.nan, np.nan])


def test_pearson_of_sums_is_pearson():
    x, y = np.random.default_rng(5).normal(size=(2, 40))
    sums = [np.array(v) for v in (40.0, x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum())]
    assert pearson_of_sums(*sums) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)
    assert np.isnan(pearson_of_sums(np.array(2.0), *sums[1:]))
