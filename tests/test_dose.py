"""Slopes of ratings over coefficients against NumPy's and SciPy's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import linregress

from prefs.statistics.dose import NO_SLOPE, mean_of, slope
from prefs.statistics.estimates import Resamples

X = np.array([-2.0, -1, 0, 1, 3])


def test_against_a_regression_of_each_task_and_of_the_mean_curve():
    rng = np.random.default_rng(0)
    y = rng.normal(size=(20, 5)) + np.outer(rng.normal(0.3, 0.1, size=20), X)
    result = slope(y, X, Resamples.draw(20, 500))
    assert result.value == pytest.approx(np.mean([linregress(X, row).slope for row in y]))
    assert result.value == pytest.approx(np.polyfit(X, y.mean(0), 1)[0])
    assert result.low < result.value < result.high
    assert result.n == 20


@given(st.floats(-5, 5), st.floats(-5, 5))
def test_a_line_has_its_slope_whatever_each_task_begins_at(a, b):
    y = a * X + np.array([[b], [0.0], [-b], [1.0]])
    assert slope(y, X, Resamples.draw(4, 10)).value == pytest.approx(a, abs=1e-9)


def test_tasks_without_a_rating_are_left_out_and_what_is_undefined_says_why():
    y = np.outer([1.0, 2.0, 3.0], X)
    y[2, 1] = np.nan
    result = slope(y, X, Resamples.draw(3, 10))
    assert (result.value, result.n) == (pytest.approx(1.5), 2)
    assert slope(y[:, :1], X[:1], Resamples.draw(3, 10)).reason == NO_SLOPE
    assert mean_of(np.array([np.nan, np.nan]), Resamples.draw(2, 3)).reason == "no task has a rating"
    assert mean_of(np.array([1.0, np.nan, 3.0]), Resamples.none(3)).value == 2
