"""Data sets: the embedded one, and files whose bad rows are named."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefs.config import DatasetConfig
from prefs.data.task import NO_ORIGIN, Task, load_tasks, read_tasks
from prefs.errors import UserError


def test_mini_has_32_tasks_of_each_origin():
    tasks = load_tasks(DatasetConfig(name="mini"))
    assert Counter(task.origin for task in tasks) == dict.fromkeys(("BAILBENCH", "WILDCHAT", "ALPACA", "MATH"), 32)
    assert len({task.id for task in tasks}) == len({task.prompt for task in tasks}) == 128
    assert all(task.topic for task in tasks)


def test_limit_is_even_over_origins_and_drawn_by_seed():
    drawn = [load_tasks(DatasetConfig(name="mini", limit=10, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert sorted(Counter(task.origin for task in drawn[0]).values()) == [2, 2, 3, 3]
    assert len(load_tasks(DatasetConfig(name="mini", limit=1))) == 1
    assert len(load_tasks(DatasetConfig(name="mini", limit=10_000))) == 128


def test_jsonl_and_csv_give_the_same_tasks(tmp_path):
    tasks = [Task("a", "Two\nlines, and a comma", "X", "t"), Task("b", 'A "quoted" word', NO_ORIGIN, None)]
    (tmp_path / "t.jsonl").write_text(
        json.dumps({"id": "a", "prompt": tasks[0].prompt, "origin": "X", "topic": "t"})
        + "\n"
        + json.dumps({"id": "b", "prompt": tasks[1].prompt})
        + "\n"
    )
    (tmp_path / "t.csv").write_text(
        '\ufeffid,prompt,origin,topic\na,"Two\nlines, and a comma",X,t\nb,"A ""quoted"" word",,\n', encoding="utf-8"
    )
    assert read_tasks(tmp_path / "t.jsonl") == read_tasks(tmp_path / "t.csv") == tasks


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", b'{"prompt": "a"}\n{"prompt": \n', r"t.jsonl:2: not JSON"),
        ("t.jsonl", b'{"prompt": "a"}\n\n{"prompt": "b"}\n', r"t.jsonl:2: an empty line"),
        ("t.jsonl", b'["a"]\n', r"t.jsonl:1: a JSON list, not an object"),
        ("t.jsonl", b'{"text": "a"}\n', r"t.jsonl:1: no `prompt`; the row has text"),
        ("t.jsonl", b'{"prompt": " "}\n', r"t.jsonl:1: the `prompt` is empty"),
        ("t.jsonl", b'{"prompt": 3}\n', r"t.jsonl:1: `prompt` is int, not text"),
        ("t.jsonl", b'{"prompt": "\\ud800"}\n', r"t.jsonl:1: `prompt` holds half a surrogate pair"),
        (
            "t.jsonl",
            b'{"prompt": "a", "id": "1"}\n{"prompt": "a", "id": "2"}\n',
            r"t.jsonl:2: the same prompt as line 1",
        ),
        ("t.jsonl", b'{"prompt": "a", "id": "1"}\n{"prompt": "b", "id": "1"}\n', r"t.jsonl:2: the same id as line 1"),
        ("t.jsonl", b'{"prompt": "a", "origin": "ALL"}\n', r"t.jsonl:1: the origin ALL is kept for the totals"),
        ("t.jsonl", b'{"prompt": "\xff"}\n', r"t.jsonl:1: not UTF-8"),
        ("t.jsonl", b"[" * 100_000, r"t.jsonl:1: not JSON"),
        ("t.csv", b"text\na\n", r"t.csv:1: no column `prompt`; the header has text"),
        ("t.csv", b"id,prompt\n1,a\n2,b,c\n", r"t.csv:3: 3 values under 2 columns"),
        ("t.csv", b'id,prompt\n1,"a\nb"\n2,\n', r"t.csv:4: the `prompt` is empty"),
        ("t.csv", b'id,prompt\n1,"a\n', r"t.csv:2: not CSV"),
        ("t.txt", b"a\n", r"unknown kind of file '.txt'; use .jsonl or .csv"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_tasks(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "content"), [("t.jsonl", ""), ("t.csv", ""), ("t.csv", "prompt\n")])
def test_no_tasks_at_all(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="no tasks"):
        load_tasks(DatasetConfig(name="f", kind="file", path=str(tmp_path / name)))


@given(st.lists(st.text().filter(str.strip), unique=True, max_size=8))
def test_any_prompts_survive_jsonl(tmp_path_factory, prompts):
    path = tmp_path_factory.mktemp("tasks") / "t.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "id": str(i)}) + "\n" for i, p in enumerate(prompts)))
    assert [task.prompt for task in read_tasks(path)] == prompts
