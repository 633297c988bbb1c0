"""A probe on disk: its tensors as safetensors, and a card in JSON that says what it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from prefs.errors import UserError
from prefs.probes.probe import FORMS, Probe, Site
from prefs.store.tensor_card import load_pair, save_pair

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

    Raises
    ------
    ValueError, TypeError
        As `prefs.store.tensor_card.save_pair` does.
    """
    probe = saved.probe
    parts = {"mean": probe.mean, "scale": probe.scale, **{f"form.{name}": each for name, each in probe.tensors.items()}}
    if saved.directions is not None:
        parts["directions"] = saved.directions
    own = {
        "kind": probe.kind,
        "layer": probe.site.layer,
        "position": probe.site.position,
        "target": probe.target,
        "d_model": probe.d_model,
        "standardisation": "(vector - mean) / scale, both in the file, from the training tasks alone",
        "sites": [list(site) for site in saved.sites],
    }
    return save_pair(Path(folder) / TENSORS, parts, own, saved.card)


def load_probe(folder: str | Path) -> SavedProbe:
    """Read what `save_probe` wrote.

    Raises
    ------
    UserError
        If a file is missing, damaged or of another probe, or tensors are not as the card says; it says what to do.
    """
    folder = Path(folder)
    wanted = {"kind": str, "layer": int, "position": str, "target": str, "d_model": int, "sites": list}
    give = f"give a folder with {CARD}, such as RUN/TEMPLATE/probe/exact"
    parts, card = load_pair(folder / TENSORS, wanted, what="probe", absent=give, again="train the probe again")
    if card["kind"] not in FORMS:
        raise UserError(f"{folder / CARD}: kind {card['kind']!r} is none of {', '.join(FORMS)}")
    try:
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
    except (KeyError, RuntimeError, UserError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{folder / CARD} does not describe {TENSORS} ({why}): train the probe again") from None
    if width != (1,):
        raise UserError(f"{folder / TENSORS} gives {list(width)} predictions for one vector: train the probe again")
    return SavedProbe(probe, card, parts.get("directions"), sites)
