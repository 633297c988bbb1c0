"""How large a model is, before its weights are there."""

from __future__ import annotations

import re

from prefs.errors import UserError
from prefs.models.loading import EMBEDDED, ModelSpec, model_folder

# Llama-3.1-8B-Instruct, SmolLM2-135M, Mixtral-8x7B, qwen2.5:7b.
_NAMED = re.compile(r"(?<![a-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", re.IGNORECASE)


def billions(spec: ModelSpec) -> float | None:
    """Billions of parameters: as the model's name says, else counted from its config. None: nothing says so, as for
    most served models."""
    from prefs.models import embedded

    name = embedded.GGUF if spec.path.startswith(EMBEDDED) else spec.path.rstrip("/").rpartition("/")[2]
    if named := _NAMED.search(name):
        experts, count, unit = named.groups()
        return int(experts or 1) * float(count) / (1000 if unit in "mM" else 1)
    if spec.backend == "openai":
        return None
    from prefs.models.architecture import active_parameters

    try:
        return active_parameters(model_folder(spec), spec.revision) / 1e9
    except UserError:
        return None
