"""Folds: the same whatever the order of tasks, with each origin's share; and the tasks that validate within them."""

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


@pytest.mark.parametrize(
    ("keys", "origins", "folds", "message"),
    [
        (["a", "b", "c"], ["A"] * 3, 4, "3 tasks cannot fill 4 folds"),
        (["a", "b", "c"], ["A"] * 3, 1, "folds=1"),
        (["a", "b", "c"], ["A"] * 2, 2, "every task needs one origin"),
    ],
)
def test_impossible_folds_are_refused_in_one_line(keys, origins, folds, message):
    with pytest.raises(ValueError, match=message) as caught:
        assign_folds(keys, origins, folds, seed=0)
    assert "\n" not in str(caught.value)


# --- splits


@given(st.lists(st.integers(1, 30), min_size=2, max_size=6), st.integers(0, 5))
def test_a_fifth_of_each_group_validates_and_never_all_of_it(sizes, seed):
    splits = Splits.draw(np.repeat(np.arange(len(sizes)), sizes), seed)
    assert (splits.k, splits.fits, splits.n) == (len(sizes), len(sizes) + 1, sum(sizes))
    for group, size in enumerate(sizes):
        held_back = splits.validation[splits.group == group].sum()
        if size > 1:
            assert held_back == min(-(-size // 5), size - 1)
    for fit in range(splits.fits):
        assert splits.training(fit).sum() == sum(size for group, size in enumerate(sizes) if group != fit)
