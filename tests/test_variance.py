"""The variance decomposition: by hand, against statsmodels, and against data whose components are known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from prefs.statistics.estimates import Estimate, Resamples
from prefs.statistics.variance import (
    EFFECTS,
    Component,
    VarianceDecomposition,
    variance_decomposition,
)

nan = float("nan")
NAMES = (*EFFECTS.values(), "rating seed")
TRUE = {
    "task": 1.0,
    "template": 0.3,
    "rater": 0.2,
    "task × template": 0.5,
    "task × rater": 0.4,
    "template × rater": 0.1,
    "task × template × rater": 0.3,
    "completion": 0.6,
    "completion × template": 0.2,
    "completion × rater": 0.25,
    "completion × template × rater": 0.15,
    "rating seed": 1.0,
}


def exact(y, draws: Resamples | None = None, sampling: float = 0.0) -> VarianceDecomposition:
    """Of exact ratings, of which one sampled rating has the same variance everywhere."""
    y = np.asarray(y, dtype=float)
    return variance_decomposition(y, np.full(y.shape, sampling), np.zeros(y.shape), draws)


def named(got: VarianceDecomposition) -> dict[str, Component]:
    return {component.name: component for component in got.components}


def variances(got: VarianceDecomposition) -> dict[str, float | None]:
    return {component.name: component.variance.value for component in got.components}


def simulate(rng: np.random.Generator, shape: tuple[int, int, int, int], true: dict[str, float]) -> np.ndarray:
    """Ratings [T, C, M, R] without sampling noise, whose effects have these variances."""
    y = np.zeros(shape)
    for effect, name in EFFECTS.items():
        levels = [count if facet in effect else 1 for facet, count in zip("tcmr", shape, strict=True)]
        y += np.sqrt(true.get(name, 0.0)) * rng.normal(size=levels)
    return y


def sample(rng: np.random.Generator, m: np.ndarray, w: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean of k sampled ratings of each mean m and variance w, with what is known of its variance from those alone."""
    x = m[..., None] + np.sqrt(w)[..., None] * rng.normal(size=(*m.shape, k))
    within = x.var(axis=-1, ddof=1)
    return x.mean(axis=-1), within, within / k


def test_tasks_and_templates_by_hand():
    # Task means 1.5, 4, 6.5 and template means 3, 5 around 4: SS 2·12.5 = 25, 3·2 = 6, and 32 in all leaves 1.
    # MS 12.5, 6, .5 on 2, 1, 2 degrees of freedom.
    y = np.array([[1, 2], [3, 5], [5, 8]], dtype=float)[:, None, :, None]
    got = named(exact(y, sampling=0.25))
    assert got["task × template"].variance.value == pytest.approx(0.5)
    assert got["task"].variance.value == pytest.approx((12.5 - 0.5) / 2)
    assert got["template"].variance.value == pytest.approx((6 - 0.5) / 3)
    assert got["rating seed"].variance.value == 0.25
    total = 0.5 + 6 + 5.5 / 3 + 0.25
    assert exact(y, sampling=0.25).total == Estimate(pytest.approx(total), None, None, 3)
    assert got["template"].share.value == pytest.approx(5.5 / 3 / total)
    assert sum(component.share.value or 0.0 for component in got.values()) == pytest.approx(1)


def anova(y: np.ndarray, formula: str) -> dict[str, float]:
    """Mean squares of a linear model, by its terms, from statsmodels."""
    index = np.indices(y.shape).reshape(4, -1)
    frame = pd.DataFrame({**dict(zip("tcmr", index, strict=True)), "y": y.ravel()})
    table = anova_lm(ols(f"y ~ {formula}", frame).fit())
    return (table["sum_sq"] / table["df"]).to_dict()


def test_crossed_facets_agree_with_statsmodels():
    T, M, R = 7, 3, 4
    y = simulate(np.random.default_rng(0), (T, 1, M, R), TRUE)
    ms = anova(y, "C(t) + C(m) + C(r) + C(t):C(m) + C(t):C(r) + C(m):C(r)")
    t, m, r, tm, tr, mr, tmr = ms.values()  # in the order of the formula; the residual is the three-way interaction
    got = variances(exact(y))
    assert got["task"] == pytest.approx((t - tm - tr + tmr) / (M * R))
    assert got["template"] == pytest.approx((m - tm - mr + tmr) / (T * R))
    assert got["rater"] == pytest.approx((r - tr - mr + tmr) / (T * M))
    assert got["task × template"] == pytest.approx((tm - tmr) / R)
    assert got["task × rater"] == pytest.approx((tr - tmr) / M)
    assert got["template × rater"] == pytest.approx((mr - tmr) / T)
    assert got["task × template × rater"] == pytest.approx(tmr)


def test_a_nested_facet_agrees_with_statsmodels():
    T, C, M = 6, 3, 4
    y = simulate(np.random.default_rng(1), (T, C, M, 1), TRUE)
    t, m, tc, tm, tcm = anova(y, "C(t) + C(m) + C(t):C(c) + C(t):C(m)").values()
    got = variances(exact(y))
    assert got["task"] == pytest.approx((t - tc - tm + tcm) / (C * M))
    assert got["template"] == pytest.approx((m - tm) / (T * C))
    assert got["task × template"] == pytest.approx((tm - tcm) / C)
    assert got["completion"] == pytest.approx((tc - tcm) / M)
    assert got["completion × template"] == pytest.approx(tcm)
    # What a seed is called in one task says nothing of another.
    y[2] = y[2, ::-1]
    assert variances(exact(y)) == pytest.approx(got)


def test_components_are_recovered_without_bias():
    # The mean of 150 data sets against the truth, within four of its standard errors.
    rng = np.random.default_rng(0)
    estimates = []
    for _ in range(150):
        m = simulate(rng, (40, 2, 3, 3), TRUE)
        estimates.append(variances(variance_decomposition(*sample(rng, m, rng.uniform(0.5, 1.5, size=m.shape), k=3))))
    table = pd.DataFrame(estimates)
    assert tuple(table.columns) == NAMES
    error = table.std() / np.sqrt(len(table))
    assert (error < 0.05).all()
    assert ((table.mean() - pd.Series(TRUE)).abs() < 4 * error).all()


def test_one_completion_seed_is_part_of_the_task():
    y = simulate(np.random.default_rng(2), (400, 1, 3, 4), TRUE)
    got = exact(y)
    by_name = named(got)
    assert by_name["task"].holds == ("completion",)
    assert by_name["task × template × rater"].holds == ("completion × template × rater",)
    assert by_name["template"].holds == ()
    assert by_name["completion × rater"] == Component(
        "completion × rater", *[Estimate.missing("one completion seed", 400)] * 2
    )
    assert by_name["task × template × rater"].variance.value == pytest.approx(0.3 + 0.15, abs=0.05)
    assert by_name["task"].variance.value == pytest.approx(1 + 0.6, abs=0.3)
    assert got.levels == {"task": 400, "completion seed": 1, "template": 3, "rater": 4}


def test_sampling_that_is_not_known_is_part_of_the_highest_order():
    rng = np.random.default_rng(4)
    m = simulate(rng, (300, 2, 2, 3), TRUE)
    x = m + rng.normal(size=m.shape)
    unknown = np.full(m.shape, nan)
    got = variance_decomposition(x, unknown, unknown, Resamples.draw(300, 50))
    by_name = named(got)
    assert by_name["completion × template × rater"].holds == ("rating seed",)
    assert by_name["completion × template × rater"].variance.value == pytest.approx(1.15, abs=0.1)
    assert by_name["rating seed"].variance == Estimate.missing("sampling variance not known", 300)
    # It is all there, in another place, when one rating of each was sampled.
    known = variance_decomposition(x, np.ones(m.shape), np.ones(m.shape))
    assert got.total.value == pytest.approx(known.total.value)
    assert by_name["task"].share.value == pytest.approx(named(known)["task"].share.value)
    assert named(known)["completion × template × rater"].holds == ()


shapes = st.tuples(st.integers(0, 6), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))


@st.composite
def cells(draw) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ratings on a grid, as options give them, some missing; with sampling variances, some of them not known."""
    shape = draw(shapes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    y = rng.integers(0, draw(st.integers(1, 5)), size=shape) / 4
    sampling = rng.random(shape)
    holes = draw(st.sampled_from([0.0, 0.02, 0.3, 1.0]))
    y[rng.random(shape) < holes / 4] = nan
    sampling[rng.random(shape) < holes] = nan
    return y, sampling, sampling / draw(st.integers(1, 4))


@settings(max_examples=80)
@given(cells(), st.randoms(use_true_random=False), st.sampled_from([0.5, -2.0, 3.0]), st.integers(-5, 5))
def test_order_and_scale_change_nothing_but_the_unit(given_, random, scale, shift):
    def moved(values: np.ndarray) -> np.ndarray:
        return values[np.ix_(*order)]

    y, sampling, noise = given_
    order = [random.sample(range(count), count) for count in y.shape]
    expected = variance_decomposition(y, sampling, noise)
    got = variance_decomposition(scale * moved(y) + shift, scale**2 * moved(sampling), scale**2 * moved(noise))
    assert (got.n, got.left_out, got.levels) == (expected.n, expected.left_out, expected.levels)
    for before, after in zip(expected.components, got.components, strict=True):
        assert (after.name, after.holds) == (before.name, before.holds)
        assert (after.variance.reason, after.share.reason) == (before.variance.reason, before.share.reason)
        if before.variance.value is not None:
            assert after.variance.value == pytest.approx(scale**2 * before.variance.value, abs=1e-10)
        if before.share.value is not None:
            assert after.share.value == pytest.approx(before.share.value, abs=1e-9)


@settings(max_examples=80)
@given(cells())
def test_every_estimate_has_a_value_in_bounds_or_a_reason(given_):
    got = variance_decomposition(*given_, Resamples.draw(len(given_[0]), 10))
    assert tuple(component.name for component in got.components) == NAMES
    for component in got.components:
        for estimate in (component.variance, component.share):
            assert estimate.defined == (estimate.reason is None)
            assert (estimate.low is None) == (estimate.high is None)
            assert estimate.n == got.n
            assert estimate.value is None or np.isfinite(estimate.value)
        assert component.share.value is None or 0 <= component.share.value <= 1
        assert component.variance.defined or not component.holds
    shares = [component.share.value for component in got.components if component.share.value is not None]
    assert not shares or sum(shares) == pytest.approx(1)


def test_intervals_cover():
    # 200 data sets of 60 tasks: the standard error of a coverage of .95 is .015. A percentile interval of a variance
    # covers somewhat less than it says for so few tasks.
    rng = np.random.default_rng(0)
    intervals: dict[str, list[Estimate]] = {name: [] for name in NAMES}
    for seed in range(200):
        m = simulate(rng, (60, 2, 3, 2), TRUE)
        w = np.broadcast_to(rng.uniform(0.5, 1.5, size=(60, 1, 1, 1)), m.shape)
        got = variance_decomposition(*sample(rng, m, w, k=3), Resamples.draw(60, 300, seed=seed))
        for component in got.components:
            intervals[component.name].append(component.variance)
    for name in ("task", "task × template", "task × rater", "completion", "completion × template", "rating seed"):
        covered = np.mean([got.low <= TRUE[name] <= got.high for got in intervals[name]])
        assert 0.88 <= covered <= 0.99, name


def test_tasks_with_a_rating_missing_are_left_out_of_the_estimate_and_its_interval():
    # The same three quarters of the resampled tasks, with the rest incomplete: as the resamples of those alone.
    y = simulate(np.random.default_rng(11), (40, 1, 2, 2), TRUE)
    draws = Resamples.draw(40, 100)
    holey = y.copy()
    holey[30:35, 0, 1, 1], holey[35:] = nan, np.inf
    got = exact(holey, draws)
    assert (got.n, got.left_out, got.levels["task"]) == (30, 10, 30)
    assert got.components == exact(y[:30], Resamples(draws.times[:, :30])).components
