"""What a run will cost: its own stages, on its own store, with engines that count in place of computing.

They are run twice: with all that is not there yet as long as it can be, and as long as such things were so far.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from rich.filesize import decimal
from rich.table import Column

from prefs.concepts.export import load_vectors
from prefs.concepts.extract import extract, read_all
from prefs.concepts.reading import Reader
from prefs.config import Config
from prefs.data.task import Task
from prefs.job import JobCounts, StageCounts
from prefs.models.architecture import active_parameters
from prefs.models.counting import COMPLETER, JUDGE, RATER, ROLES, Counts, Tally
from prefs.models.loading import Models, ModelSpec, has_weights, model_folder
from prefs.models.types import Engine
from prefs.results.result import Result, View
from prefs.results.terminal import MISSING
from prefs.stages.choose import choose
from prefs.stages.concept import reader_of
from prefs.stages.dose_response import steered_along
from prefs.stages.measure import Roles, Sites, job_tasks, measure, sites
from prefs.stages.steer import Control, SteeringVector
from prefs.stages.steering_vectors import steering_vectors
from prefs.store.planned import PlannedStore
from prefs.store.table import store_root

SERVED = "openai"
COUNTING = {
    "transformer_lens": "prefs.models.local.counting.CountingLocal",
    "vllm": "prefs.models.vllm.counting.CountingVllm",
    "openai": "prefs.models.openai.counting.CountingServer",
}
MOST_NAMED = 2
SWEEP = (
    "This is one job of a sweep. Its jobs share the store: what several of them want is in the plan of each, and made"
    " once."
)


@dataclass
class CountingModels(Models):
    """In place of the models that a process loads, engines that count. They load a tokenizer and a model's config."""

    counts: Counts = field(kw_only=True)

    def _load(self, spec: ModelSpec) -> Engine:
        module, name = COUNTING[spec.backend].rsplit(".", 1)
        return getattr(importlib.import_module(module), name)(spec, self.counts)


@dataclass(frozen=True)
class Amount:
    """How much of something: at most, and as things are expected to come. ``exact`` where both are known to be it."""

    most: float
    expected: float
    exact: bool

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.most + other.most, self.expected + other.expected, self.exact and other.exact)


@dataclass(frozen=True)
class RoleCost:
    """What one role costs.

    Attributes
    ----------
    model, served
        Its name, and whether a server runs it.
    requests, thoughts
        Conversations put to it, and thoughts that it will have.
    prompt_tokens, drawn_tokens
        Tokens that go through the model, as `prefs.models.types.Usage` counts them.
    parameters
        That a token meets; None of a served model.
    gpu_hours
        At `Config.plan_tflops`; None of a served model.
    dollars
        Where the config has prices.
    """

    role: str
    model: str
    served: bool
    requests: int
    thoughts: int
    prompt_tokens: Amount
    drawn_tokens: Amount
    parameters: int | None
    gpu_hours: Amount | None
    dollars: Amount | None


@dataclass(frozen=True)
class Plan:
    """What a run will do and what it costs.

    Attributes
    ----------
    tasks
        How many.
    work
        Records by stage: what the store has, and what is to be made.
    roles
        Costs of those that have something to do.
    vector_bytes, store_bytes
        Of activations, and of all that will be written to the store.
    known
        By kind of text ("completions", "answers"), how many the store has and their mean length in tokens.
    remarks
        What else to know.
    """

    tasks: int
    work: Sequence[StageCounts]
    roles: Sequence[RoleCost]
    vector_bytes: Amount
    store_bytes: Amount
    known: Mapping[str, tuple[int, float]]
    remarks: Sequence[str]


def plan(config: Config) -> Plan:
    """What a run with this config will cost, less what its store has. No weights are loaded and nothing is written.

    Raises
    ------
    UserError
        For what would stop the run before it asks a model: a bad row, a model that is not there.
    """
    config = anywhere(config)
    tasks, roles = job_tasks(config), Roles.of(config)
    captured = sites(config, roles.rater)
    config = replace(config, probe=replace(config.probe, layers=list(captured.probed)))
    most = likely = _counted(config, tasks, roles, captured, bound=True)
    texts = {kind: most.counts.rows(kind) for kind in ("completions", "answers")}
    thoughts = [row for kind in (*texts, "scores") for row in most.counts.rows(kind, "thought")]
    if any(texts.values()) or thoughts or (roles.judge is not None and roles.judge.backend == SERVED):
        likely = _counted(config, tasks, roles, captured, bound=False)
    specs = {COMPLETER: roles.completer, RATER: roles.rater, JUDGE: roles.judge}
    vectors, store = ([sum(sizes) for sizes in both] for both in zip(most.bytes, likely.bytes, strict=True))
    weightless = [
        f"{spec.name} has no weights in {spec.path}: what the store has of it cannot be known here."
        for spec in {spec.engine: spec for spec in roles.specs}.values()
        if spec.backend != SERVED and not has_weights(spec)
    ]
    return Plan(
        tasks=len(tasks),
        work=most.work,
        roles=[
            _cost(role, spec, most.counts, likely.counts, config.plan_tflops)
            for role in ROLES
            if (spec := specs[role]) is not None and role in most.counts.tallies
        ],
        vector_bytes=Amount(*vectors, exact=not most.counts.made_up),
        store_bytes=Amount(*store, exact=not store[0]),
        known={
            kind: (len(rows), sum(row["tokens"] for row in rows) / len(rows)) for kind, rows in texts.items() if rows
        },
        remarks=[*most.remarks, *weightless],
    )


def anywhere(config: Config) -> Config:
    """A config whose devices need not be here: a plan may be made where the run will not."""

    def freed(role: Any) -> Any:
        return replace(role, model=replace(role.model, device="auto")) if role.model else role

    return replace(freed(config), completer=freed(config.completer), judge=freed(config.judge))


@dataclass(frozen=True)
class _Counted:
    """What the stages counted. ``bytes``: those of vectors, and those of all parts."""

    work: Sequence[StageCounts]
    counts: Counts
    bytes: tuple[list[int], list[int]]
    remarks: Sequence[str]


def _counted(config: Config, tasks: Sequence[Task], roles: Roles, captured: Sites, *, bound: bool) -> _Counted:
    """Run the stages of a job with engines that count."""
    store = PlannedStore(store_root(config.store.dir), 0.0)
    counts = Counts(bound, store.stored)
    work, remarks = run_stages(config, tasks, roles, captured, store, CountingModels(counts=counts))
    return _Counted(work, counts, ([count.bytes for count in work], store.sizes), remarks)


def run_stages(
    config: Config,
    tasks: Sequence[Task],
    roles: Roles,
    captured: Sites,
    store: PlannedStore,
    models: Models,
    *,
    steered_every: int = 1,
) -> tuple[list[StageCounts], list[str]]:
    """What the stages that ask models find in a store and make, with engines that compute nothing; and what there is to
    say of vectors that are not known. Of so many completions one is steered."""
    done, remarks = JobCounts(logged=False), []
    completions, rated, _ = measure(config, tasks, roles, config.template, captured.capture, store, models, done)
    if config.choice.kind != "none" and config.shard is None:
        chosen = choose(config.choice, completions, roles.rater, store, models)
        done.add([chosen.work])
        if chosen.work.computed and len(chosen.rounds) > 1 and config.choice.pairs.select != "random":
            remarks.append(
                "Choices: which pairs later rounds ask for follows from the answers, and so do their lengths."
            )
    reader = reader_of(config, roles.completer, roles.rater, captured.capture, store, models)
    if reader is not None:
        read_all(config.concept, tasks, reader)
        done.add(reader.done())
    if config.steering.vector != "none":
        vectors, unknown = _steering_vectors(config, tasks, captured, reader)
        remarks += unknown
        for ratings in rated.ratings.values() if vectors else ():
            ratings = replace(ratings, completions=ratings.completions[::steered_every])
            steered_along(config, vectors, ratings, roles.rater, store, models, done)
    return done.work, remarks


def _steering_vectors(
    config: Config, tasks: Sequence[Task], captured: Sites, reader: Reader | None
) -> tuple[list[SteeringVector], list[str]]:
    """The vectors to be steered with, as far as they can be known, others in the place of those that cannot; and what
    there is to say of that."""
    steering, remarks = config.steering, []
    if steering.vector != "concept":
        vectors, _ = steering_vectors(steering, captured.steered, load_vectors(Path(steering.vector)), None, None)
    elif reader is not None and not any(work.computed for work in reader.work):
        key = next(iter(config.concept))
        concept = extract({key: config.concept[key]}, tasks, reader, bootstrap=config.stats.bootstrap)[key]
        if isinstance(concept, str):
            return [], [f"No steering, since there will be no vectors of concept {key}: {concept}."]
        vectors, _ = steering_vectors(steering, captured.steered, concept.saved({}), concept, None)
    else:
        kinds = ["concept", *["random"] * steering.controls.random, *["shuffled"] * steering.controls.shuffled]
        kinds += ["ablation"] * steering.controls.ablation
        vectors = [
            _unknown(kind, layer, number, captured) for layer in captured.steered for number, kind in enumerate(kinds)
        ]
        remarks.append("Steered ratings: the vectors are not there yet, so none of them is looked for in the store.")
    if steering.controls.probes and (layers := [layer for layer in captured.steered if layer in captured.probed]):
        vectors += [_unknown("probe", layer, len(vectors), captured) for layer in layers]
        remarks.append("Steered ratings: a probe's direction is known once it is trained, so it counts as to be made.")
    return vectors, remarks


def _unknown(control: str, layer: int, number: int, captured: Sites) -> SteeringVector:
    """In the place of a vector: one that no other is equal to."""
    assert captured.architecture is not None
    vector = torch.full((captured.architecture.d_model,), 1.0 + number)
    return SteeringVector(f"{control} {number}", cast(Control, control), layer, vector, 1.0)


def _cost(role: str, spec: ModelSpec, most: Counts, likely: Counts, tflops: float) -> RoleCost:
    tallies, served, api = (most.tallies[role], likely.tallies[role]), spec.backend == SERVED, spec.api

    def amount(count: Callable[[Tally], float], exact: bool = False) -> Amount:
        return Amount(count(tallies[0]), count(tallies[1]), exact)

    prompts_are_known = not served and not (tallies[0].thoughts if role == COMPLETER else most.made_up)
    parameters = None if served else active_parameters(model_folder(spec), spec.revision)
    hours = dollars = None
    if parameters is not None:
        flops = tflops * 1e12 * 3600
        hours = amount(lambda tally: 2 * parameters * (tally.prompt_tokens + tally.drawn_tokens) / flops)
    if served and api.price_prompt is not None and api.price_completion is not None:
        prices = api.price_prompt / 1e6, api.price_completion / 1e6
        dollars = amount(lambda tally: tally.prompt_tokens * prices[0] + tally.drawn_tokens * prices[1])
    return RoleCost(
        role=role,
        model=spec.name,
        served=served,
        requests=tallies[0].requests,
        thoughts=tallies[0].thoughts,
        prompt_tokens=amount(lambda tally: tally.prompt_tokens, prompts_are_known),
        drawn_tokens=amount(lambda tally: tally.drawn_tokens, not tallies[0].drawn_tokens),
        parameters=parameters,
        gpu_hours=hours,
        dollars=dollars,
    )


def plan_result(plan: Plan, config: Config, *, sweep: bool) -> Result:
    """A plan as it is printed: what is to be made, what that costs, and which of the numbers are exact."""
    names = [template.name for template in config.template.values()]
    templates = ", ".join(names) if len(names) <= MOST_NAMED else f"{len(names)} templates"
    return Result(
        title=f"Plan · {config.model.name} · {templates} · {config.dataset.name}, {plan.tasks:,} tasks",
        views=(_records(plan.work), _costs(plan.roles)) if plan.roles else (_records(plan.work),),
        remarks=(*_remarks(plan, config), *([SWEEP] if sweep else [])),
    )


def _records(work: Sequence[StageCounts]) -> View:
    kinds: dict[str, dict[str, list[StageCounts]]] = {role: {} for role in (COMPLETER, RATER, JUDGE)}
    for counts in work:
        kind = kind_of(counts)
        role = {"completions": COMPLETER, "verdicts": JUDGE}.get(kind.removeprefix("concepts, "), RATER)
        kinds[role].setdefault(kind, []).append(counts)
    rows = []
    for role, made in kinds.items():
        for number, (kind, counts) in enumerate(made.items()):
            reused, computed = sum(one.reused for one in counts), sum(one.computed for one in counts)
            rows.append(["" if number else role, kind, *map(_whole, (reused + computed, reused, computed))])
    return View("Records: exact", ["role", Column("of"), "wanted", "in the store", "to make"], rows)


def kind_of(counts: StageCounts) -> str:
    """The kind of record that a stage makes, which is the same for every template."""
    return counts.stage if counts.stage.startswith("concepts, ") else counts.stage.partition(", ")[0]


def _costs(roles: Sequence[RoleCost]) -> View:
    cells: dict[str, Callable[[Sequence[RoleCost]], str]] = {
        "prompt tokens": lambda costs: _sum([cost.prompt_tokens for cost in costs], _whole),
        "generated tokens": lambda costs: _sum([cost.drawn_tokens for cost in costs], _whole),
    }
    if any(cost.thoughts for cost in roles):
        cells = {"thoughts": lambda costs: _whole(sum(cost.thoughts for cost in costs) or None)} | cells
    if any(cost.gpu_hours for cost in roles):
        cells["GPU-hours"] = lambda costs: _sum([cost.gpu_hours for cost in costs], _hours)
    if any(cost.dollars for cost in roles):
        cells["US dollars"] = lambda costs: _sum([cost.dollars for cost in costs], "{:,.2f}".format)
    rows = [[cost.role, cost.model, *(cell([cost]) for cell in cells.values())] for cost in roles]
    if len(roles) > 1:
        rows.append(["total", "", *(cell(roles) for cell in cells.values())])
    return View("Forward passes: ≤ upper bound, ~ expected, no sign: exact", ["role", Column("model"), *cells], rows)


def _sum(amounts: Sequence[Amount | None], form: Callable[[float], str]) -> str:
    """A sum with the signs that say how sure it is."""
    known = [amount for amount in amounts if amount is not None]
    if not known:
        return MISSING
    total = sum(known, Amount(0, 0, exact=True))
    most, expected = form(total.most), form(total.expected)
    if total.exact:
        return most
    return f"≤ {most}" if most == expected else f"≤ {most}\n~ {expected}"


def _whole(number: float | None) -> str:
    return MISSING if number is None else f"{number:,.0f}"


def _hours(number: float) -> str:
    return f"{number:,.1f}" if number >= 10 else f"{max(number, 0.001):.3f}"


def _remarks(plan: Plan, config: Config) -> list[str]:
    if not any(counts.computed for counts in plan.work):
        return ["Nothing is left to make: the store has everything that models are asked for."]
    vectors, most, expected = plan.vector_bytes, _size(plan.store_bytes.most), _size(plan.store_bytes.expected)
    sign = "" if vectors.exact else "≤ "
    activations = f"Activations to be written: {sign}{_size(vectors.most)}. " if vectors.most else ""
    grows = expected if most == expected else f"{expected} to {most}"
    remarks = [f"{activations}The store grows by about {grows}."]
    if any(not cost.drawn_tokens.exact for cost in plan.roles):
        completer, rating = config.completer.max_new_tokens, config.rating.max_new_tokens
        known = [f"{count:,} {kind} with {mean:.1f} tokens on average" for kind, (count, mean) in plan.known.items()]
        so_far = f"the store has {' and '.join(known)}" if known else "the store has none to expect another length from"
        remarks.append(
            f"At most {completer} tokens a completion and {rating} an answer; {so_far}. Answers of several seeds that"
            " begin alike are run once where they do."
        )
    parameters = {cost.model: cost.parameters for cost in plan.roles if cost.parameters is not None}
    if parameters:
        sizes = ", ".join(f"{name} {count / 1e9:,.2f}" for name, count in parameters.items())
        remarks.append(
            f"GPU-hours are an estimate: 2 operations a parameter and token, at {config.plan_tflops:g} TFLOP/s"
            f" (plan_tflops). Billions of parameters: {sizes}."
        )
    if any(cost.served for cost in plan.roles):
        remarks.append("A served model's tokens are guessed from the lengths of texts.")
    return remarks + list(plan.remarks)


def _size(size: float) -> str:
    return decimal(round(size))
