"""Vectors are read from the store's shards when they are wanted, and a broken one is named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from probe_data import features, vectors

from prefs.probes.data import ProbeData
from prefs.probes.features import Captured, NotFinite, Tensors
from prefs.probes.folds import Splits
from prefs.probes.probe import Site
from prefs.records import Residuals
from prefs.store import Store


@pytest.fixture
def stored(tmp_path) -> tuple[list[Residuals], torch.Tensor]:
    """12 tasks at two positions and three layers, in several parts; the layers of some tasks lie in two parts."""
    x = vectors(12, 6, 5).bfloat16()
    residuals = []
    for at, position in enumerate(("mean_completion", "rating")):
        shards = Store(tmp_path).vectors("residuals", {"position": position})
        keys = [shards.key(task=task) for task in range(12)]
        mine = x[:, 3 * at : 3 * at + 3]
        shards.append(keys[6:], [2, 5, 9], mine[6:], [])
        shards.append(keys[:6], [5, 9], mine[:6, 1:], [])
        shards.append(keys[:6], [2], mine[:6, :1], [])
        shards.refresh()
        residuals.append(Residuals(position, (2, 5, 9), keys, shards))
    return residuals, x


def test_captured_vectors_are_those_of_their_tasks_and_sites(stored):
    residuals, x = stored
    rows = [11, 3, 4, 0, 7]
    read = Captured(residuals, rows)
    assert (read.n, read.d_model) == (5, 5)
    assert read.sites[:4] == (
        Site(2, "mean_completion"),
        Site(5, "mean_completion"),
        Site(9, "mean_completion"),
        Site(2, "rating"),
    )
    assert sorted(read.order.tolist()) == list(range(5))
    assert torch.equal(read.read(range(5), slice(0, 6)), x[rows])
    assert torch.equal(read.read([4, 1], slice(2, 4)), x[[7, 3], 2:4])
    assert read.read([0], slice(0, 1)).dtype == torch.bfloat16


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_vector_that_is_not_finite_is_named(bad):
    x = vectors(12, 4, 8)
    x[7, 2, 5] = bad
    with pytest.raises(NotFinite, match="row 7 at rating, layer 2") as caught:
        features(x).read(range(12), slice(0, 4))
    assert (caught.value.row, caught.value.site) == (7, Site(2, "rating"))
    features(x).read([7], slice(0, 2))


def test_vectors_that_overflow_their_sum_are_not_broken():
    x = torch.full((2, 1, 4), torch.finfo(torch.float32).max)
    assert features(x).read([0, 1], slice(0, 1)).isfinite().all()


def test_vectors_that_are_none_are_refused():
    for wrong in (torch.zeros(3, 4), torch.zeros(3, 0, 4), torch.zeros(3, 1, 4, dtype=torch.int32)):
        with pytest.raises(ValueError, match="vectors must be"):
            Tensors(wrong, [Site(0, "rating")])


@pytest.mark.parametrize("without_validation", [False, True])
def test_moments_are_of_training_tasks_alone(without_validation):
    x = vectors(60, 2, 7)
    x[:, 1, 3] = 2.5  # constant
    splits = Splits.of(np.arange(60) % 5, 0)
    data = ProbeData(features(x), slice(0, 2), torch.zeros(60, 1), splits)
    moments = data.moments(without_validation=without_validation)
    for fit in range(6):
        rows = splits.training(fit) & ~(splits.validation & without_validation)
        wide = x[torch.tensor(rows)].double()
        torch.testing.assert_close(moments.mean[fit], wide.mean(0), rtol=1e-9, atol=1e-9)
        wanted = wide.std(0, correction=0)
        wanted[1, 3] = 1.0
        torch.testing.assert_close(moments.scale[fit], wanted, rtol=1e-7, atol=1e-9)


def test_every_task_comes_once_an_epoch_and_in_an_order_of_the_seed():
    x, splits = vectors(25, 1, 3), Splits.of(np.arange(25) % 5, 0)
    y = torch.arange(25.0)[:, None]

    def rows(seed: int, size: int | None) -> list[int]:
        data = ProbeData(features(x), slice(0, 1), y, splits, batch_size=size, seed=seed)
        seen = list(data.train_dataloader())
        for batch in seen:
            assert torch.equal(batch.features, x[batch.rows])
            assert torch.equal(batch.targets, y[batch.rows])
        return torch.cat([batch.rows for batch in seen]).tolist()

    assert rows(0, None) == list(range(25))
    assert sorted(rows(0, 8)) == list(range(25))
    assert rows(0, 8) == rows(0, 8) != rows(1, 8)


@pytest.mark.parametrize(
    "targets", [torch.zeros(9, 1), torch.zeros(10), torch.zeros(10, 0), torch.full((10, 1), torch.nan)]
)
def test_targets_that_do_not_fit_are_refused(targets):
    with pytest.raises(ValueError, match="target"):
        ProbeData(features(vectors(10, 1, 3)), slice(0, 1), targets, Splits.of(np.arange(10) % 2, 0))
