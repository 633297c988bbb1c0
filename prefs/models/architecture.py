"""What a model's config says of it, before any weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import AutoConfig

from prefs.errors import UserError, first_line


@dataclass(frozen=True)
class Architecture:
    """Number of layers, width of the residual stream, and the family as transformers names it (``llama``)."""

    layers: int
    d_model: int
    family: str


def architecture(path: str, revision: str | None) -> Architecture:
    """The architecture of a model in a folder or on the hub; of one that also sees, that of its language model.

    Raises
    ------
    UserError
        If the config cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read the config of {path}: {first_line(error)}") from None
    return Architecture(int(config.num_hidden_layers), int(config.hidden_size), str(config.model_type))
