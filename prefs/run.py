"""The entry point: ``python -m prefs.run``. The only place that knows Hydra and composes the stages."""

from __future__ import annotations

import gc
import logging
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prefs.config import CONF, register, typed, with_options, with_prompts
from prefs.config.folders import claiming_folders
from prefs.config.keys import check_hydra_keys
from prefs.config.words import check_words
from prefs.errors import UserError, explain, one_line_errors
from prefs.job import JobCounts, recorded
from prefs.sweep import comparing_sweeps, name_suffix, sweep_name, swept

if TYPE_CHECKING:
    from prefs.models.loading import Models

log = logging.getLogger("prefs")

INTERRUPTED = "what was computed is in the store; the same command goes on from there"


def main() -> None:
    """Run the job, or the jobs of a sweep; what the user can mend ends in one line and exit code 2."""
    register()
    # Launchers' plugins bring configs of their own, which ours of the same names take the place of.
    warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")
    # Hydra prints errors in its own way unless this is set; then they come up to here.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with one_line_errors(enabled=not wants_traceback, interrupted=INTERRUPTED), claiming_folders(), comparing_sweeps():
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(_job(wants_traceback))()


def _job(wants_traceback: bool) -> Callable[[DictConfig], None]:
    """The task function that Hydra calls once a job. Models stay loaded from one job of a sweep to the next."""
    loaded: list[Models] = []

    def job(cfg: DictConfig) -> None:
        # Again, where a launcher runs the job in a process of its own.
        register()
        # Read when torch is loaded, later: threads that wait sleep instead of spinning, which costs a lone job nothing
        # and makes two on the same cores finish in two thirds of the time.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        sweep = HydraConfig.get().mode is RunMode.MULTIRUN
        with _named_failure() if sweep else one_line_errors(enabled=not wants_traceback, interrupted=INTERRUPTED):
            hydra_config, plain = HydraConfig.get(), _plain(cfg)
            check_hydra_keys(hydra_config)  # type: ignore[arg-type]
            if not hydra_config.job.chdir:
                _enter(hydra_config.runtime.cwd)
            folder, overrides = Path(hydra_config.runtime.output_dir), list(hydra_config.overrides.task)
            group, suffix = None, ""
            if sweep:
                sweep_folder = Path(hydra_config.sweep.dir)
                group = sweep_name(sweep_folder, hydra_config.runtime.choices.get("experiment"))
                suffix = name_suffix(overrides, swept(sweep_folder))
            planning = True in (plain.get("plan"), plain.get("why"))  # of which nothing stays
            with nullcontext(JobCounts()) if planning else recorded(folder, plain, overrides, group) as counts:
                check_words(cfg, CONF)
                config = typed(cfg)
                # Imported only now: help, completion and a wrong config should not wait for torch.
                with _uncollected():
                    from prefs.models.loading import Models
                    from prefs.pipeline import RunFolder, run_job

                if not loaded:
                    loaded.append(Models())
                run_job(config, RunFolder(folder, group, suffix), loaded[0], counts, plain_config=plain)

    return job


@contextmanager
def _named_failure() -> Iterator[None]:
    """In a sweep, say which job failed before Hydra goes on with the others: at the end it tells of one only."""
    try:
        yield
    except Exception as error:
        job = " ".join(HydraConfig.get().overrides.task)
        if isinstance(error, UserError | HydraException | OmegaConfBaseException):
            log.error("Job %s failed: %s", job, explain(error))
        else:
            log.exception("Job %s failed", job)
        raise


def _plain(cfg: DictConfig) -> dict[str, object]:
    """The config as it is recorded. What only makes a kind is not: the word `kind` says it."""
    try:
        container = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    except OmegaConfBaseException:  # a value is missing; the check that follows says which
        container = OmegaConf.to_container(cfg, resolve=False, enum_to_str=True)
    assert isinstance(container, dict)
    for group in ("probe", "judge"):
        for key in ("_target_", "binary"):
            (container.get(group) or {}).pop(key, None)
    return with_options(with_prompts({str(key): value for key, value in container.items()}))


def _enter(folder: str) -> None:
    """Be where the command was given, which a launcher's worker need not be: paths in a config can be relative."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise UserError(
            f"{socket.gethostname()} cannot enter the folder of the command, {folder}: {error.strerror}; "
            "the hosts of a sweep need to share it"
        ) from None


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keep the garbage collector from modules being imported, and from looking at them ever after: none is garbage, and
    each time that it looked at all of them would take .2 s."""
    if not gc.isenabled() or gc.get_freeze_count():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


if __name__ == "__main__":
    main()
