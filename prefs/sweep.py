"""What a multirun knows of itself: its folder, what it sweeps over, and how many jobs that makes.

Imported while Hydra composes a config, so nothing heavy is imported here.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

FILE = "multirun.yaml"
BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
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

    Empty where the folder is not Hydra's own sweeper's, or its file is damaged, and so there is no telling.
    """
    return {key: values for key, values in (_overrides(folder) or {}).items() if len(values) > 1}


def job_count(folder: Path) -> int | None:
    """How many jobs a multirun comes to; None where there is no telling."""
    overrides = _overrides(folder)
    return None if overrides is None else math.prod(len(values) for values in overrides.values())


def command(folder: Path) -> str | None:
    """The command line of a multirun; None where there is no telling."""
    config = _load(folder)
    if config is None:
        return None
    said = [*(OmegaConf.select(config, "hydra.overrides.hydra") or []), *_task(config)]
    return shlex.join(["python", "-m", "prefs.run", "-m", *(each for each in said if each != "hydra.mode=MULTIRUN")])


def _load(folder: Path) -> DictConfig | None:
    try:
        config = OmegaConf.load(folder / FILE)
        return config if isinstance(config, DictConfig) and _task(config) is not None else None
    except (OSError, ValueError, TypeError, YAMLError, OmegaConfBaseException):
        return None


def given(config: DictConfig) -> list[str]:
    """The overrides of a multirun, of its sweeper's config and of the command line, which comes later and so counts."""
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    return [f"{key}={value}" for key, value in params.items()] + _task(config)


def _task(config: DictConfig) -> list[str]:
    return list(OmegaConf.select(config, "hydra.overrides.task") or [])


def _overrides(folder: Path) -> dict[str, tuple[str, ...]] | None:
    """The values of each key that is overridden, as Hydra's own sweeper enumerates them; None of any other's."""
    config = _load(folder)
    if config is None or OmegaConf.select(config, "hydra.sweeper._target_") != BASIC_SWEEPER:
        return None
    values: dict[str, tuple[str, ...]] = {}
    try:
        for override in OverridesParser.create(_config_loader(config)).parse_overrides(given(config)):
            several = tuple(override.sweep_string_iterator()) if override.is_sweep_override() else ("",)
            values[override.get_key_element()] = several
    except (HydraException, ValueError):
        return None
    return values


def _config_loader(config: DictConfig) -> ConfigLoader:
    """What a glob over a group's options is looked up in: the config folders that the multirun had."""
    path = ConfigSearchPathImpl()
    for source in OmegaConf.select(config, "hydra.runtime.config_sources") or []:
        if source.path:
            path.append(source.provider, f"{source.schema}://{source.path}")
    return ConfigLoaderImpl(path)


def name_suffix(overrides: list[str], sweep: Mapping[str, tuple[str, ...]]) -> str:
    """What tells a job from the others of its sweep, beyond model and template: ``-completer.seed=1``."""
    keys = [key for key in sweep if key.lstrip("+") not in NAMED]
    return "".join(f"-{each.lstrip('+')}" for each in overrides if each.partition("=")[0] in keys)


def sweep_name(folder: Path, experiment: str | None) -> str:
    """A multirun's name, which its W&B runs have for a group: ``template_comparison 2026-11-24/04-27-26``."""
    when = "/".join(folder.parts[-2:])
    return f"{experiment} {when}" if experiment else when
