"""Vectors as the residual stream has them, in memory and in a store, for tests of probes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf

from prefs.config import CONF, ProbeConfig
from prefs.probes.features import Tensors
from prefs.probes.probe import Site
from prefs.stages.records import Residuals
from prefs.store.table import Store


def probe_config(kind: str = "ridge", **changes: object) -> ProbeConfig:
    """A kind of probe as it is shipped, on the CPU."""
    shipped = OmegaConf.merge(OmegaConf.structured(ProbeConfig), OmegaConf.load(CONF / "probe" / f"{kind}.yaml"))
    config = OmegaConf.to_object(shipped)
    assert isinstance(config, ProbeConfig)
    return replace(config, **{"trainer": {"accelerator": "cpu"}, **changes})


def residuals(n: int, layers: int, d: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """[n, layers, d] vectors: correlated, off centre, three dimensions huge; no layer knows anything of another."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(d, d)) / np.sqrt(np.arange(1, d + 1))[:, None]
    x = rng.normal(size=(n, layers, d)) @ mix
    scale = np.where(np.arange(d) < 3, 1000.0, 1.0)
    return torch.tensor((x + 3 * rng.normal(size=d)) * scale).to(dtype)


def tensors(vectors: torch.Tensor, position: str = "rating") -> Tensors:
    """Features of vectors in memory; layer numbers are the indices."""
    return Tensors(vectors, [Site(layer, position) for layer in range(vectors.shape[1])])


def planted(vectors: torch.Tensor, layer: int, share: float, seed: int = 0) -> np.ndarray:
    """[n] a target of mean 5 and SD 1 that is linear in one layer's standardised vectors up to a share of R²."""
    rng = np.random.default_rng(seed)
    x = vectors[:, layer].double().numpy()
    signal = ((x - x.mean(0)) / x.std(0)) @ rng.normal(size=x.shape[1])
    signal = (signal - signal.mean()) / signal.std()
    return 5 + np.sqrt(share) * signal + np.sqrt(1 - share) * rng.normal(size=len(x))


def signal_and_noise(vectors: torch.Tensor, layer: int, noise: float, seed: int = 0) -> np.ndarray:
    """[n] of variance 1 + noise²: a direction of one layer's standardised vectors, and noise."""
    rng = np.random.default_rng(seed)
    x = vectors[:, layer].double().numpy()
    signal = (x - x.mean(0)) / x.std(0) @ rng.normal(size=x.shape[1])
    return signal / signal.std() + noise * rng.normal(size=len(x))


def captured(
    folder: Path, position: str, vectors: torch.Tensor, *, layers: Sequence[int] | None = None, parts: int = 3
) -> Residuals:
    """Vectors [n, S, d] in a store, in several parts in random order; a row that is all NaN in all layers is absent."""
    n, count, _ = vectors.shape
    layers = tuple(range(count)) if layers is None else tuple(layers)
    collection = Store.open(str(folder)).vectors("residuals", {"position": position})
    keys = [collection.key(task=task) for task in range(n)]
    gone = vectors.isnan().flatten(1).all(1)
    order = np.random.default_rng(0).permutation(n)
    for some in np.array_split(order, parts):
        present = [int(task) for task in some if not gone[task]]
        missing = [keys[task] for task in some if gone[task]]
        collection.append([keys[task] for task in present], layers, vectors[present], missing)
    collection.refresh()
    return Residuals(position, layers, keys, collection)
