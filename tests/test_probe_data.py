"""What banks are trained on: moments of each fit's training tasks, and batches in which each task is once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from simulated_vectors import captured, residuals, tensors

from prefs.probes import data as data_module
from prefs.probes.data import ProbeData
from prefs.probes.features import Captured
from prefs.probes.folds import Splits


def probe_data(vectors, k=3, **keywords):
    n = len(vectors)
    splits = Splits.draw(np.arange(n) % k, 0)
    targets = torch.arange(n)[:, None].double()
    return ProbeData(tensors(vectors), slice(0, vectors.shape[1]), targets, splits, **keywords)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_moments_are_those_of_each_fits_training_tasks(dtype, monkeypatch):
    vectors = residuals(700, 2, 5, dtype=dtype) + torch.tensor(2000.0, dtype=dtype)
    monkeypatch.setattr(data_module, "BATCH_NUMBERS", 2 * 5 * 64)  # eleven batches
    data = probe_data(vectors)
    moments = data.moments()
    assert moments.mean.shape == moments.scale.shape == (4, 2, 5)
    for fit in range(4):
        rows = data.splits.training(fit) & ~data.splits.validation
        x = vectors[rows].double().numpy()
        np.testing.assert_allclose(moments.mean[fit], x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.scale[fit], x.std(0), rtol=1e-9)


@pytest.mark.parametrize("cache", [data_module.CACHE_BYTES, 0])
def test_each_task_is_in_one_batch(tmp_path, monkeypatch, cache):
    """Also where vectors are too large to be kept, and are read each time."""
    vectors = residuals(23, 3, 4)
    features = Captured([captured(tmp_path, "rating", vectors)], range(23))
    targets = torch.randn(23, 2, generator=torch.Generator().manual_seed(0))
    splits = Splits.draw(np.arange(23) % 4, 0)
    monkeypatch.setattr(data_module, "BATCH_NUMBERS", 2 * 4 * 5)
    monkeypatch.setattr(data_module, "CACHE_BYTES", cache)
    for batch_size, batches in ((None, 5), (4, 6), (1000, 1)):
        data = ProbeData(features, slice(1, 3), targets, splits, batch_size=batch_size, seed=3)
        made = list(data.in_order() if batch_size is None else data.in_random_order())
        assert len(made) == batches
        rows = torch.cat([batch.rows for batch in made])
        assert sorted(rows.tolist()) == list(range(23))
        assert torch.equal(torch.cat([batch.features for batch in made]), vectors[rows, 1:3])
        assert torch.equal(torch.cat([batch.targets for batch in made]), targets[rows])
        assert torch.cat([batch.rows for batch in data.in_order()]).tolist() == features.order.tolist()
