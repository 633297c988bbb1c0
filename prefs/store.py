"""The store: content-keyed records in Parquet and safetensors parts that are written once and never changed.

A collection is the folder of everything that shares a specification (model, sampling, template ...); a record's key is
the SHA-256 of the canonical JSON of that specification and of the record's own determinants (messages, seed). A part's
name is the checksum of its bytes, so damage is seen when it is read, and two jobs that write the same part write the
same file. There are no locks: a part appears whole or not at all. Leases (`prefs.leases`) keep jobs that run at the
same time from computing the same records.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from platformdirs import user_data_path
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from prefs.errors import UserError
from prefs.files import write_durably
from prefs.leases import Leases

log = logging.getLogger(__name__)

# Part of every specification: raise it when the meaning of a stored record changes.
FORMAT = 1
ABANDONED_AFTER_S = 24 * 3600


def canonical(value: object) -> str:
    """Canonical JSON: sorted names, no blanks, no NaN; equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: object) -> str:
    """SHA-256 of the canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


@dataclass(frozen=True)
class Store:
    """A folder of collections; see `Table` and `Vectors`."""

    root: Path
    leases: Leases

    @classmethod
    def open(cls, directory: str | None, lease_s: float = 60.0) -> Store:
        """The store at a folder, or at the user's data directory; `lease_s` is the term of its `leases`.

        Raises
        ------
        UserError
            If the folder cannot be made.
        """
        root = store_root(directory)
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"store.dir: cannot make {root}: {error.strerror}") from None
        return cls(root, Leases(root / "leases", lease_s))

    def table(self, kind: str, spec: Mapping[str, Any], schema: pa.Schema) -> Table:
        """The collection of rows of one kind under one specification."""
        return Table(self.root, kind, {"format": FORMAT, **spec}, schema)

    def vectors(self, kind: str, spec: Mapping[str, Any]) -> Vectors:
        """The collection of residual-stream vectors of one kind under one specification."""
        return Vectors(self.root, kind, {"format": FORMAT, **spec})

    def result(self, kind: str, spec: Mapping[str, Any]) -> Result:
        """The one result of a kind that its specification determines."""
        return Result(self.root, kind, {"format": FORMAT, **spec})


def store_root(directory: str | None) -> Path:
    """The folder of a store, which need not be there: the one given, or the user's data directory."""
    return (Path(directory).expanduser() if directory else user_data_path("prefs") / "store").resolve()


class _Collection:
    suffix: str

    def __init__(self, root: Path, kind: str, spec: Mapping[str, Any]):
        self.kind = kind
        self.spec = dict(spec)
        self.folder = root / kind / digest(self.spec)[:32]
        # The canonical JSON of what a key is the digest of, before and after the record.
        self._before, self._after = f'{{"kind":{canonical(kind)},"record":', f',"spec":{canonical(self.spec)}}}'
        # Names of the parts read so far, or written by this very object.
        self._known: set[str] = set()
        self._looked = self._tidied = False

    def key(self, **determinants: Any) -> str:
        """The key of a record: everything that determines it beyond the collection's specification."""
        text = f"{self._before}{canonical(determinants)}{self._after}"
        return hashlib.sha256(text.encode()).hexdigest()

    def _new_parts(self) -> list[Path]:
        """The undamaged parts that are not known yet, by name; from now on they are.

        A part whose bytes do not give its name is set aside and named in a warning.
        """
        good = []
        try:
            names = sorted(set(self._names()) - self._known)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"cannot read the store at {self.folder}: {error.strerror}") from None
        for name in names:
            if not name.endswith(self.suffix) or name.startswith("."):
                continue
            path = self.folder / name
            try:
                if file_checksum(path) != name.removesuffix(self.suffix):
                    self._set_aside(path, "its bytes do not match its checksum")
                    continue
            except FileNotFoundError:
                continue  # set aside by another job
            except OSError as error:
                raise UserError(f"cannot read the store at {path}: {error.strerror}") from None
            self._known.add(name)
            good.append(path)
        return good

    def _names(self) -> list[str]:
        """The folder's files as they are now, also where other hosts write to it.

        An NFS client keeps what it knows of a folder for up to a minute. Making a file in it shows the client that
        others have changed it.
        """
        if self._known or self._looked:
            look = self.folder / f".part-{uuid.uuid4().hex}"
            with contextlib.suppress(OSError):  # a folder that cannot be written to
                look.touch()
                look.unlink()
        self._looked = True
        return os.listdir(self.folder)

    def _set_aside(self, path: Path, reason: str) -> None:
        aside = self.folder / "damaged"
        with contextlib.suppress(FileNotFoundError):
            aside.mkdir(exist_ok=True)
            path.rename(aside / path.name)
            log.warning("Store: %s is damaged (%s); set aside in %s and computed again", path.name, reason, aside)

    def _write(self, content: bytes) -> Path:
        """Write a part: temporary name, flush, rename. Raises UserError where the disk refuses."""
        path = self.folder / f"{xxhash.xxh3_128_hexdigest(content)}{self.suffix}"
        try:
            if not self.folder.is_dir():
                self.folder.mkdir(parents=True, exist_ok=True)
                write_durably(self.folder / "spec.json", (canonical(self.spec) + "\n").encode())
            if not self._tidied:
                self._forget_abandoned()
                self._tidied = True
            write_durably(path, content)
        except OSError as error:
            raise UserError(f"cannot write to the store at {self.folder}: {error.strerror}") from None
        self._known.add(path.name)
        return path

    def _forget_abandoned(self) -> None:
        """Remove temporary files that a killed job left behind a day ago or more."""
        for path in self.folder.glob(".part-*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > ABANDONED_AFTER_S:
                    path.unlink()


class Table(_Collection):
    """Rows with a ``key`` column."""

    suffix = ".parquet"

    def __init__(self, root: Path, kind: str, spec: Mapping[str, Any], schema: pa.Schema):
        super().__init__(root, kind, spec)
        self.schema = pa.schema([pa.field("key", pa.string()), *schema])

    def read(self) -> dict[str, dict[str, Any]]:
        """All rows by key. Where two parts hold a key, the part whose name sorts first counts."""
        self._known.clear()
        return self.read_new()

    def read_new(self) -> dict[str, dict[str, Any]]:
        """The rows that others have written since the last reading, by key."""
        rows: dict[str, dict[str, Any]] = {}
        for path in self._new_parts():
            try:
                part = pq.read_table(path, schema=self.schema)
            except (OSError, pa.ArrowException) as error:
                self._set_aside(path, str(error).splitlines()[0])
                continue
            for row in part.to_pylist():
                rows.setdefault(row.pop("key"), row)
        return rows

    def append(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Write rows, given by key, as one part. Nothing is written for no rows."""
        if rows:
            self._write(self.encoded(rows))

    def encoded(self, rows: Mapping[str, Mapping[str, Any]]) -> bytes:
        """Rows, given by key, as the bytes of a part."""
        table = pa.Table.from_pylist([{"key": key, **row} for key, row in rows.items()], schema=self.schema)
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        return buffer.getvalue()


@dataclass(frozen=True)
class _Part:
    """A part of vectors: its rows are there at all of these layers."""

    path: Path
    layers: frozenset[int]


class Vectors(_Collection):
    """Residual-stream vectors [d_model] by key and layer; a part holds some rows at some layers.

    A record may be *absent*: the conversation has no such position, which is known and not to be computed again.
    """

    suffix = ".safetensors"

    def __init__(self, root: Path, kind: str, spec: Mapping[str, Any]):
        super().__init__(root, kind, spec)
        # By key, the parts that hold it and its row in each. A job has keys by the million, and layers by the dozen.
        self._where: dict[str, tuple[tuple[_Part, int], ...]] = {}
        self.absent: set[str] = set()
        # Keys that were written by this very object, and how many bytes their vectors take up.
        self.made: set[str] = set()
        self.bytes_made = 0
        self.refresh()

    def refresh(self) -> None:
        """Read what others have written since: which keys are there at which layers, and which are absent."""
        for path in self._new_parts():
            try:
                with safe_open(path, framework="pt") as part:
                    meta = json.loads(part.metadata()["prefs"])
            except (SafetensorError, KeyError, TypeError, ValueError) as error:
                self._set_aside(path, str(error))
                continue
            self._index(path, meta)

    def _index(self, path: Path, meta: Mapping[str, Any]) -> None:
        self.absent.update(meta["absent"])
        holding = _Part(path, frozenset(meta["layers"]))
        for row, key in enumerate(meta["keys"]):
            self._where[key] = (*self._where.get(key, ()), (holding, row))

    def has(self, key: str, layers: Iterable[int]) -> bool:
        """Whether a record needs no computing: there at all of these layers, or known to be absent."""
        if key in self.absent:
            return True
        held = [part.layers for part, _ in self._where.get(key, ())]
        return frozenset(layers).issubset(frozenset().union(*held))

    def append(self, keys: Sequence[str], layers: Sequence[int], vectors: torch.Tensor, absent: Iterable[str]) -> None:
        """Write vectors [keys, layers, d_model] in their dtype as one part, and the keys that are absent."""
        absent = sorted(absent)
        if not keys and not absent:
            return
        meta = {"keys": list(keys), "layers": list(layers), "absent": absent}
        tensors = {f"layer.{layer}": vectors[:, at].contiguous() for at, layer in enumerate(layers)} if keys else {}
        self.made.update(keys, absent)
        self.bytes_made += vectors.nbytes
        self._index(self._write(save(tensors, metadata={"prefs": canonical(meta)})), meta)

    def in_order(self, keys: Sequence[str]) -> list[int]:
        """Indices of the keys in the order in which their vectors lie in the parts; every key must be there."""

        def place(at: int) -> tuple[str, int]:
            part, row = self._where[keys[at]][0]
            return part.path.name, row

        return sorted(range(len(keys)), key=place)

    def gather(self, keys: Sequence[str], layers: Sequence[int]) -> torch.Tensor:
        """Vectors [keys, layers, d_model] in their stored dtype; every key must be there at every layer."""
        wanted: dict[tuple[Path, tuple[int, ...]], list[tuple[int, int]]] = {}
        for out, key in enumerate(keys):
            lacking = tuple(layers)
            for part, row in self._where[key]:
                if here := tuple(layer for layer in lacking if layer in part.layers):
                    wanted.setdefault((part.path, here), []).append((out, row))
                    lacking = tuple(layer for layer in lacking if layer not in part.layers)
            if lacking:
                raise KeyError(f"{key} is not there at layers {lacking}")
        gathered: torch.Tensor | None = None
        for (path, here), rows in wanted.items():
            outs, ins = (list(numbers) for numbers in zip(*rows, strict=True))
            first, last = min(ins), max(ins)
            ins = [row - first for row in ins]
            with safe_open(path, framework="pt") as part:
                for layer in here:
                    tensor = part.get_slice(f"layer.{layer}")[first : last + 1]
                    if gathered is None:
                        gathered = torch.empty((len(keys), len(layers), tensor.shape[1]), dtype=tensor.dtype)
                    gathered[outs, layers.index(layer)] = tensor[ins]
        return torch.empty((0, len(layers), 0)) if gathered is None else gathered


class Result(_Collection):
    """Tensors and what JSON says of them, as one part; nothing but the specification determines them."""

    suffix = ".safetensors"

    def read(self) -> tuple[dict[str, torch.Tensor], Any] | None:
        """The tensors by name and the JSON; None where they are not there."""
        self._known.clear()
        for path in self._new_parts():
            try:
                with safe_open(path, framework="pt") as part:
                    said = json.loads(part.metadata()["prefs"])
                    return {name: part.get_tensor(name) for name in part.keys()}, said  # noqa: SIM118
            except (SafetensorError, KeyError, TypeError, ValueError) as error:
                self._set_aside(path, str(error))
        return None

    def write(self, tensors: Mapping[str, torch.Tensor], said: Any) -> None:
        """Write tensors by name, and what JSON says of them, whose names keep their order."""
        text = json.dumps(said, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        self._write(save(dict(tensors), metadata={"prefs": text}))


def batches(lengths: Mapping[str, int], budget: int) -> list[list[str]]:
    """Cut rows into batches of similar length, of at most `budget` tokens with padding (one row at least).

    Cut from the whole list by length and key, so that a batch is the same whatever is missing and in whatever order
    the tasks came: in bfloat16 a row's numbers depend a little on the rows beside it.
    """
    cut: list[list[str]] = []
    for key in sorted(lengths, key=lambda key: (lengths[key], key)):
        if cut and (len(cut[-1]) + 1) * lengths[key] <= budget:
            cut[-1].append(key)
        else:
            cut.append([key])
    return cut


def file_checksum(path: Path) -> str:
    """XXH3 of a file's bytes, 128 bits in hexadecimal: against accidents, not against an adversary."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    return state.hexdigest()
