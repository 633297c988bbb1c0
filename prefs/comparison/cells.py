"""Cells read back from run folders: what each measured, what tells it from the others, and their common tasks."""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from prefs.config import StatsConfig
from prefs.errors import UserError
from prefs.job import FILE, FINISHED, Job, read_job
from prefs.results.stability import Stability, stability
from prefs.statistics.groups import Group, groups_by_origin
from prefs.statistics.measured import Measured

# What decides neither a completion nor a rating nor a verdict, and so does not make a cell another one.
ASIDE = ("store", "wandb", "stats", "capture", "probe", "concept", "steering", "model.device", "model.batch_tokens")
# Looked at first for what tells cells apart, before the rest of the config.
SEED, CONDITIONS = "completer.seed", ("completer.condition", "rating.condition")
FIRST = (
    "completer.name",
    SEED,
    *CONDITIONS,
    "completer.system_prompt",
    "rating.system_prompt",
    "dataset.name",
)
MIN_COMMON = 3


@dataclass(frozen=True, eq=False)
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
    def folder(self) -> Path:
        return self.job.folder / self.key

    @property
    def rater(self) -> str:
        return str(self.job.config["model"]["name"])

    @property
    def completion_seed(self) -> int:
        return int(self.job.config["completer"]["seed"])

    @property
    def name(self) -> str:
        """Rater and template, and what else tells the cell apart: ``smollm2-anchored completer.seed=1``."""
        return named(f"{self.rater}-{self.key}", self.extra)

    @property
    def condition(self) -> str:
        """What tells the cell apart beyond rater, template and completion seed; empty where nothing does."""
        return named("", {key: value for key, value in self.extra.items() if key != SEED})

    @property
    def names(self) -> dict[str, Any]:
        return {
            "cell": self.name,
            "rater": self.rater,
            "template": self.key,
            "completer": str(self.job.config["completer"]["name"]),
            "dataset": str(self.job.config["dataset"]["name"]),
            "condition": self.condition,
            "completion_seed": self.completion_seed,
        }

    @cached_property
    def facts(self) -> dict[str, str]:
        """Everything that makes this cell what it is, as flat config keys; the rater's and template's names apart."""
        facts = flat({**self.job.config, "template": self.job.config["template"][self.key]})
        facts.pop("model.name", None)
        return {key: value for key, value in facts.items() if not key.startswith(ASIDE)}

    def tasks(self) -> list[tuple[str, str]]:
        return list(zip(self.measured.tasks, self.prompts, strict=True))

    def only(self, tasks: Sequence[tuple[str, str]]) -> Cell:
        where = {task: row for row, task in enumerate(self.tasks())}
        rows = [where[task] for task in tasks]
        return replace(
            self,
            measured=self.measured.only(rows),
            prompts=tuple(self.prompts[row] for row in rows),
            texts=self.texts.iloc[rows].reset_index(drop=True),
        )


@dataclass(frozen=True, eq=False)
class Block:
    """Cells on the same tasks in the same order, and groups of these tasks (all of them first).

    The cells share the groups' resamples, so that their intervals can be compared.
    """

    cells: tuple[Cell, ...]
    groups: tuple[Group, ...]
    target_r: float

    @cached_property
    def stability(self) -> dict[Cell, list[Stability]]:
        return {cell: stability(cell.measured, self.groups, self.target_r) for cell in self.cells}


@dataclass(frozen=True, eq=False)
class Sweep:
    """Everything that was found in some run folders.

    Attributes
    ----------
    jobs
        All jobs that began, in order.
    cells
        The cells of finished jobs, each once.
    doubles
        Cells left out because a later job measured the same. Their probes may be others.
    """

    folders: tuple[Path, ...]
    jobs: tuple[Job, ...]
    cells: tuple[Cell, ...]
    doubles: tuple[Cell, ...]

    @cached_property
    def stats(self) -> StatsConfig:
        return StatsConfig(**self.jobs[0].config["stats"])

    @cached_property
    def alignment(self) -> tuple[tuple[Block, ...], str | None]:
        """The cells on their common tasks, and what had to be done for it, where that is not nothing."""
        aligned, remark = align(self.cells)
        return tuple(
            Block(tuple(cells), tuple(self.groups(cells[0].measured.origins)), self.stats.target_r) for cells in aligned
        ), remark

    @property
    def blocks(self) -> tuple[Block, ...]:
        return self.alignment[0]

    @property
    def aligned(self) -> list[Cell]:
        """All cells, on the tasks that they are compared on."""
        return [cell for block in self.blocks for cell in block.cells]

    def groups(self, origins: Sequence[str]) -> list[Group]:
        """Tasks by origin, all of them first, with the resamples that the config wants."""
        return groups_by_origin(origins, self.stats.bootstrap, self.stats.seed)

    def stacked(self, describe: Callable[[Block, Cell], pd.DataFrame]) -> pd.DataFrame:
        """A table of every cell under each other, each row with the cell's names."""
        cells = [(cell.names, describe(block, cell)) for block in self.blocks for cell in block.cells]
        frames = [frame.assign(**names).loc[:, [*names, *frame.columns]] for names, frame in cells]
        return pd.concat(frames, ignore_index=True)

    def variants(
        self, settings: Sequence[str], first: Sequence[str], has: Callable[[Cell], bool]
    ) -> list[tuple[str, Cell]]:
        """Cells that have something beside their ratings (probes, say), each with a name for it.

        A cell that was measured twice counts once, but with all that it has under different `settings`, which are
        sections of the config; the names say then what differs, of the keys in `first` before others.
        """
        chosen: dict[str, Cell] = {}
        # The later job first: of two with the same settings it is the one that counts.
        for cell in (*self.cells, *reversed(self.doubles)):
            if has(cell):
                own = {name: cell.job.config.get(name) for name in settings}
                chosen.setdefault(json.dumps([cell.name, own], sort_keys=True), cell)
        order = [cell.name for cell in self.cells]
        cells = sorted(chosen.values(), key=lambda cell: order.index(cell.name))
        facts = [flat({name: cell.job.config.get(name) for name in settings}) for cell in cells]
        names = [cell.name for cell in cells]
        several = [number for number, name in enumerate(names) if names.count(name) > 1]
        extras = telling([(names[number],) for number in several], [facts[number] for number in several], first)
        for number, extra in zip(several, extras, strict=True):
            names[number] = named(names[number], extra)
        return list(zip(names, cells, strict=True))


def read_sweep(folders: Sequence[Path]) -> Sweep:
    """Read the jobs in some folders (multiruns, or jobs themselves) and the cells of those that finished. A job that
    made a shard of its cells has none to show.

    Raises
    ------
    UserError
        If a folder holds no job, or a job's files are not there or damaged.
    """
    jobs: dict[Path, Job] = {}
    for folder in folders:
        # By number: 2 before 10.
        paths = sorted(
            folder.rglob(FILE), key=lambda path: [(int(part) if part.isdigit() else -1, part) for part in path.parts]
        )
        if not paths:
            raise UserError(f"{folder}: no jobs here (no {FILE}); give the folder of a run or a multirun")
        jobs |= {path.parent: read_job(path.parent) for path in paths if path.parent not in jobs}
    cells: dict[str, Cell] = {}
    doubles: list[Cell] = []
    for job in jobs.values():
        for key in job.config["template"] if job.status == FINISHED and not job.is_shard else ():
            cell = _read_cell(job, key)
            same = json.dumps([cell.rater, cell.key, cell.facts], sort_keys=True)
            if same in cells:
                doubles.append(cells.pop(same))
            cells[same] = cell
    # A double has the facts of the cell that took its place, and so its name.
    everything = [*cells.values(), *doubles]
    extras = telling([(cell.rater, cell.key) for cell in everything], [cell.facts for cell in everything], FIRST)
    told = tuple(replace(cell, extra=extra) for cell, extra in zip(everything, extras, strict=True))
    return Sweep(tuple(folders), tuple(jobs.values()), told[: len(cells)], told[len(cells) :])


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
    common = _common_tasks(cells)
    if len(common) >= MIN_COMMON or len(cells) < 2:
        longer = [f"{cell.name} has {len(cell.prompts)}" for cell in cells if len(cell.prompts) > len(common)]
        remark = f"Compared on the {len(common)} tasks that all cells have: {'; '.join(longer)}." if longer else None
        return [[cell.only(common) for cell in cells]], remark
    by_condition: dict[str, list[Cell]] = {}
    for cell in cells:
        by_condition.setdefault(cell.condition, []).append(cell)
    blocks: list[list[Cell]] = []
    for members in by_condition.values():
        shared = _common_tasks(members)
        aligned = len(shared) >= MIN_COMMON
        blocks += [[cell.only(shared) for cell in members]] if aligned else [[cell] for cell in members]
    counts = ", ".join(f"{len(block)} on {len(block[0].prompts)} tasks" for block in blocks)
    return blocks, f"All cells have only {len(common)} tasks in common, so they are compared in groups: cells {counts}."


def _common_tasks(cells: Sequence[Cell]) -> list[tuple[str, str]]:
    shared = set.intersection(*(set(cell.tasks()) for cell in cells)) if cells else set()
    return [task for task in cells[0].tasks() if task in shared] if cells else []


def _read_cell(job: Job, key: str) -> Cell:
    folder, config = job.folder / key, job.config
    options = config["template"][key]["options"]
    texts = read_table(job.folder / "completions.parquet", "task", "origin", "prompt", "completion", "refused")
    answers = read_table(folder / "ratings.parquet", "task", "seed", "answer", "value", "invalid")
    sampled = answers.pivot(index="task", columns="seed", values="value")
    mass = by_thought = None
    thinks = bool(config["model"]["thinking"]["enabled"])
    masses = [f"p({option['say']})" for option in options]
    if config["rating"]["exact"]:
        exact = read_table(folder / "exact.parquet", "task", *masses).set_index("task").reindex(texts["task"])
        mass = exact[masses].to_numpy(dtype=float)
        if thinks:
            thoughts = read_table(folder / "exact_by_thought.parquet", "task", "thought_seed", *masses)
            by_task = thoughts.set_index("task").loc[list(texts["task"]), masses].to_numpy(dtype=float)
            by_thought = by_task.reshape(len(texts), -1, len(options))
    measured = Measured(
        tasks=tuple(texts["task"]),
        origins=tuple(texts["origin"]),
        says=tuple(option["say"] for option in options),
        values=tuple(float(option["value"]) for option in options),
        sampled=sampled.reindex(index=texts["task"], columns=list(config["rating"]["seeds"])).to_numpy(dtype=float),
        mass=mass,
        refused=texts["refused"].to_numpy(dtype=float, na_value=np.nan),
        thinks=thinks,
        by_thought=by_thought,
    )
    return Cell(job, key, measured, tuple(texts["prompt"]), texts, answers, extra={})


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


def telling(
    names: Sequence[tuple[str, ...]], facts: Sequence[Mapping[str, str]], first: Sequence[str]
) -> list[dict[str, str]]:
    """What tells apart things that have the same name: of each the same few config keys, with its values in short.

    Keys in `first` are looked at before the others.
    """
    extra: list[str] = []
    for key in [*first, *sorted({key for own in facts for key in own}.difference(first))]:
        values: dict[tuple[str, ...], set[str | None]] = {}
        for name, own in zip(names, facts, strict=True):
            values.setdefault((*name, *(own.get(known, "") for known in extra)), set()).add(own.get(key))
        if any(len(several) > 1 for several in values.values()):
            extra.append(key)
    short = {key: _shortened({own.get(key, "none") for own in facts}) for key in extra}
    return [{key: short[key][own.get(key, "none")] for key in extra} for own in facts]


def named(name: str, extra: Mapping[str, str]) -> str:
    """A name with what tells it apart."""
    return " ".join([name, *(f"{key}={value}" for key, value in extra.items())]).strip()


def flat(value: Any, prefix: str = "") -> dict[str, str]:
    """A nested config as dotted keys; lists stay whole."""
    if isinstance(value, Mapping) and value:
        return {
            key: text
            for name, inner in value.items()
            for key, text in flat(inner, f"{prefix}.{name}" if prefix else str(name)).items()
        }
    return {prefix: "none" if value is None else value if isinstance(value, str) else json.dumps(value)}


def _shortened(values: set[str]) -> dict[str, str]:
    """Config values as names show them: short, and still different where they are."""
    short = {value: textwrap.shorten(value, 32, placeholder="…") or f"{value[:31]}…" for value in values}
    taken = list(short.values())
    marks = {value: hashlib.sha256(value.encode()).hexdigest()[:6] for value in values}
    return {value: name if taken.count(name) == 1 else f"{name[:24]}…{marks[value]}" for value, name in short.items()}
