"""Whether refused tasks are rated otherwise than the others."""

from __future__ import annotations

import numpy as np
import pandas as pd

from prefs.comparison.cells import Cell, Sweep
from prefs.comparison.show import MOST_CELLS, table
from prefs.results import figures
from prefs.results.distribution import distribution_table
from prefs.results.refusals import refusal_table, refusals
from prefs.results.result import Result, figure
from prefs.statistics.estimates import Resamples
from prefs.statistics.groups import Group


def refusals_of_cells(sweep: Sweep) -> Result:
    """One row a cell and origin: refusal × rating; a figure a cell."""
    rows = sweep.stacked(lambda block, cell: refusal_table(refusals(cell.measured, block.groups)))
    drawn = []
    for cell in sweep.aligned[:MOST_CELLS]:
        if (cell.measured.refused == 1).any():
            title = f"Ratings of refused tasks and of the others: {cell.name}"
            table_of_cell = _distribution(cell)
            drawn.append(figure(f"refused_{cell.name}", figures.refused_by_origin, title=title, table=table_of_cell))
    return Result(
        "Refusals",
        "Point-biserial r between being refused and the rating (the exact mean where there is one).",
        (table("refusals", rows, "Refusal × rating"),),
        figures=tuple(drawn),
    )


def _distribution(cell: Cell) -> pd.DataFrame:
    """One row an origin, verdict and option: shares in the exact distribution, or else of the valid sampled ratings."""
    measured = cell.measured
    origins = np.array(measured.origins, dtype=object)
    tables = []
    for verdict in (1, 0):
        groups = []
        for origin in dict.fromkeys(measured.origins):
            tasks = np.flatnonzero((measured.refused == verdict) & (origins == origin))
            groups.append(Group(origin, tasks, Resamples.none(len(tasks))))
        tables.append(distribution_table(measured, groups).assign(refused=verdict))
    share = "sampled_share" if measured.exact is None else "exact_share"
    return pd.concat(tables, ignore_index=True).rename(columns={share: "share"})
