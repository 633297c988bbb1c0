"""Scores of held-out predictions, against scikit-learn and SciPy, and the intervals they get by resampling tasks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import mean_absolute_error, r2_score, roc_auc_score

from prefs.probes import scores
from prefs.probes.scores import auc_columns, permutation_p, r2_columns, score
from prefs.statistics.estimates import Estimate, Resamples

METRICS = ("r2", "pearson", "spearman", "mae", "auc")


def simulated(n, columns, seed=0, binary=False):
    rng = np.random.default_rng(seed)
    y = rng.normal(3, 1, size=n)
    predictions = 0.6 * y[:, None] + 1.2 + rng.normal(size=(n, columns)) * np.linspace(0.3, 2, columns)
    return np.round(predictions, 1), (y > 3.3).astype(float) if binary else y  # rounded: some tie


def peers(p, y, weight=None):
    """scikit-learn's and SciPy's scores; weighted by repeating tasks where they take no weights."""
    repeated = np.arange(len(y)) if weight is None else np.repeat(np.arange(len(y)), weight)
    p, y = p[repeated], y[repeated]
    return r2_score(y, p), stats.pearsonr(p, y)[0], mean_absolute_error(y, p)


@pytest.mark.parametrize("n", [3, 4, 57])
def test_scores_are_those_of_scikit_learn_and_scipy(n):
    predictions, y = simulated(n, 7)
    for column, got in zip(predictions.T, score(predictions, y, None), strict=True):
        r2, pearson, mae = peers(column, y)
        spearman = stats.spearmanr(column, y)[0]
        assert [got.r2.value, got.pearson.value, got.mae.value] == pytest.approx([r2, pearson, mae], abs=1e-10)
        assert got.spearman.value == pytest.approx(spearman, abs=1e-10)
        assert got.auc == Estimate.missing("the target is not binary", n)
        assert got.r2 == Estimate(got.r2.value, None, None, n)
    singly = [r2_score(y, column) for column in predictions.T]
    np.testing.assert_allclose(r2_columns(predictions[:, :, None], y[:, None])[:, 0], singly, atol=1e-10)


def test_auc_is_that_of_scikit_learn():
    predictions, y = simulated(80, 6, binary=True)
    predictions[:, 5] = 2.0
    got = [scored.auc.value for scored in score(predictions, y, None, binary=True)]
    assert got == pytest.approx([roc_auc_score(y, column) for column in predictions.T], abs=1e-12)
    assert got[5] == 0.5
    np.testing.assert_allclose(auc_columns(predictions[:, :, None], y[:, None])[:, 0], got, atol=1e-12)


def test_each_resample_is_scored_as_the_tasks_drawn(monkeypatch):
    """The interval's ends are quantiles of the peers' scores of the same resamples, with their own means."""
    predictions, y = simulated(40, 3, seed=2, binary=True)
    draws = Resamples.draw(40, 60, seed=5)
    got = score(predictions, y, draws, binary=True)
    for column, scored in zip(predictions.T, got, strict=True):
        of_resamples = [peers(column, y, times) for times in draws.times[1:]]
        aucs = [roc_auc_score(y, column, sample_weight=times) for times in draws.times[1:].astype(float)]
        ranks = stats.rankdata(column), stats.rankdata(y)
        spearmans = [peers(*ranks, times)[1] for times in draws.times[1:]]
        r2, pearson, mae = zip(*of_resamples, strict=True)
        for estimate, values in zip(
            (scored.r2, scored.pearson, scored.spearman, scored.mae, scored.auc),
            (r2, pearson, spearmans, mae, aucs),
            strict=True,
        ):
            assert (estimate.low, estimate.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=1e-9)
    monkeypatch.setattr(scores, "BLOCK_ENTRIES", 400)  # one column a block
    monkeypatch.setattr(scores, "SORTED_ENTRIES", 40 * 7)
    assert_same(score(predictions, y, draws, binary=True), got)


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        for metric in METRICS:
            left, right = getattr(a, metric), getattr(b, metric)
            assert (left.n, left.reason, left.defined) == (right.n, right.reason, right.defined)
            for end in ("value", "low", "high"):
                assert getattr(left, end) == pytest.approx(getattr(right, end), abs=1e-9, nan_ok=True)


def test_tasks_without_a_target_or_a_prediction_are_left_out():
    predictions, y = simulated(50, 4, seed=3, binary=True)
    y[[3, 7]] = np.nan
    predictions[[1, 2], 1] = np.nan
    predictions[4, 2] = np.inf
    predictions[:, 3] = np.nan
    draws = Resamples.draw(50, 200, seed=1)
    got = score(predictions, y, draws, binary=True)
    assert [scored.r2.n for scored in got] == [48, 46, 47, 0]
    for column, scored in enumerate(got[:3]):
        rows = np.isfinite(predictions[:, column]) & np.isfinite(y)
        only = score(predictions[rows][:, [column]], y[rows], Resamples(draws.times[:, rows]), binary=True)
        assert_same([scored], only)
    assert all(getattr(got[3], metric) == Estimate.missing("fewer than 3 tasks (0)", 0) for metric in METRICS)


def test_what_is_not_defined_is_missing_with_its_reason():
    rng = np.random.default_rng(0)
    draws = Resamples.draw(20, 100)
    varied, constant = rng.normal(size=(20, 1)), np.full(20, 0.1) + rng.integers(0, 2, size=20) * 1e-17
    (got,) = score(varied, constant, draws)
    assert got.r2 == got.pearson == got.spearman == Estimate.missing("the target is constant", 20)
    (got,) = score(constant[:, None], rng.normal(size=20), draws)
    assert got.pearson == got.spearman == Estimate.missing("the prediction is constant", 20)
    assert got.r2.value < 0
    (got,) = score(varied, np.ones(20), draws, binary=True)
    assert got.auc == Estimate.missing("the target has one class only", 20)
    (got,) = score(varied[:2], np.array([0.0, 1.0]), draws=Resamples.draw(2, 10), binary=True)
    assert {getattr(got, metric).reason for metric in METRICS} == {"fewer than 3 tasks (2)"}
    assert score(np.zeros((5, 0)), np.zeros(5), None) == []
    for many in (r2_columns, auc_columns):
        assert np.isnan(many(varied[:2, :, None], np.array([[0.0], [1.0]]))).all()
        assert np.isnan(many(np.zeros((0, 2, 1)), np.zeros((0, 1)))).all()


@pytest.mark.parametrize("binary", [False, True])
def test_a_95_percent_interval_holds_the_truth_most_of_the_time(binary):
    """Predictions with a known error: how often does the interval of 100 tasks hold the score of all there could be?"""
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(2, 400_000))
    y = x + noise
    if binary:
        y = (y > 0).astype(float)
    truth = score(x[:, None], y, None, binary=binary)[0]
    held = dict.fromkeys(("r2", "pearson", "mae", "auc")[: 3 + binary], 0)
    for trial in range(200):
        rows = rng.integers(0, len(y), size=100)
        (got,) = score(x[rows, None], y[rows], Resamples.draw(100, 400, seed=trial), binary=binary)
        for metric in held:
            estimate, target = getattr(got, metric), getattr(truth, metric)
            held[metric] += estimate.low <= target.value <= estimate.high
    assert all(175 <= count <= 199 for count in held.values()), held


finite = st.floats(-1e3, 1e3, width=32)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(finite, st.integers(0, 1), finite), min_size=3, max_size=30), st.integers(0, 2**31))
def test_properties(rows, seed):
    predictions, positive, y = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    draws = Resamples.draw(len(rows), 20, seed)
    (got,) = score(predictions[:, None], y, draws)
    assert got.r2.value is None or got.r2.value <= 1 + 1e-9
    for scored in (got.pearson, got.spearman):
        assert scored.defined or scored.reason in ("the target is constant", "the prediction is constant")
        assert all(end is None or -1 <= end <= 1 for end in (scored.value, scored.low, scored.high))
    assert got.mae.value == pytest.approx(mean_absolute_error(y, predictions))
    (flipped,) = score(-predictions[:, None], -y, draws)
    assert_same([got], [flipped])

    up, down = score(np.stack([predictions, -predictions], axis=1), positive, draws, binary=True)
    assume(0 < positive.sum() < len(positive))
    assert up.auc.value == pytest.approx(roc_auc_score(positive, predictions))
    assert up.auc.value + down.auc.value == pytest.approx(1.0)
    if up.auc.low is not None:
        assert (up.auc.low, up.auc.high) == pytest.approx((1 - down.auc.high, 1 - down.auc.low))


def test_many_targets_at_many_sites_are_those_one_by_one(monkeypatch):
    rng = np.random.default_rng(4)
    y = rng.integers(0, 2, size=(30, 5)).astype(float)
    predictions = np.round(y[:, None, :] + rng.normal(size=(30, 7, 5)), 1).astype(np.float32)
    y[:, 2] = 1.0
    for many, metric in ((r2_columns, "r2"), (auc_columns, "auc")):
        singly = [score(predictions[:, :, t], y[:, t], None, binary=True) for t in range(5)]
        expected = np.array([[getattr(scored, metric).value for scored in column] for column in singly], dtype=float).T
        assert np.isnan(expected[:, 2]).all()
        np.testing.assert_allclose(many(predictions, y), expected, atol=1e-9)
        with monkeypatch.context() as patch:
            patch.setattr(scores, "BLOCK_ENTRIES", 30 * 5 * 2)
            np.testing.assert_allclose(many(predictions, y), expected, atol=1e-9)


def test_permutation_p():
    assert permutation_p(0.5, [0.1, 0.5, 0.9, -1.0]) == pytest.approx(3 / 5)
    assert permutation_p(2.0, np.zeros(99)) == pytest.approx(0.01)
    assert permutation_p(0.3, [0.1 + 0.2, 0.3 - 1e-16, 0.2]) == pytest.approx(3 / 4)  # but for rounding they are equal
    assert permutation_p(-0.3, [-0.3 - 1e-16, -0.4]) == pytest.approx(2 / 3)
    assert permutation_p(0.5, [np.nan, 0.1]) == pytest.approx(1 / 2)
    assert permutation_p(0.5, []) == 1.0
    assert np.isnan(permutation_p(float("nan"), [0.1]))
