"""How a program of ours ends on what its user can mend: one line, and exit code 2."""

from __future__ import annotations

import difflib
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from prefs.config import CONF, missing_value
from prefs.errors import ConfigError, UserError


@contextmanager
def one_line_errors(*, enabled: bool, interrupted: str) -> Iterator[None]:
    """Turn what the user can mend into one line and exit code 2; other errors keep their traceback.

    ``interrupted`` is what to say of a run that the user breaks off.
    """
    try:
        yield
    except Exception as error:
        line = _mendable(error) if enabled else None
        if line is None:
            raise
        sys.stderr.write(f"prefs: {line}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write(f"prefs: interrupted; {interrupted}\n")
        sys.exit(130)


def _mendable(error: Exception) -> str | None:
    """One line for what the user can mend."""
    if isinstance(error, UserError | HydraException | OmegaConfBaseException):
        return explain(error)
    if isinstance(error, AssertionError | AttributeError) and _within_omegaconf(error):
        return (
            "an override goes into a part of the config that is null; choose that part first"
            " (completer=smollm2 completer.model.name=mine, say)"
        )
    return _of_launcher(error)


def _of_launcher(error: Exception) -> str | None:
    """One line where a launcher of Hydra is not installed, finds no cluster, or has its jobs refused by it."""
    said = str(error)
    if unknown := re.match(r"Unknown plugin class : 'hydra_plugins\.hydra_(ray|submitit)_launcher\.", said):
        extra = {"ray": "ray", "submitit": "slurm"}[unknown[1]]
        return f"hydra/launcher={extra} is not installed: pip install -e '.[{extra}]' in the checkout"
    if said.startswith('Could not detect "srun"'):
        return "hydra/launcher=slurm: there are no sbatch and srun here; give the command where Slurm's are"
    # submitit's, which is not imported for this; of a job that failed it has a message of another kind.
    if type(error).__name__ == "FailedJobError" and (refused := re.findall(r"^sbatch: \w+: (.*)", said, re.MULTILINE)):
        return f"hydra/launcher=slurm: sbatch did not take the jobs: {_one_line('; '.join(refused))}"
    return None


def _within_omegaconf(error: Exception) -> bool:
    """Whether an error came up inside OmegaConf, which has no exception of its own for a key below a null."""
    innermost = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
    return str(innermost.f_globals.get("__name__", "")).startswith("omegaconf")


def explain(error: Exception) -> str:
    """One line for an error of Hydra or OmegaConf: the key, what it got and what is allowed."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return str(ConfigError(group, option, sorted(error.options)))
    if isinstance(error, MissingConfigException) and "/" in (missing := str(error.missing_cfg_file or "")):
        # Hydra gives no options where several can be chosen at once (template=[a,b]).
        group, _, option = missing.rpartition("/")
        shipped = ", ".join(_shipped(group))
        return str(ConfigError(group, option, f"{shipped}, or a file of your own (--config-dir)"))
    needed = re.search(r"Missing mandatory value: (\S+)", str(error))
    if needed:
        return str(missing_value(needed[1]))
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.full_key:
        return _unknown_key(cause)
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        return f"{cause.full_key}: {_one_line(str(cause.msg or cause).splitlines()[0])}"
    return _one_line(str(error))


def _shipped(group: str) -> list[str]:
    folder = CONF / group
    return sorted(path.name.removesuffix(".yaml") for path in folder.iterdir()) if folder.is_dir() else []


def _unknown_key(error: OmegaConfBaseException) -> str:
    beside = error.parent_node  # of a part of the config that has no class, such as Hydra's launchers
    keys = getattr(error.object_type, "__dataclass_fields__", beside if isinstance(beside, DictConfig) else {})
    known = sorted(str(key) for key in keys)
    key = str(error.full_key)
    line = f"{key}: there is no such key"
    close = difflib.get_close_matches(key.rpartition(".")[2], known, n=1)
    line += f"; did you mean {close[0]!r}?" if close else "." if known else ""
    return line + (f" Known here: {', '.join(known)}" if known else "")


def _one_line(text: str) -> str:
    return " ".join(text.split())
