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
from prefs.probes.scores import Scores
from prefs.probes.targets import Target
from prefs.probes.validated import CrossValidated, Nothing
from prefs.statistics.estimates import Estimate

R2, AUC = "R²", "AUC"


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
_KINDS = {each.__name__: each for each in (Outcome, CrossValidated, Nothing, Target, Scores, Estimate, Probe, Site)}


def taken_apart(outcome: Outcome) -> tuple[dict[str, torch.Tensor], Any]:
    """An outcome as tensors, and as JSON in which they have names."""
    tensors: dict[str, torch.Tensor] = {}
    return tensors, _apart(outcome, tensors)


def put_together(tensors: Mapping[str, torch.Tensor], said: Any) -> Outcome:
    """The outcome that was `taken_apart`.

    Raises
    ------
    KeyError, TypeError, ValueError
        If it was not one.
    """
    whole = _together(said, tensors)
    if not isinstance(whole, Outcome):
        raise TypeError(f"{type(whole).__name__} is no outcome")
    return whole


def _apart(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    def named(kind: str, tensor: torch.Tensor) -> dict[str, str]:
        name = f"{len(tensors)}"
        tensors[name] = tensor
        return {kind: name}

    match value:
        case np.generic():
            return _apart(value.item(), tensors)
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
            return {"map": {name: _apart(each, tensors) for name, each in value.items()}}
        case Site():
            return {"kind": "Site", "of": {name: _apart(each, tensors) for name, each in value._asdict().items()}}
        case _ if is_dataclass(value) and type(value).__name__ in _KINDS:
            of = {each.name: _apart(getattr(value, each.name), tensors) for each in fields(value)}
            return {"kind": type(value).__name__, "of": of}
        case list() | tuple():
            return [_apart(each, tensors) for each in value]
    raise TypeError(f"{type(value).__name__} cannot be kept")


def _together(said: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    match said:
        case {"float": text}:
            return float(text)
        case {"array": name}:
            return tensors[name].numpy()
        case {"tensor": name}:
            return tensors[name]
        case {"table": name}:
            return pd.read_parquet(io.BytesIO(tensors[name].numpy().tobytes()))
        case {"map": of}:
            return {name: _together(each, tensors) for name, each in of.items()}
        case {"kind": kind, "of": of}:
            return _KINDS[kind](**{name: _together(each, tensors) for name, each in of.items()})
        case list():
            return [_together(each, tensors) for each in said]
    return said
