"""Tasks of data sets with the real columns: what is drawn, what is skipped, and that it is counted."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra import compose
from hydra_app import shipped_configs
from hypothesis import given
from hypothesis import strategies as st

from prefs.config import DatasetConfig, RowReader, SourceConfig, typed
from prefs.data.hub import Skip, in_turn, task_of
from prefs.data.task import Task, load_tasks
from prefs.errors import ConfigError, UserError

pytestmark = pytest.mark.usefixtures("datasets_cache")


def written(folder: Path, rows: list[dict[str, Any]], kind: str = "parquet", name: str = "data/train") -> Path:
    """Rows as a folder that the hub could have."""
    path = folder / f"{name}-00000-of-00001.{kind}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def shipped(name: str, *overrides: str) -> DatasetConfig:
    """A data set's config as a command line composes and checks it."""
    with shipped_configs():
        return typed(compose("config", overrides=[f"dataset={name}", *overrides])).dataset


def messages(prefs_log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in prefs_log.records]


def counted(skipped: str) -> dict[str, int]:
    """The counts of "3 empty, 2 not text" by reason."""
    parts = [part.split(" ", 1) for part in re.split(r", (?=\d)", skipped)]
    return {reason: int(count) for count, reason in parts}


def chat(*turns: tuple[str, str | None]) -> list[dict[str, Any]]:
    """A conversation as WildChat has it."""
    return [{"content": content, "language": "English", "role": role, "toxic": False} for role, content in turns]


def wildchat(conversation: Any, language: str | None = "English", key: str | None = None) -> dict[str, Any]:
    return {"conversation_hash": key, "model": "gpt-4", "conversation": conversation, "turn": 1, "language": language}


WILDCHAT_ROWS = [
    wildchat(chat(("user", "How do I prune roses?"), ("assistant", "With care.")), key="h1"),
    wildchat(chat(("assistant", "Hello"), ("user", "Name a river")), key="h2"),
    wildchat(chat(("user", "¿Cómo podo las rosas?")), "Spanish", key="h3"),
    wildchat(chat(("user", "Name a lake")), None, key="h4"),
    wildchat(None, key="h5"),
    wildchat([], key="h6"),
    wildchat(chat(("assistant", "Hello")), key="h7"),
    wildchat(chat(("user", None)), key="h8"),
    wildchat(chat(("user", " \n ")), key="h9"),
    wildchat(chat(("user", "long " * 1000)), key="h10"),
    wildchat(chat(("user", "x" * 20_000_000)), key="h11"),
    wildchat(chat(("user", "Name a sea")), key=None),
]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_wildchat_takes_first_english_user_turns(tmp_path, prefs_log, kind):
    dataset = shipped("wildchat", f"dataset.sources.wildchat.path={written(tmp_path, WILDCHAT_ROWS, kind)}")
    assert load_tasks(dataset) == [
        Task("wildchat-h1", "How do I prune roses?", "WILDCHAT", None),
        Task("wildchat-h2", "Name a river", "WILDCHAT", None),
        Task(f"wildchat-{sha256(b'Name a sea').hexdigest()[:12]}", "Name a sea", "WILDCHAT", None),
    ]
    (line,) = messages(prefs_log)
    tasks, _, skipped = line.partition("; skipped ")
    assert tasks == "wildchat: 3 tasks of 12 rows read"
    assert counted(skipped) == {
        "empty": 3,
        "without a user turn": 2,
        "with another language than English": 2,
        "longer than 4,000 characters": 2,
    }


ALPACA_ROWS = [
    {"instruction": "Name a tree", "input": "", "output": "Oak", "text": "..."},
    {"instruction": "Add", "input": "1 and 2", "output": "3", "text": "..."},
    {"instruction": "Add", "input": None, "output": "3", "text": "..."},
    {"instruction": None, "input": "1 and 2", "output": "3", "text": "..."},
    {"instruction": "", "input": "1 and 2", "output": "3", "text": "..."},
]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_alpaca_joins_instruction_and_input(tmp_path, prefs_log, kind):
    dataset = shipped("alpaca", f"dataset.sources.alpaca.path={written(tmp_path, ALPACA_ROWS, kind)}")
    tasks = load_tasks(dataset)
    assert [task.prompt for task in tasks] == ["Name a tree", "Add\n\n1 and 2", "Add"]
    assert all(task.id.startswith("alpaca-") and len(task.id) == len("alpaca-") + 12 for task in tasks)
    assert messages(prefs_log) == ["alpaca: 3 tasks of 5 rows read; skipped 2 empty"]


def test_rows_of_all_kinds(tmp_path, prefs_log):
    rows = [{"instruction": value, "input": ""} for value in ("Name a tree", 5, ["a"], {"b": 1}, True, None)]
    rows += [{"input": "no instruction"}, {"instruction": "Add", "input": 7, "output": {"x": [1]}}]
    dataset = shipped("alpaca", f"dataset.sources.alpaca.path={written(tmp_path / 'alpaca', rows, 'jsonl')}")
    assert [task.prompt for task in load_tasks(dataset)] == ["Name a tree"]
    turns = [chat(("user", "Name a tree")), "text", 3, [4, None], [{"role": "user", "content": ["parts"]}], {"role": 1}]
    rows = [wildchat(value, key=str(number)) for number, value in enumerate(turns)]
    dataset = shipped("wildchat", f"dataset.sources.wildchat.path={written(tmp_path / 'wildchat', rows, 'jsonl')}")
    assert load_tasks(dataset) == [Task("wildchat-0", "Name a tree", "WILDCHAT", None)]
    alpaca, wild = messages(prefs_log)
    assert alpaca == "alpaca: 1 tasks of 8 rows read; skipped 5 not text, 2 empty"
    assert counted(wild.partition("; skipped ")[2]) == {
        "not a conversation": 3,
        "without a user turn": 1,
        "not text": 1,
    }


def test_bytes_that_are_no_text_spoil_only_their_row(tmp_path, prefs_log):
    half_a_pair = b"\xed\xa0\x80"
    buffers = pa.array([b"Name a tree", half_a_pair, b"Add"], pa.binary()).buffers()
    prompts = pa.Array.from_buffers(pa.string(), 3, buffers)
    (tmp_path / "data").mkdir()
    table = pa.table({"instruction": prompts, "input": ["", "", ""]})
    pq.write_table(table, tmp_path / "data" / "train.parquet")
    tasks = load_tasks(shipped("alpaca", f"dataset.sources.alpaca.path={tmp_path}"))
    assert [task.prompt for task in tasks] == ["Name a tree", "Add"]
    assert messages(prefs_log) == ["alpaca: 2 tasks of 3 rows read; skipped 1 not UTF-8"]


def test_math_has_seven_subjects_and_bailbench_categories(tmp_path):
    dataset = shipped("math", f"dataset.sources.math.path={tmp_path}")
    subjects = dataset.sources["math"].configs
    assert len(subjects) == 7
    for subject in subjects:
        written(tmp_path, [{"problem": f"Solve {subject}", "type": subject.title()}], name=f"{subject}/train")
    tasks = [(task.prompt, task.topic) for task in load_tasks(dataset)]
    assert tasks == [(f"Solve {subject}", subject.title()) for subject in subjects]
    file = tmp_path / "bailBench.csv"
    file.write_text('content,subcategory,category\n"Shout, please",Yelling,Loud\nBe quiet,,\n')
    tasks = load_tasks(shipped("bailbench", f"dataset.sources.bailbench.path={file}"))
    assert [(task.origin, task.prompt, task.topic) for task in tasks] == [
        ("BAILBENCH", "Shout, please", "Loud"),
        ("BAILBENCH", "Be quiet", None),
    ]


SIZES = {"bailbench": 30, "wildchat": 400, "alpaca": 300, "math": 200}


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> list[str]:
    """Overrides that put the four sources of `mixed` into folders."""
    folder = tmp_path_factory.mktemp("four")
    bail = [{"content": f"Bail {n}", "category": "c"} for n in range(SIZES["bailbench"])]
    wild = [wildchat(chat(("user", f"Wild {n}")), ("English", "French")[n % 2]) for n in range(SIZES["wildchat"])]
    alpaca = [{"instruction": f"Alpaca {n}", "input": ""} for n in range(SIZES["alpaca"])]
    math = [{"problem": f"Math {n}", "type": "t"} for n in range(SIZES["math"])]
    for name, rows in (("bailbench", bail), ("wildchat", wild), ("alpaca", alpaca)):
        written(folder / name, rows)
    subjects = shipped("math").sources["math"].configs
    for number, subject in enumerate(subjects):
        written(folder / "math", math[number :: len(subjects)], name=f"{subject}/train")
    return [f"dataset.sources.{name}.path={folder / name}" for name in SIZES]


def test_mixed_is_drawn_evenly_over_origins(four, prefs_log):
    tasks = load_tasks(shipped("mixed", *four, "dataset.limit=200"))
    origins = [task.origin for task in tasks]
    counts = Counter(origins)
    assert counts.pop("BAILBENCH") == 30  # that is all it has, and the others make up for it
    assert sorted(counts.values()) == [56, 57, 57]
    assert list(dict.fromkeys(origins)) == ["BAILBENCH", "WILDCHAT", "ALPACA", "MATH"]
    assert len(set(origins)) == sum(a != b for a, b in pairwise(origins)) + 1  # source by source
    assert len({task.id for task in tasks}) == 200
    assert all(task.id.startswith(f"{task.origin.lower()}-") for task in tasks)
    assert [line.split(":")[0] for line in messages(prefs_log)] == list(SIZES)
    few = load_tasks(shipped("mixed", *four, "dataset.limit=10"))
    assert sorted(Counter(task.origin for task in few).values()) == [2, 2, 3, 3]


def test_a_draw_depends_on_the_seed_and_grows_with_the_limit(four):
    mixed = shipped("mixed", *four)

    def drawn(limit: int | None, seed: int = 0) -> list[Task]:
        return load_tasks(dataclasses.replace(mixed, limit=limit, seed=seed))

    for seed in (0, 1):
        last: list[Task] = []
        for limit in (1, 2, 9, 150, 400, 100_000):
            tasks = drawn(limit, seed)
            assert len(tasks) == min(limit, 30 + 200 + 300 + 200)
            assert set(last) <= set(tasks)
            last = tasks
        assert last == drawn(None, seed)
    assert drawn(40) == drawn(40)
    assert drawn(40) != drawn(40, seed=1)


def test_origins_are_chosen_before_anything_is_opened(four):
    math = shipped("mixed", four[-1], "dataset.limit=20", "dataset.origins=[MATH]")  # the others are not here
    assert {task.origin for task in load_tasks(math)} == {"MATH"}
    with pytest.raises(ConfigError, match=r"dataset.origins: got 'MATHS'; allowed: one of ALPACA, BAILBENCH, MATH, W"):
        load_tasks(shipped("mixed", *four, "dataset.origins=[MATHS]"))
    with pytest.raises(ConfigError, match=r"dataset.sources.math.origin: got 'ALL'; allowed: another name"):
        load_tasks(shipped("mixed", *four, "dataset.sources.math.origin=ALL"))


def test_a_small_limit_reads_few_rows_of_many(tmp_path, prefs_log):
    rows = [wildchat(chat(("user", f"Wild {n}")), ("English", "French")[n % 2], str(n)) for n in range(20_000)]
    tasks = load_tasks(
        shipped("wildchat", f"dataset.sources.wildchat.path={written(tmp_path, rows)}", "dataset.limit=300")
    )
    assert len(tasks) == 300
    (line,) = messages(prefs_log)
    read, skipped = (int(count) for count in re.search(r"of (\d+) rows read; skipped (\d+)", line).groups())
    assert read - skipped == 300
    assert read < 800
    places = np.array([int(task.id.removeprefix("wildchat-")) for task in tasks])
    assert np.all(np.diff(places) > 0)  # in the order of the rows
    assert places.max() - places.min() > 18_000  # from all over


def test_a_prompt_is_one_task_whatever_its_source_case_and_blanks(tmp_path, prefs_log):
    first = [{"prompt": "Name a tree"}, {"prompt": "Ａdd"}, {"prompt": "Run"}]  # a full-width A
    second = [{"prompt": "name  a TREE"}, {"prompt": "Add "}, {"prompt": "Sing"}]
    sources = {
        "a": SourceConfig(path=str(written(tmp_path / "a", first)), origin="ONE"),
        "b": SourceConfig(path=str(written(tmp_path / "b", second)), origin="TWO"),
    }
    tasks = load_tasks(DatasetConfig(name="both", kind="hub", sources=sources))
    normal = sorted(" ".join(task.prompt.split()).casefold().replace("ａ", "a") for task in tasks)
    assert normal == ["add", "name a tree", "run", "sing"]
    skipped = [counted(line.partition("; skipped ")[2]) for line in messages(prefs_log) if "skipped" in line]
    assert sum((Counter(counts) for counts in skipped), Counter()) == {"with a prompt seen before": 2}


def test_ids_are_unique(tmp_path, prefs_log):
    rows = [{"prompt": "Name a tree", "id": 7}, {"prompt": "Add", "id": 7}, {"prompt": "Sing", "id": 8}]
    sources = {"a": SourceConfig(path=str(written(tmp_path, rows)), origin="One", id="id")}
    tasks = load_tasks(DatasetConfig(name="a", kind="hub", sources=sources))
    assert [task.id for task in tasks] == ["one-7", "one-8"]
    assert messages(prefs_log) == ["a: 2 tasks of 3 rows read; skipped 1 with an id seen before"]


def test_a_data_set_of_ones_own_needs_no_code(tmp_path):
    rows = [
        {"question": "Name a tree", "hint": "Not an oak", "nr": 1, "field": "nature", "level": 2, "checked": True},
        {"question": "Add", "hint": None, "nr": 2, "field": None, "level": 2, "checked": True},
        {"question": "Sing", "hint": "", "nr": 3, "field": "arts", "level": 1, "checked": True},
        {"question": "Jump", "hint": "", "nr": 4, "field": "arts", "level": 2, "checked": False},
    ]
    (tmp_path / "conf" / "dataset").mkdir(parents=True)
    (tmp_path / "conf" / "dataset" / "own.yaml").write_text(
        f"""
name: own
kind: hub
sources:
  questions:
    path: {written(tmp_path / "data", rows, "jsonl")}
    origin: QUIZ
    prompt: [question, hint]
    id: nr
    topic: field
    only: {{level: 2, checked: true}}
"""
    )
    assert load_tasks(shipped("own", f"hydra.searchpath=[file://{tmp_path / 'conf'}]")) == [
        Task("quiz-1", "Name a tree\n\nNot an oak", "QUIZ", "nature"),
        Task("quiz-2", "Add", "QUIZ", None),
    ]


def test_no_row_left_says_why(tmp_path):
    rows = [wildchat(chat(("user", "Hola")), "Spanish"), wildchat(None)]
    with pytest.raises(UserError, match=r"no row of .* can be a task; wildchat: 0 tasks of 2 rows read; skipped 1"):
        load_tasks(shipped("wildchat", f"dataset.sources.wildchat.path={written(tmp_path, rows)}"))


VALUES = st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text(), max_size=2) | st.just("\ud800")


@given(st.fixed_dictionaries({"a": VALUES, "b": VALUES, "id": VALUES, "topic": VALUES}))
def test_any_row_is_a_task_or_skipped(row):
    source = SourceConfig(path="x", origin="ONE", prompt=["a", "b"], id="id", topic="topic", max_chars=10)
    first, second = row["a"], row["b"]
    texts = all(text is None or (isinstance(text, str) and text != "\ud800") for text in (first, second))
    if not texts or not (first or "").strip():
        expected = None
    else:
        expected = f"{first}\n\n{second}" if (second or "").strip() else first
    if expected is None or len(expected) > 10:
        with pytest.raises(Skip):
            task_of(row, source)
        return
    task = task_of(row, source)
    assert task.prompt == expected
    assert all(isinstance(text, str) and text.encode() for text in (task.id, task.topic or "-"))


ROLES = st.sampled_from(["user", "assistant"]) | VALUES
TURNS = VALUES | st.fixed_dictionaries({"role": ROLES, "content": VALUES})


@given(st.lists(TURNS, max_size=3) | VALUES)
def test_any_conversation_is_a_task_or_skipped(conversation):
    source = SourceConfig(path="x", origin="ONE", prompt=["turns"], reader=RowReader.conversation)
    try:
        task = task_of({"turns": conversation}, source)
    except Skip:
        return
    users = [turn for turn in conversation if isinstance(turn, dict) and turn["role"] == "user"]
    assert task.prompt == users[0]["content"]


@given(st.lists(st.integers(0, 5), max_size=5))
def test_in_turn_takes_one_of_each(lengths):
    streams = [[(turn, number) for turn in range(length)] for number, length in enumerate(lengths)]
    taken = list(in_turn(streams))
    assert taken == sorted(taken)
    assert len(taken) == sum(lengths)
