"""Where a model runs, and in which precision it runs best there."""

from __future__ import annotations

import torch

from prefs.errors import UserError


def resolve_device(name: str) -> torch.device:
    """The device that a config names; ``auto`` takes a GPU where there is one.

    Raises
    ------
    UserError
        If torch does not see that device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"model.device: {name} was asked for, but torch sees no CUDA device; use cpu or auto")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("model.device: mps was asked for, but torch sees none; use cpu or auto")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> str:
    """The precision that a config names; ``auto`` is bfloat16 where the device multiplies it, else float32.

    A processor without bfloat16 instructions (AVX2, say) takes some 60 times as long for it as for float32. What
    ``auto`` comes to is part of the model's identity in the store, as if it had been written in the config.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type == "cpu":
        return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
    return "bfloat16"
