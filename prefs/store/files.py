"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from prefs.errors import UserError

if TYPE_CHECKING:  # help and completion come through here, and should not wait for it
    import pandas as pd


def write_durably(path: Path, content: bytes) -> None:
    """Write a file so that it appears whole or not at all. Raises OSError, and leaves nothing behind then."""

    def write(temporary: Path) -> Path:
        temporary.write_bytes(content)
        return path

    appear(path.parent, write)


def appear(folder: Path, write: Callable[[Path], Path]) -> Path:
    """Have a file written so that it appears in a folder whole or not at all.

    `write` is given a temporary path to write to, and returns the one that the file is to have, as this does. Raises
    OSError and what `write` raises, and leaves nothing behind then.
    """
    temporary = folder / f".part-{uuid.uuid4().hex}"
    try:
        path = write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    return path


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table as CSV and Parquet, beside each other.

    Raises
    ------
    UserError
        If the disk refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(path.with_suffix(".csv"), index=False)
        table.to_parquet(path.with_suffix(".parquet"), index=False)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def file_checksum(path: Path) -> str:
    """XXH3 of a file's bytes, 128 bits in hexadecimal: against accidents, not against an adversary."""
    state, block = xxhash.xxh3_128(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            state.update(block[:count])
    return state.hexdigest()
