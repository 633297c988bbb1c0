"""Vectors as the residual stream has them."""

from __future__ import annotations

import numpy as np
import torch

from prefs.probes.features import Tensors
from prefs.probes.probe import Site


def vectors(n: int, sites: int, d: int, seed: int = 0) -> torch.Tensor:
    """[n, sites, d] float32: correlated, off centre, three dimensions huge."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(d, d)) / np.sqrt(np.arange(1, d + 1))[:, None]
    x = rng.normal(size=(n, sites, d)) @ mix
    return torch.tensor((x + 3 * rng.normal(size=d)) * np.where(np.arange(d) < 3, 1000.0, 1.0)).float()


def features(x: torch.Tensor) -> Tensors:
    return Tensors(x, [Site(layer, "rating") for layer in range(x.shape[1])])


def planted(x: torch.Tensor, site: int, noise: float, seed: int = 0) -> np.ndarray:
    """[n] of variance 1 + noise²: a direction at one site, and noise."""
    rng = np.random.default_rng(seed)
    z = x[:, site].double().numpy()
    signal = (z - z.mean(0)) / z.std(0) @ rng.normal(size=x.shape[2])
    return signal / signal.std() + noise * rng.normal(size=len(x))
