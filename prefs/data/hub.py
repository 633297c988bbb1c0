"""Tasks of data sets that the library `datasets` reads, memory-mapped: from the hub, its cache, a folder or a file.

They are drawn by seed from rows that stay on disk, until there are enough. What cannot be opened is one line that says
what to do. A data set pinned to a commit is taken from the cache without asking the hub, so a second run works
anywhere; the library's own offline mode would take the latest commit it has.
"""

from __future__ import annotations

import logging
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlparse

import numpy as np
import xxhash

from prefs.config import DatasetConfig, RowReader, SourceConfig
from prefs.data.task import ALL, Task, id_of_prompt, is_unicode
from prefs.errors import ConfigError, UserError
from prefs.progress import progress

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder

log = logging.getLogger("prefs")
Item = TypeVar("Item")

COMMIT = re.compile(r"[0-9a-f]{40}")
FILES = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
SECONDS = 5.0  # to find out that there is no network
TURN = ("role", "content")
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
    seen: set[bytes | str] = set()
    draws = [
        Draw(number, name, source, open_source(name, source, columns_of(source)), dataset.seed, seen)
        for number, (name, source) in enumerate(dataset.sources.items())
        if dataset.origins is None or source.origin in dataset.origins
    ]
    origins = sorted({draw.source.origin for draw in draws})
    order = np.random.default_rng(dataset.seed).permutation(len(origins))
    streams = [in_turn([draw for draw in draws if draw.source.origin == origins[index]]) for index in order]
    rows = sum(len(draw.rows) for draw in draws)
    drawn = []
    with progress("Reading tasks", min(rows, dataset.limit or rows)) as advance:
        for task in islice(in_turn(streams), dataset.limit):
            drawn.append(task)
            advance(1)
    for draw in draws:
        log.info("%s", draw)
    return [task for _, task in sorted(drawn, key=lambda placed: placed[0])]


def columns_of(source: SourceConfig) -> list[str]:
    """The columns that a source's tasks are made of, each once."""
    named = [*source.prompt, source.id, source.topic, *source.only]
    return list(dict.fromkeys(name for name in named if name is not None))


@dataclass
class Draw:
    """One source's rows in the order of its draw. Iterating gives ((source, row), task), and counts what it skips.

    ``seen`` holds ids and prompts (as 16-byte digests) that a task of any source already has.
    """

    number: int
    name: str
    source: SourceConfig
    rows: Dataset
    seed: int
    seen: set[bytes | str]
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
                    task = self._new(task_of(row, self.source))
                except Skip as reason:
                    self.skipped[str(reason)] += 1
                    continue
                self.tasks += 1
                yield (self.number, index), task
        if not self.tasks:
            raise UserError(f"no row of {self.source.path} can be a task; {self}")

    def _new(self, task: Task) -> Task:
        plain = " ".join(unicodedata.normalize("NFKC", task.prompt).casefold().split())
        digest = xxhash.xxh3_128_digest(plain.encode())
        if digest in self.seen:
            raise Skip("with a prompt seen before")
        if task.id in self.seen:
            raise Skip("with an id seen before")
        self.seen |= {digest, task.id}
        return task

    def __str__(self) -> str:
        line = f"{self.name}: {self.tasks:,} tasks of {self.read:,} rows read"
        if self.skipped:
            line += "; skipped " + ", ".join(f"{count:,} {reason}" for reason, count in self.skipped.most_common())
        return line


def in_turn(streams: Sequence[Iterable[Item]]) -> Iterator[Item]:
    """One from each stream, again and again, leaving out those that have ended (`itertools`' recipe ``roundrobin``)."""
    turns: Iterator[Iterator[Item]] = map(iter, streams)
    for count in range(len(streams), 0, -1):
        turns = cycle(islice(turns, count))
        yield from map(next, turns)


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
    columns = [row[column] for column in source.prompt]
    prompt = _joined(columns if source.reader is RowReader.columns else [_first_user_turn(columns[0])])
    if source.max_chars is not None and len(prompt) > source.max_chars:
        raise Skip(f"longer than {source.max_chars:,} characters")
    task_id = (_label(row[source.id]) if source.id else None) or id_of_prompt(prompt)
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
        if value is not None and not is_unicode(value):
            raise Skip("with half a surrogate pair")
    first, *others = [value or "" for value in values]
    if not first.strip():
        raise Skip("empty")
    return "\n\n".join([first, *(other for other in others if other.strip())])


def _label(value: Any) -> str | None:
    """An id or topic; None where there is none that could be one."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) and value.strip() and is_unicode(value) else None


def open_source(name: str, source: SourceConfig, columns: Sequence[str]) -> Dataset:
    """The rows of a source, those of all its configurations in order, with only these columns.

    Raises
    ------
    UserError
        If it is not there, cannot be reached or read, or lacks a column (names expected and found).
    """
    from datasets import concatenate_datasets

    with _quiet(), _explained(name, source):
        parts = [_open(name, source, config) for config in source.configs or [None]]
        for part in parts:
            _check_columns(name, source, columns, part)
        return concatenate_datasets([part.select_columns(list(columns)) for part in parts])


def _open(name: str, source: SourceConfig, config: str | None) -> Dataset:
    if re.match(r"https?://", source.path):
        return _open_file(urlparse(source.path).path, _downloaded(name, source.path))
    path = Path(source.path).expanduser().resolve()
    if not path.exists():
        return _open_hub(name, source, config)
    if set("*?[]") & set(str(path)):
        raise UserError(f"{name}: `datasets` takes * ? [ ] in {path} for a pattern; give it another name")
    return _open_folder(path, config, source.split) if path.is_dir() else _open_file(path.name, str(path))


def _open_folder(folder: Path, config: str | None, split: str) -> Dataset:
    """A folder as the hub has it, with or without its card, or as `save_to_disk` leaves it."""
    from datasets import Dataset, concatenate_datasets, load_dataset, load_from_disk

    if config is not None and (folder / config).is_dir():
        folder, config = folder / config, None
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        saved = load_from_disk(str(folder))
        if isinstance(saved, Dataset):
            return saved
        missing = [part for part in split.split("+") if part not in saved]
        if missing:
            raise ValueError(f'Unknown split "{missing[0]}". Should be one of {list(saved)}.')
        return concatenate_datasets([saved[part] for part in split.split("+")])
    # A folder may hold a part of what its card counts.
    return load_dataset(str(folder), config, split=split, verification_mode="no_checks")


def _open_file(name: str, path: str) -> Dataset:
    """One file, which is one split whatever its name is."""
    from datasets import load_dataset

    reader = FILES.get(Path(name).suffix.lower())
    if reader is None:
        raise UserError(f"{name}: not a kind of file that can be read; use {', '.join(FILES)}")
    return load_dataset(reader, data_files=path, split="train")


def _downloaded(name: str, url: str) -> str:
    """The file of a URL, in the library's cache of downloads. A URL is taken to be pinned: it is read once."""
    import aiohttp
    from datasets import DownloadConfig, DownloadManager

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=SECONDS, sock_read=4 * SECONDS)
    options = {protocol: {"client_kwargs": {"timeout": timeout}} for protocol in ("http", "https")}
    manager = DownloadManager(download_config=DownloadConfig(use_etag=False, storage_options=options))
    try:
        return str(manager.download(url))
    except (OSError, aiohttp.ClientError) as error:
        cause = error.__cause__ or error  # fsspec says "not found" whatever it was
        if isinstance(cause, aiohttp.ClientResponseError):
            answer = f"{cause.status} {cause.message}"
            raise UserError(f"{name}: {url} cannot be fetched ({answer}); check dataset.sources.{name}.path") from error
        raise _out_of_reach(name, url) from error


def _open_hub(name: str, source: SourceConfig, config: str | None) -> Dataset:
    from datasets import config as settings
    from datasets import load_dataset_builder

    pinned = source.revision is not None and COMMIT.fullmatch(source.revision) is not None
    builder = _cached(source.path, config, source.revision) if pinned else None
    if builder is None and (settings.HF_HUB_OFFLINE or not reachable()):
        latest = _cached(source.path, config, None)
        if latest is None or pinned:
            raise _out_of_reach(name, source.path, source.revision, latest)
        builder = latest
    if builder is None:
        builder = load_dataset_builder(source.path, config, revision=source.revision)
        builder.download_and_prepare()
    if not pinned and config in (None, *source.configs[:1]):  # said once a source
        line = "%s: %s, at revision %s; to keep to it, give dataset.sources.%s.revision=%s"
        log.info(line, name, source.path, builder.hash, name, builder.hash)
    return builder.as_dataset(split=source.split)  # type: ignore[return-value]


def _cached(path: str, config: str | None, revision: str | None) -> DatasetBuilder | None:
    """What the cache of `datasets` has of a hub data set: at this commit, or (None) what came last."""
    from datasets import config as settings
    from datasets.naming import camelcase_to_snakecase
    from datasets.packaged_modules.cache.cache import Cache

    *owner, repository = path.split("/")
    root = Path(settings.HF_DATASETS_CACHE) / "___".join([*owner, camelcase_to_snakecase(repository)])
    folders = [folder for folder in root.glob(f"{config or '*'}/*/{revision or '*'}") if COMMIT.fullmatch(folder.name)]
    if config is None and len({folder.parts[-3] for folder in folders}) > 1:
        folders = [folder for folder in folders if folder.parts[-3] == "default"]
    if not folders:
        return None
    *_, kept_config, version, commit = max(folders, key=lambda folder: folder.stat().st_mtime).parts
    builder = Cache(repo_id=path, dataset_name=repository, config_name=kept_config, version=version, hash=commit)
    builder.download_and_prepare()
    return builder


def reachable() -> bool:
    """Whether the hub answers at all, found out in seconds: the library itself would retry for half a minute."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception:  # which one depends on the HTTP client that the library has
        return False
    return True


def _out_of_reach(name: str, path: str, revision: str | None = None, latest: DatasetBuilder | None = None) -> UserError:
    line = f"{name}: {path} cannot be reached, and the cache of `datasets` does not have it"
    if latest is not None:
        line += f" at {revision} (it has {latest.hash}; dataset.sources.{name}.revision={latest.hash} takes that)"
    return UserError(f"{line}: run once with a network, or give a copy with dataset.sources.{name}.path=FOLDER")


def _check_columns(name: str, source: SourceConfig, columns: Sequence[str], rows: Dataset) -> None:
    from datasets import Json, List, Value

    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise UserError(
            f"{name}: the columns of {source.path} are not as expected: there is no {', '.join(missing)}; "
            f"expected {', '.join(columns)}; found {', '.join(rows.column_names)}; "
            f"dataset.sources.{name} names the columns to use"
        )
    if source.reader is RowReader.conversation:
        column = rows.features[source.prompt[0]]
        turn = column.feature if isinstance(column, List) else column
        if isinstance(turn, dict) and not set(TURN) <= set(turn):
            raise UserError(
                f"{name}: the turns in {source.prompt[0]} of {source.path} are not as expected: "
                f"expected {', '.join(TURN)}; found {', '.join(turn)}"
            )
        # Columns without a value, and those of more than one kind (Json), are judged row by row.
        if not isinstance(column, List | Json) and column != Value("null"):
            raise UserError(f"{name}: {source.prompt[0]} of {source.path} is {column}, not a list of turns")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's notes on caches and requests out of the log, and its bars out of what is no terminal."""
    import datasets

    loggers = [logging.getLogger(name) for name in ("datasets", "httpx", "httpx2", "fsspec")]
    levels = [logger.level for logger in loggers]
    bars = sys.stderr.isatty() or datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    if not bars:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


@contextmanager
def _explained(name: str, source: SourceConfig) -> Iterator[None]:
    """Turn what the library raises over a data set into one line: all that runs inside is its code, on others' data."""
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    key = f"dataset.sources.{name}"
    try:
        yield
    except UserError:
        raise
    except DatasetNotFoundError as error:
        if "gated" in str(error):
            line = "is gated: accept its terms on its page on the hub, and give your token as HF_TOKEN"
        elif str(error).startswith("Revision"):
            line = f"has no revision {source.revision}; {key}.revision=null takes the latest"
        else:
            line = f"is not on the hub, or not for you to read; check {key}.path, and give HF_TOKEN if it is private"
        raise UserError(f"{name}: {source.path} {line}") from error
    except ConnectionError as error:
        raise _out_of_reach(name, source.path, source.revision) from error
    except StopIteration as error:
        raise UserError(f"{name}: {source.path} has no rows") from error
    except Exception as error:
        cause: BaseException = error
        while isinstance(cause, DatasetGenerationError) and cause.__cause__ is not None:
            cause = cause.__cause__
        reason = str(cause)[:500] or type(cause).__name__
        line = f"{name}: {source.path} cannot be read ({reason}); check {key}.path, .configs and .split"
        raise UserError(line) from error
