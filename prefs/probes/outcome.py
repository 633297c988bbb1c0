"""What training and testing the probes of a cell brought, and how it is kept in the store."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from prefs.probes.probe import Probe, Site
from prefs.probes.scores import Scores, p_value
from prefs.probes.targets import Target
from prefs.statistics.estimates import LEVEL, Estimate

R2, AUC = "R²", "AUC"
# Fewer tasks are not probed.
MIN_TASKS = 3


@dataclass(frozen=True, eq=False)
class Nothing:
    """A target that no probe was trained for, and why."""

    target: Target
    reason: str


@dataclass(frozen=True, eq=False)
class CrossValidated:
    """Probes of one target at S sites.

    Attributes
    ----------
    rows
        [m] the tasks that have the target, of all that have vectors.
    folds
        [m].
    by_site
        S scores; the penalty of each fold was chosen by the others.
    null
        [S, B] the main score with shuffled targets, penalties chosen anew for each.
    chosen_sites
        [k] the site that each fold's training tasks chose.
    predictions
        [m] of each task by the probe that the other folds chose: site and penalty.
    chosen, chosen_null, p
        The scores of those, [B] the same with shuffled targets, and the p-value of the first against the second.
    within
        Scores of the same for the target less its origin's mean; None where that has no meaning.
    final
        The probe of all tasks, at the site and penalty that these choose. Its own score is not among the above: they
        are what the same way of choosing and training gives on new tasks.
    final_directions
        [S, d] directions of the probes of all tasks at all sites; None for forms without.
    final_penalty
        None for a kind without.
    by_fold
        k probes, each of the site its fold's training tasks chose.
    """

    target: Target
    rows: np.ndarray
    folds: np.ndarray
    by_site: Sequence[Scores]
    null: np.ndarray
    chosen_sites: np.ndarray
    predictions: np.ndarray
    chosen: Scores
    chosen_null: np.ndarray
    p: float | None
    within: Scores | None
    final: Probe
    final_directions: torch.Tensor | None
    final_penalty: float | None
    by_fold: Sequence[Probe]

    def site_p(self, site: int) -> float | None:
        """The p-value of one site."""
        return p_value(self.target.main(self.by_site[site]), self.null[site])

    def null_band(self) -> tuple[np.ndarray, np.ndarray]:
        """[S] the lower and upper end of the middle 95 % of scores with shuffled targets; NaN without any."""
        if not self.null.shape[1]:
            nothing = np.full(len(self.null), np.nan)
            return nothing, nothing
        low, high = np.nanquantile(self.null, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)
        return low, high


@dataclass(frozen=True, eq=False)
class Outcome:
    """Probes of one cell: tables of what was found, and the probes.

    Attributes
    ----------
    metric
        What ``score`` is in all tables: R² on held-out tasks, or AUC for targets of yes and no.
    scores
        One row a target, position and layer.
    chosen
        One row a target: the penalty and site of each fold chosen by the other folds, and all these predictions
        scored together. This is the figure to report.
    controls
        One row a target and control.
    origins
        One row a target and origin: held out from training, and within the folds.
    predictions
        One row a target and task, of the probes in ``chosen``.
    results, nothing
        The targets that probes were trained for, and those that they were not.
    without
        What was wanted but could not be had, in words.
    warnings
        What training warned of.
    """

    metric: str
    scores: pd.DataFrame
    chosen: pd.DataFrame
    controls: pd.DataFrame
    origins: pd.DataFrame
    predictions: pd.DataFrame
    results: Sequence[CrossValidated]
    nothing: Sequence[Nothing]
    without: Sequence[str]
    warnings: Sequence[str]


@dataclass(frozen=True)
class NoProbe:
    """Why no probe was trained."""

    reason: str


# What an outcome is made of, beside numbers, words, arrays and tables.
_KINDS = {kind.__name__: kind for kind in (Outcome, CrossValidated, Nothing, Target, Scores, Estimate, Probe, Site)}


def taken_apart(outcome: Outcome) -> tuple[dict[str, torch.Tensor], Any]:
    """An outcome as tensors, and as JSON in which they have names."""
    tensors: dict[str, torch.Tensor] = {}

    def named(kind: str, tensor: torch.Tensor) -> dict[str, str]:
        tensors[name := str(len(tensors))] = tensor
        return {kind: name}

    def apart(value: Any) -> Any:
        match value:
            case np.generic():
                return apart(value.item())
            case float() if not math.isfinite(value):
                return {"float": str(value)}
            case None | bool() | int() | float() | str():
                return value
            case np.ndarray():
                return named("array", torch.from_numpy(np.ascontiguousarray(value)).clone())
            case torch.Tensor():
                return named("tensor", value.detach().cpu().clone(memory_format=torch.contiguous_format))
            case pd.DataFrame():
                content = io.BytesIO()
                value.to_parquet(content, index=False)
                return named("table", torch.frombuffer(bytearray(content.getvalue()), dtype=torch.uint8))
            case Mapping():
                return {"map": {name: apart(part) for name, part in value.items()}}
            case Site():
                return {"kind": "Site", "of": {name: apart(part) for name, part in value._asdict().items()}}
            case _ if is_dataclass(value) and type(value).__name__ in _KINDS:
                parts = {part.name: apart(getattr(value, part.name)) for part in fields(value)}
                return {"kind": type(value).__name__, "of": parts}
            case list() | tuple():
                return [apart(part) for part in value]
        raise TypeError(f"{type(value).__name__} cannot be kept")

    return tensors, apart(outcome)


def put_together(tensors: Mapping[str, torch.Tensor], content: Any) -> Outcome:
    """The outcome that was `taken_apart`.

    Raises
    ------
    KeyError, TypeError, ValueError
        If it was not one.
    """

    def together(value: Any) -> Any:
        match value:
            case {"float": text}:
                return float(text)
            case {"array": name}:
                return tensors[name].numpy()
            case {"tensor": name}:
                return tensors[name]
            case {"table": name}:
                return pd.read_parquet(io.BytesIO(tensors[name].numpy().tobytes()))
            case {"map": parts}:
                return {name: together(part) for name, part in parts.items()}
            case {"kind": kind, "of": parts}:
                return _KINDS[kind](**{name: together(part) for name, part in parts.items()})
            case list():
                return [together(part) for part in value]
        return value

    outcome = together(content)
    if not isinstance(outcome, Outcome):
        raise TypeError(f"{type(outcome).__name__} is no outcome")
    return outcome
