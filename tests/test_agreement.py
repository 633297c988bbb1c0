"""Correlation of two measurements over tasks."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from prefs.statistics.agreement import correlation
from prefs.statistics.estimates import Resamples

nan = np.nan


def test_agrees_with_scipy_where_both_are_there():
    x, y = np.random.default_rng(0).normal(size=(2, 60))
    y = y + x
    x[3], y[7] = nan, nan
    both = np.isfinite(x) & np.isfinite(y)
    got = correlation(x, y, Resamples.draw(60, 3000, seed=1))
    assert (got.value, got.n) == (pytest.approx(stats.pearsonr(x[both], y[both]).statistic), 58)
    peer = stats.bootstrap(
        (x[both], y[both]), lambda a, b: stats.pearsonr(a, b).statistic, paired=True, n_resamples=1000,
        vectorized=False, method="percentile", rng=np.random.default_rng(2),
    ).confidence_interval  # fmt: skip
    assert (got.low, got.high) == pytest.approx((peer.low, peer.high), abs=0.03)


@pytest.mark.parametrize(
    ("x", "y", "reason"),
    [
        ([], [], "fewer than 3 tasks with both"),
        ([1, 2, nan], [1, 2, 3], "fewer than 3 tasks with both"),
        ([1, 2, 3], [4, 4, 4], "no variance in ratings"),
        ([0.3, 0.1 + 0.2, 0.3], [1, 2, 3], "no variance in ratings"),
    ],
)
def test_missing_with_a_reason(x, y, reason):
    got = correlation(x, y, Resamples.draw(len(x), 10))
    assert (got.value, got.reason) == (None, reason)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="alike"):
        correlation([1, 2], [1, 2, 3])
