"""Which tasks are held out together."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefs.probes.folds import Splits, assign_folds


@given(
    st.lists(st.tuples(st.text(max_size=4), st.sampled_from("AB")), min_size=6, max_size=40, unique_by=lambda t: t[0]),
    st.integers(2, 6),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
)
def test_folds_do_not_depend_on_the_order_of_tasks(tasks, folds, seed, shuffler):
    before = assign_folds([key for key, _ in tasks], [origin for _, origin in tasks], folds, seed)
    shuffled = list(tasks)
    shuffler.shuffle(shuffled)
    after = assign_folds([key for key, _ in shuffled], [origin for _, origin in shuffled], folds, seed)
    by_key = dict(zip((key for key, _ in tasks), before, strict=True))
    assert [by_key[key] for key, _ in shuffled] == after.tolist()
    assert set(before) == set(range(folds))


def test_folds_are_stratified_by_origin():
    origins = ["MATH"] * 10 + ["ALPACA"] * 20
    folds = assign_folds([f"t{i}" for i in range(30)], origins, 5, seed=0)
    for fold in range(5):
        assert Counter(origins[i] for i in np.flatnonzero(folds == fold)) == {"MATH": 2, "ALPACA": 4}
    assert folds.tolist() != assign_folds([f"t{i}" for i in range(30)], origins, 5, seed=1).tolist()


def test_rare_origin_falls_back_to_plain_folds_and_says_so(caplog):
    folds = assign_folds([f"t{i}" for i in range(12)], ["MATH"] * 2 + ["ALPACA"] * 10, 4, seed=0)
    assert Counter(folds.tolist()) == dict.fromkeys(range(4), 3)
    assert "MATH has 2 tasks, fewer than 4 folds" in caplog.text


def test_rows_of_one_task_share_a_fold():
    keys = [f"t{i // 3}" for i in range(30)]
    folds = assign_folds(keys, ["A"] * 30, 5, seed=0)
    assert len({(key, fold) for key, fold in zip(keys, folds, strict=True)}) == 10


@pytest.mark.parametrize(
    ("keys", "origins", "folds", "message"),
    [
        (["a", "b", "c"], ["A"] * 3, 4, "3 tasks cannot fill 4 folds"),
        (["a", "b", "c"], ["A"] * 3, 1, "folds=1"),
        (["a", "b", "c"], ["A"] * 2, 2, "every task needs one origin"),
        (["a", "a", "c"], ["A", "B", "A"], 2, "task 'a' has two origins"),
    ],
)
def test_impossible_folds_are_refused_in_one_line(keys, origins, folds, message):
    with pytest.raises(ValueError, match=message) as caught:
        assign_folds(keys, origins, folds, seed=0)
    assert "\n" not in str(caught.value)


def test_splits_hold_out_each_group_once_and_validate_with_the_rest():
    group = np.arange(50) % 5
    splits = Splits.of(group, seed=0)
    assert (splits.k, splits.fits, splits.n) == (5, 6, 50)
    for fit in range(5):
        assert (splits.training(fit) == (group != fit)).all()
    assert splits.training(5).all()
    assert Counter(group[splits.validation].tolist()) == dict.fromkeys(range(5), 2)
    assert (splits.validation != Splits.of(group, seed=1).validation).any()


def test_a_group_of_one_keeps_its_task_for_training():
    splits = Splits.of(np.array([0] * 6 + [1]), seed=0)
    assert not splits.validation[6]
    assert splits.validation[:6].sum() == 2


@pytest.mark.parametrize(
    "group", [np.zeros(5, dtype=int), np.array([0, 2, 2]), np.array([0.0, 1.0]), np.zeros((2, 2), int)]
)
def test_groups_that_are_none_are_refused(group):
    with pytest.raises(ValueError, match="groups must be"):
        Splits.of(group, seed=0)
