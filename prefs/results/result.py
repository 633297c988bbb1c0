"""What a job, a stage or a comparison found, in the one form that every medium renders: terminal, files, W&B, HTML."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Column

Row = Mapping[str, Any]


@dataclass(frozen=True)
class View:
    """What the terminal prints of some table: every cell as text, the first column names the rows.

    Attributes
    ----------
    title
        What stands above it.
    columns
        Headings; the first is left-aligned and the others right-aligned, but for what is a `rich.table.Column`.
    rows
        Texts, one a column; a row that is shorter leaves the others empty.
    bold, dim
        Numbers of the rows that stand out (the whole, a heading), and of those that do not count.
    gaps
        Numbers of the rows below which there is a gap.
    tight
        Whether columns are close to each other.
    """

    title: str
    columns: Sequence[str | Column]
    rows: Sequence[Sequence[str]]
    bold: frozenset[int] = frozenset()
    dim: frozenset[int] = frozenset()
    gaps: frozenset[int] = frozenset()
    tight: bool = False

    @classmethod
    def of(
        cls,
        title: str,
        frame: pd.DataFrame,
        columns: Mapping[str, Callable[[Row], str]],
        bold: Callable[[Row], bool] = lambda row: False,
    ) -> View:
        """Print each row of a frame: a function of the row for each heading."""
        records: list[Row] = [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]
        return cls(
            title,
            list(columns),
            [[show(row) for show in columns.values()] for row in records],
            frozenset(number for number, row in enumerate(records) if bold(row)),
        )


@dataclass(frozen=True, eq=False)
class Excerpt:
    """Some rows or columns of a table, as HTML shows them."""

    title: str
    frame: pd.DataFrame
    note: str = ""


@dataclass(frozen=True, eq=False)
class Table:
    """A table, whole in files, W&B and HTML; what the terminal shows of it is a `View`.

    Attributes
    ----------
    name
        Of its files and its W&B table, such as ``stability``.
    frame
        Beside a column X, ``X_low`` and ``X_high`` are its interval, ``X_n`` says how many tasks it is from, and
        ``X_reason`` why it is missing.
    title, note
        Its heading in HTML, and what there is to know about its columns.
    large
        Whether it is left out of W&B and HTML (one row a task and more): it is in the run's folder.
    excerpts
        What HTML shows in place of the whole; empty: the whole.
    """

    name: str
    frame: pd.DataFrame
    title: str = ""
    note: str = ""
    large: bool = False
    excerpts: tuple[Excerpt, ...] = ()


@dataclass(frozen=True, eq=False)
class Figure:
    """A figure; ``draw`` writes it as a PNG file to the path it is given."""

    name: str
    draw: Callable[[Path], object]
    title: str = ""


def figure(name: str, draw: Callable[..., object], **given: Any) -> Figure:
    """A figure by a function of `prefs.results.figures`, with what it is given beside the path."""
    return Figure(name, partial(draw, **given))


@dataclass(frozen=True, eq=False)
class Series:
    """Numbers over a step of their own, say the layer: one row a step, which is the column ``step``."""

    step: str
    frame: pd.DataFrame


@dataclass(frozen=True, eq=False)
class Artifact:
    """Files that belong together, such as a probe and its card. ``save`` writes them to a folder and names them."""

    name: str
    kind: str
    save: Callable[[Path], Sequence[Path]]
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Result:
    """Tables, figures, remarks, metrics and artifacts about one question.

    Attributes
    ----------
    title, note
        Of its section in HTML; without a title there is none.
    views
        What the terminal prints of the tables, in this order.
    remarks
        What to be careful about, in plain words; a sentence each.
    metrics
        Numbers for the summary of a W&B run, by name; None and NaN are left out.
    """

    title: str = ""
    note: str = ""
    tables: tuple[Table, ...] = ()
    views: tuple[View, ...] = ()
    figures: tuple[Figure, ...] = ()
    remarks: tuple[str, ...] = ()
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    series: tuple[Series, ...] = ()
    artifacts: tuple[Artifact, ...] = ()

    def frame(self, name: str) -> pd.DataFrame:
        """The frame of a table.

        Raises
        ------
        KeyError
            If there is no such table.
        """
        return {table.name: table.frame for table in self.tables}[name]


def joined(results: Iterable[Result]) -> Result:
    """Several results as one, in their order."""
    results = list(results)
    return Result(
        tables=tuple(table for result in results for table in result.tables),
        views=tuple(view for result in results for view in result.views),
        figures=tuple(figure for result in results for figure in result.figures),
        remarks=tuple(remark for result in results for remark in result.remarks),
        metrics={name: value for result in results for name, value in result.metrics.items()},
        series=tuple(series for result in results for series in result.series),
        artifacts=tuple(artifact for result in results for artifact in result.artifacts),
    )
