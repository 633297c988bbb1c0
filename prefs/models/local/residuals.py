"""Residual-stream vectors, kept as a forward pass goes by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from prefs.errors import UserError
from prefs.models.positions import Span

Hook = Callable[..., torch.Tensor | None]


def one_stream(tensor: torch.Tensor) -> None:
    """Refuse a residual stream [rows, width, streams, d_model] of several, which is no vector a token (DeepSeek-V4).

    Raises
    ------
    UserError
        If it is one.
    """
    if tensor.dim() > 3:
        raise UserError(
            f"this model has {tensor.shape[2]} residual streams, which can be neither captured nor steered; give"
            " capture=none probe=none"
        )


class AllRecorded(Exception):
    """Ends a forward pass after the deepest layer that anybody wants."""


class _Columns(NamedTuple):
    """Where one position lies: in these `rows`, the columns from `starts` to before `ends`, counted from the end of the
    pass (-1 is the last), where all rows end. All are [rows]."""

    rows: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor

    def means(self, tensor: torch.Tensor, single: bool) -> torch.Tensor:
        """[rows, d_model] float32 means over the columns of a residual stream [batch, width, d_model]."""
        if single:
            return tensor[self.rows, self.starts].float()
        columns = torch.arange(-tensor.shape[1], 0, device=tensor.device)
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
    ranges
        Of each row, token ranges [start, end) by position. A vector is the mean over its range, in float32.
    lengths
        Tokens of each row.
    stops
        Whether the pass may end (`AllRecorded`) after the deepest of the layers: nobody reads its logits.
    """

    def __init__(
        self, layers: Sequence[int], ranges: Sequence[Mapping[str, Span]], lengths: Sequence[int], *, stops: bool
    ):
        self.stops = stops
        self._layers = layers
        self._count = len(ranges)
        by_position: dict[str, dict[int, Span]] = {}
        for row, own in enumerate(ranges):
            for position, (start, end) in own.items():
                by_position.setdefault(position, {})[row] = (start - lengths[row], end - lengths[row])
        self._ranges = by_position
        self._single = [all(end - start == 1 for start, end in own.values()) for own in by_position.values()]
        columns = [
            _Columns(torch.tensor(list(own)), *torch.tensor(list(own.values())).unbind(dim=1))
            for own in by_position.values()
        ]
        self._columns: dict[torch.device, list[_Columns]] = {torch.device("cpu"): columns}
        self._kept: list[torch.Tensor] = [torch.empty(0)] * len(layers)

    def hooks(self) -> list[tuple[int, Hook]]:
        """A hook for each layer."""
        return [(layer, partial(self._keep, index)) for index, layer in enumerate(self._layers)]

    def _keep(self, index: int, tensor: torch.Tensor, hook: Any) -> None:
        one_stream(tensor)
        if self._ranges:
            columns = zip(self._on(tensor.device), self._single, strict=True)
            self._kept[index] = torch.cat([position.means(tensor, single) for position, single in columns])
        if self.stops and self._layers[index] == max(self._layers):
            raise AllRecorded

    def _on(self, device: torch.device) -> list[_Columns]:
        """The columns on a device; the blocks of a model may be on several."""
        if device not in self._columns:
            on_cpu = self._columns[torch.device("cpu")]
            self._columns[device] = [_Columns(*(numbers.to(device) for numbers in position)) for position in on_cpu]
        return self._columns[device]

    def vectors(self) -> list[dict[str, torch.Tensor]]:
        """Of each row, [layers, d_model] float32 on the host by position: one transfer from each device."""
        by_row: list[dict[str, torch.Tensor]] = [{} for _ in range(self._count)]
        if not self._ranges:
            return by_row
        by_layer = torch.empty(len(self._layers), *self._kept[0].shape)
        for device in {kept.device for kept in self._kept}:
            here = [index for index, kept in enumerate(self._kept) if kept.device == device]
            by_layer[here] = torch.stack([self._kept[index] for index in here]).cpu()
        places = [(row, position) for position, own in self._ranges.items() for row in own]
        for (row, position), vectors in zip(places, by_layer.transpose(0, 1).contiguous(), strict=True):
            by_row[row][position] = vectors
        return by_row
