"""Weights & Biases: one run for each cell, offline when there is no key, and never a question asked."""

from __future__ import annotations

import logging
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

    def metrics(self, values: Mapping[str, float | None]) -> None:
        """Set summary metrics; a missing statistic is left out, never written as 0."""
        if self.run is not None:
            self.run.summary.update({name: value for name, value in values.items() if value is not None})

    def series(self, step: str, rows: pd.DataFrame) -> None:
        """Log metrics over a step of their own (say the layer): one row a step, the step in column ``step``."""
        if self.run is not None:
            self.run.define_metric(step)
            for name in rows.columns.drop(step):
                self.run.define_metric(name, step_metric=step)
            for row in rows.to_dict("records"):
                self.run.log({str(name): value for name, value in row.items() if pd.notna(value)})

    def table(self, name: str, frame: pd.DataFrame) -> None:
        """Log a table."""
        if self.run is not None:
            import wandb

            plain = frame.astype(object).where(frame.notna(), None)
            # Row by row: of a data frame W&B asks for each cell by itself.
            rows = plain.to_numpy(dtype=object).tolist()
            names: list[str | int] = [str(column) for column in frame.columns]
            self.run.log({f"tables/{name}": wandb.Table(columns=names, data=rows, allow_mixed_types=True)})

    def figure(self, name: str, path: Path) -> None:
        """Log a PNG."""
        if self.run is not None:
            import wandb

            self.run.log({f"figures/{name}": wandb.Image(str(path))})

    def page(self, name: str, path: Path) -> None:
        """Log an HTML page."""
        if self.run is not None:
            import wandb

            self.run.log({name: wandb.Html(path.read_text(), inject=False)})

    def artifact(self, name: str, kind: str, paths: list[Path], metadata: dict[str, Any]) -> None:
        """Log files as an artifact."""
        if self.run is not None:
            import wandb

            artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", name, flags=re.ASCII)[:128], type=kind, metadata=metadata)
            for path in paths:
                artifact.add_file(str(path))
            self.run.log_artifact(artifact)


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

    `another` says that it is not the job's first.

    With a key that W&B refuses, or no network, the run goes on offline and a warning says so.
    """
    if config.mode == "disabled" or os.environ.get("WANDB_MODE") == "disabled":
        yield Tracker(None, offline=False)
        return
    run, offline = _start(
        config, name=name, group=group, folder=folder, run_config=run_config, job_type=job_type, another=another
    )
    try:
        yield Tracker(run, offline)
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


def _start(
    config: WandbConfig,
    *,
    name: str,
    group: str | None,
    folder: Path,
    run_config: Mapping[str, Any],
    job_type: str,
    another: bool,
) -> tuple[Any, bool]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the library, at import
        import wandb
        from wandb.errors import Error as WandbError

    mode = os.environ.get("WANDB_MODE") or config.mode
    if mode == "auto":
        mode = "online" if _has_key() else "offline"

    # An agent of a W&B sweep names one run for the job; its second template needs a run of its own.
    run_id = secrets.token_hex(4) if another and os.environ.get("WANDB_RUN_ID") else None

    def start(mode: str) -> Any:
        return wandb.init(
            id=run_id,
            project=config.project,
            entity=config.entity,
            group=config.group or group,
            name=name,
            job_type=job_type,
            tags=config.tags or None,
            dir=str(folder),
            config=dict(run_config),
            mode=mode,  # type: ignore[arg-type]
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", init_timeout=30, save_code=False, disable_git=True),
        )

    if mode == "online":
        try:
            return start("online"), False
        except (WandbError, ValueError) as error:
            log.warning("W&B cannot be reached (%s); logging offline", " ".join(str(error).split())[:200])
    return start("offline"), True


def _has_key() -> bool:
    """Whether a key is at hand, in the environment or in the user's netrc."""
    import wandb

    return bool(os.environ.get("WANDB_API_KEY")) or wandb.login(prompt=False, verify=False)
