"""Difference of means, against the same in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from simulated_vectors import probe_config, residuals, signal_and_noise, tensors

from prefs.probes.folds import Splits
from prefs.probes.train import train


@pytest.mark.parametrize("binary", [False, True])
def test_the_direction_and_line_are_those_of_the_training_tasks(binary):
    x = residuals(90, 2, 6, dtype=torch.float32)
    y = signal_and_noise(x, 1, 0.4)
    y = (y > 0.8).astype(float) if binary else y
    splits = Splits.draw(np.arange(90) % 3, 0)
    trained = train(tensors(x), torch.tensor(y)[:, None], splits, probe_config("mean_difference"), kept=1)
    for fit in range(4):
        rows = splits.training(fit) & ~splits.validation
        wide = x[:, 1].double().numpy()
        z = (wide - wide[rows].mean(0)) / wide[rows].std(0)
        high = y[rows] > (0.5 if binary else np.median(y[rows]))
        direction = z[rows][high].mean(0) - z[rows][~high].mean(0)
        slope, bias = np.polyfit(z[rows] @ direction, y[rows], 1)
        line = z @ direction * slope + bias
        np.testing.assert_allclose(trained.probe(fit, 1, 0, "y").predict(x[:, 1]), line, atol=1e-4)
        seen = splits.training(fit) & splits.validation
        assert trained.criterion[fit, 1, 0] == pytest.approx(((line - y) ** 2)[seen].mean(), rel=1e-5)
        if fit < 3:
            held_out = splits.group == fit
            np.testing.assert_allclose(trained.out_of_fold[held_out, 1, 0], line[held_out], atol=1e-4)
    assert trained.best_sites()[3, 0] == 1
    assert np.isnan(trained.penalty).all()
