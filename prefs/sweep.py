"""What a multirun knows of itself: its folder, what it sweeps over, and how many jobs that makes.

Imported while Hydra composes a config, so nothing heavy is imported here.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

FILE = "multirun.yaml"
# What a job's name says anyway.
NAMED = ("model", "template", "experiment")

_folders: ContextVar[list[Path] | None] = ContextVar("folders of the sweeps begun", default=None)


class NoteSweep(Callback):
    """Hydra's callback that tells the entry point where a multirun puts its jobs, whichever launcher runs them."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        folders = _folders.get()
        if folders is not None:
            folders.append(Path(config.hydra.sweep.dir).absolute())


@contextmanager
def noting_sweeps() -> Iterator[list[Path]]:
    """The folders of the multiruns that begin inside.

    Hydra's own `on_multirun_end` is not called when a job fails, and what the others found is wanted then too.
    """
    folders: list[Path] = []
    token = _folders.set(folders)
    try:
        yield folders
    finally:
        _folders.reset(token)


def swept(folder: Path) -> dict[str, tuple[str, ...]]:
    """What a multirun sweeps over: the values of each key that has several, as on the command line.

    Empty where the folder is not Hydra's own sweeper's, and so there is no telling.
    """
    try:
        config = OmegaConf.load(folder / FILE)
        params = OmegaConf.select(config, "hydra.sweeper.params") or {}
        task = OmegaConf.select(config, "hydra.overrides.task") or []
    except (OSError, OmegaConfBaseException):
        return {}
    # As Hydra's BasicSweeper reads them: the command line after, and so before, the config.
    given = [f"{key}={value}" for key, value in params.items()] + list(task)
    values: dict[str, tuple[str, ...]] = {}
    for override in OverridesParser.create().parse_overrides(given):
        key = override.get_key_element()
        values[key] = (
            tuple(override.sweep_string_iterator()) if override.is_sweep_override() else (str(override.value()),)
        )
    return {key: each for key, each in values.items() if len(each) > 1}


def job_count(folder: Path) -> int | None:
    """How many jobs a multirun comes to; None where there is no telling."""
    if not (folder / FILE).is_file():
        return None
    count = 1
    for values in swept(folder).values():
        count *= len(values)
    return count


def command(folder: Path) -> str | None:
    """The command line of a multirun; None where there is no telling."""
    try:
        task = OmegaConf.select(OmegaConf.load(folder / FILE), "hydra.overrides.task") or []
    except (OSError, OmegaConfBaseException):
        return None
    return shlex.join(["python", "-m", "prefs.run", "-m", *task])


def name_suffix(overrides: list[str], sweep: Mapping[str, tuple[str, ...]]) -> str:
    """What tells a job from the others of its sweep, beyond model and template: ``-completer.seed=1``."""
    keys = [key for key in sweep if key.lstrip("+") not in NAMED]
    return "".join(f"-{each.lstrip('+')}" for each in overrides if each.partition("=")[0] in keys)


def sweep_name(folder: Path, experiment: str | None) -> str:
    """A multirun's name, which its W&B runs have for a group: ``template_comparison 2026-11-24/04-27-26``."""
    when = "/".join(folder.parts[-2:])
    return f"{experiment} {when}" if experiment else when
