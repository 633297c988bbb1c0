"""Steering: vectors added to the residual stream, or directions taken out of it, while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from prefs.errors import UserError
from prefs.models.local.residuals import one_stream
from prefs.models.positions import Span
from prefs.models.types import Steering


@dataclass(frozen=True)
class BatchSteering:
    """What is done to the residual stream of a batch, and at which tokens.

    ``ranges`` [rows, steerings, 2] are token ranges [start, end), counted in each row without its padding, so that they
    hold in every pass over the row's tokens, however these are cut into passes.
    """

    steering: tuple[Steering, ...]
    ranges: torch.Tensor

    @classmethod
    def build(
        cls, steering: Sequence[Steering], spans: Sequence[Mapping[str, Span]], device: torch.device
    ) -> BatchSteering:
        """For rows whose token ranges are given by the names that `Steering.at` has for them.

        Raises
        ------
        UserError
            If one of the names is not among them.
        """
        for change in steering:
            if spans and change.at not in spans[0]:
                raise UserError(
                    f"steering: there is no {change.at!r} to steer at here; there are {', '.join(spans[0])}"
                )
        ranges = [[row[change.at] for change in steering] for row in spans]
        return cls(tuple(steering), torch.tensor(ranges, dtype=torch.long, device=device))

    def select(self, rows: torch.Tensor) -> BatchSteering:
        """For these rows, in this order."""
        return BatchSteering(self.steering, self.ranges[rows])

    def hooks(self, tokens: torch.Tensor, real: torch.Tensor) -> list[tuple[int, Callable[..., torch.Tensor]]]:
        """A hook for each steering, by layer, for a pass over tokens with these numbers [rows, width] in their rows."""
        hooks = []
        for index, change in enumerate(self.steering):
            start, end = self.ranges[:, index].unsqueeze(-1).unbind(dim=1)
            hooks.append((change.layer, partial(_steer, change, real.bool() & (tokens >= start) & (tokens < end))))
        return hooks


def _steer(steering: Steering, where: torch.Tensor, tensor: torch.Tensor, hook: Any) -> torch.Tensor:
    """Change a residual stream [rows, width, d_model] at the tokens `where`; computed in float32, rounded once."""
    one_stream(tensor)
    before = tensor.float()
    vector = steering.vector.to(tensor.device, torch.float32)
    if steering.kind == "add":
        after = before + steering.coefficient * vector
    else:
        direction = vector / vector.norm()
        after = before - steering.coefficient * (before @ direction)[..., None] * direction
    return torch.where(where.to(tensor.device)[..., None], after, before).to(tensor.dtype)


def check(steering: Sequence[Steering], n_layers: int, d_model: int) -> None:
    """Refuse what does not fit the model.

    Raises
    ------
    UserError
        If the model has no such layer, its residual stream another width, or the vector is not finite or no direction.
    """
    for change in steering:
        if not 0 <= change.layer < n_layers:
            raise UserError(f"steering: there is no layer {change.layer}; the model has 0 to {n_layers - 1}")
        if change.vector.shape != (d_model,):
            raise UserError(f"steering: a vector of shape {list(change.vector.shape)}; this model's have [{d_model}]")
        if not bool(change.vector.isfinite().all()):
            raise UserError(f"steering: NaN or infinity in the vector for layer {change.layer}")
        if change.kind == "project_out" and not bool(change.vector.any()):
            raise UserError(f"steering: the vector for layer {change.layer} is zero, which is no direction to take out")
