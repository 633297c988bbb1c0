"""How fast the store writes and reads, beside the libraries that it is made of.

A gigabyte of residual vectors (bfloat16, 32 layers x 4,096) against ``safetensors.torch.save_file`` and ``load_file``,
and a gigabyte of rows of text against ``pyarrow.parquet.write_table`` and ``read_table`` with the same compression, in
parts of the same sizes and on the same disk. What the store has to do besides: bring vectors into the order of layers
and of the keys asked for, make names from checksums and check them, flush, and turn dictionaries into columns. What is
written is in the page cache when it is read, on both sides. All in one process, taking turns, in one order and then the
other; medians are printed.
``python benchmarks/store_speed.py --scratch FOLDER``
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from prefs.stages.complete import SCHEMA
from prefs.store.table import Store

LAYERS, WIDTH = 32, 4096
WORDS = "the model was asked how much it liked what it had done and why this could be so or not".split()  # noqa: SIM905


def flushed(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


class Vectors:
    """A gigabyte of vectors, in parts."""

    def __init__(self, megabytes: int, parts: int):
        rows = megabytes * 2**20 // (parts * LAYERS * WIDTH * 2)
        generator = torch.Generator().manual_seed(0)
        self.vectors = torch.randn(rows, LAYERS, WIDTH, generator=generator, dtype=torch.float32).bfloat16()
        self.keys = [[f"{part:032x}{row:032x}" for row in range(rows)] for part in range(parts)]
        self.bytes = parts * self.vectors.nbytes

    def plain_write(self, folder: Path, *, flush: bool) -> None:
        for part in range(len(self.keys)):
            save_file({"vectors": self.vectors}, folder / f"{part}.safetensors")
            if flush:
                flushed(folder / f"{part}.safetensors")

    def plain_read(self, folder: Path) -> None:
        for part in range(len(self.keys)):
            # It maps the file; only a copy has read it.
            assert load_file(folder / f"{part}.safetensors")["vectors"].clone().shape == self.vectors.shape

    def write(self, folder: Path) -> None:
        vectors = Store.open(str(folder)).vectors("residuals", {"model": "m"})
        for keys in self.keys:
            vectors.append(keys, range(LAYERS), self.vectors, ())

    def read(self, folder: Path) -> None:
        vectors = Store.open(str(folder)).vectors("residuals", {"model": "m"})
        for keys in self.keys:
            assert vectors.gather(keys, range(LAYERS)).shape == self.vectors.shape


class Rows:
    """A gigabyte of rows, in parts."""

    def __init__(self, megabytes: int, parts: int):
        drawn = random.Random(0)
        texts = [" ".join(drawn.choices(WORDS, k=500)) for _ in range(200)]
        row = len(texts[0]) + 64
        count = megabytes * 2**20 // (parts * row)
        self.parts = [
            {
                f"{part:032x}{at:032x}": {
                    "text": f"{at} {texts[(at * 7 + part) % len(texts)]}",
                    "tokens": at % 500,
                    "finished": at % 3 > 0,
                    "invalid": None,
                    "thought": None,
                }
                for at in range(count)
            }
            for part in range(parts)
        ]
        self.schema = pa.schema([pa.field("key", pa.string()), *SCHEMA])
        self.tables = [self.table(part) for part in self.parts]
        self.bytes = sum(table.nbytes for table in self.tables)

    def table(self, part: dict) -> pa.Table:
        return pa.Table.from_pylist([{"key": key, **row} for key, row in part.items()], schema=self.schema)

    def plain_write(self, folder: Path, *, flush: bool, rows: bool = False) -> None:
        for at, table in enumerate(self.tables):
            path = folder / f"{at}.parquet"
            pq.write_table(self.table(self.parts[at]) if rows else table, path, compression="zstd")
            if flush:
                flushed(path)

    def plain_read(self, folder: Path, *, rows: bool = False) -> None:
        tables = [pq.read_table(folder / f"{at}.parquet") for at in range(len(self.tables))]
        found = [table.to_pylist() for table in tables] if rows else tables
        assert sum(len(part) for part in found) == sum(len(part) for part in self.parts)

    def write(self, folder: Path) -> None:
        table = Store.open(str(folder)).table("completions", {"model": "m"}, SCHEMA)
        for rows in self.parts:
            table.append(rows)

    def read(self, folder: Path, *, rows: bool = False) -> None:
        found = Store.open(str(folder)).table("completions", {"model": "m"}, SCHEMA).read()
        assert len(found) == sum(len(part) for part in self.parts)
        if rows:
            for part in self.parts:
                for key in part:
                    assert found[key]["text"]


def ways(data: Vectors | Rows) -> Iterator[tuple[str, str, Callable[[Path], None]]]:
    """What is measured: what it is, by whom, and the function."""
    yield "write, on disk", "plain", lambda folder: data.plain_write(folder, flush=True)
    yield "write, not flushed", "plain", lambda folder: data.plain_write(folder, flush=False)
    yield "write, on disk", "prefs", data.write
    yield "read", "plain", data.plain_read
    yield "read", "prefs", data.read
    if isinstance(data, Rows):
        yield "write dictionaries, on disk", "plain", lambda folder: data.plain_write(folder, flush=True, rows=True)
        yield "write dictionaries, on disk", "prefs", data.write
        yield "read dictionaries", "plain", lambda folder: data.plain_read(folder, rows=True)
        yield "read dictionaries", "prefs", lambda folder: data.read(folder, rows=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, help="a folder on the disk to be measured (default: the system's)")
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    print("| data | parts | what | plain (MB/s) | prefs (MB/s) | ratio |\n|---|---|---|---|---|---|")
    for kind in (Vectors, Rows):
        for parts in given.parts:
            data = kind(given.megabytes, parts)
            taken: dict[tuple[str, str], list[float]] = {}
            with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
                for repeat in range(given.repeats):
                    turns = [
                        [way for way in ways(data) if way[0].startswith(kind)][:: -1 if repeat % 2 else 1]
                        for kind in ("write", "read")
                    ]
                    for what, who, run in itertools.chain(*turns):
                        folder = Path(scratch) / who
                        if what.startswith("write"):
                            shutil.rmtree(folder, ignore_errors=True)
                            folder.mkdir()
                            os.sync()  # what another one left to be written is not this one's
                            time.sleep(1)
                        begun = time.perf_counter()
                        run(folder)
                        taken.setdefault((what, who), []).append(time.perf_counter() - begun)
            speeds = {each: data.bytes / 1e6 / statistics.median(times) for each, times in taken.items()}
            for what in dict.fromkeys(what for what, _ in speeds):
                plain = speeds[what, "plain"]
                ours = speeds.get((what, "prefs"), speeds["write, on disk", "prefs"])
                name = kind.__name__.lower()
                print(f"| {name} | {parts} | {what} | {plain:,.0f} | {ours:,.0f} | {ours / plain:.2f} |", flush=True)


if __name__ == "__main__":
    main()
