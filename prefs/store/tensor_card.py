"""Tensors on disk with a card that says what they are: safetensors, and JSON beside them that holds their checksum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from prefs.errors import UserError
from prefs.store.files import write_durably


def save_pair(
    tensors_file: Path, tensors: Mapping[str, torch.Tensor], own: Mapping[str, Any], card: Mapping[str, Any]
) -> list[Path]:
    """Write tensors and, with the ending ``.json``, their card: what is their `own`, and whatever else there is to say.

    Each file appears whole or not at all. The card is written last and holds the checksum of the tensors, so a pair
    that does not belong together (a save cut short over an older one) is noticed when it is loaded.

    Returns
    -------
    list of Path
        Both files.

    Raises
    ------
    ValueError
        If the card has a NaN or infinity, or uses a name that is one of `own`.
    TypeError
        If the card is not JSON.
    UserError
        If the disk refuses.
    """
    content = save({name: part.detach().cpu().contiguous() for name, part in tensors.items()})
    own = {**own, "sha256": hashlib.sha256(content).hexdigest()}
    if taken := sorted(own.keys() & card.keys()):
        raise ValueError(f"the card's {', '.join(taken)} is written with the tensors themselves")
    text = json.dumps({**own, **card}, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    card_file = tensors_file.with_suffix(".json")
    try:
        tensors_file.parent.mkdir(parents=True, exist_ok=True)
        write_durably(tensors_file, content)
        write_durably(card_file, text.encode())
    except OSError as error:
        raise UserError(f"cannot write {tensors_file}: {error.strerror or error}") from None
    return [tensors_file, card_file]


def load_pair(
    tensors_file: Path, wanted: Mapping[str, type], *, what: str, absent: str, again: str
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `save_pair` wrote.

    Parameters
    ----------
    wanted
        Names that the card must have, with the types of their values.
    what, absent, again
        For messages: what it is ("probe"), what to do where there is none, and what makes a new one ("train again").

    Raises
    ------
    UserError
        If a file is missing, damaged, not of the other, or has numbers that are not finite; it says what to do.
    """
    card_file = tensors_file.with_suffix(".json")
    try:
        content = tensors_file.read_bytes()
        card = json.loads(card_file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no {what} in {tensors_file.parent}: {absent}") from None
    except ValueError as error:
        raise UserError(f"{card_file} is not JSON ({error}): {again}") from None
    for key, kind in {**wanted, "sha256": str}.items():
        if not isinstance(card, dict) or not isinstance(card.get(key), kind):
            raise UserError(f"{card_file} has no {key} ({kind.__name__}), so it is no card of a {what}: {again}")
    if hashlib.sha256(content).hexdigest() != card["sha256"]:
        raise UserError(f"{tensors_file} is damaged or not of the {what} in {card_file.name} beside it: {again}")
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise UserError(f"{tensors_file} is not safetensors ({error}): {again}") from None
    if broken := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise UserError(f"{tensors_file} holds a NaN or an infinity ({', '.join(broken)}): {again}")
    return tensors, card
