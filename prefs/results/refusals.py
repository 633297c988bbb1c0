"""Refusal × rating by origin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from prefs.results.result import Result, Row, Table, View
from prefs.results.tables import all_last, columns, is_all, metrics_by_origin, numeric
from prefs.results.terminal import MISSING, number, with_interval
from prefs.statistics.groups import Group
from prefs.statistics.measured import Measured
from prefs.statistics.refusal import MIN_GROUP, RefusalRating, refusal_rating

if TYPE_CHECKING:
    from prefs.stages.context import CellContext


def cell_refusals(cell: CellContext) -> Result:
    """What a cell's refused tasks are rated, and the others."""
    table = refusal_table(refusals(cell.measured, cell.groups))
    rated_by = "exact mean" if cell.measured.exact is not None else f"mean of {len(cell.ratings.seeds)} seeds"
    return Result(
        title="Refusals",
        tables=(Table("refusals", table),),
        views=(_view(table, rated_by),),
        remarks=tuple(_remarks(table)),
        metrics=metrics_by_origin("refusals", table),
    )


def refusals(measured: Measured, groups: Sequence[Group]) -> dict[str, RefusalRating]:
    """Refusal × rating by group. The rating is the exact mean where there is one, else the mean over seeds.

    Tasks without a verdict (no completion, no judge) are left out and counted.
    """
    rating = measured.task_means
    return {
        group.origin: refusal_rating(measured.refused[group.tasks], rating[group.tasks], group.draws)
        for group in groups
    }


def refusal_table(rows: Mapping[str, RefusalRating]) -> pd.DataFrame:
    """One row an origin, as in the report's table."""
    table = pd.DataFrame(
        [
            {
                "origin": origin,
                "n": row.n,
                "refused": row.refused,
                "unrated": row.unrated,
                "unjudged": row.unjudged,
                **columns("mean_refused", row.mean_refused),
                **columns("mean_not_refused", row.mean_not_refused),
                **columns("r", row.r),
            }
            for origin, row in rows.items()
        ]
    )
    return numeric(table)


def _view(table: pd.DataFrame, rated_by: str) -> View:
    def r(row: Row) -> str:
        return f"{MISSING} {row['r_reason']}" if pd.isna(row["r"]) else with_interval(row, "r")

    return View.of(
        f"Refusal × rating: point-biserial r with the {rated_by}",
        all_last(table),
        {
            "origin": lambda row: row["origin"],
            "n": lambda row: str(row["n"]),
            "refused": lambda row: str(row["refused"]),
            "mean, refused": lambda row: number(row["mean_refused"]),
            "mean, not": lambda row: number(row["mean_not_refused"]),
            "r [95 %]": r,
        },
        bold=is_all,
    )


def _remarks(table: pd.DataFrame) -> list[str]:
    remarks = []
    few = int(table["refused"].iloc[0])
    if 0 < few < MIN_GROUP:
        remarks.append(f"Refusal × rating rests on {few} refused task{'s' * (few > 1)}: too few for an interval.")
    if table["unjudged"].to_numpy().any():
        remarks.append("Refusals were not judged everywhere (no judge, or no completion).")
    return remarks
