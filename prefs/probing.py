"""The probing stage: from captured residuals to the rating, cross-validated by layer, beside baseline and ceiling."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from prefs.config import ProbeConfig
from prefs.measured import Measured
from prefs.models.backend import Sampling
from prefs.probes import FittedProbes, assign_folds, evaluate, fit_linear, origin_mean_baseline, save_probe
from prefs.records import Residuals
from prefs.statistics.estimates import Estimate
from prefs.statistics.exact import ceiling, predicted_r, reliability
from prefs.statistics.sampled import intraclass

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProbeReport:
    """A fitted bank of probes and its held-out scores.

    ``scores`` has one row a target and layer; ``predictions`` one a target, layer and task.
    """

    position: str
    targets: tuple[str, ...]
    layers: tuple[int, ...]
    fitted: FittedProbes
    scores: pd.DataFrame
    predictions: pd.DataFrame
    left_out: int

    def save(self, folder: Path, metadata: dict[str, Any]) -> list[Path]:
        """Write weights, card and what the card refers to; returns the files."""
        kept = ("target", "layer", "n", "r2", "baseline_r2", "ceiling_r2")
        scores = [
            {name: None if pd.isna(row[name]) else row[name] for name in kept} for row in self.scores.to_dict("records")
        ]
        save_probe(
            folder,
            self.fitted.weight,
            self.fitted.bias,
            targets=self.targets,
            layers=self.layers,
            metadata={**metadata, "position": self.position, "scores": scores},
        )
        return [folder / "probe.safetensors", folder / "probe.json"]


@dataclass(frozen=True)
class NoProbe:
    """Why no probe was trained."""

    reason: str


def probe(measured: Measured, sampling: Sampling, residuals: Residuals, config: ProbeConfig) -> ProbeReport | NoProbe:
    """Train one probe a layer for each target, on the tasks that have a vector at the position.

    The reported scores are of held-out tasks. No layer is chosen, so none is flattered.
    """
    use = [int(row) for row in np.flatnonzero(residuals.present())]
    needed = max(config.folds, 3)
    if len(use) < needed:
        return NoProbe(f"{len(use)} with a vector, and {config.folds} folds (probe.folds) need {needed} tasks or more")
    used = measured.only(use)
    targets, ceilings = _targets(used, sampling, config)
    varying = [name for name, values in targets.items() if np.nanstd(values) > 0]
    if not varying:
        return NoProbe("the target has no variance: " + ", ".join(targets))
    keys = [key for row in use if (key := residuals.keys[row]) is not None]
    features = residuals.vectors.gather(keys, residuals.layers)
    finite = features.isfinite().all(dim=2)
    if not bool(finite.all()):
        at, layer = (~finite).nonzero()[0].tolist()
        return NoProbe(f"NaN or infinity in the residuals of task {used.tasks[at]} at layer {residuals.layers[layer]}")
    folds = assign_folds(used.tasks, used.origins, config.folds, config.seed)
    y = np.stack(list(targets.values()), axis=1)
    fitted = fit_linear(
        features, y, folds, penalty=config.penalty, max_epochs=config.max_epochs, seed=config.seed, show_progress=True
    )
    scored = evaluate(fitted.out_of_fold, y, folds, names=list(targets), layers=list(residuals.layers))
    baselines = {name: origin_mean_baseline(values, used.origins, folds).r2 for name, values in targets.items()}
    rows = []
    for each in scored:
        row: dict[str, object] = {"target": each.target, "layer": each.layer, "n": each.scores.r2.n}
        row |= {"r2": each.scores.r2.value, "r2_reason": each.scores.r2.reason}
        row |= {"r2_fold_sd": each.scores.r2_fold_sd.value, "pearson": each.scores.pearson.value}
        row |= {"spearman": each.scores.spearman.value, "mae": each.scores.mae.value}
        row |= {"baseline_r2": baselines[each.target].value, "ceiling_r2": ceilings[each.target].value}
        rows.append(row | {"ceiling_reason": ceilings[each.target].reason})
    return ProbeReport(
        position=residuals.position,
        targets=tuple(targets),
        layers=residuals.layers,
        fitted=fitted,
        scores=pd.DataFrame(rows).astype({"r2": float, "baseline_r2": float, "ceiling_r2": float}),
        predictions=_predictions(fitted, targets, residuals.layers, list(used.tasks), folds),
        left_out=len(measured.tasks) - len(use),
    )


def _targets(
    used: Measured, sampling: Sampling, config: ProbeConfig
) -> tuple[dict[str, np.ndarray], dict[str, Estimate]]:
    """The targets [tasks used] by name, and the reliability of each: the largest R² a probe can reach."""
    targets: dict[str, np.ndarray] = {}
    ceilings: dict[str, Estimate] = {}
    if "exact" in config.targets and used.exact is not None:
        targets["exact"] = used.exact.mean
        ceilings["exact"] = reliability(used.exact)
    seeds = used.sampled.shape[1]
    if "sampled" in config.targets and seeds:
        name = f"mean of {seeds} seeds" if seeds > 1 else "one seed"
        targets[name] = used.seed_means
        if used.exact is not None and used.sampling_known and sampling.temperature == sampling.top_p == 1:
            # Known noise: the mean of a task's k valid ratings varies by w/k.
            k = np.isfinite(used.sampled).sum(axis=1)
            noise = np.divide(used.exact.variance, k, out=np.full(len(k), np.nan), where=k > 0)
            reliable = predicted_r(used.exact.mean, noise, uncertainty=used.exact.uncertainty)
        else:
            reliable = intraclass(used.sampled).mean
        ceilings[name] = ceiling(reliable).r2
    return targets, ceilings


def _predictions(
    fitted: FittedProbes, targets: dict[str, np.ndarray], layers: tuple[int, ...], ids: list[str], folds: np.ndarray
) -> pd.DataFrame:
    t, n = len(layers), len(ids)
    frames = [
        pd.DataFrame(
            {
                "target": name,
                "layer": np.repeat(layers, n),
                "task": ids * t,
                "fold": np.tile(folds, t),
                "measured": np.tile(values, t),
                "predicted": fitted.out_of_fold[at].reshape(-1),
            }
        )
        for at, (name, values) in enumerate(targets.items())
    ]
    return pd.concat(frames, ignore_index=True)


def features_digest(residuals: Residuals) -> str:
    """SHA-256 of the keys of the vectors a probe saw: which data it is from."""
    return hashlib.sha256("".join(key or "-" for key in residuals.keys).encode()).hexdigest()
