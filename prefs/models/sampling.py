"""Drawing tokens with random numbers that belong to the row: the same row draws the same tokens in any batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from prefs.models.tokens import ChatEncoder
from prefs.models.types import Conversation, Sampling, as_dicts

# In place of a token, where logits give no probabilities.
NOT_FINITE = -1


def row_uniforms(seed: int, conversation: Conversation, count: int) -> np.ndarray:
    """The `count` uniform numbers in [0, 1) of one (seed, conversation), by NumPy's counter-based Philox."""
    key = int.from_bytes(_row_digest(seed, conversation)[:16], "little")
    return np.random.Generator(np.random.Philox(key=key)).random(count)


def row_seed(seed: int, conversation: Conversation) -> int:
    """A seed of 31 bits for one (seed, conversation), for an engine that draws by itself.

    Given the seed alone, such an engine draws the same random numbers for every row.
    """
    return int.from_bytes(_row_digest(seed, conversation)[:4], "little") >> 1


def _row_digest(seed: int, conversation: Conversation) -> bytes:
    return hashlib.sha256(json.dumps([seed, as_dicts(conversation)], sort_keys=True).encode()).digest()


def draw(logits: torch.Tensor, uniforms: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Draw tokens by inverting each row's cumulative distribution.

    Parameters
    ----------
    logits
        [rows, vocabulary].
    uniforms
        [rows, draws], float64 in [0, 1).

    Returns
    -------
    torch.Tensor
        [rows, draws] token ids, on the CPU; `NOT_FINITE` where a row's logits hold a NaN or +∞, or -∞ alone.
    """
    logits = logits.float()
    if sampling.temperature == 0:
        tokens = logits.argmax(dim=-1, keepdim=True).where(logits.amax(dim=-1, keepdim=True).isfinite(), NOT_FINITE)
        return tokens.expand(-1, uniforms.shape[1]).cpu()
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        # A job that finds everything in the store draws nothing, and loads no transformers.
        from transformers.generation.logits_process import TopPLogitsWarper

        logits = TopPLogitsWarper(sampling.top_p)(torch.empty(0, dtype=torch.long), logits)  # type: ignore[arg-type]
    probabilities = logits.softmax(dim=-1)
    if probabilities.device.type == "mps":  # which has no float64
        probabilities = probabilities.cpu()
    cumulative = probabilities.double().cumsum(dim=-1)
    # Scaled by the last entry, so that rounding can never point past the end; `right` skips tokens of probability 0.
    total = cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, uniforms.to(cumulative.device) * total, right=True)
    return tokens.clamp_(max=logits.shape[-1] - 1).where(total.isfinite(), NOT_FINITE).cpu()


@dataclass(frozen=True)
class Stops:
    """What ends an answer: one of these tokens; or a text, where turns end with none of them."""

    tokens: frozenset[int] = frozenset()
    text: str | None = None

    @classmethod
    def of(cls, encoder: ChatEncoder, generation_config: Any) -> Stops:
        """By a model's generation config (None: it has none), its tokenizer, and the end of a turn in its template,
        which fine-tunes often leave out of the former two."""
        eos = generation_config.eos_token_id if generation_config is not None else None
        own, end = encoder.tokenizer.eos_token_id, encoder.turn_end()
        tokens = [*([eos] if isinstance(eos, int) else eos or []), own, end if isinstance(end, int) else None]
        return cls(frozenset(token for token in tokens if token is not None), end if isinstance(end, str) else None)

    def reached(self, tokenizer: Any, ids: Sequence[int]) -> bool:
        """Whether the last of an answer's tokens completes the text that ends it."""
        # Each of the text's tokens has a byte of it at least.
        return self.text is not None and self.text in tokenizer.decode(ids[-len(self.text.encode()) :])

    def cut(self, text: str) -> str:
        """What of an answer stands before the text that ends it."""
        return text if self.text is None else text.partition(self.text)[0]
