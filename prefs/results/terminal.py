"""How results are printed: numbers, views and remarks, and where everything is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from prefs.job import ModelUsage, StageCounts
from prefs.results.result import Result, View

MISSING = "–"


def console() -> Console:
    """What results are printed to. Task ids and origins are the user's text: nothing in them is markup."""
    return Console(markup=False, highlight=False, emoji=False)


def number(value: object, digits: int = 2) -> str:
    """A number as papers print it: .87, −.05, 1.00; a dash where there is none."""
    if not isinstance(value, int | float) or pd.isna(value):
        return MISSING
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.removeprefix("-")
    if abs(float(text)) < 1:
        text = text.replace("0.", ".", 1)
    return text.replace("-", "−")


def used(row: Mapping[Any, Any]) -> str:
    """How many tasks a statistic is from, and of how many if some were left out."""
    n, left_out = int(row["n"]), int(row["left_out"])
    return f"{n}/{n + left_out}" if left_out else str(n)


def with_interval(row: Mapping[Any, Any], name: str) -> str:
    """A number of a table's row with its interval, where it has one: .87 [.80, .91]."""
    value, low, high = (number(row[column]) for column in (name, f"{name}_low", f"{name}_high"))
    return value if low == MISSING else f"{value} [{low}, {high}]"


def some(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def spaced_layers(layers: Sequence[int], most: int) -> list[int]:
    """All layers, or so many of them evenly spaced, the first and last among them."""
    if len(layers) <= most:
        return list(layers)
    return [layers[round(step * (len(layers) - 1) / (most - 1))] for step in range(most)]


def show(console: Console, result: Result, *, title: str) -> None:
    """Print the views of a result under a title, and its remarks."""
    console.print()
    console.rule(Text(title, style="bold"), align="left")
    for view in result.views:
        console.print(_table(view))
    for remark in result.remarks:
        console.print(f"• {remark}")


def _table(view: View) -> Table:
    columns = [
        # A copy, since a column keeps what is printed in it.
        column.copy()
        if isinstance(column, Column)
        else Column(column, justify="right" if place else "left", no_wrap=not place)
        for place, column in enumerate(view.columns)
    ]
    table = Table(
        *columns,
        title=view.title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0) if view.tight else (0, 1),
    )
    for row, texts in enumerate(view.rows):
        style = "bold" if row in view.bold else "dim" if row in view.dim else None
        table.add_row(*texts, style=style, end_section=row in view.gaps)
    return table


def show_files(
    console: Console,
    counts: Iterable[StageCounts | ModelUsage],
    *,
    folder: Path | None = None,
    store: Path | None = None,
    wandb: Mapping[str, Path] = MappingProxyType({}),
) -> None:
    console.print()
    for line in counts:
        console.print(f"{line}")
    if folder is not None:
        console.print(f"tables and figures  {folder}", soft_wrap=True)
    if store is not None:
        console.print(f"store               {store}", soft_wrap=True)
    for name, path in wandb.items():
        console.print(f"W&B, offline        wandb sync {path}    ({name})", soft_wrap=True)
