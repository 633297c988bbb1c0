"""Correlation of two measurements over tasks, and agreement of two judges."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as hnp
from scipy import stats
from sklearn.metrics import cohen_kappa_score

from prefs.statistics.agreement import cohen_kappa, correlation, correlations
from prefs.statistics.estimates import Resamples

nan = np.nan


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


def test_kappa_by_hand():
    """Cohen's own way: 20 both yes, 15 both no, 5 and 10 apart, p_o = .7, p_e = .5."""
    a = [1] * 20 + [1] * 5 + [0] * 10 + [0] * 15
    b = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    assert cohen_kappa(a, b).value == pytest.approx(0.4)
    assert cohen_kappa([*a, nan, 1], [*b, 1, nan]) == cohen_kappa(a, b)
    assert cohen_kappa([0, 0], [0, 0]).reason == "both judges give all tasks the same verdict"
    assert cohen_kappa([nan], [1]).reason == "no task with two verdicts"
    assert cohen_kappa([0, 0, 1], [1, 1, 1]).value == 0
    with pytest.raises(ValueError, match="0, 1 or NaN"):
        cohen_kappa([2], [1])


@given(hnp.arrays(bool, (2, 30)))
def test_kappa_agrees_with_scikit_learn(verdicts):
    got = cohen_kappa(*verdicts.astype(float))
    if got.defined:
        assert got.value == pytest.approx(cohen_kappa_score(*verdicts.astype(int)))
    else:
        assert verdicts.all() or not verdicts.any()


def test_correlations_are_those_of_each_column():
    random = np.random.default_rng(3)
    x, ys = random.normal(size=30), random.normal(size=(30, 5))
    x[:3], ys[5:9, 1], ys[2:, 2], ys[:, 3] = np.nan, np.nan, np.nan, 4.0
    draws = Resamples.draw(30, 50, 1)
    result = correlations(x, ys, draws)
    for one, y in zip(result, ys.T, strict=True):
        # But for the last digits: a product with several columns is summed in another order.
        assert asdict(one) == pytest.approx(asdict(correlation(x, y, draws)), abs=1e-12)
    assert [estimate.n for estimate in result] == [27, 23, 0, 27, 27]
    assert result[0].value == pytest.approx(stats.pearsonr(x[3:], ys[3:, 0]).statistic)
    assert correlations(x, ys[:, :0], draws) == []
    with pytest.raises(ValueError, match="measurements must be"):
        correlations(x, ys[:20], draws)
