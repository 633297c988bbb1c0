"""A store that is read and not written to: what the stages of a plan put there stays in memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from prefs.store.parts import Collection
from prefs.store.table import COMPRESSION, Store, Table, store_root
from prefs.store.vectors import Vectors

log = logging.getLogger(__name__)

# What a part of vectors takes up beside them: a key, and a layer's entry in the header.
KEY_BYTES, LAYER_BYTES = 67, 100


@dataclass
class Planned:
    """What a plan would add to a store, and what it learns there.

    Attributes
    ----------
    bytes
        What the parts to be written take up. The texts in them are made up, of ordinary words.
    drawn
        By kind of table, the rows that the store has, by key.
    rows, vectors
        By folder, rows to be written, and the metadata of parts of vectors.
    """

    bytes: int = 0
    drawn: dict[str, dict[str, Mapping[str, Any]]] = field(default_factory=dict)
    rows: dict[Path, dict[str, dict[str, Any]]] = field(default_factory=dict)
    vectors: dict[Path, list[Mapping[str, Any]]] = field(default_factory=dict)

    def texts(self, kind: str) -> list[Mapping[str, Any]]:
        """Rows of the store that hold a text, and its number of tokens."""
        return [row for row in self.drawn.get(kind, {}).values() if row["text"] is not None]

    def thoughts(self, kind: str) -> list[Mapping[str, Any]]:
        """Rows of the store that hold a thought."""
        return [row for row in self.drawn.get(kind, {}).values() if row["thought"] is not None]


@dataclass(frozen=True)
class PlannedStore(Store):
    """What is in a store, with what a plan would add to it. Nothing is leased."""

    planned: Planned = field(default_factory=Planned)

    @classmethod
    def at(cls, directory: str | None) -> PlannedStore:
        """The store at a folder, which need not be there."""
        root = store_root(directory)
        return cls(root, 0.0)

    def table(self, kind: str, spec: Mapping[str, Any], schema: pa.Schema) -> Table:
        return _Table(self.planned, self.root, kind, spec, schema)

    def vectors(self, kind: str, spec: Mapping[str, Any]) -> Vectors:
        return _Vectors(self.planned, self.root, kind, spec)


class _Untouched(Collection):
    """A collection whose folder stays as it is, damaged parts included."""

    def _names(self) -> list[str]:
        return os.listdir(self.folder)

    def _set_aside(self, path: Path, reason: str) -> None:
        log.warning("Store: %s is damaged (%s); the run will compute it again", path, reason)


class _Table(_Untouched, Table):
    def __init__(self, planned: Planned, root: Path, kind: str, spec: Mapping[str, Any], schema: pa.Schema):
        super().__init__(root, kind, spec, schema)
        self._planned = planned

        self._planned.drawn.setdefault(self.kind, {}).update(self.rows)
        planned_rows = planned.rows.get(self.folder, {})
        self.rows.put({key: row for key, row in planned_rows.items() if key not in self.rows})

    def _append(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        content = pa.BufferOutputStream()
        pq.write_table(self.columns(rows), content, compression=COMPRESSION)
        self._planned.bytes += content.getvalue().size
        self._planned.rows.setdefault(self.folder, {}).update({key: dict(row) for key, row in rows.items()})


class _Vectors(_Untouched, Vectors):
    def __init__(self, planned: Planned, root: Path, kind: str, spec: Mapping[str, Any]):
        super().__init__(root, kind, spec)
        self._planned = planned
        for meta in planned.vectors.get(self.folder, []):
            self._index(self.folder, meta)

    def _put(self, meta: Mapping[str, Any], vectors: torch.Tensor) -> Path:
        keys = len(meta["keys"]) + len(meta["absent"])
        self._planned.bytes += vectors.nbytes + KEY_BYTES * keys + LAYER_BYTES * len(meta["layers"])
        self._planned.vectors.setdefault(self.folder, []).append(meta)
        return self.folder
