"""Each run has a folder of its own, and each sweep: it is claimed before Hydra writes there.

Imported while Hydra composes a config, so nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from prefs.errors import ConfigError, UserError, one_line_errors

# How the folder of a run, and of a sweep, is named that the user has given no name.
BY_THE_SECOND = "${now:%Y-%m-%d}/${now:%H-%M-%S}"

_locks: ContextVar[ExitStack | None] = ContextVar("locks of the folders claimed", default=None)


@contextmanager
def claiming_folders() -> Iterator[None]:
    """Until this ends, no other process may claim the folders that are claimed inside."""
    with ExitStack() as locks:
        token = _locks.set(locks)
        try:
            yield
        finally:
            _locks.reset(token)


class ClaimFolder(Callback):
    """Hydra's callback before a run, and before a sweep."""

    def __init__(self, run: str = "hydra.run.dir") -> None:
        self.run = run

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        _claim(config, self.run)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        key = "hydra.sweep.dir"
        if (folder := _claim(config, key)) is not None:
            # Each job composes its config anew, from these.
            quoted = str(folder).replace("\\", "\\\\").replace("'", "\\'")
            config.hydra.overrides.hydra.append(f"{key}='{quoted}'")


def _claim(config: DictConfig, key: str) -> Path | None:
    """Make and lock the folder that a key of the config names; another one, which is returned, if it is named by the
    second and there is one from the same second."""
    # Hydra only warns of an error in a callback; of the end of the program it does not.
    with one_line_errors(enabled=True, interrupted="nothing was begun"):
        folder = named = Path(str(OmegaConf.select(config, key)))
        try:
            if _written(config, key).endswith(BY_THE_SECOND):
                folder = new_folder(named)
            else:
                folder.mkdir(parents=True, exist_ok=True)
            _lock(folder, key)
        except OSError as error:
            raise UserError(f"{key}: cannot write to {folder}: {error.strerror or error}") from None
    if folder == named:
        return None
    OmegaConf.update(config, key, str(folder))
    return folder


def _written(config: DictConfig, key: str) -> str:
    """A value as the config has it, interpolations and all."""
    above, _, name = key.rpartition(".")
    return str(OmegaConf.to_container(OmegaConf.select(config, above) if above else config, resolve=False)[name])  # type: ignore[index, call-overload]


def new_folder(named: Path) -> Path:
    """Make a folder of this name, or of the first of name-2, name-3, ... that nobody has.

    Raises
    ------
    OSError
        If it cannot be made.
    """
    folder = named
    for number in count(2):
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            folder = named.with_name(f"{named.name}-{number}")
        else:
            return folder
    raise AssertionError


def _lock(folder: Path, key: str) -> None:
    locks = _locks.get()
    if locks is None:
        return
    try:
        # Of the system, and so gone with the process, however it ends.
        locks.enter_context(FileLock(folder / ".lock", timeout=0, fallback_to_soft=False))
        locks.callback((folder / ".lock").unlink, missing_ok=True)
    except Timeout:
        raise ConfigError(key, str(folder), "a folder that no other run is writing to") from None
    except OSError:  # a file system without locks
        return
