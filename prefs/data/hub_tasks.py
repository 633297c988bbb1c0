"""Tasks from the data sets that researchers use: drawn by seed from rows that stay on disk, until there are enough."""

from __future__ import annotations

import hashlib
import logging
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import xxhash

from prefs.config import DatasetConfig, RowReader, SourceConfig
from prefs.data.hub import open_source
from prefs.data.task import ALL, Task
from prefs.errors import ConfigError, UserError
from prefs.progress import progress

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger("prefs")
T = TypeVar("T")

ROWS_AT_ONCE = 64  # few enough that a batch of huge rows fits in memory


class Skip(Exception):
    """A row that cannot be a task, and the reason under which it is counted."""


def hub_tasks(dataset: DatasetConfig) -> list[Task]:
    """Tasks drawn evenly over origins by ``seed``, in the order of the sources and of their rows.

    A larger ``limit`` adds tasks to those of a smaller one. Rows are read in the order of the draw, and only as many as
    it takes. Of rows with the same prompt, but for case, blanks and Unicode forms, the one drawn first is kept.

    Raises
    ------
    UserError
        If a source cannot be opened or none of its rows can be a task.
    ConfigError
        If an origin is not in the data set.
    """
    known = sorted({source.origin for source in dataset.sources.values()})
    for key, source in dataset.sources.items():
        if source.origin == ALL:
            raise ConfigError(f"dataset.sources.{key}.origin", ALL, "another name; this one is kept for the totals")
    for origin in dataset.origins or []:
        if origin not in known:
            raise ConfigError("dataset.origins", origin, known)
    seen = Seen()
    draws = [
        Draw(place, name, source, open_source(name, source, columns_of(source)), dataset.seed, seen)
        for place, (name, source) in enumerate(dataset.sources.items())
        if dataset.origins is None or source.origin in dataset.origins
    ]
    origins = sorted({draw.source.origin for draw in draws})
    order = np.random.default_rng(dataset.seed).permutation(len(origins))
    streams = [in_turn([iter(draw) for draw in draws if draw.source.origin == origins[at]]) for at in order]
    rows = sum(len(draw.rows) for draw in draws)
    drawn = []
    with progress("Reading tasks", min(rows, dataset.limit or rows)) as advance:
        for each in islice(in_turn(streams), dataset.limit):
            drawn.append(each)
            advance(1)
    for draw in draws:
        log.info("%s", draw)
    return [task for _, task in sorted(drawn, key=lambda each: each[0])]


def columns_of(source: SourceConfig) -> list[str]:
    """The columns that a source's tasks are made of, each once."""
    named = [*source.prompt, source.id, source.topic, *source.only]
    return list(dict.fromkeys(name for name in named if name is not None))


@dataclass
class Seen:
    """Prompts (as 16-byte digests) and ids that a task already has, over all sources."""

    prompts: set[bytes] = field(default_factory=set)
    ids: set[str] = field(default_factory=set)

    def add(self, task: Task) -> None:
        """Note a task.

        Raises
        ------
        Skip
            If its prompt or its id was seen before.
        """
        same = " ".join(unicodedata.normalize("NFKC", task.prompt).casefold().split())
        digest = xxhash.xxh3_128_digest(same.encode())
        if digest in self.prompts:
            raise Skip("with a prompt seen before")
        if task.id in self.ids:
            raise Skip("with an id seen before")
        self.prompts.add(digest)
        self.ids.add(task.id)


@dataclass
class Draw:
    """One source's rows in the order of its draw. Iterating gives ((place, row), task), and counts what it skips."""

    place: int
    name: str
    source: SourceConfig
    rows: Dataset
    seed: int
    seen: Seen
    read: int = 0
    tasks: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def __iter__(self) -> Iterator[tuple[tuple[int, int], Task]]:
        order = np.random.default_rng(self.seed).permutation(len(self.rows))
        for start in range(0, len(order), ROWS_AT_ONCE):
            batch = order[start : start + ROWS_AT_ONCE].tolist()
            for index, row in zip(batch, rows_at(self.rows, batch), strict=True):
                self.read += 1
                try:
                    task = task_of(row, self.source)
                    self.seen.add(task)
                except Skip as reason:
                    self.skipped[str(reason)] += 1
                    continue
                self.tasks += 1
                yield (self.place, index), task
        if not self.tasks:
            raise UserError(f"no row of {self.source.path} can be a task; {self}")

    def __str__(self) -> str:
        line = f"{self.name}: {self.tasks:,} tasks of {self.read:,} rows read"
        if self.skipped:
            line += "; skipped " + ", ".join(f"{count:,} {reason}" for reason, count in self.skipped.most_common())
        return line


def in_turn(streams: list[Iterator[T]]) -> Iterator[T]:
    """One from each stream, again and again, leaving out those that have ended."""
    while streams:
        going = []
        for stream in streams:
            for item in islice(stream, 1):
                yield item
                going.append(stream)
        streams = going


def rows_at(rows: Dataset, indices: list[int]) -> list[Mapping[str, Any] | None]:
    """Rows by index; None for one whose bytes are no text."""
    try:
        table = rows[indices]
    except UnicodeDecodeError:
        return [None] if len(indices) == 1 else [row for index in indices for row in rows_at(rows, [index])]
    return [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]


def task_of(row: Mapping[str, Any] | None, source: SourceConfig) -> Task:
    """The task of a row.

    Raises
    ------
    Skip
        If the row cannot be one.
    """
    if row is None:
        raise Skip("not UTF-8")
    for column, wanted in source.only.items():
        if row[column] != wanted:
            raise Skip(f"with another {column} than {wanted}")
    values = [_first_user_turn(row[source.prompt[0]])] if source.reader is RowReader.conversation else None
    prompt = _joined(values or [row[column] for column in source.prompt])
    if source.max_chars is not None and len(prompt) > source.max_chars:
        raise Skip(f"longer than {source.max_chars:,} characters")
    # Without an id, the prompt names the task: stable under reordering the rows.
    own_id = _label(row[source.id]) if source.id else None
    task_id = own_id or hashlib.sha256(prompt.encode()).hexdigest()[:12]
    topic = _label(row[source.topic]) if source.topic else None
    return Task(f"{source.origin.lower()}-{task_id}", prompt, source.origin, topic)


def _first_user_turn(conversation: Any) -> Any:
    if conversation is None:
        return None
    if not isinstance(conversation, list):
        raise Skip("not a conversation")
    for turn in conversation:
        if isinstance(turn, dict) and turn.get("role") == "user":
            return turn.get("content")
    raise Skip("without a user turn")


def _joined(values: list[Any]) -> str:
    """The first text, which must be there, and those of the others that are."""
    for value in values:
        if value is not None and not isinstance(value, str):
            raise Skip("not text")
        if value is not None and not _is_unicode(value):
            raise Skip("with half a surrogate pair")
    first, *others = [value or "" for value in values]
    if not first.strip():
        raise Skip("empty")
    return "\n\n".join([first, *(other for other in others if other.strip())])


def _label(value: Any) -> str | None:
    """An id or topic; None where there is none that could be one."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) and value.strip() and _is_unicode(value) else None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
