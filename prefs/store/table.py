"""The store: content-keyed records in Parquet and safetensors parts that are written once and never changed.

A collection is the folder of everything that shares a specification (model, sampling, template ...); a record's key is
the SHA-256 of the canonical JSON of that specification and of the record's own determinants (messages, seed). A part's
name is the checksum of its bytes, so damage is seen when it is read, and two jobs that write the same part write the
same file. There are no locks: a part appears whole or not at all. Leases (`prefs.store.leases`) keep jobs that run at
the same time from computing the same records.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from platformdirs import user_data_path
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from prefs.errors import UserError
from prefs.store.files import appear, write_durably
from prefs.store.leases import Leases

log = logging.getLogger(__name__)

# Part of every specification: raise it when the meaning of a stored record changes.
FORMAT = 1
ABANDONED_AFTER_S = 24 * 3600
COMPRESSION = "zstd"
# Vectors of more than this go into several parts: they are put in order of layers in memory that is still at hand.
PART_BYTES = 2**26
# Parts of rows are put together to blocks of this size in memory.
BLOCK_BYTES = 2**24


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


class Collection:
    """The parts in the folder of one specification; see `Table`, `Vectors` and `Result`."""

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

    def _new_parts(self) -> Iterator[tuple[Path, Any]]:
        """The undamaged parts that are not known yet, by name, with what was `_loaded` of them; then they are known.

        A part whose bytes do not give its name is set aside and named in a warning.
        """
        try:
            names = sorted(set(self._names()) - self._known)
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"cannot read the store at {self.folder}: {error.strerror}") from None
        for name in names:
            if not name.endswith(self.suffix) or name.startswith("."):
                continue
            path = self.folder / name
            try:
                checksum, loaded = self._loaded(path)
                if checksum != name.removesuffix(self.suffix):
                    self._set_aside(path, "its bytes do not match its checksum")
                    continue
            except FileNotFoundError:
                continue  # set aside by another job
            except OSError as error:
                raise UserError(f"cannot read the store at {path}: {error.strerror}") from None
            self._known.add(name)
            yield path, loaded

    def _loaded(self, path: Path) -> tuple[str, Any]:
        """The checksum of a part, and of it what is kept from that reading."""
        return file_checksum(path), None

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

    def _write(self, write: Callable[[Path], object]) -> Path:
        """Have a part written to a path: temporary name, flush, rename. Raises UserError where the disk refuses."""

        def written(temporary: Path) -> Path:
            write(temporary)
            return self.folder / f"{file_checksum(temporary)}{self.suffix}"

        try:
            if not self._tidied:
                self.folder.mkdir(parents=True, exist_ok=True)
                if not (self.folder / "spec.json").is_file():
                    write_durably(self.folder / "spec.json", (canonical(self.spec) + "\n").encode())
                self._forget_abandoned()
                self._tidied = True
            path = appear(self.folder, written)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"cannot write to the store at {self.folder}: {reason}") from None
        self._known.add(path.name)
        return path

    def _forget_abandoned(self) -> None:
        """Remove temporary files that a killed job left behind a day ago or more."""
        for path in self.folder.glob(".part-*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > ABANDONED_AFTER_S:
                    path.unlink()


class Table(Collection):
    """Rows with a ``key`` column."""

    suffix = ".parquet"

    def __init__(self, root: Path, kind: str, spec: Mapping[str, Any], schema: pa.Schema):
        super().__init__(root, kind, spec)
        self.schema = pa.schema([pa.field("key", pa.string()), *schema])

    def read(self) -> Rows:
        """All rows by key. Where two parts hold a key, the part whose name sorts first counts."""
        self._known.clear()
        rows = Rows()
        self.read_new(rows)
        return rows

    def read_new(self, rows: Rows) -> None:
        """Add the rows that others have written since the last reading; of two with one key, the first stays."""
        parts: list[pa.Table] = []
        size = 0
        for path, content in self._new_parts():
            try:
                part = pq.ParquetFile(content).read()
                if not part.schema.equals(self.schema):
                    part = pq.read_table(content, schema=self.schema)
            except (OSError, pa.ArrowException) as error:
                self._set_aside(path, str(error).splitlines()[0])
                continue
            parts.append(part)
            size += part.nbytes
            if size > BLOCK_BYTES:
                rows.add(parts)
                parts, size = [], 0
        rows.add(parts)

    def _loaded(self, path: Path) -> tuple[str, pa.BufferReader]:
        content = path.read_bytes()
        return xxhash.xxh3_128_hexdigest(content), pa.BufferReader(content)

    def append(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Write rows, given by key, as one part. Nothing is written for no rows."""
        if rows:
            table = self._columns(rows)
            self._write(lambda path: pq.write_table(table, path, compression=COMPRESSION))

    def encoded_bytes(self, rows: Mapping[str, Mapping[str, Any]]) -> int:
        """How many bytes a part of these rows takes up."""
        content = pa.BufferOutputStream()
        pq.write_table(self._columns(rows), content, compression=COMPRESSION)
        return content.getvalue().size

    def _columns(self, rows: Mapping[str, Mapping[str, Any]]) -> pa.Table:
        fields = list(self.schema)[1:]
        columns = [pa.array([row.get(field.name) for row in rows.values()], field.type) for field in fields]
        return pa.Table.from_arrays([pa.array(rows, pa.string()), *columns], schema=self.schema)


class Rows(Mapping[str, dict[str, Any]]):
    """Rows by key. Those that were read stay columns until they are asked for: a store has many that a job does not
    want, and as columns they take a fraction of the memory."""

    def __init__(self) -> None:
        self._put: dict[str, dict[str, Any]] = {}
        # By key, a row's number among all that were read; a block begins at its start, and has a column for each name.
        self._number: dict[str, int] = {}
        self._starts: list[int] = []
        self._blocks: list[list[tuple[str, pa.Array]]] = []
        self._count = 0

    def put(self, rows: Mapping[str, dict[str, Any]]) -> None:
        """Take rows that are not there yet."""
        self._put.update(rows)

    def add(self, parts: Sequence[pa.Table]) -> None:
        """Take the rows of columns, with their ``key``, that are not there yet."""
        if not parts:
            return
        # Of many small parts one block is made: it takes less memory, and a row is quicker to find.
        whole = parts[0] if len(parts) == 1 else pa.concat_tables(parts).combine_chunks()
        for block in whole.to_batches():
            for number, key in enumerate(block.column("key").to_pylist(), start=self._count):
                if key not in self._put:
                    self._number.setdefault(key, number)
            self._starts.append(self._count)
            self._blocks.append([(name, block.column(name)) for name in block.schema.names if name != "key"])
            self._count += block.num_rows

    def __getitem__(self, key: str) -> dict[str, Any]:
        if key in self._put:
            return self._put[key]
        number = self._number[key]
        at = bisect_right(self._starts, number) - 1
        row = number - self._starts[at]
        return {name: column[row].as_py() for name, column in self._blocks[at]}

    def __contains__(self, key: object) -> bool:
        return key in self._put or key in self._number

    def __iter__(self) -> Iterator[str]:
        yield from self._number
        yield from self._put

    def __len__(self) -> int:
        return len(self._number) + len(self._put)


@dataclass(frozen=True)
class _Part:
    """A part of vectors: its rows are there at all of these layers."""

    path: Path
    layers: frozenset[int]


class Vectors(Collection):
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
        """Write vectors [keys, layers, d_model] in their dtype, in parts of `PART_BYTES` at most or of one row, and the
        keys that are absent."""
        absent = sorted(absent)
        if not keys and not absent:
            return
        self.made.update(keys, absent)
        self.bytes_made += vectors.nbytes
        rows = max(1, PART_BYTES * len(keys) // max(1, vectors.nbytes))
        for first in range(0, max(1, len(keys)), rows):
            some = slice(first, first + rows)
            meta = {"keys": list(keys[some]), "layers": list(layers), "absent": [] if first else absent}
            self._index(self._put(meta, vectors[some]), meta)

    def _put(self, meta: Mapping[str, Any], vectors: torch.Tensor) -> Path:
        """Write a part; where it is."""
        layers = meta["layers"] if meta["keys"] else ()
        tensors = {f"layer.{layer}": vectors[:, at].contiguous() for at, layer in enumerate(layers)}
        return self._write(lambda path: _save(tensors, path, canonical(meta)))

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
            outs, ins = (torch.tensor(numbers) for numbers in zip(*rows, strict=True))
            first, last = int(ins.min()), int(ins.max())
            # Rows that lie together, and go together, are copied once.
            whole = bool((ins.diff() == 1).all() and (outs.diff() == 1).all())
            there = slice(int(outs[0]), int(outs[-1]) + 1)
            with safe_open(path, framework="pt") as part:
                for layer in here:
                    tensor = part.get_slice(f"layer.{layer}")[first : last + 1]
                    if gathered is None:
                        gathered = torch.empty((len(keys), len(layers), tensor.shape[1]), dtype=tensor.dtype)
                    if whole:
                        gathered[there, layers.index(layer)] = tensor
                    else:
                        gathered[outs, layers.index(layer)] = tensor[ins - first]
        return torch.empty((0, len(layers), 0)) if gathered is None else gathered


class Result(Collection):
    """Tensors and what JSON says of them, as one part; nothing but the specification determines them."""

    suffix = ".safetensors"

    def read(self) -> tuple[dict[str, torch.Tensor], Any] | None:
        """The tensors by name and the JSON; None where they are not there."""
        self._known.clear()
        for path, _ in self._new_parts():
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
        self._write(lambda path: _save(dict(tensors), path, text))


def _save(tensors: dict[str, torch.Tensor], path: Path, said: str) -> None:
    """Write tensors with JSON about them, to be read by whoever may read the user's files."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"prefs": said})  # which makes it the user's own
    path.chmod(mode)


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
    state, block = xxhash.xxh3_128(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            state.update(block[:count])
    return state.hexdigest()
