"""The entry point: ``python -m prefs.run``. The only place that knows Hydra and composes the stages."""

from __future__ import annotations

import gc
import logging
import os
import re
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prefs.config import CONF, register, typed, with_prompts
from prefs.errors import UserError
from prefs.job import FILE as JOB
from prefs.job import JobCounts, read_job, recorded
from prefs.one_line_errors import explain, one_line_errors
from prefs.resources import sweep_gpus
from prefs.sweep import name_suffix, noting_sweeps, sweep_name, swept

if TYPE_CHECKING:
    from prefs.models.loading import Models

log = logging.getLogger("prefs")

INTERRUPTED = "what was computed is in the store; the same command goes on from there"


def main() -> None:
    """Run the job, or the jobs of a sweep; what the user can mend ends in one line and exit code 2."""
    register()
    register_resolvers()
    # Launchers' plugins bring configs of their own, which ours of the same names take the place of.
    warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")
    # Hydra prints errors in its own way unless this is set; then they come up to here.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with one_line_errors(enabled=not wants_traceback, interrupted=INTERRUPTED), _compared():
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(_job(wants_traceback))()


@contextmanager
def _compared() -> Iterator[None]:
    """When a multirun ends, well or with failed jobs, put what its jobs found side by side."""
    with noting_sweeps() as folders:
        try:
            yield
        except Exception:
            _compare(folders)
            raise
        _compare(folders)


def _compare(folders: list[Path]) -> None:
    for folder in folders:
        try:
            if all(read_job(path.parent).is_shard for path in folder.glob(f"*/{JOB}")):
                continue  # nothing began, and the error says why; or nothing but shards, which say what to do next
            from prefs.compare import compare

            compare([folder])
        except UserError as error:
            log.error("No comparison: %s", error)


@contextmanager
def _named_failure() -> Iterator[None]:
    """In a sweep, say which job failed before Hydra goes on with the others: at the end it tells of one only."""
    try:
        yield
    except (UserError, HydraException, OmegaConfBaseException) as error:
        log.error("Job %s failed: %s", " ".join(HydraConfig.get().overrides.task), explain(error))
        raise
    except Exception:
        log.exception("Job %s failed", " ".join(HydraConfig.get().overrides.task))
        raise


def register_resolvers() -> None:
    """Make known what configs call.

    ``${prefs.basename:PATH}`` is the last part of a path, less a data file's ending. ``${prefs.gpus:NONE}`` is how many
    GPUs each job of a sweep gets, and NONE where none needs any.
    """

    def gpus(none: Any, *, _root_: DictConfig) -> Any:
        return sweep_gpus(_root_) or none

    def basename(path: str) -> str:
        return re.sub(r"\.(jsonl?|csv)$", "", Path(str(path)).name)

    OmegaConf.register_new_resolver("prefs.basename", basename, replace=True)
    OmegaConf.register_new_resolver("prefs.gpus", gpus, replace=True)


def _job(wants_traceback: bool) -> Callable[[DictConfig], None]:
    """The task function that Hydra calls once a job. Models stay loaded from one job of a sweep to the next."""
    loaded: list[Models] = []

    def job(cfg: DictConfig) -> None:
        # Again, where a launcher runs the job in a process of its own.
        register_resolvers()
        # Read when torch is loaded, later: threads that wait sleep instead of spinning, which costs a lone job nothing
        # and makes two on the same cores finish in two thirds of the time.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        sweep = HydraConfig.get().mode is RunMode.MULTIRUN
        with _named_failure() if sweep else one_line_errors(enabled=not wants_traceback, interrupted=INTERRUPTED):
            hydra_config, plain = HydraConfig.get(), _plain(cfg)
            if not hydra_config.job.chdir:
                _enter(hydra_config.runtime.cwd)
            folder, overrides = Path(hydra_config.runtime.output_dir), list(hydra_config.overrides.task)
            group, suffix = None, ""
            if sweep:
                sweep_folder = Path(hydra_config.sweep.dir)
                group = sweep_name(sweep_folder, hydra_config.runtime.choices.get("experiment"))
                suffix = name_suffix(overrides, swept(sweep_folder))
            planning = plain.get("plan") is True  # of which nothing stays
            with nullcontext(JobCounts()) if planning else recorded(folder, plain, overrides, group) as counts:
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


def _enter(folder: str) -> None:
    """Be where the command was given, which a launcher's worker need not be: paths in a config can be relative."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise UserError(
            f"{socket.gethostname()} cannot enter the folder of the command, {folder}: {error.strerror}; "
            "the hosts of a sweep need to share it"
        ) from None


def _plain(cfg: DictConfig) -> dict[str, object]:
    try:
        container = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    except OmegaConfBaseException:  # a value is missing; the check that follows says which
        container = OmegaConf.to_container(cfg, resolve=False, enum_to_str=True)
    assert isinstance(container, dict)
    return with_prompts({str(key): value for key, value in container.items()})


if __name__ == "__main__":
    main()
