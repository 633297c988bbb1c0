"""What an engine's numbers are held against: plain transformers, one unpadded pass over the whole row, no cache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from engine_calls import masses_of
from tiny_models import plain_model
from torch import nn

from prefs.models.loading import ModelSpec
from prefs.models.prompts import Prompt
from prefs.models.sampling import draw, row_uniforms
from prefs.models.types import Conversation, Sampling


@dataclass(frozen=True, eq=False)
class Change:
    """``vector`` is added after block ``layer`` to the tokens [start, end)."""

    layer: int
    vector: torch.Tensor
    start: int
    end: int


class Plain:
    """A model of transformers, with hooks on its own blocks."""

    def __init__(self, spec: ModelSpec, layers: int):
        self.model: Any = plain_model(spec)
        stacks = [
            module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == layers and "vision" not in name
        ]
        self.blocks = stacks[0]
        self.run = cache(self._run)

    @torch.inference_mode()
    def _run(self, ids: tuple[int, ...], change: Change | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities [tokens, vocabulary] and residuals [layers, tokens, d_model] of one row."""
        kept: list[torch.Tensor] = []

        def watch(layer: int):
            def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
                stream = output[0] if isinstance(output, tuple) else output
                if change is not None and change.layer == layer:
                    stream = stream.clone()
                    stream[:, change.start : change.end] += change.vector
                kept.append(stream[0])
                return (stream, *output[1:]) if isinstance(output, tuple) else stream

            return hook

        handles = [block.register_forward_hook(watch(layer)) for layer, block in enumerate(self.blocks)]
        try:
            logits = self.model(torch.tensor([ids]), use_cache=False).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        return logits.float().log_softmax(-1), torch.stack(kept)

    def log_masses(self, prompt: Prompt, change: Change | None = None) -> list[float]:
        """Log of the options' masses, one pass for each beginning."""
        masses = masses_of(prompt, lambda ids: self.run(ids, change)[0][-1].double().exp())
        return [math.log(mass) for mass in masses]

    def drawn(
        self, ids: tuple[int, ...], seed: int, turns: Conversation, sampling: Sampling, stops: frozenset[int]
    ) -> list[int]:
        """The tokens that a seed draws after a row."""
        uniforms, tokens = row_uniforms(seed, turns, sampling.max_new_tokens), []
        for uniform in uniforms:
            log_probs, _ = self.run((*ids, *tokens))
            token = int(draw(log_probs[-1:], torch.tensor([[uniform]], dtype=torch.float64), sampling))
            if token in stops:
                break
            tokens.append(token)
        return tokens
