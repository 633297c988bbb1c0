"""How results are printed: numbers, tables, and where everything is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefs.results.job_record import Spent, Work

MISSING = "–"


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


def with_interval(row: Mapping[Any, Any], name: str) -> str:
    """A number of a table's row with its interval, where it has one: .87 [.80, .91]."""
    value, low, high = (number(row[each]) for each in (name, f"{name}_low", f"{name}_high"))
    return value if low == MISSING else f"{value} [{low}, {high}]"


def new_table(title: str, first: str = "origin") -> Table:
    """An empty table whose first column names the rows."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    return table


def show(
    console: Console,
    *,
    title: str,
    tables: Sequence[Table],
    said: Sequence[str],
) -> None:
    """Print tables under a title, and what there is to say about them."""
    console.print()
    console.rule(Text(title, style="bold"), align="left")
    for table in tables:
        console.print(table)
    for remark in said:
        console.print(f"• {remark}")


def show_files(
    console: Console, done: Sequence[Work | Spent], folder: Path | None, store: Path | None, wandb: Mapping[str, Path]
) -> None:
    """Print what was reused, computed and spent, and where everything is."""
    console.print()
    for each in done:
        console.print(f"{each}")
    if folder is not None:
        console.print(f"tables and figures  {folder}", soft_wrap=True)
    if store is not None:
        console.print(f"store               {store}", soft_wrap=True)
    for name, path in wandb.items():
        console.print(f"W&B, offline        wandb sync {path}    ({name})", soft_wrap=True)


def spaced_layers(layers: Sequence[int], most: int) -> list[int]:
    """All layers, or so many of them evenly spaced, the first and last among them."""
    if len(layers) <= most:
        return list(layers)
    return [layers[round(at * (len(layers) - 1) / (most - 1))] for at in range(most)]
