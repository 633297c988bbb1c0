"""Weights & Biases: one run for each cell, offline when there is no key, and never a question asked."""

from __future__ import annotations

import logging
import math
import os
import re
import secrets
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from prefs.config import WandbConfig
from prefs.results.files import Written
from prefs.results.result import Result

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tracker:
    """One W&B run. Every method does nothing where W&B is disabled (``run`` is None)."""

    run: Any | None
    offline: bool

    @property
    def folder(self) -> Path | None:
        """The folder of the run's files; for an offline run this is what ``wandb sync`` takes."""
        return None if self.run is None else Path(self.run.dir).parent

    def log(self, result: Result, written: Written) -> None:
        """Log a result with the files that were written of it: its metrics as summary, and all else as it is."""
        if self.run is None:
            return
        import wandb

        self.metrics(result.metrics)
        for series in result.series:
            self.run.define_metric(series.step)
            for name in series.frame.columns.drop(series.step):
                self.run.define_metric(name, step_metric=series.step)
            for row in series.frame.to_dict("records"):
                self.run.log({str(name): value for name, value in row.items() if pd.notna(value)})
        for table in result.tables:
            if not table.large:
                plain = table.frame.astype(object).where(table.frame.notna(), None)
                # Row by row: of a data frame W&B asks for each cell by itself.
                rows = plain.to_numpy(dtype=object).tolist()
                names: list[str | int] = [str(column) for column in plain.columns]
                self.run.log({f"tables/{table.name}": wandb.Table(columns=names, data=rows, allow_mixed_types=True)})
        for name, path in written.figures.items():
            self.run.log({f"figures/{name}": wandb.Image(str(path))})
        for artifact, paths in written.artifacts:
            plain_name = re.sub(r"[^\w.-]", "-", artifact.name, flags=re.ASCII)[:128]
            logged = wandb.Artifact(plain_name, type=artifact.kind, metadata=dict(artifact.metadata))
            for path in paths:
                logged.add_file(str(path))
            self.run.log_artifact(logged)

    def metrics(self, values: Mapping[str, float | None]) -> None:
        """Set summary metrics; a missing statistic is left out, never written as 0."""
        if self.run is not None:
            known = {name: value for name, value in values.items() if value is not None and not math.isnan(value)}
            self.run.summary.update(known)

    def page(self, name: str, path: Path) -> None:
        if self.run is not None:
            import wandb

            self.run.log({name: wandb.Html(path.read_text(), inject=False)})


@contextmanager
def tracker(
    config: WandbConfig,
    *,
    name: str,
    group: str | None,
    folder: Path,
    run_config: Mapping[str, Any],
    job_type: str = "cell",
    another: bool = False,
) -> Iterator[Tracker]:
    """Open a W&B run for the time of the block; marked as failed if the block raises.

    `another` says that it is not the job's first: an agent of a W&B sweep names one run for the job, and its second
    template needs a run of its own. With a key that W&B refuses, or no network, the run goes on offline and a warning
    says so.
    """
    mode = os.environ.get("WANDB_MODE") or config.mode
    if "disabled" in (config.mode, mode):
        yield Tracker(None, offline=False)
        return
    arguments = {
        "id": secrets.token_hex(4) if another and os.environ.get("WANDB_RUN_ID") else None,
        "project": config.project,
        "entity": config.entity,
        "group": config.group or group,
        "name": name,
        "job_type": job_type,
        "tags": config.tags or None,
        "dir": str(folder),
        "config": dict(run_config),
    }
    run, offline = _start(mode, arguments)
    try:
        yield Tracker(run, offline)
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


def _start(mode: str, arguments: Mapping[str, Any]) -> tuple[Any, bool]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the library, at import
        import wandb
        from wandb.errors import Error as WandbError

    if mode == "auto":
        # A key can be in the environment or in the user's netrc.
        has_key = bool(os.environ.get("WANDB_API_KEY")) or wandb.login(prompt=False, verify=False)
        mode = "online" if has_key else "offline"
    settings = wandb.Settings(silent=True, console="off", init_timeout=30, save_code=False, disable_git=True)

    def start(mode: Any) -> Any:
        return wandb.init(**arguments, mode=mode, reinit="create_new", settings=settings)

    if mode == "online":
        try:
            return start("online"), False
        except (WandbError, ValueError) as error:
            log.warning("W&B cannot be reached (%s); logging offline", " ".join(str(error).split())[:200])
    return start("offline"), True
