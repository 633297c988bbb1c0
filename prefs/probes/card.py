"""A probe on disk: its tensors as safetensors, and a card in JSON that says what it is."""

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
from prefs.probes.probe import FORMS, Probe, Site

TENSORS = "probe.safetensors"
CARD = "probe.json"


@dataclass(frozen=True, eq=False)
class SavedProbe:
    """A probe with its card.

    Attributes
    ----------
    probe
        Ready to predict.
    card
        Whatever JSON says where it is from: model, template, data, metrics.
    directions
        [S, d] float32: directions of norm 1, in the space of captured vectors, of the same target's probes at all
        ``sites``; None for forms that have none.
    sites
        The S places that probes were trained at.
    """

    probe: Probe
    card: Mapping[str, Any] = field(default_factory=dict)
    directions: torch.Tensor | None = None
    sites: Sequence[Site] = ()


def save_probe(folder: str | Path, saved: SavedProbe) -> list[Path]:
    """Write ``probe.safetensors`` and ``probe.json`` to a folder, made if need be; returns both.

    Each file appears whole or not at all. The card is written last and holds the checksum of the tensors, so a pair
    that does not belong together (a save cut short over an older probe) is noticed when it is loaded.

    Raises
    ------
    ValueError
        If the card has a NaN or infinity, or uses a name that is the probe's own.
    TypeError
        If the card is not JSON.
    """
    probe = saved.probe
    parts = {"mean": probe.mean, "scale": probe.scale, **{f"form.{name}": each for name, each in probe.tensors.items()}}
    if saved.directions is not None:
        parts["directions"] = saved.directions
    tensors = save({name: part.detach().cpu().contiguous() for name, part in parts.items()})
    own = {
        "kind": probe.kind,
        "layer": probe.site.layer,
        "position": probe.site.position,
        "target": probe.target,
        "d_model": probe.d_model,
        "standardisation": "(vector - mean) / scale, both in the file, from the training tasks alone",
        "sites": [list(site) for site in saved.sites],
        "sha256": hashlib.sha256(tensors).hexdigest(),
    }
    if taken := sorted(own.keys() & saved.card.keys()):
        raise ValueError(f"the card's {', '.join(taken)} is written by save_probe itself")
    text = json.dumps({**own, **saved.card}, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / TENSORS, tensors)
    write_durably(folder / CARD, text.encode())
    return [folder / TENSORS, folder / CARD]


def load_probe(folder: str | Path) -> SavedProbe:
    """Read what `save_probe` wrote.

    Raises
    ------
    UserError
        If a file is missing, damaged or of another probe, or tensors are not as the card says; it says what to do.
    """
    folder = Path(folder)
    try:
        tensors = (folder / TENSORS).read_bytes()
        card = json.loads((folder / CARD).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no probe in {folder}: give a folder with {CARD}, such as RUN/TEMPLATE/probe/exact") from None
    except ValueError as error:
        raise UserError(f"{folder / CARD} is not JSON ({error}): train the probe again") from None

    wanted = {"kind": str, "layer": int, "position": str, "target": str, "d_model": int, "sites": list, "sha256": str}
    for key, kind in wanted.items():
        if not isinstance(card, dict) or not isinstance(card.get(key), kind):
            raise UserError(f"{folder / CARD} has no {key} ({kind.__name__}): it is no probe card; train again")
    if hashlib.sha256(tensors).hexdigest() != card["sha256"]:
        raise UserError(f"{folder / TENSORS} is damaged or not of the probe in {CARD} beside it: train the probe again")
    if card["kind"] not in FORMS:
        raise UserError(f"{folder / CARD}: kind {card['kind']!r} is none of {', '.join(FORMS)}")
    try:
        parts = load(tensors)
        probe = Probe(
            kind=card["kind"],
            site=Site(card["layer"], card["position"]),
            target=card["target"],
            mean=parts["mean"],
            scale=parts["scale"],
            tensors={name.removeprefix("form."): part for name, part in parts.items() if name.startswith("form.")},
        )
        width = probe.predict(torch.zeros(1, card["d_model"])).shape
        sites = [Site(int(layer), str(position)) for layer, position in card["sites"]]
    except (SafetensorError, KeyError, RuntimeError, UserError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{folder / CARD} does not describe {TENSORS} ({why}): train the probe again") from None
    if width != (1,):
        raise UserError(f"{folder / TENSORS} gives {list(width)} predictions for one vector: train the probe again")
    return SavedProbe(probe, card, parts.get("directions"), sites)
