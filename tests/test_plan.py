"""What a plan says, held against what real runs then count; and that it needs no weights and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra import compose
from hydra_app import shipped_configs
from omegaconf import OmegaConf
from rich.console import Console
from test_run import run
from tiny_models import llama, tiny_model

from prefs.config import ApiConfig, typed
from prefs.errors import UserError
from prefs.job import Job, JobCounts, read_job, recorded
from prefs.models.counting import JUDGE, RATER, Counts
from prefs.models.embedded import smollm2_folder
from prefs.models.loading import Models
from prefs.models.openai.counting import CountingServer
from prefs.models.types import Message, Question, Reply, Request, Sample, Sampling, Usage
from prefs.models.vllm.counting import CountingVllm
from prefs.pipeline import RunFolder, run_job
from prefs.plan import Plan, plan, plan_result
from prefs.results.terminal import show
from prefs.stages.measure import Roles, job_tasks, measure
from prefs.store.table import Store

# At this temperature the model goes on to the end of its tokens, and its seeds part at once.
SMALL = (
    *("dataset.limit=6", "completer.max_new_tokens=8", "completer.temperature=3", "probe=none", "stats.bootstrap=0"),
    *("rating.seeds=[0,1]", "rating.max_new_tokens=4", "rating.temperature=3", "capture.layers=[0,14]"),
    *("wandb.mode=disabled", "model.device=cpu", "model.dtype=float32"),
)
JUDGED = (
    *("template=[likert,anchored]", "judge=llm", "model@judge.model=smollm2"),
    *("judge.model.dtype=float32", "judge.model.device=cpu"),
)


@pytest.fixture(scope="module", autouse=True)
def hydra_app():
    with shipped_configs():
        yield


def composed(store: Path, *overrides: str):
    return compose("config", overrides=[*overrides, f"store.dir={store}"])


def planned(store: Path, *overrides: str) -> Plan:
    return plan(typed(composed(store, *overrides)))


def done(folder: Path, store: Path, models: Models, *overrides: str) -> Job:
    """Run a job and read its record."""
    cfg = composed(store, *overrides)
    plain: Any = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    with recorded(folder, plain, overrides, None) as counts:
        run_job(typed(cfg), RunFolder(folder), models, counts, plain_config=plain)
    return read_job(folder)


def printed(costs: Plan, store: Path, *overrides: str) -> str:
    console = Console(width=80, force_terminal=False, markup=False)
    result = plan_result(costs, typed(composed(store, *overrides)), sweep=False)
    with console.capture() as captured:
        show(console, result, title=result.title)
    return captured.get()


def tokens(costs: Plan) -> tuple[float, float]:
    """Of prompts, and drawn."""
    return sum(role.prompt_tokens.expected for role in costs.roles), sum(r.drawn_tokens.expected for r in costs.roles)


def spent(job: Job) -> tuple[int, int]:
    return sum(usage.prompt_tokens for usage in job.spent), sum(usage.completion_tokens for usage in job.spent)


@dataclasses.dataclass(frozen=True)
class Checked:
    """A run on a fresh store, with the plans before and after it."""

    store: Path
    before: Plan
    job: Job
    after: Plan


@pytest.fixture(scope="module")
def checked(tmp_path_factory, models) -> Checked:
    store, folder = tmp_path_factory.mktemp("store"), tmp_path_factory.mktemp("job")
    before = planned(store, *SMALL, *JUDGED)
    assert not list(store.iterdir())
    job = done(folder, store, models, *SMALL, *JUDGED)
    return Checked(store, before, job, planned(store, *SMALL, *JUDGED))


def test_a_plan_is_what_the_run_then_counts(checked):
    assert {work.stage: (work.reused, work.computed) for work in checked.before.work} == {
        work.stage: (work.reused, work.computed) for work in checked.job.work
    }
    made: dict[str, int] = {}
    for work in checked.job.work:
        kind = work.stage.partition(",")[0]
        made[kind] = made.get(kind, 0) + work.computed
    assert made == {
        "completions": 6, "sampled ratings": 24, "exact ratings": 12, "residual vectors": 30, "verdicts": 6,
    }  # fmt: skip
    assert tokens(checked.before) == pytest.approx(spent(checked.job), rel=0.1)
    assert checked.before.vector_bytes.most == sum(work.bytes for work in checked.job.work) == 30 * 2 * 576 * 2
    files = [path for path in checked.store.rglob("*") if path.is_file() and not {"leases", "configs"} & {*path.parts}]
    assert checked.before.store_bytes.expected == pytest.approx(sum(path.stat().st_size for path in files), rel=0.1)


def test_what_is_exact_is_told_from_what_is_at_most_and_after_the_run_nothing_is_left(checked):
    completer, rater, judge = checked.before.roles
    assert (completer.prompt_tokens.exact, rater.prompt_tokens.exact, judge.drawn_tokens.exact) == (True, False, True)
    drawn = [role.drawn_tokens.most for role in checked.before.roles]
    assert drawn == [6 * 7, 24 * 3, 0]
    # Two operations a parameter and token.
    total = rater.prompt_tokens.most + rater.drawn_tokens.most
    assert rater.gpu_hours.most == pytest.approx(2 * rater.parameters * total / 200e12 / 3600)
    text = printed(checked.before, checked.store, *SMALL, *JUDGED)
    assert re.search(rf"completer +smollm2 +{completer.prompt_tokens.most:,.0f} +≤ 42 ", text)
    assert re.search(rf"rater +smollm2 +≤ {rater.prompt_tokens.most:,.0f} ", text)
    assert "Activations to be written: ≤ 69.1 kB." in text
    assert max(map(len, text.splitlines())) <= 80
    assert [work.computed for work in checked.after.work] == [0] * 7
    assert not checked.after.roles
    assert checked.after.vector_bytes.most == checked.after.store_bytes.most == 0
    assert "Nothing is left to make" in printed(checked.after, checked.store, *SMALL, *JUDGED)


class Brief(Models):
    """In place of any model one whose completions have 3 tokens and its answers 2."""

    rows_apart, max_context = True, 2048

    def _load(self, spec) -> Any:
        return self

    def tokens(self, request: Request) -> int:
        return 10

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        for number, request in enumerate(requests):
            length = 3 if request.question is None else 2
            yield number, Reply({seed: Sample("word " * length, length, True) for seed in request.seeds})

    def usage(self) -> Usage:
        return Usage()


def test_lengths_are_expected_from_what_the_store_has(tmp_path):
    overrides = (*SMALL, "template=[likert,anchored]", "judge=none", "rating.exact=false", "capture=none")
    config, store = typed(composed(tmp_path, *overrides)), Store.open(str(tmp_path))
    measure(config, job_tasks(config), Roles.of(config), config.template, None, store, Brief(), JobCounts())
    costs = planned(tmp_path, *overrides, "dataset.limit=12")
    assert costs.known == {"completions": (6, 3), "answers": (24, 2)}
    completer, rater = costs.roles
    # Batches are cut from all tasks and run whole, so the tasks that are there are run again beside the new ones.
    assert (completer.requests, completer.drawn_tokens.most, completer.drawn_tokens.expected) == (12, 12 * 7, 12 * 3)
    assert (rater.drawn_tokens.most, rater.drawn_tokens.expected) == (48 * 3, 48 * 2)
    text = " ".join(printed(costs, tmp_path, *overrides).split())
    assert "the store has 6 completions with 3.0 tokens on average and 24 answers with 2.0" in text


def test_a_plan_needs_no_weights(checked, tmp_path):
    weightless = tmp_path / "weightless"
    shutil.copytree(smollm2_folder(), weightless, ignore=shutil.ignore_patterns("*.safetensors"))
    overrides = (*SMALL, "model=hf", f"model.path={weightless}", "model.prefill='Answer: '", "judge=none", JUDGED[0])
    costs = planned(tmp_path / "store", *overrides)
    assert not (tmp_path / "store").exists()
    same = [[(role.prompt_tokens, role.drawn_tokens, role.parameters) for role in p.roles[:2]] for p in
            (costs, checked.before)]  # fmt: skip
    assert same[0] == same[1]
    assert costs.roles[0].parameters == 134_515_008
    assert any("has no weights" in remark for remark in costs.remarks)
    with pytest.raises(UserError, match="has no weights"):
        done(tmp_path / "job", tmp_path / "store", Models(), *overrides)


@pytest.mark.slow
def test_concepts_and_doses_are_counted(tmp_path, tmp_path_factory):
    """On a tiny model: the texts under each condition, their vectors, and then every dose."""
    path = tiny_model(tmp_path_factory.mktemp("model"), llama()).path
    models, store = Models(), tmp_path / "store"
    overrides = (
        *(*SMALL[1:], "dataset.limit=12", "model=hf", f"model.path={path}", "capture.layers=[1,3]", "judge=none"),
        *("concept=[liking_math]", "concept.liking_math.folds=2", "concept.liking_math.splits=2"),
    )
    first = planned(store, *overrides)
    job = done(tmp_path / "first", store, models, *overrides)
    assert {work.stage: work.computed for work in first.work} == {work.stage: work.computed for work in job.work}
    assert tokens(first) == pytest.approx(spent(job), rel=0.1)
    overrides += ("steering=concept", "steering.layers=[1,3]", "steering.coefficients=[-1,1,2]", "steering.seeds=[0]")
    overrides += ("steering.position=mean_completion", "steering.controls.random=2")
    before = planned(store, *overrides)
    (rater,) = before.roles
    assert rater.prompt_tokens.exact
    steered = done(tmp_path / "steered", store, models, *overrides)
    assert steered.work[-1].computed == before.work[-1].computed == 12 * (1 + 2 * (3 * (1 + 2 + 1) + 1))
    assert tokens(before) == pytest.approx(spent(steered), rel=0.01)
    assert not any(work.computed for work in planned(store, *overrides).work)


def test_vllm_caches_whole_blocks_of_what_questions_share(smollm2_fp32, backend):
    counts = Counts(bound=True)
    engine = CountingVllm(dataclasses.replace(smollm2_fp32, backend="vllm", batch_tokens=262_144), counts)
    row = (Message("user", "Name three rivers."), Message("assistant", "The Rhine, the Po, the Loire. " * 20))
    question = Question("How much did you like that task, from 1 to 5?", ("1", "2", "3", "4", "5"), "Answer: ")
    request = Request(row, question, Sampling(1.0, 1.0, 4), seeds=(0, 1), scores=(0,))
    (reply,) = dict(engine.run([request])).values()
    assert (set(reply.samples), set(reply.scores)) == ({0, 1}, {0})
    prompt = backend.tokens(request) - 2
    # The score's first request runs it all; of the five that look behind a digit, and of the two answers', the whole
    # blocks of 32 are there.
    tally = counts.tallies[RATER]
    assert tally.requests == 8
    behind = prompt + 1 - prompt // 32 * 32
    assert tally.prompt_tokens == prompt + 5 * behind + 2 * (prompt - (prompt - 1) // 32 * 32)
    assert tally.drawn_tokens == 2 * 3


def test_a_server_is_counted_by_requests_and_dollars(tmp_path, monkeypatch, smollm2_fp32):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    served = ("capture=none", "probe=none", "rating.exact=false", "model.api.price_prompt=1", "model.prefill=''")
    costs = planned(tmp_path, *SMALL, *served, "model.backend=openai", "model.api.price_completion=2")
    completer, rater = costs.roles
    assert (completer.requests, rater.requests) == (6, 12)
    assert completer.gpu_hours is None
    assert completer.dollars.most == pytest.approx((completer.prompt_tokens.most + 2 * 6 * 8) / 1e6)
    counts = Counts(bound=True)
    engine = CountingServer(dataclasses.replace(smollm2_fp32, backend="openai", api=ApiConfig()), counts)
    (reply,) = dict(engine.run([Request((), Question("a" * 40, ("yes", "no")), choose=True)])).values()
    assert reply.choice == "yes"
    assert counts.tallies[JUDGE].prompt_tokens == 4 + 10


@pytest.mark.slow
def test_a_sweep_prints_a_plan_a_job_and_leaves_nothing(tmp_path):
    text = run(tmp_path, tmp_path / "store", "-m", "plan=true", *SMALL, "template=likert,anchored")
    assert re.findall(r"Plan · smollm2 · (\w+) ", text) == ["likert_qualitative", "anchored_1_5"]
    assert text.count("one job of a sweep") == 2
    assert not list(tmp_path.rglob("job.json"))
    assert not list(tmp_path.rglob("wandb"))
    assert not (tmp_path / "store").exists()
    left = {path.name for path in tmp_path.rglob("*") if path.is_file() and ".hydra" not in path.parts}
    assert left <= {"multirun.yaml", "prefs.log"}
