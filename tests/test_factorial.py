"""Two factors within tasks, against statsmodels and by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from statsmodels.formula.api import ols
from statsmodels.stats.anova import AnovaRM, anova_lm

from prefs.statistics import factorial as module
from prefs.statistics.estimates import Estimate, Resamples
from prefs.statistics.factorial import (
    ALL_ALIKE,
    FEW_COMPLETE,
    INCOMPLETE,
    NEVER_BESIDE,
    NO_VARIATION,
    ONE_LEVEL,
    Factorial,
    factorial,
)

SHARES = ("first", "second", "interaction", "residual")


def simulated(
    tasks: int = 30, shape: tuple[int, int] = (3, 3), noise: float = 0.3, seed: int = 0, effects: float = 1.0
) -> np.ndarray:
    """Ratings of tasks that differ, with an effect of the first factor and a larger one of the second."""
    rng = np.random.default_rng(seed)
    first, second = (np.linspace(1, 0, levels) for levels in shape)
    fixed = effects * (0.3 * first[:, None] + 2 * second[None, :] + 0.4 * first[:, None] * second[None, :])
    return 3 + rng.normal(size=(tasks, 1, 1)) + fixed + noise * rng.normal(size=(tasks, *shape))


def long(y: np.ndarray) -> pd.DataFrame:
    rows = [(t, c, r, y[t, c, r]) for t, c, r in np.ndindex(*y.shape)]
    return pd.DataFrame(rows, columns=["t", "c", "r", "y"])


def shares(found: Factorial) -> dict[str, Estimate]:
    return {name: getattr(found.shares, name) for name in SHARES}


def values(found: Factorial) -> list[float | None]:
    contrasts = [*found.first, *found.second, *([found.interaction] if found.interaction else [])]
    return [each.points.value for each in contrasts]


@pytest.mark.parametrize("shape", [(3, 3), (2, 3), (4, 2)])
def test_shares_are_the_sums_of_squares_of_statsmodels(shape):
    y = simulated(12, shape)
    squares = anova_lm(ols("y ~ C(t) * C(c) * C(r)", long(y)).fit())["sum_sq"]
    by_hand = {
        "first": squares["C(c)"],
        "second": squares["C(r)"],
        "interaction": squares["C(c):C(r)"],
        "residual": squares["C(t):C(c)"] + squares["C(t):C(r)"] + squares["C(t):C(c):C(r)"],
    }
    whole = sum(by_hand.values())
    got = {name: each.value for name, each in shares(factorial(y)).items()}
    assert got == pytest.approx({name: part / whole for name, part in by_hand.items()})


def test_the_parts_give_the_f_of_a_repeated_measures_anova():
    y = simulated(12)
    z = y - y.mean(axis=(1, 2), keepdims=True)
    draws = Resamples.none(12)
    whole, effects, by_task = module._sums_of_squares(z, z.mean(axis=0)[None], draws, np.array([12.0]))
    df = np.array([2, 2, 4])
    f = (effects[0] / df) / (by_task[0] / (df * 11))
    np.testing.assert_allclose(f, AnovaRM(long(y), "y", "t", within=["c", "r"]).fit().anova_table["F Value"])
    assert whole[0] == pytest.approx((effects + by_task).sum())


def test_contrasts_by_hand():
    y = simulated(20, (3, 2))
    found = factorial(y)
    assert [each.first for each in found.first] == [(0, 1), (0, 2), (1, 2)]
    for each in found.first:
        a, b = each.first
        assert each.second == (0, 1)
        assert each.points.value == pytest.approx((y[:, a] - y[:, b]).mean())
        assert each.standardised.value == pytest.approx(
            (y[:, a] - y[:, b]).mean() / np.sqrt(y.var(axis=0, ddof=1).mean())
        )
    (rating,) = found.second
    assert (rating.first, rating.second) == ((0, 1, 2), (0, 1))
    assert rating.points.value == pytest.approx((y[:, :, 0] - y[:, :, 1]).mean())
    assert found.interaction is not None
    by_hand = y[:, 0, 0] - y[:, 0, 1] - y[:, 2, 0] + y[:, 2, 1]
    assert found.interaction.points.value == pytest.approx(by_hand.mean())
    sizes = abs(rating.points.value or 0) - abs(found.first[1].points.value or 0)
    assert found.second_over_first.value == pytest.approx(sizes)
    assert (found.n, found.left_out) == (20, 0)


def test_intervals_are_those_of_the_paired_differences():
    y = simulated(60)
    draws = Resamples.draw(60, 2000, seed=1)
    found = factorial(y, draws).first[1].points
    each = (y[:, 0] - y[:, 2]).mean(axis=1)
    resampled = (draws.times[1:] @ each) / 60
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(resampled, [0.025, 0.975])))
    # Tasks differ by far more than that, but each is compared with itself.
    assert (found.high or 0) - (found.low or 0) < 0.4 * 2 * 1.96 * y[:, 0, 0].std() / np.sqrt(60)


def test_resampled_shares_are_centred_on_the_share():
    """A task drawn twice is not two tasks, which would make shares of effects larger in resamples."""
    y = simulated(12, noise=1.0, effects=0.2)
    found = shares(factorial(y, Resamples.draw(12, 4000)))
    for name in ("first", "second", "interaction"):
        each = found[name]
        assert each.low is not None
        assert each.high is not None
        assert each.low <= (each.value or 0) <= each.high
    draws, z = Resamples.draw(12, 4000), y - y.mean(axis=(1, 2), keepdims=True)
    means = draws.sums(z.reshape(12, -1)).reshape(-1, 3, 3) / 12
    _, effects, by_task = module._sums_of_squares(z, means, draws, np.full(4001, 12.0))
    corrected = (effects[1:] - by_task[1:] / 11).mean(axis=0)
    np.testing.assert_allclose(corrected, effects[0], atol=0.03 * effects[0].sum())
    assert (effects[1:].mean(axis=0) > effects[0] + by_task[0] / 24).all()


def test_an_effect_that_is_there_is_found_and_none_is_not():
    rng = np.random.default_rng(3)
    covered = 0
    for seed in range(40):
        y = simulated(40, (2, 2), noise=0.5, seed=seed, effects=0.0)
        found = factorial(y, Resamples.draw(40, 200, seed=int(rng.integers(1000))))
        each = found.second[0].points
        covered += (each.low or 0) <= 0 <= (each.high or 0)
    assert 32 <= covered <= 40


finite = st.floats(-100, 100, allow_nan=False, width=32)
designs = arrays(np.float64, st.tuples(st.integers(3, 6), st.integers(1, 3), st.integers(1, 3)), elements=finite)


@settings(max_examples=60, deadline=None)
@given(designs)
def test_swapping_the_factors_swaps_their_effects(y):
    one, other = factorial(y), factorial(y.swapaxes(1, 2))
    for mine, theirs in ((one.first, other.second), (one.second, other.first)):
        for a, b in zip(mine, theirs, strict=True):
            assert (a.first, a.second) == (b.second, b.first)
            assert a.points.value == pytest.approx(b.points.value, abs=1e-9)
    assert shares(one)["first"].value == pytest.approx(shares(other)["second"].value, abs=1e-6)
    assert shares(one)["residual"].value == pytest.approx(shares(other)["residual"].value, abs=1e-6)
    a, b = one.second_over_first.value, other.second_over_first.value
    assert (a is None and b is None) or (a or 0) == pytest.approx(-(b or 0), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(designs, st.integers(0, 2**16))
def test_what_is_the_same_in_all_of_a_tasks_cells_changes_nothing(y, seed):
    shift = np.random.default_rng(seed).integers(-50, 50, size=(len(y), 1, 1)).astype(float)
    one, other = factorial(y), factorial(y + shift)
    assert values(one) == pytest.approx(values(other), abs=1e-9)
    spread = y - y.mean(axis=(1, 2), keepdims=True)
    if np.abs(spread).max() > 1e-3:  # smaller ones are lost in the shift's rounding
        for name in SHARES:
            assert shares(one)[name].value == pytest.approx(shares(other)[name].value, abs=1e-4), name


@settings(max_examples=60, deadline=None)
@given(designs)
def test_shares_add_up(y):
    found = shares(factorial(y, Resamples.draw(len(y), 10)))
    known = [each.value for each in found.values() if each.value is not None]
    assert all(0 <= value <= 1 + 1e-9 for value in known)
    if found["residual"].value is not None:
        assert sum(known) == pytest.approx(1)


def test_tasks_that_lack_a_value_are_left_out_and_counted():
    y = simulated(10)
    with_gaps = y.copy()
    with_gaps[3, 1, 2] = with_gaps[7] = np.nan
    kept = np.delete(y, [3, 7], axis=0)
    found, expected = factorial(with_gaps, Resamples.draw(10, 50)), factorial(kept)
    assert (found.n, found.left_out) == (8, 2)
    assert values(found) == pytest.approx(values(expected))
    assert found.first[0].points.low is not None


def test_what_does_not_need_an_absent_cell_is_there():
    y = simulated(10)
    y[:, 2, 0] = np.nan
    found = factorial(y, Resamples.draw(10, 20))
    assert (found.n, found.left_out) == (10, 0)
    assert [each.second for each in found.first] == [(0, 1, 2), (1, 2), (1, 2)]
    assert found.first[1].points.value == pytest.approx((y[:, 0, 1:] - y[:, 2, 1:]).mean())
    assert found.second[0].points.value == pytest.approx((y[:, :2, 0] - y[:, :2, 1]).mean())
    assert found.interaction is not None
    assert found.interaction.points.reason == INCOMPLETE
    assert {each.reason for each in shares(found).values()} == {INCOMPLETE}
    deviations = [y[:, c, r] for c, r in itertools.product(range(3), range(3)) if (c, r) != (2, 0)]
    sd = np.sqrt(np.mean([each.var(ddof=1) for each in deviations]))
    assert found.second[2].standardised.value == pytest.approx((y[:, :, 1] - y[:, :, 2]).mean() / sd)


def test_a_diagonal_compares_nothing():
    y = np.full((10, 3, 3), np.nan)
    y[:, range(3), range(3)] = simulated(10)[:, range(3), range(3)]
    found = factorial(y)
    assert {each.points.reason for each in (*found.first, *found.second)} == {NEVER_BESIDE}
    assert found.second_over_first.reason == NEVER_BESIDE


def test_one_factor_alone():
    y = simulated(10, (1, 3))
    found = factorial(y, Resamples.draw(10, 20))
    assert found.first == ()
    assert found.interaction is None
    assert found.second[1].points.value == pytest.approx((y[:, 0, 0] - y[:, 0, 2]).mean())
    assert found.second_over_first.reason == ONE_LEVEL
    assert found.shares.first.reason == found.shares.interaction.reason == ONE_LEVEL
    assert (found.shares.second.value or 0) + (found.shares.residual.value or 0) == pytest.approx(1)


def test_ratings_that_are_all_the_same():
    # Sums of probabilities that should be the same differ in their last bit.
    y = np.where(np.random.default_rng(0).random((6, 3, 3)) < 0.5, 0.1 + 0.2, 0.3)
    found = factorial(y, Resamples.draw(6, 20))
    assert values(found) == [0.0] * 7
    assert found.second[0].points == Estimate(0.0, 0.0, 0.0, 6)
    assert found.second_over_first.value == 0
    assert {each.reason for each in shares(found).values()} == {NO_VARIATION}


def test_tasks_that_do_not_differ_have_no_standard_deviation():
    y = np.tile(np.arange(9.0).reshape(1, 3, 3), (5, 1, 1))
    found = factorial(y, Resamples.draw(5, 20))
    assert found.second[0].points.value == pytest.approx(-1)
    assert found.second[0].standardised.reason == ALL_ALIKE
    assert found.shares.residual.value == 0


@pytest.mark.parametrize("tasks", [0, 1, 2])
def test_few_tasks(tasks):
    found = factorial(simulated(tasks), Resamples.draw(tasks, 20))
    assert {each.points.reason for each in (*found.first, *found.second)} == {FEW_COMPLETE}
    assert {each.reason for each in shares(found).values()} == {FEW_COMPLETE}
    assert found.second_over_first == Estimate.missing(FEW_COMPLETE, tasks)


def test_no_rating_at_all():
    found = factorial(np.full((5, 3, 3), np.nan), Resamples.draw(5, 20))
    assert (found.n, found.left_out) == (0, 5)
    assert found.first[0].points.reason == FEW_COMPLETE


@pytest.mark.parametrize("shape", [(5, 3), (5, 0, 3), (5, 3, 3, 3)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="y must be"):
        factorial(np.zeros(shape))
    with pytest.raises(ValueError, match="resamples of 4 tasks"):
        factorial(np.zeros((5, 2, 2)), Resamples.draw(4, 3))
