"""Steering: vectors added to the residual stream, or directions taken out of it, while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from prefs.errors import UserError
from prefs.models.options import Asked
from prefs.models.types import Steering

# The end of a range that also holds what is generated.
OPEN = torch.iinfo(torch.long).max


@dataclass(frozen=True)
class Steered:
    """What is done to the residual stream of a batch, and at which tokens.

    ``ranges`` [rows, steerings, 2] are token ranges [start, end), counted in each row without its padding, so that they
    hold in every pass over the row's tokens, however these are cut into passes.
    """

    steering: tuple[Steering, ...]
    ranges: torch.Tensor

    @classmethod
    def of(
        cls, steering: Sequence[Steering], places: Sequence[Mapping[str, tuple[int, int]]], device: torch.device
    ) -> Steered:
        """For rows whose token ranges are given by the names that `Steering.at` has for them.

        Raises
        ------
        UserError
            If one of the names is not among them.
        """
        for each in steering:
            if places and each.at not in places[0]:
                raise UserError(f"steering: there is no {each.at!r} to steer at here; there are {', '.join(places[0])}")
        ranges = [[of_row[each.at] for each in steering] for of_row in places]
        return cls(tuple(steering), torch.tensor(ranges, dtype=torch.long, device=device))

    def select(self, rows: torch.Tensor) -> Steered:
        """For these rows, in this order."""
        return Steered(self.steering, self.ranges[rows])

    def hooks(self, tokens: torch.Tensor, real: torch.Tensor) -> list[tuple[int, Callable[..., torch.Tensor]]]:
        """A hook for each steering, by layer, for a pass over tokens with these numbers [rows, width] in their rows."""
        found = []
        for at, each in enumerate(self.steering):
            start, end = self.ranges[:, at].unsqueeze(-1).unbind(dim=1)
            where = real.bool() & (tokens >= start) & (tokens < end)
            found.append((each.layer, partial(_steer, each, where)))
        return found


def _steer(steering: Steering, where: torch.Tensor, tensor: torch.Tensor, hook: Any) -> torch.Tensor:
    """Change a residual stream [rows, width, d_model] at the tokens `where`; computed in float32, rounded once."""
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
    for each in steering:
        if not 0 <= each.layer < n_layers:
            raise UserError(f"steering: there is no layer {each.layer}; the model has 0 to {n_layers - 1}")
        if each.vector.shape != (d_model,):
            raise UserError(f"steering: a vector of shape {list(each.vector.shape)}; this model's have [{d_model}]")
        if not bool(each.vector.isfinite().all()):
            raise UserError(f"steering: NaN or infinity in the vector for layer {each.layer}")
        if each.kind == "project_out" and not bool(each.vector.any()):
            raise UserError(f"steering: the vector for layer {each.layer} is zero, which is no direction to take out")


def places_of_answer(asked: Asked) -> dict[str, tuple[int, int]]:
    """Token ranges of a conversation with a question, and of what is generated after it."""
    return {
        "all": (0, OPEN),
        "last": (len(asked.ids) - 1, OPEN),
        "completion": asked.spans[-2],
        "question": asked.spans[-1],
    }


def places_of_completion(prompt: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Token ranges of a prompt, and of the completion that is generated after it."""
    return {"all": (0, OPEN), "last": (len(prompt) - 1, OPEN), "completion": (len(prompt), OPEN)}
