"""Vectors as the residual stream has them, and banks trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning
import numpy as np
import torch

from prefs.probes.bank import ProbeBank
from prefs.probes.data import ProbeData
from prefs.probes.features import Tensors
from prefs.probes.folds import Splits
from prefs.probes.probe import Site
from prefs.probes.ridge import RidgeBank


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


def fit(bank: ProbeBank, data: ProbeData, **arguments: Any) -> None:
    settings = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "precision": "64-true",
    }
    lightning.Trainer(**{**settings, **arguments}).fit(bank, datamodule=data)


def ridge_bank(x: torch.Tensor, y: np.ndarray, group: np.ndarray, penalties: Sequence[float]) -> RidgeBank:
    """A fitted bank over all sites that keeps every penalty's weights."""
    splits = Splits.of(group, 0)
    data = ProbeData(features(x), slice(0, x.shape[1]), torch.tensor(y), splits)
    bank = RidgeBank(data.features.sites, x.shape[2], y.shape[1], splits, penalties, data.reference(), keep_all=True)
    fit(bank, data)
    return bank
