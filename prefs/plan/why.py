"""Why records are missing: which fields of the config differ from those that the store's nearest records have.

The store keeps the configs that it has served. The values of each are tried in place of those asked for; where the
records are there then, as many values as can be are put back without losing them again. Those left are the answer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from enum import Enum
from functools import cache, partial
from typing import Any, get_args, get_origin, get_type_hints

import torch
from rich.table import Column

from prefs.config import Config, ModelDType
from prefs.data.task import Task
from prefs.errors import UserError
from prefs.models.loading import SERVED, Models, ModelSpec, identity
from prefs.models.types import Reply, Request, Sample, Score, Usage, as_dicts
from prefs.plan import anywhere, kind_of, run_stages
from prefs.results.result import Result, View
from prefs.results.terminal import MISSING
from prefs.stages.measure import Roles, job_tasks, sites
from prefs.store.configs import remembered
from prefs.store.keys import digest
from prefs.store.planned import PlannedStore
from prefs.store.table import Store, store_root

# What determines the records that models are asked for.
DETERMINING = (
    "model",
    "completer",
    "template",
    "dataset",
    "rating",
    "judge",
    "capture",
    "concept",
    "choice",
    "steering",
)
# Of the configs that a store has served, so many of the nearest are tried.
MOST_TRIED = 16
ENOUGH_TASKS = 32
MOST_CHARACTERS = 32
NO_CONFIG = "The store says of no job what it was made with; it is from before that was kept, or empty."
THE_SAME = "A dash: a job with these very values began, and has not made them."


@dataclass(frozen=True, eq=False)
class Difference:
    """A field, by its names, in which a config that the store has served differs from the one asked for."""

    path: tuple[str, ...]
    stored: Any
    asked: Any


@dataclass(frozen=True)
class Missing:
    """The records of one kind that are missing.

    Attributes
    ----------
    count
        How many.
    stored
        How many the store has with the other values.
    differences
        The fewest fields whose other values find them; of what no config explains, all that the nearest differs in.
        None: the store has served no config.
    """

    kind: str
    count: int
    stored: int
    differences: tuple[Difference, ...] | None


def made_with(config: Config, roles: Roles, tasks: Sequence[Task]) -> dict[str, Any]:
    """What `prefs.store.configs` keeps of a job: its config, and which models and tasks that meant."""
    specs = {"model": roles.rater, "completer.model": roles.completer, "judge.model": roles.judge}
    return {
        "config": {name: part for name, part in _plain(_resolved(config)).items() if name in DETERMINING},
        "models": {role: identity(spec)["revision"] for role, spec in specs.items() if spec is not None},
        "tasks": digest([asdict(task) for task in tasks]),
    }


def why(config: Config) -> list[Missing]:
    """What is missing in the store, by kind of record, and what differs. Nothing is loaded, and nothing written.

    Raises
    ------
    UserError
        For what would stop the run before it asks a model.
    """
    config = anywhere(_resolved(config))
    asked, now = _plain(config), made_with(config, Roles.of(config), job_tasks(config))
    served = remembered(Store(store_root(config.store.dir)))
    nearest = sorted((_differences(now["config"], content["config"]) for content in served), key=len)[:MOST_TRIED]
    counts = cache(partial(_counts, json.dumps(asked)))
    told = []
    for kind, (_, missing) in counts((), whole=True).items():
        if not missing:
            continue
        shares = {kept: _share(kind, counts(kept)) for kept in [(), *nearest]}
        best = min(shares, key=lambda kept: shares[kept])  # the nearest, of those that are as good
        if shares[best] < shares[()]:
            best = _fewest(best, lambda kept, kind=kind: _share(kind, counts(kept)))
            told.append(Missing(kind, missing, counts(best, whole=True)[kind][0], best))
        else:
            differences = [_differences(now, content) for content in served]
            told.append(Missing(kind, missing, 0, min(differences, key=len, default=None)))
    return told


def _share(kind: str, counts: Mapping[str, tuple[int, int]]) -> float:
    """Of the records of a kind the share that is missing: all, where none is wanted or there."""
    there, missing = counts.get(kind, (0, 0))
    return missing / (there + missing) if there else 1.0


def _fewest(
    differences: tuple[Difference, ...], share: Callable[[tuple[Difference, ...]], float]
) -> tuple[Difference, ...]:
    """The differences less those without which no more is missing: whole groups first, then one by one."""
    least, groups = share(differences), {one.path[0]: 0 for one in differences}
    together = [[one for one in differences if one.path[0] == group] for group in groups]
    for some in [*together, *([one] for one in differences)]:
        fewer = tuple(one for one in differences if one not in some)
        if len(fewer) < len(differences) and share(fewer) <= least:
            differences = fewer
    return differences


def _resolved(config: Config) -> Config:
    """A config whose models have the precision that they get on this machine, as records have."""

    def resolved(role: Any) -> Any:
        if role.model is None:
            return role
        dtype = ModelSpec.from_config(role.model).dtype
        return role if dtype == SERVED else replace(role, model=replace(role.model, dtype=ModelDType(dtype)))

    return replace(resolved(config), completer=resolved(config.completer), judge=resolved(config.judge))


def _plain(config: Config) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(config), default=lambda member: member.name))


def _built(kind: Any, plain: Any) -> Any:
    """A value of a structured config's type from its plain form."""
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(plain, dict):
        return kind(**{name: _built(get_type_hints(kind)[name], value) for name, value in plain.items()})
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind[plain]
    origin, parts = get_origin(kind), get_args(kind)
    if origin is list:
        return [_built(parts[0], value) for value in plain]
    if origin is dict:
        return {name: _built(parts[1], value) for name, value in plain.items()}
    return plain if plain is None or not parts else _built(parts[0], plain)  # of X | None, the X


def _differences(asked: Any, stored: Any, path: tuple[str, ...] = ()) -> tuple[Difference, ...]:
    """The fields in which two plain configs differ; of two that do not have the same fields, the whole."""
    if isinstance(asked, dict) and isinstance(stored, dict) and asked.keys() == stored.keys():
        return tuple(one for name in asked for one in _differences(asked[name], stored[name], (*path, name)))
    return () if asked == stored else (Difference(path, stored, asked),)


def _counts(asked: str, differences: tuple[Difference, ...], *, whole: bool = False) -> Mapping[str, tuple[int, int]]:
    """Records there and missing by kind, with other values in some fields; of some tasks, or of all.

    None where these values cannot be together, or are of a version of the program that has other fields.
    """
    plain = json.loads(asked)
    for difference in differences:
        *groups, name = difference.path
        part = plain
        for group in groups:
            part = part[group]
        part[name] = difference.stored
    try:
        config = _built(Config, plain)
        tasks, roles = job_tasks(config), Roles.of(config)
        captured = sites(config, roles.rater)
    except (UserError, TypeError, KeyError):
        return {}
    config = replace(config, probe=replace(config.probe, layers=list(captured.probed)))
    every = 1 if whole else max(1, len(tasks) // ENOUGH_TASKS)
    if not config.concept:  # a vector follows from all tasks
        tasks = tasks[::every]
    store = PlannedStore(store_root(config.store.dir), 0.0)
    work, _ = run_stages(config, tasks, roles, captured, store, MadeUp(), steered_every=every)
    counts: dict[str, tuple[int, int]] = {}
    for stage in work:
        there, missing = counts.get(kind_of(stage), (0, 0))
        counts[kind_of(stage)] = there + stage.reused, missing + stage.computed
    return counts


class MadeUp(Models):
    """In the place of all models one that answers with what no model says, so that nothing after it is in the store."""

    max_context, rows_apart = sys.maxsize, True

    def _load(self, spec: ModelSpec) -> Any:
        return self

    def tokens(self, request: Request) -> int:
        return 1

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        for number, request in enumerate(requests):
            text, question, capture = digest(as_dicts(request.turns)), request.question, request.capture
            mass = (0.0,) * len(question.options) if question else ()
            vectors = torch.zeros(len(capture.layers), 1) if capture else torch.empty(0)
            yield (
                number,
                Reply(
                    samples={seed: Sample(f"{text} {seed}", 1, True) for seed in request.seeds},
                    scores=dict.fromkeys(request.scores, Score(mass)),
                    choice=question.options[0] if question and request.choose else None,
                    residuals=dict.fromkeys(capture.positions, vectors) if capture else {},
                ),
            )

    def usage(self) -> Any:
        return Usage()


def why_result(told: Sequence[Missing], config: Config) -> Result:
    """What is missing, as it is printed: a line for each field that differs."""
    rows = []
    for one in told:
        begin = [one.kind, f"{one.count:,}", f"{one.stored:,}" if one.differences else MISSING]
        fields = [f"{_name(d.path)}={_short(d.stored)}, not {_short(d.asked)}" for d in one.differences or ()]
        for number, text in enumerate(fields or [MISSING]):
            rows.append([*(["", "", ""] if number else begin), text])
    remarks = []
    if not told:
        remarks = ["Nothing is missing: the store has everything that models are asked for."]
    elif any(one.differences is None for one in told):
        remarks = [NO_CONFIG]
    elif any(not one.differences for one in told):
        remarks = [THE_SAME]
    columns = ["records", "missing", "in the store", Column("with", ratio=1)]
    return Result(
        title=f"Why · {config.model.name} · {config.dataset.name}",
        views=(View("Records that are missing, and the nearest in the store", columns, rows),) if told else (),
        remarks=tuple(remarks),
    )


def _name(path: tuple[str, ...]) -> str:
    """A field's key; of what a config only names, what it is."""
    whole = ".".join(path)
    if path[0] == "models":
        return f"files of {whole.removeprefix('models.')}"
    return "tasks of dataset" if path[0] == "tasks" else whole.removeprefix("config.")


def _short(value: Any) -> str:
    """A value as the command line has it, cut; of a group, its name or the names in it."""
    if isinstance(value, dict):
        value = value["name"] if "name" in value else list(value)
    if isinstance(value, list):
        value = f"[{','.join(map(str, value))}]"
    text = repr(value) if isinstance(value, str) and not value else " ".join(str(value).split())
    text = {"None": "null", "True": "true", "False": "false"}.get(text, text)
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + "…"
