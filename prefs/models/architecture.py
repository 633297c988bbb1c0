"""What a model's config says of it, before any weights are loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefs.errors import explained
from prefs.models.types import NO_LIMIT

# What families call the number of tokens that their context holds.
CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")


@dataclass(frozen=True)
class Architecture:
    """Number of layers, width of the residual stream, the family as transformers names it (``llama``), and how many
    tokens the context holds (None: the config does not say)."""

    layers: int
    d_model: int
    family: str
    context: int | None


def architecture(path: str, revision: str | None) -> Architecture:
    """The architecture of a model in a folder or on the hub; of one that also sees, that of its language model.

    Raises
    ------
    UserError
        If the config cannot be read.
    """
    written = _written(path, revision)
    if written is not None:
        return written
    config = _config(path, revision).get_text_config()
    with explained(f"the config of {path} is not that of a language model"):
        return Architecture(
            layers=int(config.num_hidden_layers),
            d_model=int(config.hidden_size),
            family=str(config.model_type),
            context=written_context(config),
        )


def written_context(config: Any) -> int | None:
    """How many tokens the context holds, by a config of transformers; None where it does not say."""
    written = (getattr(config, name, None) for name in CONTEXT)
    return next((tokens for tokens in written if isinstance(tokens, int) and tokens > 0), None)


def context_length(written: int | None, tokenizer: Any) -> int:
    """How many tokens are read at once: what the config says, else the tokenizer. `NO_LIMIT` where neither does, as of
    recurrent families and those that count positions back from each token (ALiBi)."""
    return written or min(int(tokenizer.model_max_length), NO_LIMIT)


def model_type(path: str) -> str:
    """The family that the config in a folder names; empty where there is none."""
    try:
        return str(json.loads((Path(path).expanduser() / "config.json").read_text())["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def active_parameters(path: str, revision: str | None) -> int:
    """How many parameters a token meets in a model, whose weights need not be there. Of experts, those that it is sent
    to; what only images meet is left out.

    Raises
    ------
    UserError
        If the config cannot be read, or transformers does not know the family.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = _config(path, revision).get_text_config()
    with explained(f"cannot count the parameters of {path}"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    share = chosen / experts if experts and chosen else 1.0
    return round(sum(p.numel() * (share if ".experts." in name else 1) for name, p in model.named_parameters()))


def _config(path: str, revision: str | None) -> Any:
    # Imported only now: it takes two seconds, and most configs can do without it.
    from transformers import AutoConfig

    with explained(f"cannot read the config of {path}"):
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)


def _written(path: str, revision: str | None) -> Architecture | None:
    """The architecture as it stands in a config on disk; None where transformers has to make sense of it.

    That is where something has other names, or is not written because it is the usual, or there are several models.
    """
    file = Path(path) / "config.json"
    if not Path(path).is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(path, "config.json", revision=revision)
        if not isinstance(cached, str):
            return None
        file = Path(cached)
    names = ("num_hidden_layers", "hidden_size", "model_type", "max_position_embeddings")
    try:
        config: dict[str, Any] = json.loads(file.read_text())
        layers, width, family, context = (config[name] for name in names)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    parts = [part for part in config.values() if isinstance(part, dict)]
    if any("model_type" in part or "hidden_size" in part for part in parts):
        return None
    if not (all(isinstance(number, int) for number in (layers, width, context)) and isinstance(family, str)):
        return None
    return Architecture(layers, width, family, context)
