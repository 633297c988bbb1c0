"""Tensors in safetensors parts: residual-stream vectors by key and layer, and results by their specification."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from prefs.store.keys import canonical
from prefs.store.parts import Collection

# Vectors of more than this go into several parts: they are put in order of layers in memory that is still at hand.
PART_BYTES = 2**26


@dataclass(frozen=True)
class _Part:
    """A part of vectors: its rows are there at all of these layers."""

    path: Path
    layers: frozenset[int]


class Vectors(Collection):
    """Residual-stream vectors [d_model] by key and layer; a part holds some rows at some layers.

    A record may be *absent*: the conversation has no such position, which is known and not to be computed again. At
    some layers a record may be *not finite* (NaN, or infinite in the dtype that it is stored in): it is not kept there.
    """

    suffix = ".safetensors"

    def __init__(self, root: Path, kind: str, spec: Mapping[str, Any]):
        super().__init__(root, kind, spec)
        # By key, the parts that hold it and its row in each. A job has keys by the million, and layers by the dozen.
        self._where: dict[str, tuple[tuple[_Part, int], ...]] = {}
        self.absent: set[str] = set()
        # By key, the layers at which it is not finite.
        self.not_finite: dict[str, frozenset[int]] = {}
        # Keys that were written by this very object, and how many bytes their vectors take up.
        self.made: set[str] = set()
        self.bytes_made = 0
        self.refresh()

    def refresh(self) -> None:
        """Read what others have written since: which keys are there at which layers, and which are absent."""
        for path, _ in self._new_parts():
            try:
                with safe_open(path, framework="pt") as part:
                    meta = json.loads(part.metadata()["prefs"])
            except (SafetensorError, KeyError, TypeError, ValueError) as error:
                self._set_aside(path, str(error))
                continue
            self._index(path, meta)

    def _index(self, path: Path, meta: Mapping[str, Any]) -> None:
        self.absent.update(meta["absent"])
        part = _Part(path, frozenset(meta["layers"]))
        for row, key in enumerate(meta["keys"]):
            self._where[key] = (*self._where.get(key, ()), (part, row))
        if broken := frozenset(meta.get("not_finite", ())):
            self.not_finite |= {key: broken | self.not_finite.get(key, frozenset()) for key in meta["keys"]}

    def has(self, key: str, layers: Iterable[int]) -> bool:
        """Whether a record needs no computing: at all of these layers there, or known not to be finite; or absent."""
        if key in self.absent:
            return True
        held = [part.layers for part, _ in self._where.get(key, ())]
        return frozenset(layers).issubset(self.not_finite.get(key, frozenset()).union(*held))

    def append(self, keys: Sequence[str], layers: Sequence[int], vectors: torch.Tensor, absent: Iterable[str]) -> None:
        """Write vectors [keys, layers, d_model] in their dtype, in parts of `PART_BYTES` at most or of one row, and the
        keys that are absent. Of vectors that are not finite, only that is written."""
        absent = sorted(absent)
        self.made.update(keys, absent)
        alike: dict[tuple[bool, ...], list[int]] = {}
        for row, finite in enumerate(self._finite(vectors)):
            alike.setdefault(finite, []).append(row)
        for finite, rows in alike.items() or [((True,) * len(layers), [])]:
            kept = vectors if all(finite) and len(alike) == 1 else vectors[rows][:, list(finite)]
            meta = {"layers": [layer for layer, is_finite in zip(layers, finite, strict=True) if is_finite]}
            if broken := [layer for layer in layers if layer not in meta["layers"]]:
                meta["not_finite"] = broken
            self._append([keys[row] for row in rows], kept, absent, meta)
            absent = []

    def _append(self, keys: list[str], vectors: torch.Tensor, absent: list[str], meta: Mapping[str, Any]) -> None:
        """Write what is there at the same layers."""
        self.bytes_made += vectors.nbytes
        rows = max(1, PART_BYTES * len(keys) // max(1, vectors.nbytes))
        for first in range(0, len(keys) or bool(absent), rows):
            some = slice(first, first + rows)
            of_part = {**meta, "keys": keys[some], "absent": [] if first else absent}
            self._index(self._put(of_part, vectors[some]), of_part)

    def _finite(self, vectors: torch.Tensor) -> list[tuple[bool, ...]]:
        """[keys][layers] whether a vector is finite."""
        return [tuple(layers) for layers in vectors.isfinite().all(dim=-1).tolist()]

    def _put(self, meta: Mapping[str, Any], vectors: torch.Tensor) -> Path:
        layers = meta["layers"] if meta["keys"] else ()
        tensors = {f"layer.{layer}": vectors[:, number].contiguous() for number, layer in enumerate(layers)}
        return self._write(lambda path: _save(tensors, path, canonical(meta)))

    def in_order(self, keys: Sequence[str]) -> list[int]:
        """Indices of the keys in the order in which their vectors lie in the parts; every key must be there."""

        def position(index: int) -> tuple[str, int]:
            part, row = self._where[keys[index]][0]
            return part.path.name, row

        return sorted(range(len(keys)), key=position)

    def gather(self, keys: Sequence[str], layers: Sequence[int]) -> torch.Tensor:
        """Vectors [keys, layers, d_model] in their stored dtype; every key must be there at every layer."""
        # By part and the layers that are read of it: the rows of what is returned, and those of the part.
        wanted: dict[tuple[Path, tuple[int, ...]], tuple[list[int], list[int]]] = {}
        for row, key in enumerate(keys):
            lacking = tuple(layers)
            for part, part_row in self._where[key]:
                if held := tuple(layer for layer in lacking if layer in part.layers):
                    rows, part_rows = wanted.setdefault((part.path, held), ([], []))
                    rows.append(row)
                    part_rows.append(part_row)
                    lacking = tuple(layer for layer in lacking if layer not in part.layers)
            if lacking:
                raise KeyError(f"{key} is not there at layers {lacking}")
        gathered: torch.Tensor | None = None
        for (path, held), numbers in wanted.items():
            rows, part_rows = map(torch.tensor, numbers)
            first, last = int(part_rows.min()), int(part_rows.max())
            # Rows that lie together, and go together, are copied once.
            whole = bool((part_rows.diff() == 1).all() and (rows.diff() == 1).all())
            with safe_open(path, framework="pt") as part:
                for layer in held:
                    tensor = part.get_slice(f"layer.{layer}")[first : last + 1]
                    if gathered is None:
                        gathered = torch.empty((len(keys), len(layers), tensor.shape[1]), dtype=tensor.dtype)
                    if whole:
                        gathered[int(rows[0]) : int(rows[-1]) + 1, layers.index(layer)] = tensor
                    else:
                        gathered[rows, layers.index(layer)] = tensor[part_rows - first]
        return torch.empty((0, len(layers), 0)) if gathered is None else gathered


class StoredResult(Collection):
    """Tensors and what JSON says of them, as one part; nothing but the specification determines them."""

    suffix = ".safetensors"

    def read(self) -> tuple[dict[str, torch.Tensor], Any] | None:
        """The tensors by name and the JSON; None where they are not there."""
        self._known.clear()
        for path, _ in self._new_parts():
            try:
                with safe_open(path, framework="pt") as part:
                    content = json.loads(part.metadata()["prefs"])
                    return {name: part.get_tensor(name) for name in part.keys()}, content  # noqa: SIM118
            except (SafetensorError, KeyError, TypeError, ValueError) as error:
                self._set_aside(path, str(error))
        return None

    def write(self, tensors: Mapping[str, torch.Tensor], content: Any) -> None:
        """Write tensors by name, and what JSON says of them, whose names keep their order."""
        text = json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        self._write(lambda path: _save(dict(tensors), path, text))


def _save(tensors: dict[str, torch.Tensor], path: Path, text: str) -> None:
    """Write tensors with JSON about them, to be read by whoever may read the user's files."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"prefs": text})  # which makes it the user's own
    path.chmod(mode)
