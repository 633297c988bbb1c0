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

from prefs.statistics import sampled as module
from prefs.statistics.estimates import Estimate, Resamples
from prefs.statistics.sampled import cross_seed, distribution, intraclass, modal

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


def every_estimate(x: np.ndarray, resamples: int = 0) -> dict[str, Estimate]:
    draws = Resamples.draw(len(x), resamples)
    across, icc = cross_seed(x, draws), intraclass(x, draws)
    inf = across.informative
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
        "modal share": modal(x, draws).share,
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
    draws = Resamples.draw(40, 50)
    whole = cross_seed(x, draws)
    monkeypatch.setattr(module, "TABLE_ENTRIES", 51 * 5 * 5 * 3)
    assert cross_seed(x, draws) == whole


@settings(max_examples=60)
@given(cells)
def test_many_levels_one_pair_at_a_time_give_the_same(x):
    draws = Resamples.draw(len(x), 20)
    by_table = cross_seed(x, draws)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MANY_LEVELS", 0)
        by_pair = cross_seed(x, draws)
    for one, other in (
        (by_table.pearson, by_pair.pearson),
        (by_table.spearman, by_pair.spearman),
        (by_table.informative.r, by_pair.informative.r),
    ):
        assert [pair.r.reason for pair in one.pairs] == [pair.r.reason for pair in other.pairs]
        assert (one.mean.value, one.mean.low, one.mean.high) == pytest.approx(
            (other.mean.value, other.mean.low, other.mean.high), abs=1e-9
        )
    assert by_table.informative.d == by_pair.informative.d


def test_a_seed_without_variance_leaves_the_other_pairs():
    got = cross_seed([[1, 1, 4], [2, 3, 4], [3, 2, 4], [4, 4, 4]], Resamples.draw(4, 100)).pearson
    assert (got.pairs_defined, got.pairs_total) == (1, 3)
    assert got.mean.value == got.pairs[0].r.value
    assert [pair.r.reason for pair in got.pairs] == [None, "no variance in ratings", "no variance in ratings"]
    assert got.sd.reason == "fewer than 2 pairs of seeds with a defined r"


@pytest.mark.parametrize(("kind", "peer"), [("pearson", stats.pearsonr), ("spearman", stats.spearmanr)])
def test_cross_seed_interval_agrees_with_scipy(kind, peer):
    x = sampled(80, 2, seed=3)
    got = getattr(cross_seed(x, Resamples.draw(80, 3000, seed=1)), kind).mean
    expected = stats.bootstrap(
        (x[:, 0], x[:, 1]),
        lambda a, b: peer(a, b).statistic,
        paired=True,
        n_resamples=1000,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high), abs=0.03)


# --- informative r and d


def test_informative_by_hand():
    # Mode 4. Seeds differ from it in the last three tasks of seven: (1, 2), (4, 5), (5, 4).
    x = np.array([[4, 4], [4, 4], [4, 4], [4, 4], [1, 2], [4, 5], [5, 4]], dtype=float)
    got = cross_seed(x).informative
    assert modal(x).rating == 4
    assert got.d.value == pytest.approx(3 / 7)
    assert got.d.n == 7
    assert got.r.mean.value == pytest.approx(stats.pearsonr([1, 4, 5], [2, 5, 4]).statistic)
    assert got.r.mean.n == 3
    assert got.r.sd.reason == "fewer than 2 pairs of seeds with a defined r"


@pytest.mark.parametrize("invalid", [0.0, 0.3])
def test_informative_agrees_with_masks(invalid):
    x = sampled(80, 4, seed=4, invalid=invalid, noise=0.5)
    got = cross_seed(x).informative
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
    got = cross_seed(x).informative
    assert modal(x).rating == 2
    assert got.d.value == pytest.approx(6 / 7)
    assert got.r.mean.value == pytest.approx(stats.pearsonr([4, 4, 4, 1, 2, 5], [4, 4, 4, 2, 3, 5]).statistic)


def test_a_model_that_always_says_four_is_not_informative():
    x = np.full((100, 4), 4.0)
    x[:2] = 1.0
    got = cross_seed(x, Resamples.draw(100, 50)).informative
    assert cross_seed(x).pearson.mean.value == pytest.approx(1.0)
    assert got.r.mean.reason == "fewer than 3 tasks with a rating other than the mode"
    assert got.d.value == pytest.approx(0.02)
    assert got.d.low <= 0.02 <= got.d.high


# --- modal rating


def test_modal_by_hand():
    got = modal([[4, 4], [2, nan], [2, 5]], Resamples.draw(3, 50))
    assert (got.rating, got.share.value, got.ratings, got.share.n) == (2.0, 0.4, 5, 3)
    assert got.share.low <= 0.4 <= got.share.high
    assert modal([[nan]]).share.reason == "no valid ratings"
    assert modal(np.empty((0, 3))).share.reason == "no tasks"


def test_distribution_by_hand():
    one, four, nine = distribution([[4, 4], [1, nan], [4, 5]], [1, 4, 9], Resamples.draw(3, 50))
    assert (one.value, four.value, nine.value, one.n) == (0.2, 0.6, 0.0, 3)
    assert four.low <= 0.6 <= four.high
    assert distribution([[nan]], [1, 2])[0].reason == "no valid ratings"


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
    got = every_estimate(x, resamples=20)
    for name in ("pearson", "pearson sd", "spearman", "spearman sd", "icc1", "icc1k"):
        assert got[name].value is None, name
        assert got[name].reason == reason, name
    assert got["informative"].value is None
    constant = reason == "no variance in ratings"
    assert got["informative"].reason == ("fewer than 3 tasks with a rating other than the mode" if constant else reason)


@settings(max_examples=100)
@given(ratings)
def test_every_estimate_has_a_value_in_bounds_or_a_reason(x):
    for name, got in every_estimate(x, resamples=10).items():
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
