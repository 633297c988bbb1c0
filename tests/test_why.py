"""What `why=true` says of a store, which made-up answers fill; that it needs no model and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose
from hydra_app import shipped_configs
from rich.console import Console

from prefs.config import Config, typed
from prefs.job import JobCounts
from prefs.models.types import Reply, Request
from prefs.plan.why import MadeUp, Missing, why, why_result
from prefs.results.terminal import show
from prefs.stages.made_with import made_with
from prefs.stages.measure import Roles, job_tasks, measure, sites
from prefs.store.configs import FOLDER, remember
from prefs.store.table import Store

JOB = (
    *("dataset.limit=4", "completer.max_new_tokens=8", "rating.seeds=[0,1]", "template=[likert]", "probe=none"),
    *("capture.layers=[0,1]", "capture.positions=[rating]", "judge=llm", "model@judge.model=smollm2"),
)
KINDS = ("completions", "sampled ratings", "exact ratings", "residual vectors", "verdicts")


@pytest.fixture(scope="module", autouse=True)
def hydra_app():
    with shipped_configs():
        yield


def composed(store: Path, *overrides: str) -> Config:
    return typed(compose("config", overrides=[*JOB, *overrides, f"store.dir={store}"]))


class Model(MadeUp):
    """One whose answers follow from how they are drawn, too, as a model's do."""

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        for number, reply in super().run(requests):
            drawn = requests[number].sampling
            samples = {seed: replace(one, text=f"{one.text} {drawn}") for seed, one in reply.samples.items()}
            yield number, replace(reply, samples=samples)


def serve(store: Path, *overrides: str) -> None:
    """Do what a job does with its store."""
    config, opened = composed(store, *overrides), Store.open(str(store))
    tasks, roles = job_tasks(config), Roles.of(config)
    remember(opened, made_with(config, roles, tasks))
    capture = sites(config, roles.rater).capture
    measure(config, tasks, roles, config.template, capture, opened, Model(), JobCounts(logged=False))


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Path:
    store = tmp_path_factory.mktemp("store")
    serve(store)
    serve(store, "template=[anchored]", "rating.temperature=0.5", "completer.seed=5")
    return store


def said(missing: list[Missing]) -> dict[str, tuple[int, int, dict[str, tuple[object, object]]]]:
    """By kind: how many are missing, how many the store has, and the fields with what it has and what was asked."""
    return {
        one.kind: (one.count, one.stored, {".".join(d.path): (d.stored, d.asked) for d in one.differences or ()})
        for one in missing
    }


@pytest.mark.parametrize(
    ("overrides", "fields", "kinds"),
    [
        (["completer.max_new_tokens=9"], {"completer.max_new_tokens": (8, 9)}, KINDS),
        (["rating.max_new_tokens=9"], {"rating.max_new_tokens": (8, 9)}, KINDS[1:2]),
        (["rating.seeds=[0,1,2]"], {"rating.seeds": ([0, 1], [0, 1, 2])}, KINDS[1:2]),
        (["capture.layers=[0,1,2]"], {"capture.layers": ([0, 1], [0, 1, 2])}, KINDS[3:4]),
        (["rating.system_prompt=Hello"], {"rating.system_prompt": (None, "Hello")}, KINDS[1:4]),
        (["judge.question='{request}? {reply}'"], {"judge.question": None}, KINDS[4:]),
        (["model.dtype=float16", "completer=smollm2"], {"model.dtype": None}, KINDS[1:4]),
        # Fields that change nothing are not among them, and of two that change a kind both are.
        (["model.batch_tokens=7", "completer.seed=1", "rating.exact=false"], {"completer.seed": (0, 1)}, None),
        (["dataset.limit=8", "completer.top_p=0.5"], {"dataset.limit": (4, 8), "completer.top_p": (1.0, 0.5)}, KINDS),
        ([], {}, ()),
        (["template=[likert,stated]"], {"template": None}, KINDS[1:4]),
    ],
)
def test_the_fields_that_differ_are_named_for_each_kind(served, overrides, fields, kinds):
    missing = said(why(composed(served, *overrides)))
    if kinds is not None:
        assert tuple(missing) == kinds
    for count, stored, differing in missing.values():
        assert count > 0
        assert stored > 0
        assert set(differing) == set(fields)
        assert all(differing[name] == pair for name, pair in fields.items() if pair is not None)


def test_the_nearest_config_counts(served):
    missing = said(why(composed(served, "template=[anchored]", "rating.temperature=0.5", "completer.seed=6")))
    assert missing["sampled ratings"] == (8, 8, {"completer.seed": (5, 6)})
    missing = said(why(composed(served, "template=[anchored]", "completer.seed=5")))
    assert missing == {"sampled ratings": (8, 8, {"rating.temperature": (0.5, 1.0)})}


def test_what_no_config_says_is_told_as_the_files_and_tasks_it_named(tmp_path):
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    own = ("dataset=file", f"dataset.path={tasks}", "dataset.limit=null")
    serve(tmp_path / "store", *own)
    tasks.write_text('{"prompt": "c"}\n{"prompt": "d"}\n')
    missing = why(composed(tmp_path / "store", *own))
    assert {path for one in missing for d in one.differences or () for path in d.path} == {"tasks"}
    assert "tasks of dataset" in printed(missing, composed(tmp_path / "store", *own))


def test_it_says_so_where_there_is_nothing_to_compare_with(tmp_path):
    config = composed(tmp_path / "store")
    missing = why(config)
    assert [one.differences for one in missing] == [None] * len(KINDS)
    assert "The store says of no job" in printed(missing, config)
    assert not (tmp_path / "store").exists()


def test_it_reads_only_and_prints_a_line_a_field(served):
    before = {path: path.read_bytes() for path in served.rglob("*") if path.is_file()}
    config = composed(served, "completer.max_new_tokens=9")
    text = printed(why(config), config)
    assert "completions 4 4 completer.max_new_tokens=8, not 9" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80
    assert "Nothing is missing" in printed(why(composed(served)), config)
    assert {path: path.read_bytes() for path in served.rglob("*") if path.is_file()} == before


def test_a_config_of_another_version_or_a_broken_file_is_passed_over(tmp_path):
    serve(tmp_path / "store")
    kept = tmp_path / "store" / FOLDER
    (kept / "broken.json").write_text("{")
    (kept / "other.json").write_text('{"config": {"model": {"gone": 1}}, "models": {}, "tasks": ""}')
    missing = said(why(composed(tmp_path / "store", "completer.seed=3")))
    assert missing["completions"] == (4, 4, {"completer.seed": (0, 3)})


def test_a_store_that_cannot_be_written_to_is_no_error_here(tmp_path):
    remember(replace(Store(tmp_path), root=tmp_path / "nowhere" / "deep"), {"config": 1})
    assert not list(tmp_path.iterdir())


def printed(missing: list[Missing], config: Config) -> str:
    console, result = Console(width=80, force_terminal=False, markup=False), why_result(missing, config)
    with console.capture() as captured:
        show(console, result, title=result.title)
    return captured.get()
