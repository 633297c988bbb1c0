"""Choices between tasks and their utilities: against choix, against worlds whose truth is known, and by hand."""

from __future__ import annotations

from collections.abc import Callable

import choix
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, logit

from prefs.statistics import pairs
from prefs.statistics.choices import Choices, consistency, exact_logits, sampled_logits, triads
from prefs.statistics.utilities import BradleyTerry, Thurstone, held_out, reliability, split_half

Ask = Callable[[np.ndarray], np.ndarray]


def choices(tasks: int, asked, logits: np.ndarray, valid=1.0, answers: int = 1, left_out=0) -> Choices:
    asked, logits = np.array(asked).reshape(-1, 2), np.asarray(logits, dtype=float).reshape(-1, 2)
    count = len(asked)
    return Choices(
        tasks,
        asked,
        expit(logits),
        np.clip(logits, -50, 50),
        np.broadcast_to(np.asarray(valid, dtype=float), (count, 2)),
        answers,
        np.arange(count) < left_out,
        np.zeros(count, dtype=int),
    )


def world(tasks: int, seed: int, sd: float = 3.0, residual: float = 1.0, bias: float = 0.0) -> tuple[np.ndarray, Ask]:
    """True utilities, and a chooser: each pair's own deviation, and a liking for the one shown first."""
    rng = np.random.default_rng(seed)
    u = rng.normal(0, sd, tasks)
    own = np.triu(rng.normal(0, residual, (tasks, tasks)), 1)
    own = own - own.T

    def ask(asked: np.ndarray) -> np.ndarray:
        a, b = np.array(asked).T
        difference = u[a] - u[b] + own[a, b]
        return np.column_stack([difference + bias, difference - bias])

    return u, ask


def in_rounds(tasks: int, ask: Ask, degree: int, how: str, seed: int) -> np.ndarray:
    """Utilities from as many pairs a task, asked in rounds as the stage does."""
    rng = np.random.default_rng(seed)
    asked = pairs.regular(tasks, tasks, [], rng)
    while len(asked) < tasks * degree // 2:
        fit = BradleyTerry().fit(choices(tasks, asked, ask(asked)), 0.02)
        asked += pairs.select(fit, min(tasks // 2, tasks * degree // 2 - len(asked)), asked, how, rng)  # type: ignore[arg-type]
    assert len({tuple(sorted(pair)) for pair in asked}) == len(asked) == tasks * degree // 2
    return BradleyTerry().fit(choices(tasks, asked, ask(asked))).u


def r(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def test_hard_counts_give_the_utilities_of_choix():
    rng = np.random.default_rng(0)
    u = rng.normal(0, 1.5, 30)
    asked = np.array([(a, b) for a in range(30) for b in range(a)])
    wins = rng.binomial(4, expit(u[asked[:, 0]] - u[asked[:, 1]])[:, None], size=(len(asked), 2))
    won = [(a, b) for (a, b), count in zip(asked.tolist(), wins.sum(1), strict=True) for _ in range(count)]
    lost = [(b, a) for (a, b), count in zip(asked.tolist(), wins.sum(1), strict=True) for _ in range(8 - count)]
    # Both orders of a pair together, since choix knows no order.
    share = np.repeat(wins.mean(axis=1, keepdims=True) / 4, 2, axis=1)
    with np.errstate(divide="ignore"):
        fit = BradleyTerry(position="none").fit(choices(30, asked, logit(share), answers=4), penalty=0.2)
    expected = choix.opt_pairwise(30, won + lost, alpha=0.1)
    np.testing.assert_allclose(fit.u, expected - expected.mean(), atol=1e-3)


def test_soft_targets_without_a_residual_give_back_the_truth():
    u, ask = world(200, 1, residual=0.0)
    asked = pairs.regular(200, 1000, [], np.random.default_rng(0))
    fit = BradleyTerry(penalties=(1e-6,)).fit(choices(200, asked, ask(np.array(asked))))
    assert r(fit.u, u) > 0.9999
    thurstone = Thurstone(penalty=1e-6).fit(choices(200, asked, ask(np.array(asked))))
    assert r(thurstone.u, u) > 0.98


@pytest.mark.parametrize(("degree", "least"), [(6, 0.96), (10, 0.98)])
def test_in_the_simulated_world_pairs_by_information_find_the_utilities(degree, least):
    found = [
        r(in_rounds(200, ask, degree, "information", seed), u) for seed in range(4) for u, ask in [world(200, seed)]
    ]
    assert np.mean(found) >= least


@pytest.mark.slow
def test_ten_pairs_by_information_are_no_worse_than_fourteen_at_random():
    informed, random = [], []
    for seed in range(8):
        u, ask = world(200, seed)
        informed.append(r(in_rounds(200, ask, 10, "information", seed), u))
        random.append(r(in_rounds(200, ask, 14, "random", seed), u))
    assert np.mean(informed) >= np.mean(random)


def test_a_position_bias_is_found_and_leaves_utilities_alone():
    u, ask = world(100, 2)
    _, biased = world(100, 2, bias=2.0)
    asked = np.array(pairs.regular(100, 500, [], np.random.default_rng(0)))
    plain = BradleyTerry().fit(choices(100, asked, ask(asked)), 0.02)
    moved = BradleyTerry().fit(choices(100, asked, biased(asked)), 0.02)
    assert moved.position == pytest.approx(2.0, abs=0.05)
    assert r(plain.u, moved.u) > 0.999
    assert r(moved.u, u) > 0.98


@pytest.mark.parametrize("position", ["shared", "task"])
def test_of_sampled_choices_the_position_is_fitted_beside_the_utilities(position):
    u, biased = world(100, 2, sd=1.5, residual=0.0, bias=2.0)
    asked = np.array(pairs.regular(100, 1500, [], np.random.default_rng(0)))
    rng = np.random.default_rng(1)
    share = rng.binomial(20, expit(biased(asked))) / 20
    with np.errstate(divide="ignore"):
        fit = BradleyTerry(position=position).fit(choices(100, asked, logit(share), answers=20), 0.1)
    assert r(fit.u, u) > 0.99
    if position == "shared":
        assert fit.position == pytest.approx(2.0, abs=0.1)


def test_swapping_the_tasks_of_every_pair_changes_nothing():
    _, ask = world(40, 3, bias=0.7)
    asked = np.array(pairs.regular(40, 160, [], np.random.default_rng(0)))
    one = choices(40, asked, ask(asked), valid=0.8)
    # The other task, shown first, is chosen against this one where this one is shown second.
    other = choices(40, asked[:, ::-1], -one.logits[:, ::-1], valid=0.8)
    for model in (BradleyTerry(), Thurstone()):
        np.testing.assert_allclose(model.fit(one, 0.1).u, model.fit(other, 0.1).u, atol=1e-4)
    assert consistency(one) == consistency(other)
    assert triads(one) == triads(other)


def test_refusals_moved_from_one_order_to_the_other_change_nothing():
    _, ask = world(40, 4, bias=1.0)
    asked = np.array(pairs.regular(40, 160, [], np.random.default_rng(0)))
    refused = np.random.default_rng(1).random((len(asked), 2))
    fits = [
        BradleyTerry().fit(choices(40, asked, ask(asked), valid=valid), 0.1) for valid in (refused, refused[:, ::-1])
    ]
    np.testing.assert_array_equal(fits[0].u, fits[1].u)


def test_sandwich_errors_cover_the_truth():
    covered = []
    for seed in range(12):
        u, ask = world(60, seed, sd=1.5, residual=0.5)
        asked = pairs.regular(60, 400, [], np.random.default_rng(seed))
        fit = BradleyTerry(penalties=(1e-3,)).fit(choices(60, asked, ask(np.array(asked))))
        covered.append(np.abs(fit.u - (u - u.mean())) < 1.96 * fit.se)
    assert 0.85 < np.mean(covered) < 0.99


def test_what_is_not_connected_is_told_and_has_a_mean_of_its_own():
    asked = np.array([(0, 1), (1, 2), (3, 4)])
    fit = BradleyTerry(penalties=(0.1,)).fit(choices(6, asked, [[1, 1], [1, 1], [2, 2]]))
    assert fit.components == 2
    assert np.isnan(fit.u[5])
    assert fit.u[:3].sum() == pytest.approx(0, abs=1e-9)
    assert fit.u[3:5].sum() == pytest.approx(0, abs=1e-9)


def test_reliability_is_that_of_the_simulated_utilities():
    u, ask = world(150, 5, residual=2.0)
    asked = np.array(pairs.regular(150, 1800, [], np.random.default_rng(0)))
    whole = choices(150, asked, ask(asked))
    fit = BradleyTerry().fit(whole)
    halves = split_half(whole, BradleyTerry(), fit.penalty, splits=5)
    estimate = reliability(halves, np.arange(150))
    # The reliability is the squared correlation with the truth.
    assert estimate.value == pytest.approx(r(fit.u, u) ** 2, abs=0.03)


def test_held_out_pairs_are_predicted_up_to_their_ceiling():
    u, ask = world(100, 6, residual=0.0)
    rng = np.random.default_rng(0)
    left_out = pairs.held_out(100, 200, rng)
    asked = left_out + pairs.regular(100, 800, left_out, rng)
    whole = choices(100, asked, ask(np.array(asked)), left_out=len(left_out))
    found = held_out(whole, BradleyTerry(penalties=(1e-6,)).fit(whole))
    assert found.accuracy.value == pytest.approx(found.most_accurate.value, abs=1e-3)
    assert found.log_loss.value == pytest.approx(found.least_log_loss.value, abs=1e-3)
    assert found.residual.value == pytest.approx(0.0, abs=0.05)
    true = expit(np.abs(u[np.array(left_out)[:, 0]] - u[np.array(left_out)[:, 1]])).mean()
    assert found.most_accurate.value == pytest.approx(true)


def test_consistency_by_hand():
    one = choices(3, [(0, 1), (1, 2), (0, 2)], [[2, 1], [2, -1], [np.nan, 1]], valid=[[1, 1], [0.5, 0.5], [0, 1]])
    found = consistency(one)
    assert found.consistent.value == pytest.approx(0.5)
    assert found.bias.value == pytest.approx((0.5 + 1.5) / 2)
    assert found.first.value == pytest.approx(np.mean([expit([2, -1]).mean(), expit([2, 1]).mean(), expit(-1)]))
    assert found.valid.value == pytest.approx(np.mean([1, 0.5, 0.5]))
    assert found.between_orders.reason is not None


def test_order_r_is_that_of_both_orientations():
    logits = np.random.default_rng(0).normal([1.0, -1.0], 1.0, size=(50, 2))
    asked = pairs.regular(40, 50, [], np.random.default_rng(1))
    found = consistency(choices(40, asked, logits)).between_orders.value
    x, y = logits.T
    assert found == pytest.approx(r(np.r_[x, -y], np.r_[y, -x]))


@given(st.integers(3, 9), st.integers(0, 2**31))
def test_triads_are_counted_as_by_hand(tasks, seed):
    rng = np.random.default_rng(seed)
    asked = [pair for pair in pairs.held_out(tasks, 99, rng) if rng.random() < 0.7]
    beats = {pair: bool(rng.integers(2)) for pair in asked}
    sign = np.array([[1.0, 1.0] if won else [-1.0, -1.0] for won in beats.values()]).reshape(-1, 2)
    measured = cyclic = 0
    for a in range(tasks):
        for b in range(a + 1, tasks):
            for c in range(b + 1, tasks):
                edges = [(a, b), (b, c), (a, c)]
                if all(edge in beats for edge in edges):
                    measured += 1
                    cyclic += beats[a, b] == beats[b, c] != beats[a, c]
    found = triads(choices(tasks, asked, sign))
    assert (found.measured, found.cyclic) == (measured, cyclic)


@given(st.integers(2, 40), st.integers(0, 200), st.integers(0, 2**31))
def test_pairs_are_new_different_and_even(tasks, count, seed):
    rng = np.random.default_rng(seed)
    left_out = pairs.held_out(tasks, count // 4, rng)
    asked = pairs.regular(tasks, count, left_out, rng)
    both = left_out + asked
    assert len({frozenset(pair) for pair in both}) == len(both)
    assert all(0 <= a < b < tasks for a, b in both)
    assert len(asked) <= count


def test_log_odds_of_masses_and_counts():
    np.testing.assert_allclose(exact_logits(np.array([0.2, 0.0]), np.array([0.1, 0.0])), [np.log(2), np.nan])
    assert np.isfinite(exact_logits(np.array(1.0), np.array(0.0)))
    np.testing.assert_allclose(sampled_logits(np.array([3.0, 0.0]), np.array([0.0, 0.0])), [np.log(7), np.nan])
