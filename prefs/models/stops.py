"""The tokens that end an answer, for every engine that draws tokens itself."""

from __future__ import annotations

from typing import Any


def stop_tokens(tokenizer: Any, generation_config: Any) -> frozenset[int]:
    """What a model's generation config (None: it has none) and its tokenizer say ends a turn."""
    stops = generation_config.eos_token_id if generation_config is not None else None
    stops = [stops] if isinstance(stops, int) else list(stops or [])
    return frozenset([*stops, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])])
