"""Cells read back from run folders: what each measured, what tells it from the others, and their common tasks."""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from prefs.errors import UserError
from prefs.results.job_record import FILE, FINISHED, Job, Spent, Work, read_job
from prefs.statistics.measured import Measured

# What decides neither a completion nor a rating nor a verdict, and so does not make a cell another one.
ASIDE = ("store", "wandb", "stats", "capture", "probe", "concept", "steering", "model.device", "model.batch_tokens")
# Looked at first for what tells cells apart, before the rest of the config.
CONDITIONS = ("completer.condition", "rating.condition")
FIRST = (
    "completer.name",
    "completer.seed",
    *CONDITIONS,
    "completer.system_prompt",
    "rating.system_prompt",
    "dataset.name",
)
SEED = "completer.seed"
MIN_COMMON = 3


@dataclass(frozen=True)
class Cell:
    """One cell of a finished job.

    Attributes
    ----------
    key
        The template's short name in the job's config.
    extra
        What tells this cell from others of the same rater and template: config keys and their values.
    prompts
        [T] the tasks' prompts; with its id, a prompt is what makes a task the same in two cells.
    texts
        The job's table of completions, in the order of the tasks.
    answers
        The cell's table of sampled answers.
    """

    job: Job
    key: str
    measured: Measured
    prompts: tuple[str, ...]
    texts: pd.DataFrame
    answers: pd.DataFrame
    extra: Mapping[str, str]

    @property
    def rater(self) -> str:
        return str(self.job.config["model"]["name"])

    @property
    def template(self) -> str:
        return str(self.job.config["template"][self.key]["name"])

    @property
    def completer(self) -> str:
        return str(self.job.config["completer"]["name"])

    @property
    def dataset(self) -> str:
        return str(self.job.config["dataset"]["name"])

    @property
    def completion_seed(self) -> int:
        return int(self.job.config["completer"]["seed"])

    @property
    def name(self) -> str:
        """Rater and template, and what else tells the cell apart: ``smollm2-anchored completer.seed=1``."""
        return " ".join([f"{self.rater}-{self.key}", *(f"{key}={value}" for key, value in self.extra.items())])

    @property
    def condition(self) -> str:
        """What tells the cell apart beyond rater, template and completion seed; empty where nothing does."""
        return " ".join(f"{key}={value}" for key, value in self.extra.items() if key != SEED)

    @cached_property
    def facts(self) -> dict[str, str]:
        """Everything that makes this cell what it is, as flat config keys; the rater's and template's names apart."""
        facts = flat({**self.job.config, "template": self.job.config["template"][self.key]})
        facts.pop("model.name", None)
        return {key: value for key, value in facts.items() if not key.startswith(ASIDE)}

    def tasks(self) -> list[tuple[str, str]]:
        """What makes each task the same in another cell."""
        return list(zip(self.measured.tasks, self.prompts, strict=True))

    def only(self, tasks: Sequence[tuple[str, str]]) -> Cell:
        """The cell on these tasks, in this order; each must be there."""
        where = {task: row for row, task in enumerate(self.tasks())}
        rows = [where[task] for task in tasks]
        return replace(
            self,
            measured=self.measured.only(rows),
            prompts=tuple(self.prompts[row] for row in rows),
            texts=self.texts.iloc[rows].reset_index(drop=True),
        )


@dataclass(frozen=True)
class Sweep:
    """Everything that was found in some run folders.

    Attributes
    ----------
    cells
        The cells of finished jobs, each once.
    jobs
        All jobs that began, in order.
    doubles
        Cells left out because a later job measured the same. Their probes may be others.
    """

    cells: tuple[Cell, ...]
    jobs: tuple[Job, ...]
    doubles: tuple[Cell, ...]

    def work(self) -> list[Work]:
        """What all jobs reused and computed, by stage."""
        totals: dict[str, Work] = {}
        for work in (each for job in self.jobs for each in job.work):
            totals[work.stage] = totals.get(work.stage, Work(work.stage, 0, 0)).plus(work)
        return list(totals.values())

    def spent(self) -> list[Spent]:
        """What all jobs spent, by model; dollars where any job knew them."""
        totals: dict[str, Spent] = {}
        for spent in (each for job in self.jobs for each in job.spent):
            before = totals.get(spent.model)
            totals[spent.model] = spent if before is None else before.plus(spent)
        return list(totals.values())


def read_sweep(folders: Sequence[Path]) -> Sweep:
    """Read the jobs in some folders (multiruns, or jobs themselves) and the cells of those that finished. A job that
    made a shard of its cells has none to show.

    Raises
    ------
    UserError
        If a folder holds no job, or a job's files are not there or damaged.
    """
    jobs: list[Job] = []
    for folder in folders:
        found = sorted(folder.rglob(FILE), key=_in_order)
        if not found:
            raise UserError(f"{folder}: no jobs here (no {FILE}); give the folder of a run or a multirun")
        jobs += [read_job(path.parent) for path in found if path.parent not in {job.folder for job in jobs}]
    cells: dict[str, Cell] = {}
    doubles: list[Cell] = []
    for job in jobs:
        for key in job.config["template"] if job.status == FINISHED and not job.is_shard else ():
            cell = _read_cell(job, key)
            same = json.dumps([cell.rater, cell.key, cell.facts], sort_keys=True)
            if same in cells:
                doubles.append(cells.pop(same))
            cells[same] = cell
    # A double has the facts of the cell that took its place, and so its name.
    named = _told_apart([*cells.values(), *doubles])
    return Sweep(named[: len(cells)], tuple(jobs), named[len(cells) :])


def common_tasks(cells: Sequence[Cell]) -> list[tuple[str, str]]:
    """The tasks that all cells have, in the order of the first."""
    if not cells:
        return []
    shared = set(cells[0].tasks()).intersection(*(cell.tasks() for cell in cells[1:]))
    return [task for task in cells[0].tasks() if task in shared]


def align(cells: Sequence[Cell]) -> tuple[list[list[Cell]], str | None]:
    """Cells on their common tasks.

    Returns
    -------
    blocks
        Cells that can be compared with each other, on the same tasks in the same order: one block where at least
        `MIN_COMMON` tasks are common to all, else one for each condition (a data set, say), else one a cell.
    remark
        What was done, where that is not nothing.
    """
    common = common_tasks(cells)
    if len(common) >= MIN_COMMON or len(cells) < 2:
        short = [f"{cell.name} has {len(cell.prompts)}" for cell in cells if len(cell.prompts) > len(common)]
        remark = f"Compared on the {len(common)} tasks that all cells have: {'; '.join(short)}." if short else None
        return [[cell.only(common) for cell in cells]], remark
    by_condition: dict[str, list[Cell]] = {}
    for cell in cells:
        by_condition.setdefault(cell.condition, []).append(cell)
    blocks: list[list[Cell]] = []
    for members in by_condition.values():
        shared = common_tasks(members)
        aligned = len(shared) >= MIN_COMMON
        blocks += [[cell.only(shared) for cell in members]] if aligned else [[cell] for cell in members]
    counts = ", ".join(f"{len(block)} on {len(block[0].prompts)} tasks" for block in blocks)
    return blocks, f"All cells have only {len(common)} tasks in common, so they are compared in groups: cells {counts}."


def _read_cell(job: Job, key: str) -> Cell:
    folder = job.folder / key
    options = job.config["template"][key]["options"]
    texts = read_table(job.folder / "completions.parquet", "task", "origin", "prompt", "completion", "refused")
    answers = read_table(folder / "ratings.parquet", "task", "seed", "answer", "value", "invalid")
    seeds = list(job.config["rating"]["seeds"])
    wide = answers.pivot(index="task", columns="seed", values="value").reindex(index=texts["task"], columns=seeds)
    mass = by_thought = None
    thinks = bool(job.config["model"]["thinking"]["enabled"])
    masses = [f"p({option['say']})" for option in options]
    if job.config["rating"]["exact"]:
        exact = read_table(folder / "exact.parquet", "task", *masses).set_index("task").reindex(texts["task"])
        mass = exact[masses].to_numpy(dtype=float)
    if mass is not None and thinks:
        each = read_table(folder / "exact_by_thought.parquet", "task", "thought_seed", *masses).set_index("task")
        by_task = each.loc[list(texts["task"]), masses].to_numpy(dtype=float)
        by_thought = by_task.reshape(len(texts), -1, len(options))
    return Cell(
        job=job,
        key=key,
        measured=Measured(
            tasks=tuple(texts["task"]),
            origins=tuple(texts["origin"]),
            says=tuple(option["say"] for option in options),
            values=tuple(float(option["value"]) for option in options),
            sampled=wide.to_numpy(dtype=float),
            mass=mass,
            refused=texts["refused"].to_numpy(dtype=float, na_value=np.nan),
            thinks=thinks,
            by_thought=by_thought,
        ),
        prompts=tuple(texts["prompt"]),
        texts=texts,
        answers=answers,
        extra={},
    )


def read_table(path: Path, *columns: str) -> pd.DataFrame:
    """A job's table, with the columns that are needed of it.

    Raises
    ------
    UserError
        If it is not there, damaged, or without one of them.
    """
    try:
        table = pd.read_parquet(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read {path} ({str(error).splitlines()[0]}); run its job again") from None
    for name in columns:
        if name not in table:
            raise UserError(f"cannot read {path} (no column {name}); run its job again")
    return table


def _told_apart(cells: list[Cell]) -> tuple[Cell, ...]:
    """Give each cell the config keys that tell it from others of the same rater and template, and no more."""
    extras = telling([(cell.rater, cell.key) for cell in cells], [cell.facts for cell in cells], FIRST)
    return tuple(replace(cell, extra=extra) for cell, extra in zip(cells, extras, strict=True))


def telling(
    names: Sequence[tuple[str, ...]], facts: Sequence[Mapping[str, str]], first: Sequence[str]
) -> list[dict[str, str]]:
    """What tells apart things that have the same name: of each the same few config keys, with its values in short.

    Keys in `first` are looked at before the others.
    """
    extra: list[str] = []
    for key in [*first, *sorted({key for each in facts for key in each}.difference(first))]:
        groups: dict[tuple[str, ...], set[str | None]] = {}
        for name, each in zip(names, facts, strict=True):
            groups.setdefault((*name, *(each.get(known, "") for known in extra)), set()).add(each.get(key))
        if any(len(values) > 1 for values in groups.values()):
            extra.append(key)
    shown = {key: _shown({each.get(key, "none") for each in facts}) for key in extra}
    return [{key: shown[key][each.get(key, "none")] for key in extra} for each in facts]


def also_different(cells: Sequence[Cell]) -> list[str]:
    """Config keys in which cells differ though nothing in their names says so (a temperature, beside the rater)."""
    named = {key for cell in cells for key in cell.extra}
    named |= {key.replace("condition", "system_prompt") for key in named.intersection(CONDITIONS)}
    keys = {key for cell in cells for key in cell.facts if not key.startswith(("model.", "template."))} - named
    return sorted(key for key in keys if len({cell.facts.get(key) for cell in cells}) > 1)


def flat(value: Any, prefix: str = "") -> dict[str, str]:
    """A nested config as dotted keys; lists stay whole."""
    if isinstance(value, Mapping) and value:
        return {
            key: each
            for name, inner in value.items()
            for key, each in flat(inner, f"{prefix}.{name}" if prefix else str(name)).items()
        }
    return {prefix: "none" if value is None else value if isinstance(value, str) else json.dumps(value)}


def _shown(values: set[str]) -> dict[str, str]:
    """Config values as names show them: short, and still different where they are."""
    short = {value: textwrap.shorten(value, 32, placeholder="…") or f"{value[:31]}…" for value in values}
    taken = list(short.values())
    marks = {value: hashlib.sha256(value.encode()).hexdigest()[:6] for value in values}
    return {value: name if taken.count(name) == 1 else f"{name[:24]}…{marks[value]}" for value, name in short.items()}


def _in_order(path: Path) -> tuple[tuple[int, str], ...]:
    """Jobs by number: 2 before 10."""
    return tuple((int(part) if part.isdigit() else -1, part) for part in path.parts)
