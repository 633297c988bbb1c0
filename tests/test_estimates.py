"""Estimates, and the bootstrap over tasks that their intervals come from."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from prefs.statistics.estimates import Estimate, Resamples, resampling


def test_interval_of_a_mean_agrees_with_scipy():
    x = np.random.default_rng(0).normal(3, 1, size=200)
    got = Estimate.of(Resamples.draw(200, 4000, seed=1).sums(x[:, None])[:, 0] / 200, 200, "never")
    peer = stats.bootstrap(
        (x,), np.mean, vectorized=True, n_resamples=4000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert got.value == pytest.approx(x.mean())
    assert (got.low, got.high) == pytest.approx((peer.low, peer.high), abs=0.01)


def test_undefined_resamples_are_left_out_up_to_half():
    for share, interval in ((1, (7.0, 7.0)), (0.5, (7.0, 7.0)), (0.49, (None, None)), (0, (None, None))):
        values = np.full(101, 7.0)
        values[1 + round(share * 100) :] = np.nan
        assert Estimate.of(values, 10, "never") == Estimate(7.0, *interval, 10)
    assert Estimate.of(np.array([2.0]), 10, "never") == Estimate(2.0, None, None, 10)
    assert Estimate.of(np.array([np.nan, 1.0, 1.0]), 10, "why") == Estimate.missing("why", 10)


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 2**32 - 1))
def test_resamples_hold_as_many_tasks_as_there_are(tasks, resamples, seed):
    draws = Resamples.draw(tasks, resamples, seed)
    assert draws.times.shape == (1 + resamples, tasks)
    assert (draws.times.sum(axis=1) == tasks).all()
    assert (draws.times[0] == 1).all()
    codes = np.random.default_rng(seed).integers(-1, 3, size=(2, tasks))
    tally = draws.tally(codes, 3)
    for pair in range(2):
        for code in range(3):
            np.testing.assert_array_equal(tally[:, pair, code], draws.times[:, codes[pair] == code].sum(axis=1))


def test_resamples_of_other_tasks_are_refused():
    assert resampling(None, 3).times.shape == (1, 3)
    with pytest.raises(ValueError, match="resamples of 4 tasks do not fit 3"):
        resampling(Resamples.none(4), 3)
