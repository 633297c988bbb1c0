"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from prefs.errors import UserError

if TYPE_CHECKING:  # help and completion come through here, and should not wait for it
    import pandas as pd


def write_durably(path: Path, content: bytes) -> None:
    """Write a file so that it appears whole or not at all. Raises OSError, and leaves nothing behind then."""
    temporary = path.parent / f".part-{uuid.uuid4().hex}"
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


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
