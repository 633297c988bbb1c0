"""What only a sweep needs: shards, what it sweeps over, what its jobs ask a cluster for, and the comparison at its end.

Imported while Hydra composes a config, so nothing heavy is imported here.
"""

from __future__ import annotations

import logging
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from prefs.errors import ConfigError, UserError

log = logging.getLogger("prefs")

FILE = "multirun.yaml"
BASIC_SWEEPER = f"{BasicSweeper.__module__}.{BasicSweeper.__name__}"
# What a job's name says anyway.
NAMED = ("model", "template", "experiment")
ROLES = ("model", "completer.model", "judge.model")

Item = TypeVar("Item")
_folders: ContextVar[list[Path] | None] = ContextVar("folders of the sweeps begun", default=None)


@dataclass(frozen=True)
class Shard:
    """Share `number`, from 1, of `count`: several jobs make the same cells together, wherever and whenever they run."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``2/8``.

        Raises
        ------
        ConfigError
            If it is something else, or there is no such share.
        """
        parts = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if parts is None or not 1 <= int(parts[1]) <= int(parts[2]):
            raise ConfigError("shard", text, "null, or i/n: share i of n, from 1/n to n/n")
        return cls(int(parts[1]), int(parts[2]))

    def share(self, tasks: Sequence[Item]) -> list[Item]:
        """Every `count`-th task, so that each share has about as many of every origin.

        Raises
        ------
        UserError
            If there are fewer tasks than shares, and none is left for this one.
        """
        share = list(tasks[self.number - 1 :: self.count])
        if not share:
            raise UserError(f"shard: {self} has no task; there are only {len(tasks)}")
        return share

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


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


@contextmanager
def comparing_sweeps() -> Iterator[None]:
    """When a multirun that begins inside ends, well or with failed jobs, put what its jobs found side by side."""
    with noting_sweeps() as folders:
        try:
            yield
        except Exception:
            _compare(folders)
            raise
        _compare(folders)


def _compare(folders: list[Path]) -> None:
    for folder in folders:
        from prefs.job import FILE as JOB
        from prefs.job import read_job

        try:
            if all(read_job(path.parent).is_shard for path in folder.glob(f"*/{JOB}")):
                continue  # nothing began, and the error says why; or nothing but shards, which say what to do next
            from prefs.compare import compare

            compare([folder])
        except UserError as error:
            log.error("No comparison: %s", error)


def swept(folder: Path) -> dict[str, tuple[str, ...]]:
    """What a multirun sweeps over: the values of each key that has several, as on the command line.

    Empty where the folder is not Hydra's own sweeper's, or its file is damaged, and so there is no telling.
    """
    return {key: values for key, values in (_values(folder) or {}).items() if len(values) > 1}


def job_count(folder: Path) -> int | None:
    """How many jobs a multirun comes to; None where there is no telling."""
    values = _values(folder)
    return None if values is None else math.prod(len(several) for several in values.values())


def command(folder: Path) -> str | None:
    """The command line of a multirun; None where there is no telling."""
    config = _load(folder)
    if config is None:
        return None
    words = [*(OmegaConf.select(config, "hydra.overrides.hydra") or []), *_task(config)]
    return shlex.join(["python", "-m", "prefs.run", "-m", *(word for word in words if word != "hydra.mode=MULTIRUN")])


def name_suffix(overrides: list[str], sweep: Mapping[str, tuple[str, ...]]) -> str:
    """What tells a job from the others of its sweep, beyond model and template: ``-completer.seed=1``."""
    keys = [key for key in sweep if key.lstrip("+") not in NAMED]
    return "".join(f"-{override.lstrip('+')}" for override in overrides if override.partition("=")[0] in keys)


def sweep_name(folder: Path, experiment: str | None) -> str:
    """A multirun's name, which its W&B runs have for a group: ``template_comparison 2026-11-24/04-27-26``."""
    when = "/".join(folder.parts[-2:])
    return f"{experiment} {when}" if experiment else when


def job_gpus(config: DictConfig) -> int:
    """How many GPUs a job needs at least: those of its largest model. All its models share them."""

    def needed(model: DictConfig | None) -> int:
        if model is None or model.backend == "openai":
            return 0
        if model.gpus is not None:
            return model.gpus
        if model.backend == "vllm":
            return model.vllm.tensor_parallel_size * model.vllm.data_parallel_size
        return 0 if model.device in ("cpu", "mps") else 1

    return max(needed(OmegaConf.select(config, role)) for role in ROLES)


def sweep_gpus(master: DictConfig) -> int:
    """The same for a whole sweep, whose launcher gives all jobs alike: the most that any of its jobs needs.

    `master` is the sweep's own config, as Hydra composes it before it has any job.
    """
    loader = GlobalHydra.instance().config_loader()
    jobs = chain.from_iterable(BasicSweeper.split_arguments(_overrides(master, loader), None))
    return max(job_gpus(loader.load_sweep_config(master, job)) for job in jobs)


def _load(folder: Path) -> DictConfig | None:
    try:
        config = OmegaConf.load(folder / FILE)
        return config if isinstance(config, DictConfig) and _task(config) is not None else None
    except (OSError, ValueError, TypeError, YAMLError, OmegaConfBaseException):
        return None


def _task(config: DictConfig) -> list[str]:
    return list(OmegaConf.select(config, "hydra.overrides.task") or [])


def _overrides(config: DictConfig, loader: ConfigLoader) -> list[Override]:
    """The overrides of a multirun, one a key: of its sweeper's config, and of the command line, which counts."""
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    given = [f"{key}={value}" for key, value in params.items()] + _task(config)
    by_key = {
        override.get_key_element(): override for override in OverridesParser.create(loader).parse_overrides(given)
    }
    return list(by_key.values())


def _values(folder: Path) -> dict[str, tuple[str, ...]] | None:
    """The values of each key that is overridden, as Hydra's own sweeper enumerates them; None of any other's."""
    config = _load(folder)
    if config is None or OmegaConf.select(config, "hydra.sweeper._target_") != BASIC_SWEEPER:
        return None
    path = ConfigSearchPathImpl()  # a glob over a group's options is looked up in the folders that the multirun had
    for source in OmegaConf.select(config, "hydra.runtime.config_sources") or []:
        if source.path:
            path.append(source.provider, f"{source.schema}://{source.path}")
    try:
        return {
            override.get_key_element(): tuple(override.sweep_string_iterator())
            if override.is_sweep_override()
            else ("",)
            for override in _overrides(config, ConfigLoaderImpl(path))
        }
    except (HydraException, ValueError):
        return None
