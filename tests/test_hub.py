"""Opening data sets with the real library: folders as the hub has them, a hub on loopback, its cache, no network."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fake_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefs.config import RowReader, SourceConfig
from prefs.data.hub import open_source
from prefs.errors import UserError

pytestmark = pytest.mark.usefixtures("datasets_cache")

FIRST, SECOND = "1" * 40, "2" * 40
ALPACA = {"instruction": ["Name a tree", "Add"], "input": ["", "1 and 2"], "output": ["Oak", "3"], "text": ["", ""]}
WANTED = ["instruction", "input"]


def parquet(path: Path, columns: dict[str, list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def source(path: object, **settings) -> SourceConfig:
    return SourceConfig(**{"path": str(path), "origin": "ALPACA", "prompt": WANTED, **settings})


def opened(path: object, **settings) -> list[str]:
    return list(open_source("alpaca", source(path, **settings), WANTED)["instruction"])


# Folders and files


def as_parquet(folder: Path) -> Path:
    parquet(folder / "data" / "train-00000-of-00002.parquet", {name: values[:1] for name, values in ALPACA.items()})
    parquet(folder / "data" / "train-00001-of-00002.parquet", {name: values[1:] for name, values in ALPACA.items()})
    return folder


def as_jsonl(folder: Path) -> Path:
    rows = [dict(zip(ALPACA, values, strict=True)) for values in zip(*ALPACA.values(), strict=True)]
    folder.mkdir()
    (folder / "alpaca.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def as_csv_file(folder: Path) -> Path:
    folder.mkdir()
    (folder / "alpaca.csv").write_text('instruction,input\nName a tree,\n"Add","1 and 2"\n')
    return folder / "alpaca.csv"


def saved_splits(folder: Path) -> Path:
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_dict(ALPACA)}).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize(
    "write",
    [
        as_parquet,
        as_jsonl,
        as_csv_file,
        saved_splits,
        lambda folder: as_jsonl(folder) / "alpaca.jsonl",
    ],
)
def test_every_layout_of_a_folder(tmp_path, write):
    rows = open_source("alpaca", source(write(tmp_path / "alpaca")), WANTED)
    assert rows.column_names == WANTED
    assert list(rows["instruction"]) == ALPACA["instruction"]
    assert [text or "" for text in rows["input"]] == ALPACA["input"]
    assert rows.cache_files  # on disk, not in memory


@pytest.mark.parametrize("card", [True, False])
def test_configurations_are_read_in_order(tmp_path, card):
    for config in ("algebra", "geometry"):
        for split in ("train", "test"):
            row = {"instruction": [f"{config} {split}"], "input": [""]}
            parquet(tmp_path / config / f"{split}-00000-of-00001.parquet", row)
    if card:
        items = [f"- config_name: {config}\n  data_files: {config}/*\n" for config in ("algebra", "geometry")]
        (tmp_path / "README.md").write_text(f"---\nconfigs:\n{''.join(items)}---\n")
    assert opened(tmp_path, configs=["geometry", "algebra"]) == ["geometry train", "algebra train"]
    assert opened(tmp_path, configs=["geometry"], split="train+test") == ["geometry train", "geometry test"]
    for settings, message in (
        ({"configs": ["calculus"]}, "BuilderConfig 'calculus' not found.*check dataset.sources.alpaca"),
        ({"configs": ["algebra"], "split": "dev"}, r'Unknown split "dev". Should be one of \[.*alpaca.path, .*split'),
    ):
        with pytest.raises(UserError, match=message):
            opened(tmp_path, **settings)


CONVERSATION = pa.array([[{"role": "user", "text": "Hi"}]])


TURNS = {"prompt": ["conversation"], "reader": RowReader.conversation}


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"prompt": ["Hi"], "output": ["Ho"]}, {}, "no instruction, input; expected instruction, input; found prompt,"),
        ({"conversation": CONVERSATION}, TURNS, "turns in conversation of .*: expected role, content; found role, te"),
        ({"conversation": ["Hi"]}, TURNS, r"conversation of .* is Value\('string'\), not a list of turns"),
    ],
)
def test_changed_columns_are_named(tmp_path, columns, settings, message):
    parquet(tmp_path / "train.parquet", columns)
    given = source(tmp_path, **settings)
    with pytest.raises(UserError, match=message):
        open_source("alpaca", given, given.prompt)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.parquet", b"PAR1", "alpaca: .* cannot be read .*Parquet.*; check dataset.sources.alpaca.path"),
        ("data.jsonl", b'{"instruction": "\\ud800", "input": ""}\n', "cannot be read .*surrogate pair"),
        ("data.jsonl", b"", "alpaca: .* has no rows"),
        ("data.csv", b"instruction,input\na,b\na,b,c\n", "cannot be read .*Expected 2 fields in line 3, saw 3"),
        (None, b"", "contain any data files"),
        # `datasets` takes the folder for a pattern.
        ("[1]/data.csv", b"a", r"takes \* \? \[ \] in .*\[1\] for a pattern; give it another name"),
        ("file.xlsx", b"a", r"file.xlsx: not a kind of file .* use .parquet, .jsonl, .json, .csv"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, name, content, message):
    path = tmp_path / (name or "none")
    if name:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        opened(path if path.suffix == ".xlsx" else path.parent)
    assert "\n" not in str(caught.value)


# The hub

PROGRAM = """
import json, logging, sys
from prefs.config import DatasetConfig, SourceConfig
from prefs.errors import UserError
from prefs.data.task import load_tasks

logged = []
handler = logging.Handler()
handler.emit = lambda record: logged.append(record.getMessage())
logging.basicConfig(level=logging.INFO, handlers=[handler])
for settings in json.loads(sys.argv[1]):
    logged.clear()
    dataset = DatasetConfig(name="hub", kind="hub", sources={"alpaca": SourceConfig(**settings)})
    try:
        print(json.dumps([[task.prompt for task in load_tasks(dataset)], logged]))
    except UserError as error:
        print(json.dumps([None, [*logged, str(error)]]))
"""
Loaded = tuple[list[str] | None, list[str]]


def load(home: Path, endpoint: str, *sources: dict, offline: str | None = None) -> list[Loaded]:
    """In a process of its own, for each source: its prompts (None: an error), and all that was logged.

    ``offline`` names a variable to set.
    """
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    env |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1"}
    env |= {offline: "1"} if offline else {}
    default = {"path": "tatsu-lab/alpaca", "revision": FIRST, "origin": "ALPACA", "prompt": WANTED}
    command = [sys.executable, "-c", PROGRAM, json.dumps([default | settings for settings in sources or [{}]])]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")  # nothing of the library's own
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


NOWHERE = "http://127.0.0.1:9"  # refuses
PROMPTS = ["Name a tree", "Add\n\n1 and 2"]
LOADED = (PROMPTS, ["alpaca: 2 tasks of 2 rows read"])
OUT_OF_REACH = (
    "alpaca: tatsu-lab/alpaca cannot be reached, and the cache of `datasets` does not have it: "
    "run once with a network, or give a copy with dataset.sources.alpaca.path=FOLDER"
)


@pytest.fixture
def hub(tmp_path) -> Iterator[fake_hub.FakeHub]:
    alpaca = tmp_path / "hub" / "tatsu-lab" / "alpaca"
    as_parquet(alpaca / FIRST)
    parquet(alpaca / SECOND / "data" / "train-0.parquet", {"instruction": ["Newer"], "input": [""]})
    parquet(tmp_path / "hub" / "E" / "math" / FIRST / "train-0.parquet", {"problem": ["1 + 2"]})
    with fake_hub.serve(tmp_path / "hub") as served:
        yield served


def test_what_was_loaded_once_needs_no_network(hub, tmp_path):
    home = tmp_path / "home"
    assert load(home, hub.url, {}, {}) == [LOADED, LOADED]
    assert sum(request.startswith("GET") and "train-00000" in request for request in hub.asked) == 1
    hub.asked.clear()
    assert load(home, hub.url, offline="HF_HUB_OFFLINE") == [LOADED]
    assert hub.asked == []
    assert load(home, NOWHERE) == [LOADED]


def test_a_pin_holds_whatever_else_is_in_the_cache(hub, tmp_path):
    home = tmp_path / "home"
    ((newest, messages),) = load(home, hub.url, {"revision": None})
    assert newest == ["Newer"]
    assert messages[0] == (
        f"alpaca: tatsu-lab/alpaca, at revision {SECOND}; to keep to it, give dataset.sources.alpaca.revision={SECOND}"
    )
    ((prompts, (line,)),) = load(home, NOWHERE)
    assert prompts is None
    assert f"at {FIRST} (it has {SECOND}; dataset.sources.alpaca.revision={SECOND} takes that)" in line
    assert load(home, hub.url) == [LOADED]
    pinned, newer, latest = load(home, NOWHERE, {}, {"revision": SECOND}, {"revision": "main"})
    assert pinned == LOADED
    assert newer[0] == ["Newer"]
    assert latest[0] == PROMPTS  # what came last into the cache


@pytest.mark.parametrize("why", ["told to be offline", "no network", "a hub that never answers"])
def test_out_of_reach_is_one_line_in_seconds(tmp_path, why):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}" if why == "a hub that never answers" else NOWHERE
        started = time.monotonic()
        offline = "HF_HUB_OFFLINE" if why == "told to be offline" else None
        assert load(tmp_path / "home", endpoint, offline=offline) == [(None, [OUT_OF_REACH])]
        assert time.monotonic() - started < 20


def test_gated_missing_and_changed_data_sets(hub, tmp_path):
    hub.gated.add("E/math")
    expected = [
        (
            {"path": "E/math"},
            "is gated: accept its terms on its page on the hub, and give your token as HF_TOKEN",
        ),
        ({"path": "no/such"}, "no/such is not on the hub, or not for you to read; check dataset.sources.alpaca.path"),
        ({"revision": "3" * 40}, f"has no revision {'3' * 40}; dataset.sources.alpaca.revision=null takes the latest"),
        ({"prompt": ["question"]}, "there is no question; expected question; found instruction, input, output, text"),
    ]
    results = load(tmp_path / "home", hub.url, *(settings for settings, _ in expected))
    for (prompts, (line,)), (_, message) in zip(results, expected, strict=True):
        assert prompts is None
        assert message in line


def test_a_file_behind_a_url_is_fetched_once(hub, tmp_path):
    file = tmp_path / "hub" / "files" / FIRST / "bailBench.csv"
    file.parent.mkdir(parents=True)
    file.write_text('content,subcategory,category\n"Shout, please",Yelling,Loud\n')
    settings = {"path": f"{hub.url}/files/{FIRST}/bailBench.csv", "revision": None, "prompt": ["content"]}
    expected = (["Shout, please"], ["alpaca: 1 tasks of 1 rows read"])
    home = tmp_path / "home"
    assert load(home, hub.url, settings) == [expected]
    hub.asked.clear()
    others = {
        f"{NOWHERE}/files/none.csv": "cannot be reached",
        f"{hub.url}/files/none.csv": "(404 Not Found); check dataset.",
        f"{hub.url}/broken": "(500 ",
    }
    again, *failed = load(home, hub.url, settings, *(settings | {"path": path} for path in others))
    assert again == expected
    assert not any(FIRST in request for request in hub.asked)
    for (prompts, (line,)), message in zip(failed, others.values(), strict=True):
        assert prompts is None
        assert message in line
    assert load(home, hub.url, settings, offline="HF_DATASETS_OFFLINE") == [expected]
