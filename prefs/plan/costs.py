"""What a run will cost: its own stages, on its own store, with engines that count in place of computing.

They are run twice: with all that is not there yet as long as it can be, and as long as such things were so far.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from prefs.concepts.export import load_vectors
from prefs.concepts.extract import extract, read_all
from prefs.concepts.reading import Reader
from prefs.config import Config, ModelConfig, SteeringControlsConfig
from prefs.data.task import Task
from prefs.job import JobCounts, StageCounts
from prefs.models.architecture import active_parameters
from prefs.models.loading import ModelSpec, has_weights, model_folder
from prefs.plan.book import COMPLETER, JUDGE, RATER, ROLES, Book, Tally
from prefs.plan.engines import PlannedModels
from prefs.plan.lengths import Lengths
from prefs.plan.store import Planned, PlannedStore
from prefs.stages.concept import reader_of
from prefs.stages.dose_response import arrows, steered_along
from prefs.stages.measure import Roles, Sites, job_tasks, measure, sites
from prefs.stages.steer import Arrow, Control

SERVED = "openai"
# Tables of what models say, with how long it was.
TEXTS = ("completions", "answers")


@dataclass(frozen=True)
class Amount:
    """How much of something: at most, and as things are expected to come. ``exact`` where both are known to be it."""

    most: float
    expected: float
    exact: bool

    def plus(self, other: Amount) -> Amount:
        """Both together."""
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
    config = _anywhere(config)
    tasks = job_tasks(config)
    roles = Roles.of(config)
    of = sites(config, roles.rater)
    config = replace(config, probe=replace(config.probe, layers=list(of.probed)))
    most = _counted(config, tasks, roles, of, bound=True)
    likely = _counted(config, tasks, roles, of, bound=False) if _expects(most.planned, roles) else most
    specs = {COMPLETER: roles.completer, RATER: roles.rater, JUDGE: roles.judge}
    costs = [
        _cost(role, spec, most.book, likely.book, config.plan_tflops)
        for role in ROLES
        if (spec := specs[role]) is not None and role in most.book.tallies
    ]
    sizes = [sum(work.bytes for work in each.work) for each in (most, likely)]
    known = {kind: most.planned.texts(kind) for kind in TEXTS}
    return Plan(
        tasks=len(tasks),
        work=most.work,
        roles=costs,
        vector_bytes=Amount(sizes[0], sizes[1], exact=not most.book.made_up),
        store_bytes=Amount(most.planned.bytes, likely.planned.bytes, exact=not most.planned.bytes),
        known={kind: (len(rows), _mean([row["tokens"] for row in rows])) for kind, rows in known.items() if rows},
        remarks=[*most.remarks, *_weightless(roles)],
    )


def _expects(planned: Planned, roles: Roles) -> bool:
    """Whether there are lengths to expect, other than the most."""
    drawn = any(planned.texts(kind) for kind in TEXTS) or any(planned.thoughts(kind) for kind in (*TEXTS, "scores"))
    return drawn or (roles.judge is not None and roles.judge.backend == SERVED)


@dataclass(frozen=True)
class _Counted:
    work: Sequence[StageCounts]
    book: Book
    planned: Planned
    remarks: Sequence[str]


def _counted(config: Config, tasks: Sequence[Task], roles: Roles, of: Sites, *, bound: bool) -> _Counted:
    """Run the stages of a job with engines that count."""
    store = PlannedStore.at(config.store.dir)
    models = PlannedModels(lengths=Lengths(store.planned, bound))
    counts, remarks = JobCounts(logged=False), []
    _, rated, _ = measure(config, tasks, roles, config.template, of.capture, store, models, counts)
    reader = reader_of(config, roles.completer, roles.rater, of.capture, store, models)
    if reader is not None:
        read_all(config.concept, tasks, reader)
        counts.add(reader.done())
    if config.steering.vector != "none":
        found, remarks = _arrows(config, tasks, of, reader)
        for ratings in rated.ratings.values() if found else ():
            steered_along(config, found, ratings, roles.rater, store, models, counts)
    return _Counted(counts.work, models.book, store.planned, remarks)


def _arrows(config: Config, tasks: Sequence[Task], of: Sites, reader: Reader | None) -> tuple[list[Arrow], list[str]]:
    """The vectors to be steered with, as far as they can be known, others in the place of those that cannot; and what
    there is to say of that."""
    steering, concept, remarks = config.steering, None, []
    if steering.vector != "concept":
        found, _ = arrows(steering, of.steered, load_vectors(steering.vector), None, None)
    elif reader is not None and not any(work.computed for work in reader.work):
        key = next(iter(config.concept))
        concept = extract({key: config.concept[key]}, tasks, reader, bootstrap=config.stats.bootstrap)[key]
        if isinstance(concept, str):
            return [], [f"No steering, since there will be no vectors of concept {key}: {concept}."]
        found, _ = arrows(steering, of.steered, concept.saved({}), concept, None)
    else:
        found = [
            _unknown(control, layer, at, of)
            for layer in of.steered
            for at, control in enumerate(_controls(steering.controls))
        ]
        remarks.append("Steered ratings: the vectors are not there yet, so none of them is looked for in the store.")
    if steering.controls.probes and (layers := [layer for layer in of.steered if layer in of.probed]):
        found += [_unknown("probe", layer, len(found), of) for layer in layers]
        remarks.append("Steered ratings: a probe's direction is known once it is trained, so it counts as to be made.")
    return found, remarks


def _controls(config: SteeringControlsConfig) -> Iterator[Control]:
    """The kinds of vectors at a layer, as often as there will be one, but for a probe's."""
    yield "concept"
    for _ in range(config.random):
        yield "random"
    for _ in range(config.shuffled):
        yield "shuffled"
    if config.ablation:
        yield "ablation"


def _unknown(control: Control, layer: int, at: int, of: Sites) -> Arrow:
    """In the place of a vector: one that no other is equal to."""
    assert of.architecture is not None
    vector = torch.full((of.architecture.d_model,), 1.0 + at)
    return Arrow(f"{control} {at}", control, layer, vector, 1.0)


def _cost(role: str, spec: ModelSpec, most: Book, likely: Book, tflops: float) -> RoleCost:
    one, other = most.of(role), likely.of(role)
    served = spec.backend == SERVED
    prompts_are_known = not served and not (one.thoughts if role == COMPLETER else most.made_up)
    prompt = Amount(one.prompt_tokens, other.prompt_tokens, exact=prompts_are_known)
    drawn = Amount(one.drawn_tokens, other.drawn_tokens, exact=not one.drawn_tokens)
    parameters = None if served else active_parameters(model_folder(spec), spec.revision)

    def hours(tally: Tally) -> float:
        return 2 * (parameters or 0) * (tally.prompt_tokens + tally.drawn_tokens) / (tflops * 1e12 * 3600)

    dollars, api = None, spec.api
    if served and api.price_prompt is not None and api.price_completion is not None:
        prices = api.price_prompt / 1e6, api.price_completion / 1e6
        paid = [each.prompt_tokens * prices[0] + each.drawn_tokens * prices[1] for each in (one, other)]
        dollars = Amount(*paid, exact=False)
    return RoleCost(
        role=role,
        model=spec.name,
        served=served,
        requests=one.requests,
        thoughts=one.thoughts,
        prompt_tokens=prompt,
        drawn_tokens=drawn,
        parameters=parameters,
        gpu_hours=None if served else Amount(hours(one), hours(other), exact=False),
        dollars=dollars,
    )


def _anywhere(config: Config) -> Config:
    """A config whose devices need not be here: a plan may be made where the run will not."""

    def freed(model: ModelConfig) -> ModelConfig:
        return replace(model, device="auto")

    completer, judge = config.completer, config.judge
    return replace(
        config,
        model=freed(config.model),
        completer=replace(completer, model=freed(completer.model)) if completer.model else completer,
        judge=replace(judge, model=freed(judge.model)) if judge.model else judge,
    )


def _weightless(roles: Roles) -> list[str]:
    return [
        f"{spec.name} has no weights in {spec.path}: what the store has of it cannot be known here."
        for spec in {spec.engine: spec for spec in roles.specs}.values()
        if spec.backend != SERVED and not has_weights(spec)
    ]


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)
