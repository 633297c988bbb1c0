"""Drawing tokens with random numbers that belong to the row: the same row draws the same tokens in any batch."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import torch
from transformers.generation.logits_process import TopPLogitsWarper

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
        logits = TopPLogitsWarper(sampling.top_p)(torch.empty(0, dtype=torch.long), logits)  # type: ignore[arg-type]
    probabilities = logits.softmax(dim=-1)
    if probabilities.device.type == "mps":  # which has no float64
        probabilities = probabilities.cpu()
    cumulative = probabilities.double().cumsum(dim=-1)
    # Scaled by the last entry, so that rounding can never point past the end; `right` skips tokens of probability 0.
    total = cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, uniforms.to(cumulative.device) * total, right=True)
    return tokens.clamp_(max=logits.shape[-1] - 1).where(total.isfinite(), NOT_FINITE).cpu()


def stop_tokens(tokenizer: Any, generation_config: Any) -> frozenset[int]:
    """The tokens that end an answer, by a model's generation config (None: it has none) and its tokenizer."""
    stops = generation_config.eos_token_id if generation_config is not None else None
    stops = [stops] if isinstance(stops, int) else list(stops or [])
    return frozenset([*stops, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])])
