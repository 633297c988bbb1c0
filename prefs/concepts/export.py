"""Concept vectors on disk: safetensors with a card in JSON, and control vectors in GGUF for llama.cpp and repeng."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefs.errors import UserError
from prefs.probes.probe import Site
from prefs.store.files import appear
from prefs.store.tensor_card import load_pair, save_pair

TENSORS = "vectors.safetensors"
CARD = "vectors.json"
ARCHITECTURE = "controlvector"


@dataclass(frozen=True, eq=False)
class SavedVectors:
    """The vectors of a concept at S sites, with their card.

    Attributes
    ----------
    concept
        Its name.
    sites
        Where they are from.
    vectors
        [S, d] float32: differences of means, in the units of the residual stream.
    activation_norms
        [S] float32: the mean norm of the activations there, the unit of coefficients that are to mean the same
        everywhere.
    card
        Whatever JSON says where they are from: model, conditions, tasks, metrics.
    """

    concept: str
    sites: tuple[Site, ...]
    vectors: torch.Tensor
    activation_norms: torch.Tensor
    card: Mapping[str, Any] = field(default_factory=dict)

    def vector(self, site: Site) -> tuple[torch.Tensor, float]:
        """The vector [d] at a site, and the mean norm of the activations there.

        Raises
        ------
        UserError
            If there is none; it says where there are some.
        """
        if site not in self.sites:
            positions = ", ".join(dict.fromkeys(position for _, position in self.sites))
            layers = ", ".join(dict.fromkeys(str(layer) for layer, _ in self.sites))
            raise UserError(f"{self.concept} has no vector at {site}; it has {positions} at layers {layers}")
        row = self.sites.index(site)
        return self.vectors[row], float(self.activation_norms[row])


def save_vectors(folder: str | Path, saved: SavedVectors) -> list[Path]:
    """Write ``vectors.safetensors`` and ``vectors.json`` to a folder, made if need be; returns both.

    The tensors are ``vectors`` [S, d], ``unit`` [S, d] (of norm 1; 0 where the vector is) and ``activation_norms`` [S];
    the card's ``sites`` has the layer and position of each row.

    Raises
    ------
    ValueError, TypeError
        As `prefs.store.tensor_card.save_pair` does.
    """
    norms = saved.vectors.norm(dim=-1, keepdim=True)
    unit = torch.where(norms > 0, saved.vectors / norms.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
    tensors = {"vectors": saved.vectors, "unit": unit, "activation_norms": saved.activation_norms}
    own = {
        "concept": saved.concept,
        "d_model": saved.vectors.shape[-1],
        "sites": [list(site) for site in saved.sites],
        "vectors": "mean of the first condition less mean of the second, after block `layer`, at `position`",
    }
    return save_pair(Path(folder) / TENSORS, tensors, own, saved.card)


def load_vectors(folder: str | Path) -> SavedVectors:
    """Read what `save_vectors` wrote.

    Raises
    ------
    UserError
        If a file is missing, damaged or of other vectors; it says what to do.
    """
    folder = Path(folder).expanduser()
    wanted = {"concept": str, "d_model": int, "sites": list}
    absent = f"give a folder with {CARD}, such as RUN/concept/liking_math"
    again = "extract the vectors again"
    tensors, card = load_pair(folder / TENSORS, wanted, what="concept vector", absent=absent, again=again)
    try:
        sites = tuple(Site(int(layer), str(position)) for layer, position in card["sites"])
        vectors, norms = tensors["vectors"], tensors["activation_norms"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / CARD} does not describe {TENSORS} ({error!r}): {again}") from None
    if vectors.shape != (len(sites), card["d_model"]) or norms.shape != (len(sites),):
        raise UserError(f"{folder / CARD} does not fit {TENSORS}: {again}")
    return SavedVectors(card["concept"], sites, vectors, norms, card)


def export_gguf(path: Path, saved: SavedVectors, position: str, model_type: str) -> Path | None:
    """Write the vectors at a position as a control vector of llama.cpp (``--control-vector``), which repeng reads too.

    Both add tensor ``direction.L`` to the residual stream after block L, counted from 0, and have no place for block 0.

    Parameters
    ----------
    model_type
        The model's architecture as its config names it ("llama"), a hint that readers print.

    Returns
    -------
    Path or None
        The file; None where the only vector is at layer 0, which it cannot hold.

    Raises
    ------
    UserError
        If the disk refuses.
    """
    rows = {site.layer: row for row, site in enumerate(saved.sites) if site.position == position and site.layer > 0}
    if not rows:
        return None

    def write(temporary: Path) -> Path:
        from gguf import GGUFWriter  # only here: most jobs write none

        writer = GGUFWriter(temporary, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", model_type)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(rows))
        for layer, row in sorted(rows.items()):
            writer.add_tensor(f"direction.{layer}", np.ascontiguousarray(saved.vectors[row].float().numpy()))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return appear(path.parent, write)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def check_model(saved: SavedVectors, model: Mapping[str, Any], name: str) -> None:
    """Refuse vectors of another model, or of other weights of the same one; a precision of its own is no other model.

    Raises
    ------
    UserError
        Naming what differs.
    """
    theirs = saved.card.get("model")
    if not isinstance(theirs, Mapping):
        raise UserError(f"{saved.concept}: the card does not say of which model the vectors are: extract them again")
    differs = [key for key in ("id", "revision") if theirs.get(key) != model.get(key)]
    if differs:
        shown = ", ".join(f"{key} {theirs.get(key)!r} and not {model.get(key)!r}" for key in differs)
        raise UserError(f"the vectors of {saved.concept} are of another model than {name}: {shown}")
