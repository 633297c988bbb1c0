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
from prefs.store.table import COMPRESSION, Store, Table
from prefs.store.vectors import Vectors

log = logging.getLogger(__name__)

# What a part of vectors takes up beside them: a key, and a layer's entry in the header.
KEY_BYTES, LAYER_BYTES = 67, 100


@dataclass(frozen=True)
class PlannedStore(Store):
    """What is in a store, with what a plan would add to it, which stays in memory. Nothing is leased.

    Attributes
    ----------
    stored
        By kind of table, the rows that the store has, by key.
    rows, metadata
        By folder, rows to be written, and the metadata of parts of vectors.
    sizes
        Bytes of the parts to be written. The texts in them are made up, of ordinary words.
    """

    stored: dict[str, dict[str, Mapping[str, Any]]] = field(default_factory=dict)
    rows: dict[Path, dict[str, dict[str, Any]]] = field(default_factory=dict)
    metadata: dict[Path, list[Mapping[str, Any]]] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)

    def table(self, kind: str, spec: Mapping[str, Any], schema: pa.Schema) -> Table:
        return _Table(self, kind, spec, schema)

    def vectors(self, kind: str, spec: Mapping[str, Any]) -> Vectors:
        return _Vectors(self, kind, spec)


class _Untouched(Collection):
    """A collection whose folder stays as it is, damaged parts included."""

    def _names(self) -> list[str]:
        return os.listdir(self.folder)

    def _set_aside(self, path: Path, reason: str) -> None:
        log.warning("Store: %s is damaged (%s); the run will compute it again", path, reason)


class _Table(_Untouched, Table):
    def __init__(self, store: PlannedStore, kind: str, spec: Mapping[str, Any], schema: pa.Schema):
        super().__init__(store.root, kind, spec, schema)
        self._store = store
        store.stored.setdefault(kind, {}).update(self.rows)
        self.rows.put({key: row for key, row in store.rows.get(self.folder, {}).items() if key not in self.rows})

    def _append(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        part = pa.BufferOutputStream()
        pq.write_table(self.columns(rows), part, compression=COMPRESSION)
        self._store.sizes.append(part.tell())
        self._store.rows.setdefault(self.folder, {}).update({key: dict(row) for key, row in rows.items()})


class _Vectors(_Untouched, Vectors):
    def __init__(self, store: PlannedStore, kind: str, spec: Mapping[str, Any]):
        super().__init__(store.root, kind, spec)
        self._store = store
        for metadata in store.metadata.get(self.folder, []):
            self._index(self.folder, metadata)

    def _finite(self, vectors: torch.Tensor) -> list[tuple[bool, ...]]:
        return [(True,) * vectors.shape[1]] * len(vectors)  # they have no numbers

    def _put(self, meta: Mapping[str, Any], vectors: torch.Tensor) -> Path:
        keys = len(meta["keys"]) + len(meta["absent"])
        self._store.sizes.append(vectors.nbytes + KEY_BYTES * keys + LAYER_BYTES * len(meta["layers"]))
        self._store.metadata.setdefault(self.folder, []).append(meta)
        return self.folder
