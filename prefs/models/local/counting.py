"""What the local engine would run: the engine itself, over passes that count and a decoder that makes texts up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig
from transformers.cache_utils import DynamicCache

from prefs.models.architecture import Architecture, architecture, context_length
from prefs.models.counting import COMPLETER, Counts, MadeUp, role_of, tokenizer_of
from prefs.models.loading import ModelSpec, model_folder
from prefs.models.local.decoding import Decoder
from prefs.models.local.engine import LocalEngine
from prefs.models.local.memory import Halving
from prefs.models.local.passes import Passes, State, Watcher, blocks_until_stopped
from prefs.models.local.residuals import AllRecorded, Recorder
from prefs.models.local.sharing import Sharing
from prefs.models.options import Path, branchings
from prefs.models.positions import Span
from prefs.models.prompts import Prompt, Thought
from prefs.models.tokens import ChatEncoder
from prefs.models.types import Conversation, Reply, Request, Sample, Sampling, Usage


class CountingLocal(LocalEngine):
    """Counts the tokens that would be run. Steered passes are counted as those of a family that `shares_blocks`."""

    def __init__(self, spec: ModelSpec, counts: Counts):
        shape = architecture(model_folder(spec), spec.revision)
        self.spec, self.counts = spec, counts
        self.encoder = ChatEncoder(tokenizer_of(spec), spec.chat_template_kwargs, spec.thinking)
        self.d_model, self.n_layers = shape.d_model, shape.layers
        self.max_context = spec.max_context or context_length(shape.context, self.encoder.tokenizer)
        self.passes = _CountingPasses(shape, counts, _sharing(spec))
        self.device, self.recorder = self.passes.device, partial(_Unread, shape.d_model)
        self.decoder = _MakingUp(counts, self.encoder, self.passes)
        self._halving, self._requests, self.proof = Halving(spec.name), 0, None

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        self.counts.role, before = role_of(requests[0]), self._requests  # of a stage, and so the same for all
        yield from super().run(requests)
        self.counts.tally.requests += self._requests - before

    def usage(self) -> Usage:
        return Usage()

    def close(self) -> None:
        pass


def _sharing(spec: ModelSpec) -> Sharing:
    """What passes may share by the config, which `architecture` has brought here; all, of a family that is not known.
    What is only found out with the weights is not counted."""
    try:
        options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
        return Sharing.of_config(AutoConfig.from_pretrained(model_folder(spec), revision=spec.revision, **options))
    except (OSError, ValueError, KeyError):
        return Sharing()


class _CountingPasses(Passes):
    """Runs nothing. A pass counts as its share of the blocks; its residual stream and its logits have no numbers."""

    _begins_above = True  # pyright: ignore[reportAssignmentType]

    def __init__(self, shape: Architecture, counts: Counts, sharing: Sharing):
        self.device, self.n_layers, self.sharing = torch.device("cpu"), shape.layers, sharing
        self._d_model, self._counts = shape.d_model, counts

    def extend_tree(
        self, state: State, trees: Sequence[Sequence[Path]], watchers: Sequence[Watcher] = ()
    ) -> torch.Tensor:
        self._counts.tally.prompt_tokens += sum(map(len, trees))
        return torch.empty((len(trees), max(map(len, trees)), 0))

    def nothing(self, rows: int, cached: bool = True) -> State:
        return replace(super().nothing(rows, cached=False), cache=DynamicCache())

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def nll(self, logits: torch.Tensor, tokens: torch.Tensor, reduction: str) -> torch.Tensor:
        return torch.zeros(() if reduction == "sum" else len(tokens), dtype=torch.float64)

    def _run(
        self,
        state: State,
        rows: Sequence[Sequence[int]],
        keep: int,
        watchers: Sequence[Watcher],
        *,
        drawn: bool = False,
        first: int = 0,
    ) -> tuple[State, torch.Tensor]:
        lengths = self.tensor([len(row) for row in rows])
        stream = torch.empty((len(rows), int(lengths.max()), self._d_model), device="meta")
        with suppress(AllRecorded):
            for _, hook in (hook for watcher in watchers for hook in watcher.hooks()):
                hook(stream, None)
        blocks = (blocks_until_stopped(watchers) or self.n_layers) - first
        self._counts.tally.prompt_tokens += int(lengths.sum()) * blocks / self.n_layers
        run = tuple((*before, *row) for before, row in zip(state.ids, rows, strict=True))
        return replace(state, ids=run, lengths=state.lengths + lengths), torch.empty((len(rows), keep, 0))

    def _handing_over(self, layers: Sequence[int], hidden: torch.Tensor) -> AbstractContextManager[object]:
        return nullcontext()


class _MakingUp(Decoder):
    """Makes up what would be drawn."""

    def __init__(self, counts: Counts, encoder: ChatEncoder, passes: Passes):
        self._counts, self._encoder, self._made_up, self._passes = counts, encoder, MadeUp(counts, encoder), passes

    def masses(self, state: State, logits: torch.Tensor, prompts: Sequence[Prompt]) -> np.ndarray:
        for _ in self._after_beginnings(state, [branchings(prompt.beginnings) for prompt in prompts]):
            pass
        options = len(prompts[0].tails)
        return np.full((len(prompts), options), 1 / options)

    def samples(
        self,
        state: State,
        logits: torch.Tensor,
        seeds: Sequence[Sequence[int]],
        turns: Sequence[Conversation],
        sampling: Sampling,
    ) -> list[dict[int, Sample]]:
        self._counts.made_up |= self._counts.role == COMPLETER
        self._counts.tally.drawn_tokens += self._counts.answer(sampling.max_new_tokens).run * sum(map(len, seeds))
        return [
            {seed: self._made_up.sample(row, seed, sampling) for seed in own}
            for row, own in zip(turns, seeds, strict=True)
        ]

    def thoughts(
        self,
        state: State,
        logits: torch.Tensor,
        seeds: Sequence[Sequence[int]],
        turns: Sequence[Conversation],
        sampling: Sampling,
    ) -> list[dict[int, Thought]]:
        assert self._encoder.thinking is not None
        length, thoughts = self._counts.thought(self._encoder.thinking.max_tokens, self._encoder), sum(map(len, seeds))
        self._counts.made_up = True
        self._counts.tally.drawn_tokens += length.run * thoughts
        self._counts.tally.thoughts += thoughts
        return [
            {seed: Thought(self._made_up.text(length.drawn, row, seed), round(length.drawn)) for seed in own}
            for row, own in zip(turns, seeds, strict=True)
        ]


class _Unread(Recorder):
    """Vectors without numbers, which take up no memory."""

    def __init__(
        self,
        d_model: int,
        layers: Sequence[int],
        ranges: Sequence[Mapping[str, Span]],
        lengths: Sequence[int],
        **stops: Any,
    ):
        super().__init__(layers, [{}] * len(ranges), lengths, **stops)
        self._vectors, self._by_row = torch.empty(len(layers), d_model, device="meta"), ranges

    def vectors(self) -> list[dict[str, torch.Tensor]]:
        return [dict.fromkeys(ranges, self._vectors) for ranges in self._by_row]
