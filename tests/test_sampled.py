"""Stability statistics: by hand, against peers, and by their properties."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pingouin
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from prefs.statistics.estimates import Estimate, Resamples
from prefs.statistics.sampled import cross_seed, distribution, intraclass, modal

nan = np.nan


def sampled(tasks: int, seeds: int, seed: int, invalid: float = 0.0, noise: float = 1.0) -> np.ndarray:
    """Ratings 1-5, [tasks, seeds], of a task's own level and noise."""
    rng = np.random.default_rng(seed)
    x = np.clip(np.round(3 + rng.normal(size=(tasks, 1)) + noise * rng.normal(size=(tasks, seeds))), 1, 5)
    x[rng.random(x.shape) < invalid] = nan
    return x


def arrays(tasks: st.SearchStrategy[int], seeds: st.SearchStrategy[int]) -> st.SearchStrategy[np.ndarray]:
    elements = st.sampled_from([1.0, 2.0, 3.0, 4.0, 5.0, nan])
    return st.tuples(tasks, seeds).flatmap(lambda shape: hnp.arrays(float, shape, elements=elements))


cells = arrays(st.integers(3, 12), st.integers(2, 4))


def every_estimate(x: np.ndarray, resamples: int = 0) -> dict[str, Estimate]:
    draws = Resamples.draw(len(x), resamples)
    across, icc = cross_seed(x, draws), intraclass(x, draws)
    informative = across.informative
    return {
        "pearson": across.pearson.mean,
        "pearson sd": across.pearson.sd,
        "spearman": across.spearman.mean,
        "spearman sd": across.spearman.sd,
        "informative": informative.r.mean,
        "informative sd": informative.r.sd,
        "d": informative.d,
        "icc1": icc.single,
        "icc1k": icc.mean,
        "modal share": modal(x, draws).share,
    }


@pytest.mark.parametrize(("invalid", "levels"), [(0.0, 5), (0.3, 5), (0.3, 1000)])
def test_pairs_agree_with_scipy(invalid, levels):
    x = sampled(80, 5, seed=1, invalid=invalid, noise=0.7)
    if levels > 5:  # pairs of many different ratings are counted otherwise
        x[40:] += np.random.default_rng(2).integers(0, levels, size=(40, 5)) / levels
    across, mode = cross_seed(x), modal(x).rating
    peers = (stats.pearsonr, stats.spearmanr, stats.pearsonr)
    shares = []
    for kind, correlation in enumerate((across.pearson, across.spearman, across.informative.r)):
        peer = []
        for (first, second), r in correlation.pairs.items():
            a, b = x[:, first], x[:, second]
            used = both = ~np.isnan(a) & ~np.isnan(b)
            if kind == 2:
                used = both & ((a != mode) | (b != mode))
                shares.append(used.sum() / both.sum())
            peer.append(peers[kind](a[used], b[used]).statistic)
            assert (r.value, r.n) == (pytest.approx(peer[-1], abs=1e-12), used.sum())
        assert correlation.mean.value == pytest.approx(np.mean(peer), abs=1e-12)
        assert correlation.sd.value == pytest.approx(np.std(peer, ddof=1), abs=1e-12)
        assert (correlation.pairs_defined, list(correlation.pairs)[:2]) == (10, [(0, 1), (0, 2)])
    assert across.informative.d.value == pytest.approx(np.mean(shares), abs=1e-12)
    assert across.pearson.mean.n == (np.isfinite(x).sum(axis=1) >= 2).sum()


def test_a_seed_without_variance_leaves_the_other_pairs():
    got = cross_seed([[1, 1, 4], [2, 3, 4], [3, 2, 4], [4, 4, 4]], Resamples.draw(4, 100)).pearson
    assert (got.pairs_defined, len(got.pairs)) == (1, 3)
    assert got.mean.value == got.pairs[0, 1].value
    assert [r.reason for r in got.pairs.values()] == [None, "no variance in ratings", "no variance in ratings"]
    assert got.sd.reason == "fewer than 2 pairs of seeds with a defined r"


def test_mode_and_distribution_by_hand():
    got = modal([[4, 4], [2, nan], [2, 5]], Resamples.draw(3, 50))
    assert (got.rating, got.share.value, got.ratings, got.share.n) == (2.0, 0.4, 5, 3)
    assert got.share.low <= 0.4 <= got.share.high
    assert modal([[nan]]).share.reason == "no valid ratings"
    assert modal(np.empty((0, 3))).share.reason == "no tasks"
    one, four, nine = distribution([[4, 4], [1, nan], [4, 5]], [1, 4, 9], Resamples.draw(3, 50))
    assert (one.value, four.value, nine.value, one.n) == (0.2, 0.6, 0.0, 3)
    assert four.low <= 0.6 <= four.high
    assert distribution([[nan]], [1, 2])[0].reason == "no valid ratings"


def test_intraclass_unbalanced_by_hand():
    # Ratings (1, 3), (4), (6, 8, 7), (5, 5): k = 2, 1, 3, 2; N = 8; means 2, 4, 7, 5; grand mean 39/8.
    got = intraclass([[1, 3, nan], [4, nan, nan], [6, 8, 7], [5, nan, 5]])
    between = sum(k * (mean - 39 / 8) ** 2 for k, mean in ((2, 2), (1, 4), (3, 7), (2, 5))) / 3
    within, n0 = 4 / 4, (8 - 18 / 8) / 3
    assert got.k == pytest.approx(n0)
    assert got.single.value == pytest.approx((between - within) / (between + (n0 - 1) * within))
    assert got.mean.value == pytest.approx((between - within) / between)
    alike = intraclass([[1, 5], [5, 1], [1, 5]])
    assert (alike.single.value, alike.mean.reason) == (pytest.approx(-1), "no variance between tasks")


@pytest.mark.parametrize("noise", [0.3, 1.0, 30.0])
def test_intraclass_agrees_with_pingouin(noise):
    x = sampled(40, 4, seed=5, noise=noise)
    long = pd.DataFrame(x).rename_axis("task").reset_index().melt("task", var_name="seed", value_name="x")
    peer = pingouin.intraclass_corr(long, targets="task", raters="seed", ratings="x")["ICC"]
    got = intraclass(x)
    assert (got.single.value, got.mean.value) == pytest.approx((peer.iloc[0], peer.iloc[3]), abs=1e-10)  # ICC1, ICC1k
    assert got.k == 4


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (np.empty((5, 0)), "no rating seeds"),
        (np.array([[1.0], [2.0], [3.0], [4.0]]), "one rating seed"),
        (np.empty((0, 3)), "no tasks"),
        (np.array([[1.0, 2.0], [3.0, 4.0], [5.0, nan]]), "fewer than 3 tasks with two valid ratings"),
        (np.full((6, 3), nan), "fewer than 3 tasks with two valid ratings"),
        (np.full((6, 3), 4.0), "no variance in ratings"),
        (np.full((6, 3), 0.1), "no variance in ratings"),
    ],
)
def test_undefined_ratings_have_a_reason(x, reason):
    got = every_estimate(x, resamples=20)
    constant = reason == "no variance in ratings"
    off_mode = "fewer than 3 tasks with a rating other than the mode" if constant else reason
    for name in ("pearson", "pearson sd", "spearman", "spearman sd", "icc1", "icc1k", "informative"):
        assert (got[name].value, got[name].reason) == (None, off_mode if name == "informative" else reason), name


@settings(max_examples=100)
@given(arrays(st.integers(0, 8), st.integers(0, 4)))
def test_every_estimate_has_a_value_in_bounds_or_a_reason(x):
    for name, got in every_estimate(x, resamples=10).items():
        assert got.defined == (got.reason is None), name
        assert (got.low is None) == (got.high is None)
        assert got.n <= len(x)
        if got.value is not None:
            assert np.isfinite(got.value), name
            assert got.value <= 1 + 1e-12 or "sd" in name
            assert got.value >= -1 or "icc" in name
        if got.low is not None:
            assert got.low <= got.high


@settings(max_examples=60)
@given(cells, st.sampled_from([-1.0, 0.5, 2.0, 10.0]), st.integers(-20, 20), st.randoms(use_true_random=False))
def test_order_scale_and_unrated_tasks_change_nothing(x, scale, shift, random):
    tasks, seeds = (random.sample(range(n), n) for n in x.shape)
    moved = np.vstack([scale * x[tasks][:, seeds] + shift, np.full((2, x.shape[1]), nan)])
    expected, got = every_estimate(x), every_estimate(moved)
    _, counts = np.unique(x[np.isfinite(x)], return_counts=True)
    tie = scale < 0 and (counts == counts.max(initial=0)).sum() > 1  # the smallest mode is then another
    for name in expected:
        if tie and name.startswith(("informative", "d")):
            continue
        assert (got[name].n, got[name].reason) == (expected[name].n, expected[name].reason), name
        if expected[name].defined:
            assert got[name].value == pytest.approx(expected[name].value, abs=1e-7), name
