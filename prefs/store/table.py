"""The store: content-keyed records, rows in Parquet parts and vectors in safetensors parts.

A record's key is the digest of its collection's specification and of its own determinants (messages, seed).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from platformdirs import user_data_path

from prefs.errors import UserError
from prefs.store.parts import Collection
from prefs.store.vectors import StoredResult, Vectors

COMPRESSION = "zstd"
# Parts of rows are put together to blocks of this size in memory.
BLOCK_BYTES = 2**24


@dataclass(frozen=True)
class Store:
    """A folder of collections; see `Table` and `Vectors`.

    `lease_s` is how long a job that holds a lease may give no sign of life; with 0 nothing is leased.
    """

    root: Path
    lease_s: float = 60.0

    @classmethod
    def open(cls, directory: str | None, lease_s: float = 60.0) -> Store:
        """The store at a folder, or at the user's data directory.

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
        return cls(root, lease_s)

    def table(self, kind: str, spec: Mapping[str, Any], schema: pa.Schema) -> Table:
        return Table(self.root, kind, spec, schema)

    def vectors(self, kind: str, spec: Mapping[str, Any]) -> Vectors:
        return Vectors(self.root, kind, spec)

    def result(self, kind: str, spec: Mapping[str, Any]) -> StoredResult:
        return StoredResult(self.root, kind, spec)


def store_root(directory: str | None) -> Path:
    """The folder of a store, which need not be there: the one given, or the user's data directory."""
    return (Path(directory).expanduser() if directory else user_data_path("prefs") / "store").resolve()


class Table(Collection):
    """Rows by key, as this object knows them: those that were there, those it wrote, and after `refresh` those that
    others have written since. Of two rows with one key, the one known first stays; of two parts read together, that
    whose name sorts first counts.

    ``made`` are the keys of the rows that were written by this very object.
    """

    suffix = ".parquet"

    def __init__(self, root: Path, kind: str, spec: Mapping[str, Any], schema: pa.Schema):
        super().__init__(root, kind, spec)
        self.schema = pa.schema([pa.field("key", pa.string()), *schema])
        self.rows = Rows()
        self.made: set[str] = set()
        self.refresh()

    def refresh(self) -> None:
        """Read what others have written since."""
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
                self.rows.add(parts)
                parts, size = [], 0
        self.rows.add(parts)

    def _loaded(self, path: Path) -> tuple[str, pa.BufferReader]:
        content = path.read_bytes()
        return xxhash.xxh3_128_hexdigest(content), pa.BufferReader(content)

    def write(self, rows: Mapping[str, dict[str, Any]]) -> None:
        """Write rows that are lacking, by key, as one part. Nothing is written for no rows."""
        if rows:
            self._append(rows)
            self.rows.put(rows)
            self.made.update(rows)

    def _append(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        table = self.columns(rows)
        self._write(lambda path: pq.write_table(table, path, compression=COMPRESSION))

    def columns(self, rows: Mapping[str, Mapping[str, Any]]) -> pa.Table:
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
        block = bisect_right(self._starts, number) - 1
        row = number - self._starts[block]
        return {name: column[row].as_py() for name, column in self._blocks[block]}

    def __contains__(self, key: object) -> bool:
        return key in self._put or key in self._number

    def __iter__(self) -> Iterator[str]:
        yield from self._number
        yield from self._put

    def __len__(self) -> int:
        return len(self._number) + len(self._put)
