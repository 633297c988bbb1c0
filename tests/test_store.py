"""The store: parts appear whole or not at all, damage is seen, two writers agree."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import time
import tracemalloc

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from prefs.errors import UserError
from prefs.store.table import Rows, Store, batches, canonical, digest

SCHEMA = pa.schema([("text", pa.string()), ("mass", pa.list_(pa.float64()))])
SPEC = {"model": {"id": "m", "dtype": "bfloat16"}, "temperature": 1.0}


@pytest.fixture
def store(tmp_path) -> Store:
    return Store.open(str(tmp_path / "store"))


def fill(store: Store, count: int = 3, start: int = 0):
    table = store.table("t", SPEC, SCHEMA)
    rows = {table.key(messages=[str(n)]): {"text": f"text {n}", "mass": [0.1, n]} for n in range(start, start + count)}
    table.append(rows)
    return table, rows


def test_rows_come_back(store):
    table, rows = fill(store)
    assert table.read() == rows
    assert store.table("t", SPEC, SCHEMA).read() == rows
    assert store.table("t", {**SPEC, "temperature": 0.5}, SCHEMA).read() == {}


def test_keys_depend_on_everything_that_determines_a_record_and_nothing_else(store):
    table = store.table("t", SPEC, SCHEMA)
    assert table.key(a=1, b=2) == store.table("t", dict(reversed(SPEC.items())), SCHEMA).key(b=2, a=1)
    assert table.key(a=1, b=2) == digest({"kind": "t", "spec": table.spec, "record": {"b": 2, "a": 1}})
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


def test_nan_has_no_canonical_form():
    with pytest.raises(ValueError, match="JSON"):
        canonical(float("nan"))


def test_the_same_part_twice_is_one_file(store):
    table, _ = fill(store)
    fill(store)
    assert len(list(table.folder.glob("*.parquet"))) == 1


def test_a_damaged_part_is_named_set_aside_and_left_out(store, prefs_log):
    table, rows = fill(store)
    _, more = fill(store, start=3)
    part = sorted(table.folder.glob("*.parquet"))[0]
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    left = table.read()
    assert left in (rows, more)
    assert part.name in prefs_log.text
    assert (table.folder / "damaged" / part.name).exists()
    fill(store)
    fill(store, start=3)
    assert table.read() == rows | more


@pytest.mark.parametrize("length", [0, 10])
def test_a_cut_off_part_is_set_aside(store, length):
    table, _ = fill(store)
    part = next(table.folder.glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:length])
    assert table.read() == {}


def test_a_folder_whose_maker_was_killed_gets_its_specification(store):
    table = store.table("t", SPEC, SCHEMA)
    table.folder.mkdir(parents=True)
    fill(store)
    assert (table.folder / "spec.json").read_text() == canonical(table.spec) + "\n"


def test_a_killed_writer_leaves_nothing_that_is_read(store):
    table, rows = fill(store)
    half = table.folder / ".part-0123"
    half.write_bytes(b"half a part")
    assert table.read() == rows
    old = time.time() - 2 * 24 * 3600
    os.utime(half, (old, old))
    fill(store, start=5)
    assert not half.exists()


def test_a_full_disk_is_one_line_and_leaves_no_part(store, monkeypatch):
    table, rows = fill(store)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write to the store at .*: No space left on device"):
        fill(store, start=7)
    monkeypatch.undo()
    assert table.read() == rows
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
    table, _ = fill(Store.open(root), count=1)
    assert sorted(row["text"] for row in table.read().values()) == sorted(f"text {n}" for n in range(31))
    assert not (table.folder / "damaged").exists()


def test_vectors_by_key_and_layer(store):
    vectors = store.vectors("v", SPEC)
    some = torch.randn(3, 2, 4).to(torch.bfloat16)
    vectors.append(["a", "b", "c"], [0, 5], some, absent=["d"])
    vectors.append(["a"], [7], torch.ones(1, 1, 4, dtype=torch.bfloat16), absent=[])
    vectors.refresh()
    assert vectors.has("a", [0, 5, 7])
    assert not vectors.has("b", [0, 7])
    assert vectors.has("d", [0, 99])
    assert not vectors.has("e", [0])
    assert torch.equal(vectors.gather(["c", "a"], [5, 0]), some[[2, 0]][:, [1, 0]])
    assert vectors.gather(["c", "a"], [5]).dtype is torch.bfloat16


@pytest.mark.parametrize("part_bytes", [1, 2 * 24, 3 * 24 + 5, 1 << 20])
def test_many_vectors_go_into_several_parts(store, monkeypatch, part_bytes):
    monkeypatch.setattr("prefs.store.table.PART_BYTES", part_bytes)
    some, keys = torch.randn(7, 2, 3), list("gfedcba")
    store.vectors("v", SPEC).append(keys, [0, 5], some, absent=["x"])
    vectors = store.vectors("v", SPEC)
    assert len(list(vectors.folder.glob("*.safetensors"))) == {1: 7, 48: 4, 77: 3}.get(part_bytes, 1)
    assert torch.equal(vectors.gather(keys, [0, 5]), some)
    assert vectors.absent == {"x"}
    vectors.append([], [0], torch.empty(0, 1, 3), absent=["y"])
    assert store.vectors("v", SPEC).absent == {"x", "y"}


def test_vectors_of_several_parts_with_other_layers_and_rows(store):
    """Parts that overlap agree only by chance here, so that it is seen which of them was read: the first by name."""
    vectors = store.vectors("v", SPEC)
    parts = {
        "one": (["a", "b", "c"], [0, 5]),
        "two": (["c", "a"], [5, 7]),
        "three": (["b"], [7, 0, 9]),
    }
    for keys, layers in parts.values():
        vectors.append(keys, layers, torch.randn(len(keys), len(layers), 4), absent=[])
    vectors = store.vectors("v", SPEC)
    expected: dict[tuple[str, int], torch.Tensor] = {}
    for path in sorted(vectors.folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as part:
            keys = json.loads(part.metadata()["prefs"])["keys"]
            for name in part.keys():  # noqa: SIM118
                for row, key in enumerate(keys):
                    expected.setdefault((key, int(name.removeprefix("layer."))), part.get_tensor(name)[row])
    got = vectors.gather(["b", "a", "c", "a"], [7, 5])
    for at, key in enumerate(["b", "a", "c", "a"]):
        assert got[at].equal(torch.stack([expected[key, layer] for layer in (7, 5)]))
    assert vectors.gather(["b"], [9, 0])[0].equal(torch.stack([expected["b", 9], expected["b", 0]]))
    assert vectors.has("a", [0, 5, 7])
    assert not vectors.has("a", [0, 9])
    assert vectors.has("a", [])
    with pytest.raises(KeyError, match=r"a is not there at layers \(9,\)"):
        vectors.gather(["a"], [0, 9])


def test_the_index_does_not_grow_with_the_layers(store):
    vectors = store.vectors("v", SPEC)
    keys = [vectors.key(n=n) for n in range(4000)]
    for start in range(0, len(keys), 100):
        vectors.append(keys[start : start + 100], range(40), torch.zeros(100, 40, 1), absent=[])
    tracemalloc.start()
    vectors = store.vectors("v", SPEC)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert vectors.has(keys[-1], range(40))
    assert held / len(keys) < 500  # bytes; the key itself takes 113


def test_damaged_vectors_are_set_aside(store, prefs_log):
    vectors = store.vectors("v", SPEC)
    vectors.append(["a"], [0], torch.ones(1, 1, 4), absent=[])
    part = next(vectors.folder.glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:-1] + b"\0")
    assert not store.vectors("v", SPEC).has("a", [0])
    assert "damaged" in prefs_log.text


def test_what_others_write_meanwhile_is_read_and_what_is_known_is_not_read_again(store):
    ours, rows = fill(store)
    theirs, more = fill(store, start=3)
    vectors, other = store.vectors("v", SPEC), store.vectors("v", SPEC)
    other.append(["a"], [0], torch.ones(1, 1, 4), absent=["b"])
    known = Rows()
    ours.read_new(known)
    assert known == more
    ours.read_new(again := Rows())
    assert not again
    assert theirs.read() == rows | more
    assert not vectors.has("a", [0])
    vectors.refresh()
    assert vectors.has("a", [0])
    assert vectors.has("b", [0])
    assert vectors.made == set()
    assert other.made == {"a", "b"}


def test_a_store_that_can_only_be_read_serves_what_it_has(store):
    table, rows = fill(store)
    table.folder.chmod(0o555)
    reader = store.table("t", SPEC, SCHEMA)
    assert reader.read() == rows
    reader.read_new(found := Rows())
    assert not found
    table.folder.chmod(0o755)


@given(st.dictionaries(st.text(max_size=4), st.integers(1, 50), max_size=40), st.integers(1, 200), st.randoms())
def test_batches_hold_every_row_once_within_the_budget_in_any_order(lengths, budget, random):
    cut = batches(lengths, budget)
    assert sorted(key for batch in cut for key in batch) == sorted(lengths)
    for batch in cut:
        assert len(batch) == 1 or len(batch) * max(lengths[key] for key in batch) <= budget
    items = list(lengths.items())
    random.shuffle(items)
    assert batches(dict(items), budget) == cut


def test_rows_of_many_parts_are_found_each_by_its_key(store, monkeypatch):
    monkeypatch.setattr("prefs.store.table.BLOCK_BYTES", 300)  # a few parts make a block
    whole = {}
    for start in range(0, 60, 3):
        whole |= fill(store, start=start)[1]
    table = store.table("t", SPEC, SCHEMA)
    found = table.read()
    assert 1 < len(found._blocks) < 20
    assert found == whole
    assert sorted(found) == sorted(whole)
    assert "nothing" not in found
    with pytest.raises(KeyError):
        found["nothing"]


def test_of_two_rows_with_one_key_the_first_known_stays(store):
    table, rows = fill(store)
    key = next(iter(rows))
    found = table.read()
    store.table("t", SPEC, SCHEMA).append({key: {"text": "another", "mass": []}, "new": {"text": None, "mass": None}})
    table.read_new(found)
    assert found == rows | {"new": {"text": None, "mass": None}}
    assert len(found) == 4
    found.put({"made": {"text": "made", "mass": [1.0]}})
    store.table("t", SPEC, SCHEMA).append({"made": {"text": "by another", "mass": None}})
    table.read_new(found)
    assert found["made"]["text"] == "made"
    assert len(found) == len(list(found)) == 5


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


@pytest.mark.parametrize("order", [list(range(8)), list(range(2, 7)), [5, 0, 3], [7, 6, 5], [4, 4]])
def test_vectors_come_in_the_order_asked_for(store, order):
    vectors = store.vectors("v", SPEC)
    known = torch.randn(8, 3, 4)
    keys = [f"{at}" for at in range(8)]
    for start in (0, 4):
        vectors.append(keys[start : start + 4], [1, 2, 5], known[start : start + 4], absent=[])
    gathered = store.vectors("v", SPEC).gather([keys[at] for at in order], [5, 1])
    assert torch.equal(gathered, known[order][:, [2, 0]])
