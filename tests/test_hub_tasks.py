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
from prefs.data.hub import Skip, task_of
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
    wildchat(None, key="h5"),
    wildchat(chat(("assistant", "Hello")), key="h7"),
    wildchat(chat(("user", None)), key="h8"),
    wildchat(chat(("user", " \n ")), key="h9"),
    wildchat(chat(("user", "long " * 1000)), key="h10"),
    wildchat(chat(("user", "Name a sea")), key=None),
]


def test_wildchat_takes_first_english_user_turns(tmp_path, prefs_log):
    dataset = shipped("wildchat", f"dataset.sources.wildchat.path={written(tmp_path, WILDCHAT_ROWS)}")
    assert load_tasks(dataset) == [
        Task("wildchat-h1", "How do I prune roses?", "WILDCHAT", None),
        Task("wildchat-h2", "Name a river", "WILDCHAT", None),
        Task(f"wildchat-{sha256(b'Name a sea').hexdigest()[:12]}", "Name a sea", "WILDCHAT", None),
    ]
    (line,) = messages(prefs_log)
    tasks, _, skipped = line.partition("; skipped ")
    assert tasks == "wildchat: 3 tasks of 9 rows read"
    assert counted(skipped) == {
        "empty": 3,
        "without a user turn": 1,
        "with another language than English": 1,
        "longer than 4,000 characters": 1,
    }


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
    assert [line.split(":")[0] for line in messages(prefs_log)] == list(SIZES)


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


def test_a_data_set_of_ones_own_needs_no_code(tmp_path):
    rows = [
        {"question": "Name a tree", "hint": "Not an oak", "nr": 1, "field": "nature", "level": 2, "checked": True},
        {"question": "Add", "hint": None, "nr": 2, "field": None, "level": 2, "checked": True},
        {"question": "Sing", "hint": "", "nr": 3, "field": "arts", "level": 1, "checked": True},
        {"question": "Jump", "hint": "", "nr": 4, "field": "arts", "level": 2, "checked": False},
    ]
    source = SourceConfig(
        path=str(written(tmp_path, rows, "jsonl")), origin="QUIZ", prompt=["question", "hint"], id="nr", topic="field",
        only={"level": 2, "checked": True},
    )  # fmt: skip
    assert load_tasks(DatasetConfig(name="own", kind="hub", sources={"questions": source})) == [
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
