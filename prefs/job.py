"""A job's own record, ``job.json`` in its folder: what it was to do, whether it did, and what that took.

Written when a job begins and again when it ends, so that what was killed in between shows as not finished.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from prefs.errors import UserError
from prefs.store.files import write_durably

log = logging.getLogger(__name__)

FILE = "job.json"
RUNNING, FINISHED, FAILED = "not finished", "finished", "failed"


@dataclass(frozen=True)
class StageCounts:
    """How many records of a stage were found in the store and how many had to be computed.

    ``bytes`` are those of the vectors that were computed.
    """

    stage: str
    reused: int
    computed: int
    bytes: int = 0

    def plus(self, other: StageCounts) -> StageCounts:
        """Both together."""
        return StageCounts(
            self.stage, self.reused + other.reused, self.computed + other.computed, self.bytes + other.bytes
        )

    def __str__(self) -> str:
        size = f" ({self.bytes / 1e6:,.1f} MB)" if self.bytes else ""
        return f"{self.stage}: {self.reused} in the store, {self.computed} computed{size}"


@dataclass(frozen=True)
class ModelUsage:
    """What a job spent on one model: requests, tokens, and US dollars where prices are known."""

    model: str
    requests: int
    prompt_tokens: int
    completion_tokens: int
    dollars: float | None

    def plus(self, other: ModelUsage) -> ModelUsage:
        """Both together; dollars where either knows them."""
        known = [dollars for dollars in (self.dollars, other.dollars) if dollars is not None]
        return ModelUsage(
            self.model,
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            sum(known) if known else None,
        )

    def __str__(self) -> str:
        tokens = f"{self.prompt_tokens:,} prompt and {self.completion_tokens:,} completion tokens"
        cost = "" if self.dollars is None else f", ${self.dollars:,.4f}"
        return f"{self.model}: {self.requests:,} requests, {tokens}{cost}"


Counts = TypeVar("Counts", StageCounts, ModelUsage)


def summed(counts: Iterable[Counts]) -> list[Counts]:
    """Those of the same stage, or of the same model, together."""
    totals: dict[str, Counts] = {}
    for count in counts:
        name = count.stage if isinstance(count, StageCounts) else count.model
        # Of one name, they are of one kind.
        totals[name] = totals[name].plus(count) if name in totals else count  # pyright: ignore[reportArgumentType]
    return list(totals.values())


@dataclass
class JobCounts:
    """What a job has done and spent so far; it fills this in while it runs, so that a job that fails leaves it too.

    ``logged``: each stage's counts go to the log when it is done.
    """

    work: list[StageCounts] = field(default_factory=list)
    spent: list[ModelUsage] = field(default_factory=list)
    logged: bool = True

    def add(self, counts: Iterable[StageCounts]) -> None:
        for stage in counts:
            self.work.append(stage)
            if self.logged:
                log.info("%s", stage)

    def spend(self, usage: ModelUsage) -> None:
        self.spent = summed([*self.spent, usage])
        log.info("%s", usage)


@dataclass(frozen=True)
class Job:
    """One job: its folder, resolved config, overrides and W&B group, how it ended, and what it took."""

    folder: Path
    config: Mapping[str, Any]
    overrides: tuple[str, ...] = ()
    group: str | None = None
    status: str = RUNNING
    error: str | None = None
    work: tuple[StageCounts, ...] = ()
    spent: tuple[ModelUsage, ...] = ()

    @property
    def is_shard(self) -> bool:
        """Whether it made a share of its cells, and no tables of them."""
        return self.config["shard"] is not None

    def __str__(self) -> str:
        return " ".join(self.overrides) or str(self.folder)


@contextmanager
def recorded(
    folder: Path, config: Mapping[str, Any], overrides: Sequence[str], group: str | None
) -> Iterator[JobCounts]:
    """Keep a job's record while it runs; what is given takes the work it did.

    Raises
    ------
    UserError
        If the record cannot be written.
    """
    job = Job(folder, config, tuple(overrides), group)
    _write(job)
    counts = JobCounts()
    try:
        yield counts
    except Exception as error:
        line = " ".join(str(error).split())
        named = line if isinstance(error, UserError) else f"{type(error).__name__}: {line}"
        _write(replace(job, status=FAILED, error=named, work=tuple(counts.work), spent=tuple(counts.spent)))
        raise
    _write(replace(job, status=FINISHED, work=tuple(counts.work), spent=tuple(counts.spent)))


def _write(job: Job) -> None:
    content = {name: value for name, value in asdict(job).items() if name != "folder"}
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        write_durably(job.folder / FILE, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise UserError(f"cannot write to {job.folder}: {error.strerror}") from None


def read_job(folder: Path) -> Job:
    """The record in a job's folder.

    Raises
    ------
    UserError
        If there is none, or it is not one.
    """
    path = folder / FILE
    try:
        content = json.loads(path.read_text())
        return Job(
            folder=folder,
            config=content["config"],
            overrides=tuple(content["overrides"]),
            group=content["group"],
            status=content["status"],
            error=content["error"],
            work=tuple(StageCounts(**stage) for stage in content["work"]),
            spent=tuple(ModelUsage(**usage) for usage in content["spent"]),
        )
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the record of a job ({type(error).__name__}: {error})") from None
