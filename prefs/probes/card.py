"""A probe on disk: its weights as safetensors, and a card in JSON that says what they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from prefs.errors import UserError
from prefs.files import write_durably

WEIGHTS = "probe.safetensors"
CARD = "probe.json"


@dataclass(frozen=True, eq=False)
class SavedProbe:
    """A linear probe for vectors as captured: rating of target t at layer l = weight[t, l] . vector + bias[t, l].

    ``weight`` [T, L, d] and ``bias`` [T, L]; ``targets`` are the T names, ``layers`` the L layer numbers of the model,
    and ``metadata`` whatever JSON the caller wants to remember.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    targets: tuple[str, ...]
    layers: tuple[int, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def d_model(self) -> int:
        return self.weight.shape[-1]


def save_probe(
    folder: str | Path,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    targets: Sequence[str],
    layers: Sequence[int],
    metadata: Mapping[str, Any],
) -> None:
    """Write ``probe.safetensors`` and ``probe.json`` to a folder, made if need be.

    Each file appears whole or not at all. The card is written last and holds the checksum of the weights, so a pair
    that does not belong together (a save cut short over an older probe) is noticed when it is loaded.

    Raises
    ------
    ValueError
        If shapes do not agree with targets and layers, or the metadata has a NaN or infinity.
    TypeError
        If the metadata is not JSON.
    """
    probe = SavedProbe(weight, bias, tuple(targets), tuple(int(layer) for layer in layers), metadata)
    problem = _mismatch(probe, d_model=weight.shape[-1] if weight.ndim else 0)
    if problem is not None:
        raise ValueError(problem)
    tensors = save({"weight": weight.detach().cpu().contiguous(), "bias": bias.detach().cpu().contiguous()})
    card = {
        "targets": probe.targets,
        "layers": probe.layers,
        "d_model": probe.d_model,
        "weights_sha256": hashlib.sha256(tensors).hexdigest(),
        "metadata": metadata,
    }
    text = json.dumps(card, indent=2, allow_nan=False, ensure_ascii=False) + "\n"

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / WEIGHTS, tensors)
    write_durably(folder / CARD, text.encode())


def load_probe(folder: str | Path) -> SavedProbe:
    """Read what `save_probe` wrote.

    Raises
    ------
    UserError
        If a file is missing, damaged or of another probe, or shapes are not as the card says; it says what to do.
    """
    folder = Path(folder)
    try:
        tensors = (folder / WEIGHTS).read_bytes()
        card = json.loads((folder / CARD).read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"no probe in {folder}: {error.filename} is missing; give a finished run's folder") from None
    except ValueError as error:
        raise UserError(f"{folder / CARD} is not JSON ({error}): train the probe again") from None

    wanted = {"targets": list, "layers": list, "d_model": int, "weights_sha256": str, "metadata": dict}
    for key, kind in wanted.items():
        if not isinstance(card, dict) or not isinstance(card.get(key), kind):
            raise UserError(f"{folder / CARD} has no {key} ({kind.__name__}): it is no probe card; train again")
    if hashlib.sha256(tensors).hexdigest() != card["weights_sha256"]:
        raise UserError(f"{folder / WEIGHTS} is damaged or not of the probe in {CARD} beside it: train the probe again")
    try:
        stored = load(tensors)
        weight, bias = stored["weight"], stored["bias"]
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{folder / WEIGHTS} has no weight and bias ({error}): train the probe again") from None
    probe = SavedProbe(weight, bias, tuple(card["targets"]), tuple(card["layers"]), card["metadata"])
    problem = _mismatch(probe, d_model=card["d_model"])
    if problem is not None:
        raise UserError(f"{folder / CARD} does not describe {WEIGHTS}: {problem}; train the probe again")
    return probe


def _mismatch(probe: SavedProbe, d_model: int) -> str | None:
    bank = (len(probe.targets), len(probe.layers))
    if tuple(probe.weight.shape) == (*bank, d_model) and tuple(probe.bias.shape) == bank and d_model > 0:
        return None
    return (
        f"{bank[0]} targets, {bank[1]} layers and d_model={d_model} need weight {[*bank, d_model]} and "
        f"bias {list(bank)}, got weight {list(probe.weight.shape)} and bias {list(probe.bias.shape)}"
    )
