"""What comparisons' tables and views have in common: columns that say nothing, and names that fit a screen."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from rich.table import Column

from prefs.results.result import Excerpt, Table
from prefs.results.tables import distinct

# Columns that name a cell, beside `cell`.
NAMES = ("rater", "template", "completer", "dataset", "condition", "completion_seed")
# Figures of single cells, beyond which they crowd out the rest.
MOST_CELLS = 12


def table(name: str, frame: pd.DataFrame, title: str, note: str = "") -> Table:
    """A table that HTML shows without the columns that say nothing."""
    return Table(name, frame, excerpts=(Excerpt(title, telling_columns(frame), note),))


def telling_columns(frame: pd.DataFrame) -> pd.DataFrame:
    """A table without the names that are the same in all rows, or empty."""
    return frame.drop(columns=[name for name in NAMES if name in frame and len(set(frame[name])) <= 1])


def names_column(heading: str, width: int = 18) -> Column:
    """The first column of a view, for names that may be too long for it."""
    return Column(heading, overflow="fold", min_width=width)


def numbers(*headings: str) -> tuple[Column, ...]:
    """Columns of a view that are never broken."""
    return tuple(Column(heading, justify="right", no_wrap=True) for heading in headings)


def short_names(frame: pd.DataFrame) -> list[str]:
    """Cells' names as views have them: conditions in a word, and no rater where there is one only."""
    one_rater = len(distinct(frame, "rater")) == 1
    names = frame["cell"].str.replace("completer.condition=", "completed: ", regex=False)
    names = names.str.replace("rating.condition=", "rated: ", regex=False)
    return [
        str(name).removeprefix(f"{rater}-" if one_rater else "")
        for name, rater in zip(names, frame["rater"], strict=True)
    ]


def counted(frame: pd.DataFrame) -> str:
    """How many tasks the rows are of: 40, or 30 to 40."""
    counts = sorted(distinct(frame, "n"))
    return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def square(pairs: Mapping[tuple[str, str], float]) -> pd.DataFrame:
    """A symmetric matrix with 1 on its diagonal, from what is above it."""
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    matrix = pd.DataFrame(np.eye(len(names)), index=names, columns=names)
    for (a, b), value in pairs.items():
        matrix.loc[a, b] = matrix.loc[b, a] = value
    return matrix


def numbered(name: str, number: int) -> str:
    """Names of figures of a kind: variance, variance_1, variance_2."""
    return f"{name}_{number}" if number else name
