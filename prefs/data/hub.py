"""Data sets that the library `datasets` reads, opened memory-mapped: from the hub, its cache, a folder or a file.

What cannot be opened is one line that says what to do. A data set pinned to a commit is taken from the cache without
asking the hub, so a second run works anywhere; the library's own offline mode would take the latest commit it has.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

from prefs.config import RowReader, SourceConfig
from prefs.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder

log = logging.getLogger("prefs")

COMMIT = re.compile(r"[0-9a-f]{40}")
URL = re.compile(r"https?://")
FILES = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
SECONDS = 5.0  # to find out that there is no network
TURN = ("role", "content")


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
    if URL.match(source.path):
        return _open_file(urlparse(source.path).path, _downloaded(name, source.path))
    place = Path(source.path).expanduser()
    if place.exists() and set("*?[]") & set(str(place.resolve())):
        raise UserError(f"{name}: `datasets` takes * ? [ ] in {place.resolve()} for a pattern; give it another name")
    if place.is_dir():
        return _open_folder(place.resolve(), config, source.split)
    if place.is_file():
        return _open_file(place.name, str(place.resolve()))
    return _open_hub(name, source, config)


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
    rows = load_dataset(str(folder), config, split=split, verification_mode="no_checks")
    assert isinstance(rows, Dataset)
    return rows


def _open_file(called: str, file: str) -> Dataset:
    """One file, which is one split whatever it is called."""
    from datasets import Dataset, load_dataset

    kind = FILES.get(Path(called).suffix.lower())
    if kind is None:
        raise UserError(f"{called}: not a kind of file that can be read; use {', '.join(FILES)}")
    rows = load_dataset(kind, data_files=file, split="train")
    assert isinstance(rows, Dataset)
    return rows


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
            said = f"{cause.status} {cause.message}"
            raise UserError(f"{name}: {url} cannot be fetched ({said}); check dataset.sources.{name}.path") from error
        raise _out_of_reach(name, url) from error


def _open_hub(name: str, source: SourceConfig, config: str | None) -> Dataset:
    from datasets import Dataset, load_dataset_builder

    pinned = source.revision is not None and COMMIT.fullmatch(source.revision) is not None
    builder = _cached(source.path, config, source.revision) if pinned else None
    if builder is None and not reachable():
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
    rows = builder.as_dataset(split=source.split)
    assert isinstance(rows, Dataset)
    return rows


def _cached(path: str, config: str | None, revision: str | None) -> DatasetBuilder | None:
    """What the cache of `datasets` has of a hub data set: at this commit, or (None) what came last."""
    from datasets import config as settings
    from datasets.naming import camelcase_to_snakecase
    from datasets.packaged_modules.cache.cache import Cache

    *owner, repository = path.split("/")
    root = Path(settings.HF_DATASETS_CACHE) / "___".join([*owner, camelcase_to_snakecase(repository)])
    found = [folder for folder in root.glob(f"{config or '*'}/*/{revision or '*'}") if COMMIT.fullmatch(folder.name)]
    if config is None and len({folder.parts[-3] for folder in found}) > 1:
        found = [folder for folder in found if folder.parts[-3] == "default"]
    if not found:
        return None
    *_, kept_config, version, commit = max(found, key=lambda folder: folder.stat().st_mtime).parts
    builder = Cache(repo_id=path, dataset_name=repository, config_name=kept_config, version=version, hash=commit)
    builder.download_and_prepare()
    return builder


def reachable() -> bool:
    """Whether the hub answers at all, found out in seconds: the library itself would retry for half a minute."""
    from datasets import config as settings
    from huggingface_hub import constants, get_session

    if settings.HF_HUB_OFFLINE:
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

    found = rows.column_names
    missing = [column for column in columns if column not in found]
    if missing:
        raise UserError(
            f"{name}: the columns of {source.path} are not as expected: there is no {', '.join(missing)}; "
            f"expected {', '.join(columns)}; found {', '.join(found)}; dataset.sources.{name} names the columns to use"
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
        said = str(error)
        if "gated" in said:
            line = "is gated: accept its terms on its page on the hub, and give your token as HF_TOKEN"
        elif said.startswith("Revision"):
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
        said = str(cause)[:500] or type(cause).__name__
        raise UserError(
            f"{name}: {source.path} cannot be read ({said}); check {key}.path, .configs and .split"
        ) from error
