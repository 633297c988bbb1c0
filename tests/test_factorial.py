"""Two factors within tasks, against statsmodels and by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from prefs.statistics.estimates import Estimate, Resamples
from prefs.statistics.factorial import (
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


def shares(result: Factorial) -> dict[str, Estimate]:
    return {name: getattr(result.shares, name) for name in SHARES}


def values(result: Factorial) -> list[float | None]:
    contrasts = [*result.first, *result.second, *([result.interaction] if result.interaction else [])]
    return [part.points.value for part in contrasts]


@pytest.mark.parametrize("shape", [(3, 3), (4, 2)])
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
    got = {name: part.value for name, part in shares(factorial(y)).items()}
    assert got == pytest.approx({name: part / whole for name, part in by_hand.items()})


def test_contrasts_by_hand():
    y = simulated(20, (3, 2))
    result = factorial(y)
    assert [part.first for part in result.first] == [(0, 1), (0, 2), (1, 2)]
    for part in result.first:
        a, b = part.first
        assert part.second == (0, 1)
        assert part.points.value == pytest.approx((y[:, a] - y[:, b]).mean())
        assert part.standardised.value == pytest.approx(
            (y[:, a] - y[:, b]).mean() / np.sqrt(y.var(axis=0, ddof=1).mean())
        )
    (rating,) = result.second
    assert (rating.first, rating.second) == ((0, 1, 2), (0, 1))
    assert rating.points.value == pytest.approx((y[:, :, 0] - y[:, :, 1]).mean())
    assert result.interaction is not None
    by_hand = y[:, 0, 0] - y[:, 0, 1] - y[:, 2, 0] + y[:, 2, 1]
    assert result.interaction.points.value == pytest.approx(by_hand.mean())
    sizes = abs(rating.points.value or 0) - abs(result.first[1].points.value or 0)
    assert result.second_over_first.value == pytest.approx(sizes)
    assert (result.n, result.left_out) == (20, 0)


def test_intervals_are_those_of_the_paired_differences():
    y = simulated(60)
    draws = Resamples.draw(60, 2000, seed=1)
    result = factorial(y, draws).first[1].points
    part = (y[:, 0] - y[:, 2]).mean(axis=1)
    resampled = (draws.times[1:] @ part) / 60
    assert (result.low, result.high) == pytest.approx(tuple(np.quantile(resampled, [0.025, 0.975])))


finite = st.floats(-100, 100, allow_nan=False, width=32)
designs = arrays(np.float64, st.tuples(st.integers(3, 6), st.integers(1, 3), st.integers(1, 3)), elements=finite)


@settings(max_examples=60)
@given(designs)
def test_swapping_the_factors_swaps_their_effects(y):
    one, other = factorial(y), factorial(y.swapaxes(1, 2))
    known = [part.value for part in shares(one).values() if part.value is not None]
    assert all(0 <= value <= 1 + 1e-9 for value in known)
    assert shares(one)["residual"].value is None or sum(known) == pytest.approx(1)
    for mine, theirs in ((one.first, other.second), (one.second, other.first)):
        for a, b in zip(mine, theirs, strict=True):
            assert (a.first, a.second) == (b.second, b.first)
            assert a.points.value == pytest.approx(b.points.value, abs=1e-9)
    assert shares(one)["first"].value == pytest.approx(shares(other)["second"].value, abs=1e-6)
    assert shares(one)["residual"].value == pytest.approx(shares(other)["residual"].value, abs=1e-6)
    a, b = one.second_over_first.value, other.second_over_first.value
    assert (a is None and b is None) or (a or 0) == pytest.approx(-(b or 0), abs=1e-9)


def test_tasks_that_lack_a_value_are_left_out_and_counted():
    y = simulated(10)
    with_gaps = y.copy()
    with_gaps[3, 1, 2] = with_gaps[7] = np.nan
    kept = np.delete(y, [3, 7], axis=0)
    result, expected = factorial(with_gaps, Resamples.draw(10, 50)), factorial(kept)
    assert (result.n, result.left_out) == (8, 2)
    assert values(result) == pytest.approx(values(expected))
    assert result.first[0].points.low is not None


def test_what_does_not_need_an_absent_cell_is_there():
    y = simulated(10)
    y[:, 2, 0] = np.nan
    result = factorial(y, Resamples.draw(10, 20))
    assert (result.n, result.left_out) == (10, 0)
    assert [part.second for part in result.first] == [(0, 1, 2), (1, 2), (1, 2)]
    assert result.first[1].points.value == pytest.approx((y[:, 0, 1:] - y[:, 2, 1:]).mean())
    assert result.second[0].points.value == pytest.approx((y[:, :2, 0] - y[:, :2, 1]).mean())
    assert result.interaction is not None
    assert result.interaction.points.reason == INCOMPLETE
    assert {part.reason for part in shares(result).values()} == {INCOMPLETE}


def only_the_diagonal() -> np.ndarray:
    y = np.full((10, 3, 3), np.nan)
    y[:, range(3), range(3)] = simulated(10)[:, range(3), range(3)]
    return y


# Sums of probabilities that should be the same differ in their last bit.
ALL_THE_SAME = np.where(np.random.default_rng(0).random((6, 3, 3)) < 0.5, 0.1 + 0.2, 0.3)


@pytest.mark.parametrize(
    ("y", "contrasts", "shares_", "over"),
    [
        (simulated(0), FEW_COMPLETE, FEW_COMPLETE, FEW_COMPLETE),
        (simulated(2), FEW_COMPLETE, FEW_COMPLETE, FEW_COMPLETE),
        (only_the_diagonal(), NEVER_BESIDE, INCOMPLETE, NEVER_BESIDE),
        (ALL_THE_SAME, None, NO_VARIATION, None),
        (simulated(10, (1, 3)), None, ONE_LEVEL, ONE_LEVEL),
    ],
    ids=["no tasks", "two tasks", "diagonal", "all the same", "one level"],
)
def test_what_is_undefined_has_a_reason(y, contrasts, shares_, over):
    result = factorial(y, Resamples.draw(len(y), 20))
    assert {part.points.reason for part in (*result.first, *result.second)} == {contrasts}
    assert {result.shares.first.reason, result.shares.interaction.reason} == {shares_}
    assert result.second_over_first.reason == over
    if y is ALL_THE_SAME:
        assert values(result) == [0.0] * 7
        assert result.second[0].points == Estimate(0.0, 0.0, 0.0, 6)
