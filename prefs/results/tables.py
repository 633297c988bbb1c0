"""What tables of statistics have in common: columns of an estimate, rows by origin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from prefs.data.task import ALL
from prefs.results.result import Row
from prefs.statistics.estimates import Estimate


def columns(name: str, estimate: Estimate) -> dict[str, object]:
    """An estimate as five columns: value, interval, how many tasks it is from, and the reason where it has no value."""
    return {
        name: estimate.value,
        f"{name}_low": estimate.low,
        f"{name}_high": estimate.high,
        f"{name}_n": estimate.n,
        f"{name}_reason": estimate.reason,
    }


def numeric(table: pd.DataFrame, words: Sequence[str] = ("origin",)) -> pd.DataFrame:
    """Missing statistics as NaN, so that a column of numbers is one even when all of it is missing.

    Columns of `words`, and reasons, stay as they are.
    """
    kept = [name for name in table.columns if name in words or name.endswith("_reason")]
    return table.assign(**{name: pd.to_numeric(table[name]) for name in table.columns.drop(kept)})


def distinct(table: pd.DataFrame, column: str) -> list[Any]:
    return list(dict.fromkeys(table[column]))


def whole(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of a table that are of the tasks of all origins."""
    return table.loc[table["origin"] == ALL, :]


def by_origin(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of a table that are of one origin each."""
    return table.loc[table["origin"] != ALL, :]


def all_last(table: pd.DataFrame) -> pd.DataFrame:
    """A table as it is printed: the row of all tasks below those of their origins."""
    return table.sort_values(by="origin", key=lambda origins: origins == ALL, kind="stable")


def is_all(row: Row) -> bool:
    """Whether a row is of all tasks: it is printed bold."""
    return row["origin"] == ALL


def metrics_by_origin(kind: str, table: pd.DataFrame) -> dict[str, float]:
    """All numbers of a table as metrics ``kind/column/origin``."""
    return {
        f"{kind}/{name}/{row['origin']}": float(value)
        for row in table.to_dict("records")
        for name, value in row.items()
        if isinstance(value, int | float) and pd.notna(value)
    }
