"""Tasks completed under one system prompt and read under one, the same or another: where concept vectors come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from prefs.data.task import Task
from prefs.job import StageCounts
from prefs.models.loading import Models, ModelSpec
from prefs.models.types import Capture, Sampling
from prefs.probes.features import Captured
from prefs.stages.complete import complete
from prefs.stages.rate import rate
from prefs.stages.records import Completion, Residuals
from prefs.store.table import Store


@dataclass(frozen=True)
class Read:
    """Completions of some tasks with the residuals captured while the subject read them, by position."""

    completions: Sequence[Completion]
    residuals: Mapping[str, Residuals]

    @cached_property
    def present(self) -> dict[str, int]:
        """The tasks that have a vector at every position, by id, and where they stand."""
        present = np.all([residuals.present() for residuals in self.residuals.values()], axis=0)
        return {completion.task.id: row for row, completion in enumerate(self.completions) if present[row]}

    def features(self, tasks: Sequence[str]) -> Captured:
        """The vectors of these tasks, which must be there."""
        present = self.present
        return Captured(list(self.residuals.values()), [present[task] for task in tasks])


@dataclass(frozen=True)
class Reader:
    """Who completes tasks, who reads them, and what is captured; notes the work that was done."""

    completer: ModelSpec
    subject: ModelSpec
    sampling: Sampling
    seed: int
    capture: Capture
    store: Store
    models: Models
    dtype: str = "bfloat16"
    work: list[StageCounts] = field(default_factory=list)

    def read(self, tasks: Sequence[Task], *, written_under: str | None, read_under: str | None) -> Read:
        """Complete tasks under one system prompt (None: without), and capture them under another; what the store has
        is not made again."""
        completions, completed = complete(
            tasks,
            self.completer,
            self.sampling,
            seed=self.seed,
            system_prompt=written_under,
            store=self.store,
            models=self.models,
        )
        rated = rate(
            completions,
            self.subject,
            {},
            self.sampling,
            seeds=(),
            exact=False,
            capture=self.capture,
            dtype=self.dtype,
            system_prompt=read_under,
            store=self.store,
            models=self.models,
        )
        self.work.extend([completed, *rated.work])
        return Read(completions, rated.residuals)

    def done(self) -> list[StageCounts]:
        """The work of all that was read, by stage."""
        totals: dict[str, StageCounts] = {}
        for work in self.work:
            totals[work.stage] = totals.get(work.stage, StageCounts(f"concepts, {work.stage}", 0, 0)).plus(work)
        return list(totals.values())
