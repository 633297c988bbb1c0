"""What a user can mend: the errors that say it in one line, and how a program ends on them, with exit code 2."""

from __future__ import annotations

import difflib
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException


class UserError(Exception):
    """Something the user can mend. Printed as one line, without a traceback; the program exits with code 2."""

    def __str__(self) -> str:
        return _one_line(super().__str__())


class ConfigError(UserError):
    """A config value that cannot be right: names the key, what it got and what is allowed."""

    def __init__(self, key: str, got: object, allowed: str | Iterable[object]) -> None:
        if not isinstance(allowed, str):
            allowed = "one of " + ", ".join(str(choice) for choice in allowed)
        super().__init__(f"{key}: got {got!r}; allowed: {allowed}")
        self.key = key


def missing_value(key: str) -> ConfigError:
    return ConfigError(key, "???", "a value; this one has no default, so give it on the command line")


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line: its first, and what a heading stands over."""
    text = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = " ".join(text[:2]) if text[0].endswith(":") else text[0]
    return f"{type(error).__name__}: {line}" if isinstance(error, LookupError) else line


@contextmanager
def explained(failed: str) -> Iterator[None]:
    """Turn what a library raises into one line that begins with what failed. Only its code on the user's files may run
    inside: errors of our own are to keep their traceback."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{failed}: {first_line(error)}") from error


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
    if isinstance(error, UserError | HydraException | OmegaConfBaseException):
        return explain(error)
    innermost = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
    within_omegaconf = str(innermost.f_globals.get("__name__", "")).startswith("omegaconf")
    if isinstance(error, AssertionError | AttributeError) and within_omegaconf:  # it has no exception of its own
        return (
            "an override goes into a part of the config that is null; choose that part first"
            " (completer=smollm2 completer.model.name=mine, say)"
        )
    # A launcher of Hydra that is not installed, finds no cluster, or has its jobs refused by it.
    text = str(error)
    if unknown := re.match(r"Unknown plugin class : 'hydra_plugins\.hydra_(ray|submitit)_launcher\.", text):
        extra = {"ray": "ray", "submitit": "slurm"}[unknown[1]]
        return f"hydra/launcher={extra} is not installed: pip install -e '.[{extra}]' in the checkout"
    if text.startswith('Could not detect "srun"'):
        return "hydra/launcher=slurm: there are no sbatch and srun here; give the command where Slurm's are"
    # submitit's, which is not imported for this; of a job that failed it has a message of another kind.
    if type(error).__name__ == "FailedJobError" and (refused := re.findall(r"^sbatch: \w+: (.*)", text, re.MULTILINE)):
        return f"hydra/launcher=slurm: sbatch did not take the jobs: {_one_line('; '.join(refused))}"
    return None


def explain(error: Exception) -> str:
    """One line for an error of ours, of Hydra or of OmegaConf: the key, what it got and what is allowed."""
    if isinstance(error, MissingConfigException) and "/" in (missing := error.missing_cfg_file or ""):
        group, _, option = missing.rpartition("/")
        if error.options:
            return str(ConfigError(group, option, sorted(error.options)))
        # Hydra gives no options where several can be chosen at once (template=[a,b]), but says where it looked.
        folders = [Path(folder) / group for folder in re.findall(r"path=file://(.+)$", str(error), re.MULTILINE)]
        known = ", ".join(sorted({path.stem for folder in folders for path in folder.glob("*.yaml")}))
        return str(ConfigError(group, option, f"{known}, or a file of your own (--config-dir)"))
    if needed := re.search(r"Missing mandatory value: (\S+)", str(error)):
        return str(missing_value(needed[1]))
    below = (error.__cause__, error.__context__)
    cause = next((other for other in below if isinstance(other, OmegaConfBaseException)), error)
    file = re.match(r"In '(.+?)': ", str(error))  # of the user's; what an override says has none
    where = f"{file[1]}.yaml: " if file else ""
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.full_key:
        return where + _unknown_key(cause)
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        return f"{where}{cause.full_key}: {_one_line(str(cause.msg or cause).splitlines()[0])}"
    return _one_line(str(error))


def _unknown_key(error: OmegaConfBaseException) -> str:
    part = error.parent_node  # the part of the config that has no such key
    schema = getattr(error.object_type, "__dataclass_fields__", None)
    if schema is None and isinstance(part, DictConfig) and part._metadata.element_type is Any and not part:
        return f"{error.full_key}: there is no such key yet; to add it, write +{error.full_key}=..."
    keys = schema or (part if isinstance(part, DictConfig) else {})
    whole = part._get_root() if part is not None else None
    return unknown_key(str(error.full_key), map(str, keys), dotted(whole))


def unknown_key(key: str, known: Iterable[str], elsewhere: Iterable[str] = ()) -> str:
    """One line for a key that nothing reads, with the nearest one that something does.

    `known` are the names beside it, `elsewhere` the whole config's keys.
    """
    name, known = key.rpartition(".")[2], sorted(set(known) - {"_target_"})
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    near = near or [other for other in elsewhere if other.rpartition(".")[2] == name and other != key]
    near = near or difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    return f"{key}: there is no such key{hint}" + (f" Known here: {', '.join(known)}" if known else "")


def dotted(part: object, prefix: str = "") -> Iterator[str]:
    """All keys of a config, as an override names them."""
    for name, value in part.items_ex(resolve=False) if isinstance(part, DictConfig) else ():
        yield f"{prefix}{name}"
        if isinstance(value, DictConfig) and not (value._is_none() or value._is_missing()):
            yield from dotted(value, f"{prefix}{name}.")


def _one_line(text: str) -> str:
    return " ".join(text.split())
