"""How far a batch has been run: what the next forward pass goes on from."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from prefs.models.local.steering import Steered


@dataclass(frozen=True)
class State:
    """A batch that has been run so far: its cache, the mask [rows, width] of real tokens, tokens a row, and what its
    residual stream is steered by. There is no cache before the first pass, nor where none follows it."""

    cache: Cache | None
    mask: torch.Tensor
    lengths: torch.Tensor
    steered: Steered

    def fork(self) -> State:
        """The same, to go on from without changing this one."""
        return replace(self, cache=_fork(self.cache))

    def select(self, rows: torch.Tensor) -> State:
        """The state of these rows, in this order; rows may repeat."""
        if torch.equal(rows, torch.arange(len(self.lengths), device=rows.device)):
            return self
        cache = _fork(self.cache)
        for layer in cache.layers:
            layer.batch_select_indices(rows.to(getattr(layer, "device", rows.device)))  # type: ignore[attr-defined]
        return State(cache, self.mask[rows], self.lengths[rows], self.steered.select(rows))

    def with_lower(self, other: State, count: int) -> State:
        """With the keys and values of another state over the same tokens in its lowest `count` blocks."""
        cache = _fork(self.cache)
        cache.layers[:count] = _fork(other.cache).layers[:count]
        return replace(self, cache=cache)


def _fork(cache: Cache | None) -> Cache:
    """A cache that can be extended without changing this one. Growing layers replace their tensors, so these are
    shared; other kinds write in place and are copied."""
    assert cache is not None, "a state whose pass kept no cache cannot be gone on from"
    forked = copy.copy(cache)
    growing = (DynamicLayer, DynamicSlidingWindowLayer)
    forked.layers = [copy.copy(x) if type(x) in growing else copy.deepcopy(x) for x in cache.layers]
    return forked
