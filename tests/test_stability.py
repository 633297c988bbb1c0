"""Stability statistics: by hand, against peers, by their properties, and on data of a known kind."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pingouin
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from prefs import stability
from prefs.estimates import Estimate
from prefs.stability import (
    ceiling,
    cross_seed,
    exact_summary,
    informative,
    intraclass,
    modal,
    predicted_r,
    seeds_needed,
)

nan = np.nan


def sampled(tasks: int, seeds: int, seed: int, invalid: float = 0.0, noise: float = 1.0) -> np.ndarray:
    """Ratings 1-5, [tasks, seeds], of a task's own level and noise."""
    rng = np.random.default_rng(seed)
    x = np.clip(np.round(3 + rng.normal(size=(tasks, 1)) + noise * rng.normal(size=(tasks, seeds))), 1, 5)
    x[rng.random(x.shape) < invalid] = nan
    return x


ratings = st.tuples(st.integers(0, 8), st.integers(0, 4)).flatmap(
    lambda shape: hnp.arrays(float, shape, elements=st.sampled_from([1.0, 2.0, 3.0, 4.0, 5.0, nan]))
)
cells = st.tuples(st.integers(3, 12), st.integers(2, 4)).flatmap(
    lambda shape: hnp.arrays(float, shape, elements=st.sampled_from([1.0, 2.0, 3.0, 4.0, 5.0, nan]))
)


def every_estimate(x: np.ndarray, bootstrap: int = 0) -> dict[str, Estimate]:
    across, inf, icc = cross_seed(x, bootstrap), informative(x, bootstrap), intraclass(x, bootstrap)
    return {
        "pearson": across.pearson.mean,
        "pearson sd": across.pearson.sd,
        "spearman": across.spearman.mean,
        "spearman sd": across.spearman.sd,
        "informative": inf.r.mean,
        "informative sd": inf.r.sd,
        "d": inf.d,
        "icc1": icc.single,
        "icc1k": icc.mean,
        "modal share": modal(x, bootstrap).share,
    }


# --- cross-seed r


def test_cross_seed_by_hand():
    # Columns (1, 2, 3), (1, 3, 2), (3, 2, 1): r = 1/2, -1, -1/2.
    got = cross_seed([[1, 1, 3], [2, 3, 2], [3, 2, 1]])
    for kind in (got.pearson, got.spearman):
        assert [(pair.first, pair.second) for pair in kind.pairs] == [(0, 1), (0, 2), (1, 2)]
        assert [pair.r.value for pair in kind.pairs] == pytest.approx([0.5, -1, -0.5])
        assert kind.mean.value == pytest.approx(-1 / 3)
        assert kind.sd.value == pytest.approx(np.std([0.5, -1, -0.5], ddof=1))
        assert (kind.pairs_defined, kind.pairs_total, kind.mean.n) == (3, 3, 3)


@pytest.mark.parametrize("invalid", [0.0, 0.3])
def test_cross_seed_agrees_with_scipy(invalid):
    x = sampled(60, 5, seed=1, invalid=invalid)
    got = cross_seed(x)
    for kind, peer in ((got.pearson, stats.pearsonr), (got.spearman, stats.spearmanr)):
        each = []
        for pair in kind.pairs:
            both = ~np.isnan(x[:, [pair.first, pair.second]]).any(axis=1)
            assert pair.r.n == both.sum()
            each.append(peer(x[both, pair.first], x[both, pair.second]).statistic)
            assert pair.r.value == pytest.approx(each[-1], abs=1e-12)
        assert kind.mean.value == pytest.approx(np.mean(each), abs=1e-12)
        assert kind.sd.value == pytest.approx(np.std(each, ddof=1), abs=1e-12)
        assert kind.mean.n == (np.isfinite(x).sum(axis=1) >= 2).sum()


def test_cross_seed_in_blocks_of_pairs(monkeypatch):
    x = sampled(40, 5, seed=2, invalid=0.2)
    whole = cross_seed(x, bootstrap=50), informative(x, bootstrap=50)
    monkeypatch.setattr(stability, "BLOCK_ENTRIES", 40 * 6 * 3)
    blocks = cross_seed(x, bootstrap=50), informative(x, bootstrap=50)
    assert blocks[0].pearson.mean.low == pytest.approx(whole[0].pearson.mean.low)
    assert blocks[0].pearson.mean.value == pytest.approx(whole[0].pearson.mean.value)
    assert blocks[1].d.high == pytest.approx(whole[1].d.high)
    assert [pair.r.n for pair in blocks[1].r.pairs] == [pair.r.n for pair in whole[1].r.pairs]


def test_a_seed_without_variance_leaves_the_other_pairs():
    got = cross_seed([[1, 1, 4], [2, 3, 4], [3, 2, 4], [4, 4, 4]], bootstrap=100).pearson
    assert (got.pairs_defined, got.pairs_total) == (1, 3)
    assert got.mean.value == got.pairs[0].r.value
    assert [pair.r.reason for pair in got.pairs] == [None, "no variance in ratings", "no variance in ratings"]
    assert got.sd.reason == "fewer than 2 pairs of seeds with a defined r"


def test_cross_seed_interval_agrees_with_scipy():
    x = sampled(80, 2, seed=3)
    got = cross_seed(x, bootstrap=3000, seed=1).pearson.mean
    peer = stats.bootstrap(
        (x[:, 0], x[:, 1]),
        lambda a, b: stats.pearsonr(a, b).statistic,
        paired=True,
        n_resamples=1000,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval
    assert (got.low, got.high) == pytest.approx((peer.low, peer.high), abs=0.03)


# --- informative r and d


def test_informative_by_hand():
    # Mode 4. Seeds differ from it in the last three tasks of seven: (1, 2), (4, 5), (5, 4).
    x = np.array([[4, 4], [4, 4], [4, 4], [4, 4], [1, 2], [4, 5], [5, 4]], dtype=float)
    got = informative(x)
    assert got.modal == 4
    assert got.d.value == pytest.approx(3 / 7)
    assert got.d.n == 7
    assert got.r.mean.value == pytest.approx(stats.pearsonr([1, 4, 5], [2, 5, 4]).statistic)
    assert got.r.mean.n == 3
    assert got.r.sd.reason == "fewer than 2 pairs of seeds with a defined r"


@pytest.mark.parametrize("invalid", [0.0, 0.3])
def test_informative_agrees_with_masks(invalid):
    x = sampled(80, 4, seed=4, invalid=invalid, noise=0.5)
    got = informative(x)
    mode = modal(x).rating
    each, shares = [], []
    for pair, (a, b) in zip(got.r.pairs, itertools.combinations(x.T, 2), strict=True):
        both = ~np.isnan(a) & ~np.isnan(b)
        off = both & ((a != mode) | (b != mode))
        each.append(stats.pearsonr(a[off], b[off]).statistic)
        shares.append(off.sum() / both.sum())
        assert pair.r.n == off.sum()
        assert pair.r.value == pytest.approx(each[-1], abs=1e-12)
    assert got.r.mean.value == pytest.approx(np.mean(each), abs=1e-12)
    assert got.d.value == pytest.approx(np.mean(shares), abs=1e-12)


def test_the_mode_is_of_the_whole_cell():
    # 2 is the mode only through tasks with one valid rating, which no pair uses; among the others it would be 4.
    x = np.array([[2, nan]] * 4 + [[4, 4], [4, 4], [4, 4], [2, 2], [1, 2], [2, 3], [5, 5]], dtype=float)
    got = informative(x)
    assert got.modal == modal(x).rating == 2
    assert got.d.value == pytest.approx(6 / 7)
    assert got.r.mean.value == pytest.approx(stats.pearsonr([4, 4, 4, 1, 2, 5], [4, 4, 4, 2, 3, 5]).statistic)


def test_a_model_that_always_says_four_is_not_informative():
    x = np.full((100, 4), 4.0)
    x[:2] = 1.0
    got = informative(x, bootstrap=50)
    assert cross_seed(x).pearson.mean.value == pytest.approx(1.0)
    assert got.r.mean.reason == "fewer than 3 tasks with a rating other than the mode"
    assert got.d.value == pytest.approx(0.02)
    assert got.d.low <= 0.02 <= got.d.high


# --- modal rating


def test_modal_by_hand():
    got = modal([[4, 4], [2, nan], [2, 5]], bootstrap=50)
    assert (got.rating, got.share.value, got.ratings, got.share.n) == (2.0, 0.4, 5, 3)
    assert got.share.low <= 0.4 <= got.share.high
    assert modal([[nan]]).share.reason == "no valid ratings"
    assert modal(np.empty((0, 3))).share.reason == "no tasks"


# --- ICC


def test_intraclass_by_hand():
    # Task means 1.5, 3.5, 5.5: MSB = 2·(4 + 0 + 4)/2 = 8, MSW = 3·.5/3 = .5.
    got = intraclass([[1, 2], [3, 4], [5, 6]])
    assert got.single.value == pytest.approx(7.5 / 8.5)
    assert got.mean.value == pytest.approx(7.5 / 8)
    assert got.k == 2


def test_intraclass_unbalanced_by_hand():
    # Ratings (1, 3), (4), (6, 8, 7), (5, 5): k = 2, 1, 3, 2; N = 8; means 2, 4, 7, 5; grand mean 39/8.
    got = intraclass([[1, 3, nan], [4, nan, nan], [6, 8, 7], [5, nan, 5]])
    between = sum(k * (mean - 39 / 8) ** 2 for k, mean in ((2, 2), (1, 4), (3, 7), (2, 5))) / 3
    within, n0 = 4 / 4, (8 - 18 / 8) / 3
    assert got.k == pytest.approx(n0)
    assert got.single.value == pytest.approx((between - within) / (between + (n0 - 1) * within))
    assert got.mean.value == pytest.approx((between - within) / between)


@pytest.mark.parametrize("noise", [0.3, 1.0, 30.0])
def test_intraclass_agrees_with_pingouin(noise):
    x = sampled(40, 4, seed=5, noise=noise)
    long = pd.DataFrame(x).rename_axis("task").reset_index().melt("task", var_name="seed", value_name="x")
    peer = pingouin.intraclass_corr(long, targets="task", raters="seed", ratings="x")["ICC"]
    got = intraclass(x)
    assert (got.single.value, got.mean.value) == pytest.approx((peer.iloc[0], peer.iloc[3]), abs=1e-10)  # ICC1, ICC1k
    assert got.k == 4


def test_intraclass_of_tasks_alike_is_negative():
    got = intraclass([[1, 5], [5, 1], [1, 5]])
    assert got.single.value == pytest.approx(-1)
    assert got.mean.reason == "no variance between tasks"


# --- exact ratings


def test_exact_summary_by_hand():
    got = exact_summary([[0.1, 0.1, 0.2], [0, 0, 0.5], [0, 0, 0], [nan, nan, nan]], [1, 2, 3])
    np.testing.assert_allclose(got.valid_mass, [0.4, 0.5, 0, nan])
    np.testing.assert_allclose(got.mean, [2.25, 3, nan, nan])
    np.testing.assert_allclose(got.variance, [0.6875, 0, nan, nan])
    with pytest.raises(ValueError, match="options"):
        exact_summary([[0.5, 0.5]], [1, 2, 3])
    with pytest.raises(ValueError, match="negative"):
        exact_summary([[0.5, -0.5]], [1, 2])


def test_predicted_r_by_hand():
    got = predicted_r([1, 2, 3, nan], [1, 2, 3, 4])  # Var(m) = 1, mean(w) = 2
    assert (got.value, got.n, got.low) == (pytest.approx(1 / 3), 3, None)
    assert predicted_r([1, 2, 3], [1, 2, 3], k=4).value == pytest.approx(2 / 3)
    assert predicted_r([1, 2, 3], [0, 0, 0]).value == 1.0
    assert predicted_r([2, 2, 2], [1, 1, 1]).value == 0.0
    with pytest.raises(ValueError, match="at least 1"):
        predicted_r([1, 2, 3], [1, 2, 3], k=0)


def test_equal_means_up_to_rounding_have_no_variance():
    m = [0.3, 0.1 + 0.2, 0.3]
    assert predicted_r(m, [0, 0, 0]).reason == "no variance in ratings"
    assert seeds_needed(m, [1, 1, 1], 0.9).reason == "no variance between tasks"


def test_seeds_needed_by_hand():
    # Var(m) = mean(w) = 1: r of k-seed means is k/(k + 1), so .9 takes exactly 9.
    assert seeds_needed([1, 2, 3], [1, 1, 1], 0.9).seeds == 9
    assert seeds_needed([1, 2, 3], [1, 1, 1], 0.91).seeds == 11
    assert seeds_needed([1, 2, 3], [0, 0, 0], 0.99).seeds == 1
    assert seeds_needed([2, 2, 2], [0, 0, 0], 0.9).reason == "no variance in ratings"
    assert seeds_needed([1, 2], [1, 1], 0.9).reason == "fewer than 3 tasks with an exact rating"
    for wrong in (0.0, 1.0):
        with pytest.raises(ValueError, match="between 0 and 1"):
            seeds_needed([1, 2, 3], [1, 1, 1], wrong)


masses = st.tuples(st.integers(3, 10), st.integers(2, 5)).flatmap(
    lambda shape: hnp.arrays(float, shape, elements=st.floats(0, 1, allow_subnormal=False))
)


@settings(max_examples=50)
@given(masses, st.floats(0.05, 0.95))
def test_seeds_needed_is_the_smallest(p, target):
    exact = exact_summary(p, np.arange(p.shape[1]))
    got = seeds_needed(exact.mean, exact.variance, target)
    if got.seeds is not None and got.seeds < 10**9:
        assert predicted_r(exact.mean, exact.variance, k=got.seeds).value >= target - 1e-9
        if got.seeds > 1:
            assert predicted_r(exact.mean, exact.variance, k=got.seeds - 1).value < target + 1e-9


@settings(max_examples=50)
@given(masses, st.floats(0.5, 10), st.floats(-10, 10), st.integers(1, 20), st.randoms(use_true_random=False))
def test_predicted_r_properties(p, scale, shift, k, random):
    values = np.arange(p.shape[1])
    exact = exact_summary(p, values)
    there = exact.valid_mass > 0
    assert (exact.variance[there] >= 0).all()
    assert ((exact.mean[there] >= -1e-12) & (exact.mean[there] <= values[-1] + 1e-12)).all()
    got = predicted_r(exact.mean, exact.variance, k, bootstrap=10)
    assert got.defined == (got.reason is None)
    if not got.defined:
        return
    assert 0 <= got.value <= 1
    order = random.sample(range(len(p)), len(p))
    moved = exact_summary(p[order], scale * values + shift)
    again = predicted_r(moved.mean, moved.variance, k)
    if exact.mean[there].var() > 1e-9 or exact.variance[there].mean() > 1e-9:
        assert again.value == pytest.approx(got.value, abs=1e-6)


# --- noise ceiling


def test_ceiling():
    got = ceiling(Estimate(0.64, 0.25, 0.81, 100))
    assert got.r == Estimate(pytest.approx(0.8), 0.5, pytest.approx(0.9), 100)
    assert got.r2 == Estimate(0.64, 0.25, 0.81, 100)
    clipped = ceiling(Estimate(-0.1, -0.3, 1.2, 10))
    assert clipped.r == clipped.r2 == Estimate(0.0, 0.0, 1.0, 10)
    missing = ceiling(Estimate.missing("one rating seed", 5))
    assert missing.r == missing.r2 == Estimate.missing("one rating seed", 5)


def test_no_predictor_beats_the_ceiling():
    rng = np.random.default_rng(0)
    true = rng.normal(size=100_000)
    noisy = true + 0.75 * rng.normal(size=(100_000, 2)).T
    best = ceiling(cross_seed(noisy.T).pearson.mean)
    assert stats.pearsonr(true, noisy[0]).statistic == pytest.approx(best.r.value, abs=0.005)
    assert 1 - np.var(noisy[0] - true) / np.var(noisy[0]) == pytest.approx(best.r2.value, abs=0.005)


# --- never an exception, always a reason


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (np.empty((0, 0)), "no rating seeds"),
        (np.empty((5, 0)), "no rating seeds"),
        (np.empty((0, 1)), "one rating seed"),
        (np.array([[1.0], [2.0], [3.0], [4.0]]), "one rating seed"),
        (np.empty((0, 3)), "no tasks"),
        (np.array([[1.0, 2.0, 3.0]]), "fewer than 3 tasks with two valid ratings"),
        (np.array([[1.0, 2.0], [3.0, 4.0]]), "fewer than 3 tasks with two valid ratings"),
        (np.array([[1.0, 2.0], [3.0, 4.0], [5.0, nan]]), "fewer than 3 tasks with two valid ratings"),
        (np.full((6, 3), nan), "fewer than 3 tasks with two valid ratings"),
        (np.full((6, 3), 4.0), "no variance in ratings"),
        (np.full((6, 3), 0.1), "no variance in ratings"),
    ],
)
def test_undefined_ratings_have_a_reason(x, reason):
    got = every_estimate(x, bootstrap=20)
    for name in ("pearson", "pearson sd", "spearman", "spearman sd", "icc1", "icc1k"):
        assert got[name].value is None, name
        assert got[name].reason == reason, name
    assert got["informative"].value is None
    constant = reason == "no variance in ratings"
    assert got["informative"].reason == ("fewer than 3 tasks with a rating other than the mode" if constant else reason)


@pytest.mark.parametrize("tasks", [0, 1, 2])
def test_undefined_exact_ratings_have_a_reason(tasks):
    exact = exact_summary(np.full((tasks, 3), 0.3), [1, 2, 3])
    got = predicted_r(exact.mean, exact.variance, bootstrap=20)
    assert got == Estimate.missing("fewer than 3 tasks with an exact rating", tasks)
    assert seeds_needed(exact.mean, exact.variance, 0.9).reason == got.reason
    nothing = exact_summary(np.zeros((5, 3)), [1, 2, 3])
    assert predicted_r(nothing.mean, nothing.variance).n == 0


@settings(max_examples=100)
@given(ratings)
def test_every_estimate_has_a_value_in_bounds_or_a_reason(x):
    for name, got in every_estimate(x, bootstrap=10).items():
        assert got.defined == (got.reason is None), name
        assert (got.low is None) == (got.high is None)
        assert got.n <= len(x)
        if got.value is not None:
            assert np.isfinite(got.value), name
            assert got.value <= 1 + 1e-12 or "sd" in name
        if got.value is not None and "icc" not in name:
            assert got.value >= -1
        if got.low is not None:
            assert got.low <= got.high


@settings(max_examples=60)
@given(cells, st.sampled_from([0.5, 2.0, 3.0, 10.0]), st.integers(-20, 20), st.randoms(use_true_random=False))
def test_order_scale_and_unrated_tasks_change_nothing(x, scale, shift, random):
    tasks, seeds = (random.sample(range(n), n) for n in x.shape)
    moved = np.vstack([scale * x[tasks][:, seeds] + shift, np.full((2, x.shape[1]), nan)])
    expected, got = every_estimate(x), every_estimate(moved)
    for name in expected:
        assert got[name].n == expected[name].n, name
        assert got[name].reason == expected[name].reason, name
        if expected[name].defined:
            assert got[name].value == pytest.approx(expected[name].value, abs=1e-7), name


def test_a_reversed_scale_changes_no_correlation():
    x = sampled(50, 4, seed=6, invalid=0.1)
    expected, got = every_estimate(x), every_estimate(6 - x)
    for name in expected:
        assert got[name].value == pytest.approx(expected[name].value, abs=1e-9), name


def test_ratings_must_be_tasks_by_seeds():
    with pytest.raises(ValueError, match=r"\[tasks, seeds\]"):
        cross_seed([1, 2, 3])


# --- simulations


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


def coverage(estimates: list[Estimate], true: float) -> float:
    return float(np.mean([got.low <= true <= got.high for got in estimates]))


def test_intervals_cover():
    # 200 data sets of 120 tasks, tasks of variance 1 and a noise variance drawn from U(0, 2): the true r is 1/2.
    rng = np.random.default_rng(0)
    exact, across, inter = [], [], []
    for at in range(200):
        m, w = rng.normal(3, 1, size=120), rng.uniform(0, 2, size=120)
        x = m[:, None] + np.sqrt(w)[:, None] * rng.normal(size=(120, 3))
        exact.append(predicted_r(m, w, bootstrap=400, seed=at))
        across.append(cross_seed(x, bootstrap=400, seed=at).pearson.mean)
        inter.append(intraclass(x, bootstrap=400, seed=at).single)
    for kind in (exact, across, inter):
        assert 0.89 <= coverage(kind, 0.5) <= 0.99
