"""What a model's config says of it, before any weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from prefs.errors import UserError, first_line


@dataclass(frozen=True)
class Architecture:
    """Number of layers, width of the residual stream, the family as transformers names it (``llama``), and how many
    tokens the context holds."""

    layers: int
    d_model: int
    family: str
    context: int


def architecture(path: str, revision: str | None) -> Architecture:
    """The architecture of a model in a folder or on the hub; of one that also sees, that of its language model.

    Raises
    ------
    UserError
        If the config cannot be read.
    """
    config = _config(path, revision).get_text_config()
    return Architecture(
        layers=int(config.num_hidden_layers),
        d_model=int(config.hidden_size),
        family=str(config.model_type),
        context=int(config.max_position_embeddings),
    )


def active_parameters(path: str, revision: str | None) -> int:
    """How many parameters a token meets in a model, whose weights need not be there. Of experts, those that it is sent
    to; what only images meet is left out.

    Raises
    ------
    UserError
        If the config cannot be read, or transformers does not know the family.
    """
    config = _config(path, revision).get_text_config()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, ImportError) as error:
        raise UserError(f"cannot count the parameters of {path}: {first_line(error)}") from None
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    share = chosen / experts if experts and chosen else 1.0
    return round(sum(each.numel() * (share if ".experts." in name else 1) for name, each in model.named_parameters()))


def _config(path: str, revision: str | None) -> Any:
    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read the config of {path}: {first_line(error)}") from None
