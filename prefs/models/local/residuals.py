"""Residual-stream vectors, kept as a forward pass goes by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from prefs.models.options import Asked

Hook = Callable[..., torch.Tensor | None]


class AllRecorded(Exception):
    """Ends a forward pass after the deepest layer that anybody wants."""


@dataclass(frozen=True)
class _Spots:
    """One position of the rows that have it: the tokens from `starts` to before `ends`, by column. All are [rows]."""

    rows: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor

    @classmethod
    def of(cls, ranges: Mapping[int, tuple[int, int]], offsets: Sequence[int]) -> _Spots:
        columns = [(offsets[row] + start, offsets[row] + end) for row, (start, end) in ranges.items()]
        starts, ends = torch.tensor(columns).unbind(dim=1)
        return cls(torch.tensor(list(ranges)), starts, ends)

    def to(self, device: torch.device) -> _Spots:
        return _Spots(self.rows.to(device), self.starts.to(device), self.ends.to(device))

    def means(self, tensor: torch.Tensor, single: bool) -> torch.Tensor:
        """[rows, d_model] float32 means over the spots of a residual stream [batch, width, d_model]."""
        if single:
            return tensor[self.rows, self.starts].float()
        columns = torch.arange(tensor.shape[1], device=tensor.device)
        outside = (columns < self.starts[:, None]) | (columns >= self.ends[:, None])
        chosen = tensor if len(self.rows) == len(tensor) else tensor[self.rows]
        total = chosen.masked_fill(outside[..., None], 0).sum(dim=1, dtype=torch.float32)
        return total / (self.ends - self.starts)[:, None]


class Recorder:
    """Keeps the vectors of one forward pass over left-padded rows: on the device as it goes, on the host at the end.

    Parameters
    ----------
    layers
        Layers whose residual stream is kept, after the block.
    spots
        Of each row, token ranges [start, end) by position. A vector is the mean over its range, in float32.
    lengths
        Tokens of each row.
    stops
        Whether the pass may end (`AllRecorded`) after the deepest of the layers: nobody reads its logits.
    """

    def __init__(
        self,
        layers: Sequence[int],
        spots: Sequence[Mapping[str, tuple[int, int]]],
        lengths: Sequence[int],
        *,
        stops: bool,
    ):
        self.stops = stops
        self._layers = layers
        self._count = len(spots)
        offsets = [max(lengths) - length for length in lengths]
        ranges: dict[str, dict[int, tuple[int, int]]] = {}
        for row, of_row in enumerate(spots):
            for position, wanted in of_row.items():
                ranges.setdefault(position, {})[row] = wanted
        self._ranges = ranges
        self._single = {name: all(end - start == 1 for start, end in of.values()) for name, of in ranges.items()}
        self._spots: dict[torch.device, dict[str, _Spots]] = {
            torch.device("cpu"): {name: _Spots.of(of, offsets) for name, of in ranges.items()}
        }
        self._kept: list[torch.Tensor] = [torch.empty(0)] * len(layers)

    @classmethod
    def of_last(cls, layers: Sequence[int], lengths: Sequence[int], *, stops: bool) -> Recorder:
        """Of the last token of each row, as position ``rating``."""
        return cls(layers, [{"rating": (length - 1, length)} for length in lengths], lengths, stops=stops)

    def hooks(self) -> list[tuple[int, Hook]]:
        """A hook for each layer."""
        return [(layer, partial(self._keep, at)) for at, layer in enumerate(self._layers)]

    def _keep(self, at: int, tensor: torch.Tensor, hook: Any) -> None:
        if self._ranges:
            spots = self._on(tensor.device)
            self._kept[at] = torch.cat([each.means(tensor, self._single[name]) for name, each in spots.items()])
        if self.stops and self._layers[at] == max(self._layers):
            raise AllRecorded

    def _on(self, device: torch.device) -> dict[str, _Spots]:
        """The spots on a device; the blocks of a model may be on several."""
        if device not in self._spots:
            self._spots[device] = {name: each.to(device) for name, each in self._spots[torch.device("cpu")].items()}
        return self._spots[device]

    def vectors(self) -> list[dict[str, torch.Tensor]]:
        """Of each row, [layers, d_model] float32 on the host by position: one transfer from each device."""
        found: list[dict[str, torch.Tensor]] = [{} for _ in range(self._count)]
        if not self._ranges:
            return found
        by_layer = torch.empty(len(self._layers), *self._kept[0].shape)
        for device in {kept.device for kept in self._kept}:
            here = [at for at, kept in enumerate(self._kept) if kept.device == device]
            by_layer[here] = torch.stack([self._kept[at] for at in here]).cpu()
        places = [(row, position) for position, of_position in self._ranges.items() for row in of_position]
        for (row, position), vectors in zip(places, by_layer.transpose(0, 1).contiguous(), strict=True):
            found[row][position] = vectors
        return found


def spots(asked: Asked, positions: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Token ranges [start, end) of the positions that lie in the conversation (all but ``rating``).

    The completion is the last turn before the question; ``last_prompt`` is the token just before it, where the
    assistant's turn has been opened. An empty completion has only that one.
    """
    start, end = asked.spans[-2]
    ranges = {"last_prompt": (start - 1, start)}
    if end > start:
        ranges["first_completion"] = (start, start + 1)
        ranges["last_completion"] = (end - 1, end)
        ranges["mean_completion"] = (start, end)
    return {position: ranges[position] for position in positions if position in ranges}
