"""What a stage is, and what it finds at hand: the job, and the cell where it is about one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from prefs.config import Config
from prefs.data.task import Task
from prefs.data.template import Template
from prefs.job import JobCounts, ModelUsage
from prefs.models.loading import Models, ModelSpec
from prefs.models.types import Usage
from prefs.probes.outcome import NoProbe
from prefs.results.choices import Revealed
from prefs.results.result import Result
from prefs.stages.concept import Concepts
from prefs.stages.judge import Judged
from prefs.stages.measure import Roles, Sites
from prefs.stages.probe import ProbeReport
from prefs.stages.records import Completion, Rated, Ratings
from prefs.statistics.groups import Group, groups_by_origin
from prefs.statistics.measured import Measured
from prefs.store.table import Store


@dataclass(frozen=True)
class RunFolder:
    """Where a job's results go: its folder, and its W&B group and the words that tell it from others of the sweep."""

    path: Path
    group: str | None = None
    suffix: str = ""


@dataclass(eq=False)
class JobContext:
    """A job while it runs: what it is given, and what its stages have brought so far.

    Attributes
    ----------
    plain_config
        The config as plain containers, as cards and W&B have it.
    sites
        What is captured, probed and steered.
    completions, rated, judged, concepts, revealed
        What stages brought; not there before they ran.
    probes
        Of the cells so far, for the transfer between them.
    """

    config: Config
    plain_config: Mapping[str, Any]
    folder: Path
    tasks: list[Task]
    roles: Roles
    templates: Mapping[str, Template]
    sites: Sites
    store: Store
    models: Models
    counts: JobCounts
    completions: list[Completion] = field(init=False)
    rated: Rated = field(init=False)
    judged: Judged = field(init=False)
    concepts: Concepts = field(default_factory=dict)
    revealed: Revealed | None = None
    probes: list[ProbeReport] = field(default_factory=list)

    @property
    def rater(self) -> ModelSpec:
        return self.roles.rater

    @cached_property
    def groups(self) -> list[Group]:
        """All tasks, and those of each origin; the cells share their resamples."""
        stats = self.config.stats
        origins = [completion.task.origin for completion in self.completions]
        return groups_by_origin(origins, stats.bootstrap, stats.seed)

    @contextmanager
    def noting_usage(self) -> Iterator[None]:
        """Note what its models are used for while inside, also where that ends with an error."""
        before = self.models.usage()
        try:
            yield
        finally:
            names = {spec.engine: spec.name for spec in self.roles.specs}
            for engine, usage in self.models.usage().items():
                if engine in names and (spent := usage.since(before.get(engine, Usage()))).requests:
                    self.counts.spend(ModelUsage(names[engine], **asdict(spent)))


@dataclass(eq=False)
class CellContext:
    """One template of a job: its ratings, as records and as arrays, and what its probes brought once they are there."""

    job: JobContext
    key: str
    ratings: Ratings
    measured: Measured
    probed: ProbeReport | NoProbe | None = None

    @property
    def config(self) -> Config:
        return self.job.config

    @property
    def groups(self) -> list[Group]:
        """The job's."""
        return self.job.groups

    @property
    def title(self) -> str:
        """Rater and template, as figures name the cell."""
        return f"{self.job.rater.name}, {self.ratings.template.name}"


@dataclass(frozen=True)
class Stage:
    """A part of a job.

    Attributes
    ----------
    name
        What it is called.
    run
        Gives what was found; what later stages need it puts into the context.
    wanted
        Whether a config asks for it.
    by_cell
        Whether it is run for each cell, with its context, and not once with the job's.
    """

    name: str
    run: Callable[[Any], Result]
    wanted: Callable[[Config], bool] = lambda config: True
    by_cell: bool = True
