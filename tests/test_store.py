"""The store: parts appear whole or not at all, damage is seen, two writers agree."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefs.errors import UserError
from prefs.store.keys import canonical
from prefs.store.table import Store, Table

SCHEMA = pa.schema([("text", pa.string()), ("mass", pa.list_(pa.float64()))])
SPEC = {"model": {"id": "m", "dtype": "bfloat16"}, "temperature": 1.0}


@pytest.fixture
def store(tmp_path) -> Store:
    return Store.open(str(tmp_path / "store"))


def opened(store: Store) -> Table:
    return store.table("t", SPEC, SCHEMA)


def fill(store: Store, count: int = 3, start: int = 0):
    table = opened(store)
    rows = {table.key(messages=[str(n)]): {"text": f"text {n}", "mass": [0.1, n]} for n in range(start, start + count)}
    table.write(rows)
    return table, rows


def test_rows_come_back(store):
    table, rows = fill(store)
    assert table.rows == rows
    assert table.made == set(rows)
    again = opened(store)
    assert again.rows == rows
    assert not again.made
    assert store.table("t", {**SPEC, "temperature": 0.5}, SCHEMA).rows == {}


def test_keys_depend_on_everything_that_determines_a_record_and_nothing_else(store):
    table = opened(store)
    assert table.key(a=1, b=2) == store.table("t", dict(reversed(SPEC.items())), SCHEMA).key(b=2, a=1)
    others = [
        table.key(a=1, b=3),
        store.table("u", SPEC, SCHEMA).key(a=1, b=2),
        store.table("t", {**SPEC, "x": 1}, SCHEMA).key(a=1, b=2),
    ]
    assert table.key(a=1, b=2) not in others


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.dictionaries(st.text(), x)))
def test_canonical_json_ignores_the_order_of_names(value):
    shuffled = dict(reversed(value.items())) if isinstance(value, dict) else value
    assert canonical(value) == canonical(shuffled)


@pytest.mark.parametrize("damage", ["a bit", "cut off", "empty"])
def test_a_damaged_part_is_named_set_aside_and_made_again(store, prefs_log, damage):
    table, rows = fill(store)
    _, more = fill(store, start=3)
    part = sorted(table.folder.glob("*.parquet"))[0]
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes({"a bit": content, "cut off": content[:10], "empty": b""}[damage])
    assert opened(store).rows in (rows, more)
    assert part.name in prefs_log.text
    assert (table.folder / "damaged" / part.name).exists()
    fill(store)
    fill(store, start=3)
    assert len(list(table.folder.glob("*.parquet"))) == 2, "the same part is the same file"
    assert opened(store).rows == rows | more


def test_damaged_vectors_are_set_aside(store, prefs_log):
    vectors = store.vectors("v", SPEC)
    vectors.append(["a"], [0], torch.ones(1, 1, 4), absent=[])
    part = next(vectors.folder.glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:-1] + b"\0")
    assert not store.vectors("v", SPEC).has("a", [0])
    assert "damaged" in prefs_log.text


def test_a_killed_writer_leaves_nothing_that_is_read(store):
    table = opened(store)
    table.folder.mkdir(parents=True)
    half = table.folder / ".part-0123"
    half.write_bytes(b"half a part")
    old = time.time() - 2 * 24 * 3600
    os.utime(half, (old, old))
    table, rows = fill(store)
    assert opened(store).rows == rows
    assert (table.folder / "spec.json").read_text() == canonical(table.spec) + "\n"
    assert not half.exists(), "after a day it is removed"


def test_a_full_disk_is_one_line_and_leaves_no_part(store, monkeypatch):
    table, rows = fill(store)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write to the store at .*: No space left on device"):
        fill(store, start=7)
    monkeypatch.undo()
    assert opened(store).rows == rows
    assert not list(table.folder.glob(".part-*"))


def test_a_store_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"store\.dir: cannot make"):
        Store.open(str(tmp_path / "file" / "store"))


def _write_many(root: str, worker: int) -> None:
    store = Store.open(root)
    for n in range(30):
        fill(store, count=2, start=n if worker % 2 else 29 - n)


def test_two_processes_on_one_store(tmp_path):
    root = str(tmp_path / "store")
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write_many, args=(root, n)) for n in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    table = opened(Store.open(root))
    assert sorted(row["text"] for row in table.rows.values()) == sorted(f"text {n}" for n in range(31))
    assert not (table.folder / "damaged").exists()


def test_what_others_write_meanwhile_is_read_and_of_two_rows_with_one_key_the_first_known_stays(store):
    ours, theirs = opened(store), opened(store)
    key, other = ours.key(n=0), ours.key(n=1)
    ours.write({key: {"text": "ours", "mass": [1.0]}})
    theirs.write({key: {"text": "theirs", "mass": None}, other: {"text": None, "mass": None}})
    ours.refresh()
    assert ours.rows == {key: {"text": "ours", "mass": [1.0]}, other: {"text": None, "mass": None}}
    assert ours.made == {key}
    mine, yours = store.vectors("v", SPEC), store.vectors("v", SPEC)
    yours.append(["a"], [0], torch.ones(1, 1, 4), absent=["b"])
    assert not mine.has("a", [0])
    mine.refresh()
    assert mine.has("a", [0])
    assert mine.has("b", [0])
    assert (mine.made, yours.made) == (set(), {"a", "b"})


def test_rows_stored_before_there_was_a_column_are_read(store):
    _, rows = fill(store)
    wider = pa.schema([*SCHEMA, ("thought", pa.string())])
    assert store.table("t", SPEC, wider).rows == {key: {**row, "thought": None} for key, row in rows.items()}


def test_whoever_may_read_the_users_files_may_read_parts(store):
    before = os.umask(0o027)
    try:
        table, _ = fill(store)
        vectors = store.vectors("v", SPEC)
        vectors.append(["a"], [0], torch.ones(1, 1, 4), absent=[])
    finally:
        os.umask(before)
    parts = [*table.folder.glob("*.parquet"), *vectors.folder.glob("*.safetensors")]
    assert [path.stat().st_mode & 0o777 for path in parts] == [0o640, 0o640]


@pytest.mark.parametrize(("part_bytes", "parts"), [(1, 7), (2 * 24, 4), (3 * 24 + 5, 3), (1 << 20, 1)])
def test_many_vectors_go_into_several_parts(store, monkeypatch, part_bytes, parts):
    monkeypatch.setattr("prefs.store.vectors.PART_BYTES", part_bytes)
    known, keys = torch.randn(7, 2, 3), list("gfedcba")
    store.vectors("v", SPEC).append(keys, [0, 5], known, absent=["x"])
    vectors = store.vectors("v", SPEC)
    assert len(list(vectors.folder.glob("*.safetensors"))) == parts
    assert torch.equal(vectors.gather(keys, [0, 5]), known)
    assert vectors.absent == {"x"}


def test_vectors_of_several_parts_with_other_layers_and_rows(store):
    known = torch.randn(3, 10, 4).bfloat16()  # keys, layers
    vectors = store.vectors("v", SPEC)
    for keys, layers in (("abc", [0, 5]), ("ca", [5, 7]), ("b", [7, 0, 9])):
        rows = ["abc".index(key) for key in keys]
        vectors.append(list(keys), layers, known[rows][:, layers], absent=["d"])
    vectors = store.vectors("v", SPEC)
    gathered = vectors.gather(list("baca"), [7, 5])
    assert gathered.dtype is torch.bfloat16
    assert gathered.equal(known[[1, 0, 2, 0]][:, [7, 5]])
    assert vectors.gather(["b"], [9, 0]).equal(known[[1]][:, [9, 0]])
    assert [vectors.has("a", layers) for layers in ([0, 5, 7], [0, 9], [])] == [True, False, True]
    assert vectors.has("d", [0, 99]), "it is known to be absent"
    assert not vectors.has("e", [0])
    with pytest.raises(KeyError, match=r"a is not there at layers \(9,\)"):
        vectors.gather(["a"], [0, 9])
