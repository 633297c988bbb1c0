"""Refusal x rating: the point-biserial correlation of a group, and when there is none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from prefs.statistics.estimates import Resamples
from prefs.statistics.refusal import refusal_rating

nan = np.nan


def test_every_task_is_counted_once():
    got = refusal_rating([True, None, False, None, False, True, False], [1, 2, nan, nan, 4, 2, 5])
    assert (got.n, got.refused, got.unrated, got.unjudged) == (4, 2, 2, 1)
    assert got.n + got.unrated + got.unjudged == 7
    assert (got.mean_refused.value, got.mean_not_refused.value) == (1.5, 4.5)
    assert got.r.value == pytest.approx(stats.pointbiserialr([1, 0, 1, 0], [1, 4, 2, 5])[0])
    assert (got.r.low, got.r.high, got.r.n) == (None, None, 4)
    with pytest.raises(ValueError, match="refused and rating must be one-dimensional and alike"):
        refusal_rating([1, 0], [1, 2, 3])


@pytest.mark.parametrize(
    ("refused", "rating", "reason", "means"),
    [
        ([], [], "fewer than 3 tasks with a rating and a verdict", (None, None)),
        ([1, 0], [1, 4], "fewer than 3 tasks with a rating and a verdict", (1, 4)),
        ([0, 0, 0], [1, 2, 3], "no refusals", (None, 2)),
        ([1, 1, 1], [1, 2, 3], "all refused", (2, None)),
        ([1, 0, 0], [0.3, 0.1 + 0.2, 0.3], "no variance in ratings", (0.3, 0.3)),
    ],
)
def test_missing_with_a_reason(refused, rating, reason, means):
    got = refusal_rating(refused, rating, Resamples.draw(len(rating), 20))
    assert got.r.value is None
    assert got.r.reason == reason
    assert got.r.n == got.n
    assert (got.mean_refused.value, got.mean_not_refused.value) == pytest.approx(means)


@settings(max_examples=50)
@given(
    st.integers(0, 12).flatmap(
        lambda n: st.tuples(
            hnp.arrays(float, n, elements=st.sampled_from([0.0, 1.0, nan])),
            hnp.arrays(float, n, elements=st.sampled_from([1.0, 2.0, 3.0, 4.0, 5.0, nan])),
        )
    ),
    st.randoms(use_true_random=False),
)
def test_properties(arrays, random):
    refused, rating = arrays
    got = refusal_rating(refused, rating, Resamples.draw(len(rating), 10))
    assert got.r.defined == (got.r.reason is None)
    assert got.n + got.unrated + got.unjudged == len(rating)
    order = random.sample(range(len(rating)), len(rating))
    shuffled = refusal_rating(refused[order], rating[order]).r
    flipped, scaled = refusal_rating(1 - refused, rating).r, refusal_rating(refused, 10 - 3 * rating).r
    if not got.r.defined:
        assert {shuffled.defined, flipped.defined, scaled.defined} == {False}
        return
    assert -1 - 1e-12 <= got.r.value <= 1 + 1e-12
    assert [shuffled.value, -flipped.value, -scaled.value] == pytest.approx([got.r.value] * 3, abs=1e-12)
