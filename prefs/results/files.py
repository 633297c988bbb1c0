"""Results in a folder: tables as CSV and Parquet, figures as PNG, artifacts as they save themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prefs.results.result import Artifact, Result
from prefs.store.files import write_table

FIGURES = "figures"
# Characters of a figure's file, its ending apart.
LONGEST = 100


@dataclass(frozen=True)
class Written:
    """The files of a result: its figures by name, and its artifacts, each with its files."""

    figures: Mapping[str, Path]
    artifacts: Sequence[tuple[Artifact, Sequence[Path]]]


def write(result: Result, folder: Path) -> Written:
    """Write a result's tables, figures and artifacts.

    Raises
    ------
    UserError
        If the disk refuses.
    """
    for table in result.tables:
        write_table(table.frame, folder / table.name)
    figures = {figure.name: folder / FIGURES / f"{plain(figure.name)}.png" for figure in result.figures}
    for figure in result.figures:
        figure.draw(figures[figure.name])
    return Written(figures, [(artifact, artifact.save(folder)) for artifact in result.artifacts])


def plain(name: str) -> str:
    """A name as a file can have it anywhere: no odd characters, and not too long."""
    safe = "".join(char if char.isascii() and (char.isalnum() or char in "-_.=") else "_" for char in name)
    if safe == name and len(safe) <= LONGEST:
        return safe
    return f"{safe[: LONGEST - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
