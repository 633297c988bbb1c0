"""Estimates, and the bootstrap over tasks that their intervals come from."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from prefs.statistics import estimates
from prefs.statistics.estimates import Estimate, Resamples, excess, pearson_of_sums, ratio, resampling


def test_interval_of_a_mean_agrees_with_scipy():
    x = np.random.default_rng(0).normal(3, 1, size=200)
    got = Estimate.of(Resamples.draw(200, 4000, seed=1).sums(x[:, None])[:, 0] / 200, 200, "never")
    peer = stats.bootstrap(
        (x,), np.mean, vectorized=True, n_resamples=4000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert got.value == pytest.approx(x.mean())
    assert (got.low, got.high) == pytest.approx((peer.low, peer.high), abs=0.01)


def test_the_seed_gives_the_resamples_whatever_the_blocks(monkeypatch):
    whole = Resamples.draw(50, 101, seed=3)
    parts, codes = np.random.default_rng(0).normal(size=(50, 2)), np.arange(50)[None] % 4 - 1
    sums, tally = whole.sums(parts), whole.tally(codes, 3)
    monkeypatch.setattr(estimates, "BLOCK_ENTRIES", 50 * 20)
    blocks = Resamples.draw(50, 101, seed=3)
    np.testing.assert_array_equal(blocks.times, whole.times)
    np.testing.assert_allclose(blocks.sums(parts), sums)
    np.testing.assert_array_equal(blocks.tally(codes, 3), tally)
    assert (Resamples.draw(50, 101, seed=4).times != whole.times).any()


def test_undefined_resamples_are_left_out_up_to_half():
    def defined_in(share):
        values = np.full(101, 7.0)
        values[1 + round(share * 100) :] = np.nan
        got = Estimate.of(values, 10, "never")
        assert got.value == 7.0
        return got.low, got.high

    assert defined_in(1) == (7.0, 7.0)
    assert defined_in(0.5) == (7.0, 7.0)
    assert defined_in(0.49) == (None, None)
    assert defined_in(0) == (None, None)
    assert Estimate.of(np.array([2.0]), 10, "never") == Estimate(2.0, None, None, 10)
    assert Estimate.of(np.array([np.nan, 1.0, 1.0]), 10, "why") == Estimate.missing("why", 10)


def test_a_decreasing_function_turns_the_interval_round():
    assert Estimate(2.0, 1.0, 4.0, 9).map(lambda value: 1 / value) == Estimate(0.5, 0.25, 1.0, 9)


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
