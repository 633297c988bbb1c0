"""Every field of the config: another value gives other keys, or the same records under the same keys.

No model is run. In the place of each stands one that answers with a digest of all that an engine is told; a record that
two configs have under one key must then be the same in both. What changes no key is listed, with the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from hydra import compose
from hydra_app import shipped_configs
from tiny_models import llama

from prefs.concepts.export import SavedVectors, save_vectors
from prefs.config import Config, ModelDType, ProbeConfig, typed
from prefs.data.task import Task
from prefs.errors import UserError
from prefs.models.counting import tokenizer_of
from prefs.models.loading import VLLM_SCHEDULING, Models, ModelSpec, identity
from prefs.models.types import Capture, Reply, Request, Sample, Sampling, Score, Usage, as_dicts
from prefs.plan import run_stages
from prefs.probes.probe import Site
from prefs.stages import probe
from prefs.stages.measure import Roles, job_tasks, sites
from prefs.statistics.measured import Measured
from prefs.store.keys import digest
from prefs.store.planned import PlannedStore
from prefs.store.vectors import Vectors

# Fields that change no key of a record that models are asked for. MODEL is any of the three roles'.
ROUNDING = "the same numbers, but for rounding (shown by the tests of the engines)"
SPEED = "how fast, and on how many devices"
ANEW = "what is made of the records, anew by each run"
NAME = "a name in tables"
PAIRS = "which pairs are asked for: their prompts are in the keys"
UNKEYED = {
    "MODEL.name": NAME,
    "MODEL.completion_tokens": "what completer.max_new_tokens is by default, which is in the key",
    **dict.fromkeys(("MODEL.device", "MODEL.device_map", "MODEL.attn_implementation", "MODEL.batch_tokens"), ROUNDING),
    **dict.fromkeys(("MODEL.gpus", "MODEL.vllm.tensor_parallel_size", "MODEL.vllm.data_parallel_size"), SPEED),
    **dict.fromkeys(("MODEL.vllm.gpu_memory_utilization", "MODEL.vllm.enforce_eager"), SPEED),
    **dict.fromkeys(("MODEL.api.concurrency", "MODEL.api.timeout_s", "MODEL.api.max_retries"), SPEED),
    "MODEL.api.key_env": "who pays",
    **dict.fromkeys(("MODEL.api.price_prompt", "MODEL.api.price_completion"), "what is told of the cost"),
    "completer.name": NAME,
    **dict.fromkeys(("completer.condition", "rating.condition"), "stands for the system prompt, which is in the key"),
    "template.*.name": NAME,
    "template.*.scale": "stands for the options, which are in the key",
    **dict.fromkeys(("template.*.reading", "template.*.options.*.value"), ANEW),
    **dict.fromkeys(("choice.name", "choice.template.name"), NAME),
    "choice.thoughts": "of exact choices of a model that thinks, whose seeds are in the keys",
    "choice.condition": "stands for the system prompt, which is in the key",
    **{f"choice.pairs.{name}": PAIRS for name in ("degree", "first", "step", "select", "holdout", "stop_se", "seed")},
    **{f"choice.utility.{name}": PAIRS for name in ("model", "position", "folds", "splits", "seed")},
    **dict.fromkeys(("judge.name", "judge.phrases", "judge.window"), ANEW),
    "capture.name": NAME,
    **dict.fromkeys(("concept.*.name", "concept.*.folds", "concept.*.splits", "concept.*.seed"), ANEW),
    "concept.*.contrast": "which of two conditions is the first; their prompts are in the keys",
    "steering.name": NAME,
    "steering.controls.probes": "probes are not run here; a direction's numbers are in the key",
    "steering.controls.shuffled": "as the concept's vectors, which are not there here",
    **{f"steering.coherence.{name}": ANEW for name in ("valid_mass", "perplexity", "invalid")},
}
# Groups of which no field does.
GROUPS = {
    "probe": "has keys of its own (below)",
    "stats": ANEW,
    "wandb": "where results go",
    "store": "where records are",
    "plan": "nothing is run",
    "plan_tflops": "nothing is run",
    "why": "nothing is run",
    "shard": "which tasks",
    "dataset": "which tasks: their prompts are in the key",
}
# Of the fields of ProbeConfig, those that change no key of what probes find.
PROBE_UNKEYED = {
    "name": NAME,
    "layers": "those of the vectors are in the key",
    "positions": "those of the vectors are in the key",
    "binary": "told by the kind",
}
# What of a model's spec an engine's answers are digests of: all but what is listed above.
SPEC_UNKEYED = [name.partition(".")[2] for name in UNKEYED if name.startswith("MODEL.") and name.count(".") == 1]
ROLES = ("completer.model.", "judge.model.", "model.")


class Digesting(Models):
    """In the place of all models one whose answers follow from its spec and what it is asked, and from nothing else."""

    def get(self, spec: ModelSpec) -> Any:
        told = {name: value for name, value in asdict(spec).items() if name not in SPEC_UNKEYED}
        if spec.backend != "openai":
            told.pop("revision")  # of a hub model, whose commit is in the key; an embedded one and a folder have none
        scheduled = {name: value for name, value in spec.vllm.engine.items() if name not in VLLM_SCHEDULING}
        told["vllm"] = (spec.vllm.quantization, scheduled) if spec.backend == "vllm" else (None, {})
        told["api"] = spec.api.extra_body if spec.backend == "openai" else {}
        shown = (spec.api.top_logprobs, spec.api.prefill) if spec.backend == "openai" else ()
        of_the_engine = ("prefill", "backend")  # which is in the question; and one engine's records serve another
        return Answering({name: value for name, value in told.items() if name not in of_the_engine}, shown)


@dataclasses.dataclass
class Answering:
    """`Digesting` with one model's spec; ``shown`` is what of it only changes the probabilities that are shown."""

    told: Mapping[str, Any]
    shown: tuple[Any, ...]
    max_context: int = 10**9
    rows_apart: bool = True

    def tokens(self, request: Request) -> int:
        return 1

    def run(self, requests: list[Request]) -> Iterator[tuple[int, Reply]]:
        for number, request in enumerate(requests):
            question, drawn = request.question, request.sampling
            also = question and question.also  # other words for the options, which are scored but not shown
            asked = [self.told, as_dicts(request.turns), question and asdict(replace(question, also=()))]
            asked += [
                (change.vector.numpy().tobytes().hex(), change.layer, change.coefficient, change.at, change.kind)
                for change in request.steering
            ]
            thinks = self.told["thinking"] and drawn and [drawn.temperature, drawn.top_p]
            capture = request.capture or Capture((), ())
            yield number, Reply(
                samples={s: Sample(digest([*asked, drawn and asdict(drawn), s]), 1, True) for s in request.seeds},
                scores={s: Score((number_of(asked, also, thinks, self.shown, s),)) for s in request.scores},
                choice=question.options[number_of(asked) > 0.5] if question and request.choose else None,
                residuals={
                    position: torch.tensor([[number_of(asked, thinks, position, layer)] for layer in capture.layers])
                    for position in capture.positions
                },
                nll=number_of(asked),
            )  # fmt: skip

    def usage(self) -> Usage:
        return Usage()

    def close(self) -> None:
        pass


def number_of(*content: Any) -> float:
    return int(digest(content)[:8], 16) / 2**32


@dataclasses.dataclass(frozen=True)
class Recording(PlannedStore):
    """A store in memory that keeps vectors too, by key and layer."""

    kept: dict[tuple[str, int], list[float]] = dataclasses.field(default_factory=dict)

    def vectors(self, kind: str, spec: Mapping[str, Any]) -> Vectors:
        vectors, put = super().vectors(kind, spec), self.kept

        def append(keys, layers, tensors, absent) -> None:
            put.update({(key, layer): tensors[row, n].tolist() for row, key in enumerate(keys)
                        for n, layer in enumerate(layers)})  # fmt: skip
            type(vectors).append(vectors, keys, layers, tensors, absent)

        vectors.append = append  # type: ignore[method-assign]
        return vectors


def records(config: Config, tasks: Sequence[Task]) -> dict[Any, Any]:
    """All records that a config makes on an empty store: by key, and vectors by key and layer."""
    roles = Roles.of(config)
    captured = sites(config, roles.rater)
    store = Recording(Path("/nowhere"), 0.0)
    run_stages(config, tasks, roles, captured, store, Digesting())
    return {key: row for rows in store.rows.values() for key, row in rows.items()} | store.kept


# --- another value for each field

# By field, what a rule of its type does not give; a function is given the value.
OTHER: dict[str, Any] = {
    "MODEL.dtype": ModelDType.float16,
    "MODEL.device": "cpu",
    "MODEL.device_map": "auto",
    "MODEL.api.base_url": "http://elsewhere/v1",
    "MODEL.api.key_env": "HOME",
    "judge._target_": "prefs.stages.judge.judged_by_phrases",
    "judge.kind": "none",
    "choice.kind": "none",
    "choice.labels": [["C", "D"]],
    "choice.template.question": lambda question: f"{question}!",
    "choice.template.when": "after",
    "concept.*.conditions": lambda prompts: {**prompts, "positive": "Be glad."},
    "concept.*.contrast": lambda pair: pair[::-1],
    "concept.*.wordings": {"other": {"positive": "Rejoice.", "negative": "Mourn."}},
    "concept.*.origins": ["ALPACA"],
    "capture.layers": [1],
    "steering.coefficients": lambda doses: [*doses, 9.0],
    "steering.vector": "none",
    "steering.position": "last_prompt",
    "steering.layers": [2],
    "probe.layers": [1],
    "_target_": "mine.Ridge",
}
ADDED = {str: "x", int: 7, float: 0.5}


def other(name: str, value: Any, hint: Any, limits: Any) -> Any:
    """Another valid value of a field."""
    if name in OTHER:
        return OTHER[name](value) if callable(OTHER[name]) else OTHER[name]
    allowed = [limit.allowed for limit in limits if isinstance(limit.allowed, tuple)]
    kind = get_args(hint)[0] if type(None) in get_args(hint) else hint
    item = next(iter(get_args(kind)), None)
    if value is None:
        return [ADDED[item]] if item else allowed[0][0] if allowed else ADDED[kind]
    if isinstance(value, bool):
        return not value
    if isinstance(value, Enum):
        return next(member for member in type(value) if member is not value)
    if isinstance(value, int | float):
        return next(tried for tried in (value + 1, value / 2) if all(limit.holds(tried) for limit in limits))
    if isinstance(value, dict):
        return {**value, "added": 1}
    if isinstance(value, list):
        added = next((choice for choice in allowed[0] if choice not in value), None) if allowed else None
        return value[:-1] if allowed and added is None else [*value, added or ADDED[item]]
    return next(choice for choice in allowed[0] if choice != value) if allowed else value + "x"


def leaves(part: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[str, tuple[Any, ...], Any]]:
    """The fields of a config that hold no others: their names, the way to them, and another value."""
    hints = get_type_hints(type(part))
    for field in fields(part):
        value, way = getattr(part, field.name), (*path, field.name)
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        parts = [(key, held) for key, held in inner if is_dataclass(held)]
        if is_dataclass(value):
            yield from leaves(value, way)
        elif parts:
            for key, held in parts[:1]:
                yield from leaves(held, (*way, key))
        elif value or hint_of(hints[field.name]) is None:
            name = named(way)
            yield name, way, other(name, value, hints[field.name], field.metadata.get("limits", ()))


def hint_of(hint: Any) -> Any:
    """The structured config that a field may hold, alone, by name or in a list, if it does."""
    return next((part for part in (hint, *get_args(hint)) if isinstance(part, type) and is_dataclass(part)), None)


def named(way: tuple[Any, ...]) -> str:
    """A field's name: of any template, concept or option, and of any of the roles' models."""
    keyed = [*way]
    for place, part in enumerate(way):
        held = way[0] != "choice" and way[place - 1] in ("template", "concept", "sources")
        if place and (isinstance(part, int) or held):
            keyed[place] = "*"
    name = ".".join(map(str, keyed))
    role = next((role for role in ROLES if name.startswith(role)), None)
    return f"MODEL.{name.removeprefix(role)}" if role else name


def every_field(kind: type, way: tuple[str, ...] = ()) -> Iterator[str]:
    """The names of all fields of the schema that hold no others."""
    for field in fields(kind):
        hint = get_type_hints(kind)[field.name]
        inner, many = hint_of(hint), get_args(hint) and type(None) not in get_args(hint)
        if inner is None:
            yield named((*way, field.name))
        else:
            yield from every_field(inner, (*way, field.name, *(["*"] if many else [])))


def changed(part: Any, way: tuple[Any, ...], value: Any) -> Any:
    """A config with another value at the end of a way."""
    first, *rest = way
    inner = (
        value
        if not rest
        else changed(part[first] if isinstance(part, dict | list) else getattr(part, first), tuple(rest), value)
    )
    if isinstance(part, dict):
        return {**part, first: inner}
    if isinstance(part, list):
        return [inner if place == first else held for place, held in enumerate(part)]
    return replace(part, **{first: inner})


# --- the tests

COMMON = (
    *(
        "dataset.limit=2",
        "dataset.origins=[MATH]",
        "template=[likert]",
        "completer=smollm2",
        "judge=llm",
        "model@judge.model=smollm2",
    ),
    *("rating.seeds=[0,1]", "stats.bootstrap=0", "probe=none"),
)
IN_ROLES = ("model", "completer.model", "judge.model")
CONFIGS = {
    "here": ("concept=[liking_math]", "capture.positions=[last_prompt,mean_completion,rating]", "capture.layers=[0,1]"),
    "steered": ("capture.positions=[rating]", "steering=concept", "steering.layers=[1]", "steering.seeds=[0]"),
    "choosing": ("choice=sampled", "choice.seeds=[0]", "capture=none"),
    "thinking": (*(f"{role}.thinking.enabled=true" for role in IN_ROLES), "capture.positions=[rating]"),
    "vllm": (*(f"{role}.backend=vllm" for role in IN_ROLES), "capture=none"),
    "served": (
        *(f"{role}.backend=openai" for role in IN_ROLES), *(f"{role}.api.key_env=null" for role in IN_ROLES),
        *(f"{role}.api.prefill=true" for role in IN_ROLES), "capture=none",
    ),
}  # fmt: skip


# Of each, the fields that act in no other, or in another way.
ACTING = {
    "here": ("",),
    "steered": ("steering.", "rating."),
    "choosing": ("choice.",),
    **dict.fromkeys(("thinking", "vllm", "served"), ("MODEL.", "rating.", "completer.")),
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> dict[str, Config]:
    """A config of each kind, in which together every field acts."""
    vectors, model = tmp_path_factory.mktemp("vectors"), tmp_path_factory.mktemp("model")
    llama().save_pretrained(model)
    OTHER["MODEL.path"] = str(model)
    made = {}
    with shipped_configs():
        for name, overrides in CONFIGS.items():
            if name == "steered":
                overrides = (*overrides, f"steering.vector={vectors}")
            made[name] = compose("config", overrides=[*COMMON, *overrides])
        rater = identity(ModelSpec.from_config(typed(made["here"]).model))
        where = tuple(Site(layer, at) for layer in (1, 2) for at in ("mean_completion", "last_prompt"))
        directions = torch.arange(4 * 576.0).reshape(4, 576) ** 0.5
        save_vectors(vectors, SavedVectors("liking", where, directions, directions.norm(dim=1), {"model": rater}))
        return {name: typed(config) for name, config in made.items()}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """What takes nearly all of the time, over and over: to measure what a part would take, and to load a tokenizer."""
    loaded: dict[Any, Any] = {}

    def tokenizer(spec: ModelSpec) -> Any:
        which = spec.path, spec.revision
        return loaded[which] if which in loaded else loaded.setdefault(which, tokenizer_of(spec))

    monkeypatch.setattr("prefs.store.planned.pq.write_table", lambda *part, **options: None)
    monkeypatch.setattr("prefs.stages.measure.tokenizer_of", tokenizer)


def test_another_value_gives_other_keys_or_the_same_records(configs):
    keyed, names = set(), set()
    for kind, config in configs.items():
        tasks = job_tasks(config)
        before = records(config, tasks)
        for name, way, value in leaves(config):
            names.add(name)
            if name.partition(".")[0] in GROUPS or not name.startswith(ACTING[kind]):
                continue
            try:
                after = records(changed(config, way, value), tasks)
            except UserError:
                continue  # refused: nothing is read from the store, and nothing written
            if before.keys() != after.keys():
                keyed.add(name)
            for key in before.keys() & after.keys():
                assert before[key] == after[key], f"{'.'.join(map(str, way))} changes a record and not its key ({kind})"
    unkeyed = {name for name in names - keyed if name.partition(".")[0] not in GROUPS}
    wrong = sorted(unkeyed ^ set(UNKEYED))
    assert not wrong, f"fields that change no key are listed, with the reason, and no others: {wrong}"
    sources = {name for name in every_field(Config) if name.startswith("dataset.sources.")}
    assert names | sources == set(every_field(Config))


def test_no_field_of_these_groups_changes_a_key_or_a_record(configs):
    config = configs["here"]
    tasks = job_tasks(config)
    before = records(config, tasks)
    other_groups = config
    for name, way, value in leaves(config):
        if name.partition(".")[0] in GROUPS:
            other_groups = changed(other_groups, way, value)
    assert records(other_groups, tasks) == before
    others = [replace(task, prompt=f"{task.prompt}!") for task in tasks]  # by which two of them act
    assert not records(config, others).keys() & before.keys()


def test_every_field_of_a_probe_gives_another_key_or_is_listed():
    config = ProbeConfig(name="x", _target_="prefs.probes.ridge.Ridge", penalties=[1.0])
    measured = Measured(("a", "b"), ("A", "B"), ("1", "2"), (1.0, 2.0), np.ones((2, 1)), None, np.zeros(2))
    subject = probe.Subject("cell", measured, Sampling(1, 1, 1), ("a", "b"), ("c", "d"), ())
    key = partial(probe._key, subject, subject.measured.tasks, np.arange(2))
    unkeyed = set()
    for name, way, value in leaves(config):
        if key(changed(config, way, value), 0) == key(config, 0):
            unkeyed.add(name)
    assert unkeyed == set(PROBE_UNKEYED)
    assert key(config, 0) != key(config, 1)
