"""What a plan says, held against what real runs then count; and that it needs no weights and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hydra import compose
from hydra_app import shipped_configs
from omegaconf import OmegaConf
from rich.console import Console
from test_run import run, start
from tiny_models import llama, tiny_model

from prefs.config import ApiConfig, typed
from prefs.errors import UserError
from prefs.job import Job, read_job, recorded
from prefs.models.embedded import smollm2_folder
from prefs.models.loading import Models
from prefs.models.tokens import Message
from prefs.models.types import Ask, Question, Sampling
from prefs.pipeline import RunFolder, run_job
from prefs.plan.book import JUDGE, RATER, Book
from prefs.plan.costs import Plan, plan
from prefs.plan.lengths import Lengths
from prefs.plan.server import PlannedServer
from prefs.plan.show import plan_result
from prefs.plan.store import Planned
from prefs.plan.vllm_requests import PlannedVllm
from prefs.results.terminal import show

# At this temperature the model goes on to the end of its tokens, and its seeds part at once.
SMALL = (
    "dataset.limit=6",
    "completer.max_new_tokens=8",
    "rating.seeds=[0,1]",
    "rating.max_new_tokens=4",
    "rating.temperature=3",
    "capture.layers=[0,14]",
    "probe=none",
    "stats.bootstrap=0",
    "wandb.mode=disabled",
    "model.device=cpu",
    "model.dtype=float32",
)
JUDGED = ("template=[likert,anchored]", "judge=llm", "model@judge.model=smollm2", "judge.model.dtype=float32")
TOKENS = ("prompt_tokens", "completion_tokens")


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
    with recorded(folder, plain, overrides, None) as doings:
        run_job(typed(cfg), RunFolder(folder), models, doings, plain_config=plain)
    return read_job(folder)


def printed(found: Plan, config, *, sweep: bool = False) -> str:
    console = Console(width=80, force_terminal=False, markup=False)
    with console.capture() as captured:
        result = plan_result(found, config, sweep=sweep)
        show(console, result, title=result.title)
    return captured.get()


def tokens(found: Plan) -> dict[str, float]:
    """As the record of a job has them: of prompts, and drawn."""
    of = {"prompt_tokens": "prompt_tokens", "completion_tokens": "drawn_tokens"}
    return {name: sum(getattr(role, each).expected for role in found.roles) for name, each in of.items()}


def spent(job: Job) -> dict[str, float]:
    return {name: sum(getattr(each, name) for each in job.spent) for name in TOKENS}


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
    of = (*SMALL, *JUDGED, "judge.model.device=cpu")
    before = planned(store, *of)
    assert not list(store.iterdir())
    job = done(folder, store, models, *of)
    return Checked(store, before, job, planned(store, *of))


def test_a_plan_is_what_the_run_then_counts(checked):
    assert {each.stage: (each.reused, each.computed) for each in checked.before.work} == {
        each.stage: (each.reused, each.computed) for each in checked.job.work
    }
    counts = {each.stage.partition(",")[0]: 0 for each in checked.job.work}
    for each in checked.job.work:
        counts[each.stage.partition(",")[0]] += each.computed
    assert counts == {
        "completions": 6, "sampled ratings": 24, "exact ratings": 12, "residual vectors": 30, "verdicts": 6,
    }  # fmt: skip
    assert tokens(checked.before) == pytest.approx(spent(checked.job), rel=0.1)
    assert checked.before.vector_bytes.most == sum(each.bytes for each in checked.job.work) == 30 * 2 * 576 * 2
    files = [path for path in checked.store.rglob("*") if path.is_file() and "leases" not in path.parts]
    assert checked.before.store_bytes.expected == pytest.approx(sum(path.stat().st_size for path in files), rel=0.1)


def test_what_is_known_before_is_said_to_be_exact(checked):
    completer, rater, judge = checked.before.roles
    assert completer.prompt_tokens.exact
    assert not rater.prompt_tokens.exact
    assert (completer.drawn_tokens.most, rater.drawn_tokens.most) == (6 * 7, 24 * 3)
    assert judge.drawn_tokens.exact
    assert judge.drawn_tokens.most == 0
    said = printed(checked.before, typed(composed(checked.store, *SMALL, *JUDGED)))
    assert re.search(rf"completer +smollm2 +{completer.prompt_tokens.most:,.0f} +≤ 42 ", said)
    assert re.search(rf"rater +smollm2 +≤ {rater.prompt_tokens.most:,.0f} ", said)
    assert "Activations to be written: ≤ 69.1 kB." in said
    assert "has none to expect" in " ".join(said.split())
    assert max(map(len, said.splitlines())) <= 80


def test_after_the_run_nothing_is_left(checked):
    assert [each.computed for each in checked.after.work] == [0] * 7
    assert not checked.after.roles
    assert checked.after.vector_bytes.most == checked.after.store_bytes.most == 0
    assert "Nothing is left to make" in printed(checked.after, typed(composed(checked.store, *SMALL, *JUDGED)))


def test_with_completions_in_the_store_prompts_are_exact(checked, models, tmp_path):
    of = (*SMALL, "template=stated", "capture.positions=[last_completion,rating]", "rating.seeds=[]")
    before = planned(checked.store, *of)
    job = done(tmp_path, checked.store, models, *of)
    (rater,) = before.roles
    assert rater.prompt_tokens.exact
    assert spent(job) == {"prompt_tokens": rater.prompt_tokens.most, "completion_tokens": 0}
    assert before.vector_bytes.exact
    assert before.vector_bytes.most == sum(each.bytes for each in job.work) == 6 * 2 * 576 * 2


def test_only_vectors_missing_stops_at_the_deepest_layer(checked, models, tmp_path):
    """A token that 5 of 30 blocks run is a sixth of a token, in both."""
    of = (*SMALL, *JUDGED, "judge.model.device=cpu", "capture.layers=[1,4]")
    before = planned(checked.store, *of)
    job = done(tmp_path, checked.store, models, *of)
    assert tokens(before) == pytest.approx(spent(job), abs=1)
    assert spent(job)["prompt_tokens"] < tokens(checked.before)["prompt_tokens"] / 5


def test_lengths_are_expected_from_what_the_store_has(checked):
    found = planned(checked.store, *SMALL, "dataset.limit=12", "template=[likert,anchored]", "judge=none")
    assert found.known["completions"] == (6, pytest.approx(7.5, abs=1))
    count, mean = found.known["answers"]
    assert count == 24
    completer, rater = found.roles
    # Batches are cut from all tasks and run whole, so the tasks that are there are run again beside the new ones.
    assert (completer.requests, rater.drawn_tokens.most) == (12, 48 * 3)
    assert completer.drawn_tokens.expected < completer.drawn_tokens.most == 12 * 7
    assert completer.drawn_tokens.expected == pytest.approx(12 * found.known["completions"][1], rel=0.15)
    assert rater.drawn_tokens.expected <= 48 * mean
    assert "the store has 6 completions with" in " ".join(printed(found, typed(composed(checked.store))).split())


@pytest.fixture(scope="module")
def weightless(tmp_path_factory) -> Path:
    """The embedded model's folder without its weights."""
    folder = tmp_path_factory.mktemp("weightless") / "model"
    shutil.copytree(smollm2_folder(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def test_a_plan_needs_no_weights(checked, weightless, tmp_path):
    given = ("model=hf", f"model.path={weightless}", "model.prefill='Answer: '", "judge=none", JUDGED[0])
    found = planned(tmp_path / "store", *SMALL, *given)
    assert not (tmp_path / "store").exists()
    same = [(each.prompt_tokens, each.drawn_tokens, each.parameters) for each in found.roles]
    assert same == [(each.prompt_tokens, each.drawn_tokens, each.parameters) for each in checked.before.roles[:2]]
    assert found.roles[0].parameters == 134_515_008
    assert any("has no weights" in remark for remark in found.remarks)
    with pytest.raises(UserError, match="has no weights"):
        done(tmp_path / "job", tmp_path / "store", Models(), *SMALL, *given)


def test_hours_are_two_operations_a_parameter_and_token(checked):
    rater = checked.before.roles[1]
    total = rater.prompt_tokens.most + rater.drawn_tokens.most
    assert rater.gpu_hours.most == pytest.approx(2 * rater.parameters * total / 200e12 / 3600)


@pytest.mark.slow
def test_concepts_and_doses_are_counted(tmp_path, tmp_path_factory):
    """On a tiny model: the texts under each condition, their vectors, and then every dose."""
    path = tiny_model(tmp_path_factory.mktemp("model"), llama()).path
    models, store = Models(), tmp_path / "store"
    concept = ("concept=[liking_math]", "concept.liking_math.folds=2", "concept.liking_math.splits=2")
    of = (
        *SMALL[1:],
        "dataset.limit=12",
        "model=hf",
        f"model.path={path}",
        *concept,
        "capture.layers=[1,3]",
        "judge=none",
    )
    first = planned(store, *of)
    job = done(tmp_path / "first", store, models, *of)
    assert {each.stage: each.computed for each in first.work} == {each.stage: each.computed for each in job.work}
    assert tokens(first) == pytest.approx(spent(job), rel=0.1)
    steering = ("steering=concept", "steering.layers=[1,3]", "steering.coefficients=[-1,1,2]", "steering.seeds=[0]")
    steering += ("steering.position=mean_completion", "steering.controls.random=2")
    before = planned(store, *of, *steering)
    (rater,) = before.roles
    assert rater.prompt_tokens.exact
    steered = done(tmp_path / "steered", store, models, *of, *steering)
    assert steered.work[-1].computed == before.work[-1].computed == 12 * (1 + 2 * (3 * (1 + 2 + 1) + 1))
    assert tokens(before) == pytest.approx(spent(steered), rel=0.01)
    assert not any(each.computed for each in planned(store, *of, *steering).work)


def test_vllm_caches_whole_blocks_of_what_questions_share(smollm2_fp32, backend):
    book = Book()
    engine = PlannedVllm(
        dataclasses.replace(smollm2_fp32, backend="vllm", batch_tokens=262_144), Lengths(Planned(), True), book
    )
    row = (Message("user", "Name three rivers."), Message("assistant", "The Rhine, the Po, the Loire. " * 20))
    question = Question("How much did you like that task, from 1 to 5?", ("1", "2", "3", "4", "5"), "Answer: ")
    engine.observe([row], [Ask(question, seeds=(0, 1), scores=(0,))], Sampling(1.0, 1.0, 4))
    prompt = backend.question_tokens(row, question) - 1
    # The score's request runs it all; of the two answers' the whole blocks of 32 are there.
    assert book.of(RATER).requests == 3
    assert book.of(RATER).prompt_tokens == prompt + 2 * (prompt - (prompt - 1) // 32 * 32)
    assert book.of(RATER).drawn_tokens == 2 * 3


def test_a_server_is_counted_by_requests_and_dollars(tmp_path, monkeypatch, smollm2_fp32):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    served = ("capture=none", "probe=none", "rating.exact=false", "model.api.price_prompt=1", "model.prefill=''")
    found = planned(tmp_path, *SMALL[:6], *served, "model.backend=openai", "model.api.price_completion=2")
    completer, rater = found.roles
    assert (completer.requests, rater.requests) == (6, 12)
    assert completer.gpu_hours is None
    assert completer.dollars.most == pytest.approx((completer.prompt_tokens.most + 2 * 6 * 8) / 1e6)
    book = Book()
    server = PlannedServer(
        dataclasses.replace(smollm2_fp32, backend="openai", api=ApiConfig()), Lengths(Planned(), True), book
    )
    assert server.choose([(Message("user", "a" * 40),)], ["yes", "no"]) == ["yes"]
    assert book.of(JUDGE).prompt_tokens == 4 + 10


def test_a_sweep_prints_a_plan_a_job_and_leaves_nothing(tmp_path):
    printed = run(tmp_path, tmp_path / "store", "-m", "plan=true", *SMALL, "template=likert,anchored")
    assert re.findall(r"Plan · smollm2 · (\w+) ", printed) == ["likert_qualitative", "anchored_1_5"]
    assert printed.count("one job of a sweep") == 2
    assert not list(tmp_path.rglob("job.json"))
    assert not list(tmp_path.rglob("wandb"))
    assert not (tmp_path / "store").exists()
    left = {path.name for path in tmp_path.rglob("*") if path.is_file() and ".hydra" not in path.parts}
    assert left <= {"multirun.yaml", "prefs.log"}


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("plam=true", "prefs: plam: there is no such key; did you mean 'plan'?"),
        ("plan_tflops=0", "prefs: plan_tflops: got 0.0; allowed: more than 0"),
    ],
)
def test_a_wrong_key_is_one_line(tmp_path, override, line):
    process = start(tmp_path, tmp_path / "store", "plan=true", override)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said.startswith(line)
    assert said.count("\n") == 1
