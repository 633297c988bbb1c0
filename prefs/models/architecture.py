"""What a model's config says of it, before any weights are loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    written = _written(path, revision)
    if written is not None:
        return written
    # Imported only now: it takes two seconds, and most configs can do without it.
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read the config of {path}: {first_line(error)}") from None
    return Architecture(int(config.num_hidden_layers), int(config.hidden_size), str(config.model_type))


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
    try:
        config: dict[str, Any] = json.loads(file.read_text())
        layers, width, family = (config[name] for name in ("num_hidden_layers", "hidden_size", "model_type"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    parts = [part for part in config.values() if isinstance(part, dict)]
    if any("model_type" in part or "hidden_size" in part for part in parts):
        return None
    if not (isinstance(layers, int) and isinstance(width, int) and isinstance(family, str)):
        return None
    return Architecture(layers, width, family)
