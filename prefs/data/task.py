"""Tasks: the embedded data set, the user's own JSONL or CSV, and (in `hub`) data sets of the hub."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from prefs.config import DatasetConfig
from prefs.errors import ConfigError, UserError

log = logging.getLogger(__name__)

NO_ORIGIN = "USER"
ALL = "ALL"


@dataclass(frozen=True)
class Task:
    """One user prompt."""

    id: str
    prompt: str
    origin: str = NO_ORIGIN
    topic: str | None = None


def load_tasks(dataset: DatasetConfig) -> list[Task]:
    """The tasks of a data set, in its order, restricted by ``origins`` and ``limit``. Near-duplicates are told.

    Raises
    ------
    UserError
        If a row of a file is malformed, empty or a duplicate (named by file and line), a data set of the hub cannot be
        opened, or nothing is left.
    ConfigError
        If an origin is not in the data set.
    """
    if dataset.kind == "hub":
        from prefs.data.hub import hub_tasks

        tasks = hub_tasks(dataset)
    else:
        tasks = _own_tasks(dataset)
    same = same_tasks([task.id for task in tasks], [task.prompt for task in tasks])
    if twins := [(task, first) for task, first in zip(tasks, same, strict=True) if task.id != first]:
        task, first = twins[0]
        log.warning(
            "%d of %d tasks have the prompt of another, but for case or blanks (%s and %s: %s): all are kept, and held"
            " out together",
            len(twins),
            len(tasks),
            first,
            task.id,
            _short(task.prompt),
        )
    return tasks


def same_tasks(ids: Sequence[str], prompts: Sequence[str]) -> list[str]:
    """Of each task, the smallest id among those with its prompt, but for case, blanks, and forms of a character (NFKC).

    Such tasks are one, where some are trained on and others held out.
    """
    plain = [" ".join(unicodedata.normalize("NFKC", prompt).casefold().split()) for prompt in prompts]
    first: dict[str, str] = {}
    for task, prompt in sorted(zip(ids, plain, strict=True)):
        first.setdefault(prompt, task)
    return [first[prompt] for prompt in plain]


def _own_tasks(dataset: DatasetConfig) -> list[Task]:
    """Those that ship, or of the user's file."""
    if dataset.kind == "mini":
        path = Path(str(files("prefs") / "data" / "mini.jsonl"))
    else:
        path = Path(dataset.path or "").expanduser()
    tasks = read_tasks(path)
    if dataset.origins is not None:
        known = sorted({task.origin for task in tasks})
        for origin in dataset.origins:
            if origin not in known:
                raise ConfigError("dataset.origins", origin, known)
        tasks = [task for task in tasks if task.origin in dataset.origins]
    if dataset.limit is not None:
        tasks = _draw(tasks, dataset.limit, dataset.seed)
    if not tasks:
        raise UserError(f"{path}: no tasks; give at least one row with a `prompt`")
    return tasks


def read_tasks(path: Path) -> list[Task]:
    """Read and check a JSONL or CSV file, one task a row.

    Raises
    ------
    UserError
        Naming the file and line of the first row that is malformed, empty or a duplicate.
    """
    readers = {".jsonl": _jsonl_rows, ".json": _jsonl_rows, ".csv": _csv_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: unknown kind of file {path.suffix!r}; use .jsonl or .csv")
    tasks: list[Task] = []
    lines_of_ids: dict[str, int] = {}
    lines_of_prompts: dict[str, int] = {}
    for line, row in reader(path):
        task = _task(path, line, row)
        for seen, key, what in ((lines_of_ids, task.id, "id"), (lines_of_prompts, task.prompt, "prompt")):
            if key in seen:
                raise UserError(f"{path}:{line}: the same {what} as line {seen[key]}: {_short(key)}")
            seen[key] = line
        tasks.append(task)
    return tasks


def _task(path: Path, line: int, row: Mapping[str, object]) -> Task:
    def text(name: str) -> str | None:
        value = row.get(name)
        if value is None or value == "":
            return None
        if isinstance(value, int) and not isinstance(value, bool) and name == "id":
            return str(value)
        if not isinstance(value, str):
            raise UserError(f"{path}:{line}: `{name}` is {type(value).__name__}, not text")
        if not is_unicode(value):
            raise UserError(f"{path}:{line}: `{name}` holds half a surrogate pair, which is no text")
        return value

    unknown = sorted(set(row) - {"id", "prompt", "origin", "topic"})
    if "prompt" not in row:
        raise UserError(f"{path}:{line}: no `prompt`; the row has {', '.join(unknown) or 'nothing'}")
    prompt = text("prompt")
    if prompt is None or not prompt.strip():
        raise UserError(f"{path}:{line}: the `prompt` is empty")
    if text("origin") == ALL:
        raise UserError(f"{path}:{line}: the origin {ALL} is kept for the totals; give it another name")
    return Task(text("id") or id_of_prompt(prompt), prompt, text("origin") or NO_ORIGIN, text("topic"))


def id_of_prompt(prompt: str) -> str:
    """What names a task that has no id: stable when rows are put in another order."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:12]


def is_unicode(text: str) -> bool:
    """Whether a text has no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    for line, text in enumerate(_lines(path), start=1):
        if not text.strip():
            raise UserError(f"{path}:{line}: an empty line")
        try:
            row = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{path}:{line}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{line}: a JSON {type(row).__name__}, not an object with a `prompt`")
        yield line, row


def _csv_rows(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(_lines(path), strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for values in reader:
            if header is None:
                header = [name.strip() for name in values]
                if "prompt" not in header:
                    raise UserError(f"{path}:{line}: no column `prompt`; the header has {', '.join(header)}")
            elif not any(value.strip() for value in values):
                raise UserError(f"{path}:{line}: an empty row")
            elif len(values) != len(header):
                raise UserError(f"{path}:{line}: {len(values)} values under {len(header)} columns")
            else:
                yield line, dict(zip(header, values, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{line}: not CSV ({error})") from None


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            for line, raw in enumerate(file, start=1):
                try:
                    yield raw.decode("utf-8-sig" if line == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    reason = f"{error.reason} at byte {error.start}"
                    raise UserError(f"{path}:{line}: not UTF-8 ({reason})") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _draw(tasks: list[Task], limit: int, seed: int) -> list[Task]:
    """Keep `limit` tasks, as evenly over origins as they allow, drawn by `seed`, in the order of the file."""
    turns: Counter[str] = Counter()
    ranked = []
    for index in np.random.default_rng(seed).permutation(len(tasks)):
        turns[tasks[index].origin] += 1
        ranked.append((turns[tasks[index].origin], int(index)))
    kept = {index for _, index in sorted(ranked, key=lambda pair: pair[0])[:limit]}
    return [task for index, task in enumerate(tasks) if index in kept]


def _short(text: str, limit: int = 60) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= limit else text[:limit] + "…")
