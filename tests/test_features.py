"""Features: the same vectors from memory and from a store's parts; a bad number is named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from simulated_vectors import captured, residuals, tensors

from prefs.probes.features import Captured, NotFinite
from prefs.probes.probe import Site


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_vectors_from_a_store_are_those_written(tmp_path, dtype):
    rating = (residuals(17, 3, 6) / 1000).to(dtype)
    before = (residuals(17, 2, 6, seed=1) / 1000).to(dtype)
    before[4] = float("nan")  # no such position: absent
    both = [
        captured(tmp_path, "rating", rating, layers=(2, 5, 9)),
        captured(tmp_path, "mean_completion", before, layers=(5, 7), parts=4),
    ]
    rows = [row for row in range(17) if row != 4][::-1]
    assert np.flatnonzero(both[0].present() & both[1].present()).tolist() == rows[::-1]
    features = Captured(both, rows)
    assert features.sites == (
        Site(2, "rating"),
        Site(5, "rating"),
        Site(9, "rating"),
        Site(5, "mean_completion"),
        Site(7, "mean_completion"),
    )
    assert (features.n, features.d_model) == (16, 6)
    whole = torch.cat([rating[rows], before[rows]], dim=1)
    assert features.read(range(16), slice(0, 5)).dtype == dtype
    assert torch.equal(features.read(range(16), slice(0, 5)), whole)
    assert torch.equal(features.read([3, 0, 3], slice(1, 4)), whole[[3, 0, 3], 1:4])
    assert torch.equal(features.read([15], slice(3, 4)), whole[[15], 3:4])


def test_some_tasks_are_read_as_of_the_whole(tmp_path):
    vectors = residuals(20, 2, 4)
    whole = Captured([captured(tmp_path, "rating", vectors)], list(range(20)))
    rows = np.array([17, 3, 9, 4])
    some = whole.only(rows)
    assert (some.n, some.sites) == (4, whole.sites)
    assert torch.equal(some.read([2, 0], slice(1, 2)), vectors[[9, 17], 1:2])
    place = {row: number for number, row in enumerate(whole.order.tolist())}
    assert [place[int(row)] for row in rows[some.order]] == sorted(place[int(row)] for row in rows)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_named(bad):
    vectors = residuals(12, 4, 8)
    vectors[7, 2, 5] = bad
    with pytest.raises(NotFinite, match="row 7 at rating, layer 2 holds") as caught:
        tensors(vectors).read(range(12), slice(0, 4))
    assert (caught.value.row, caught.value.site) == (7, Site(2, "rating"))
    assert tensors(vectors).read(range(7), slice(0, 4)).shape == (7, 4, 8)
    assert tensors(vectors).read(range(12), slice(0, 2)).shape == (12, 2, 8)
