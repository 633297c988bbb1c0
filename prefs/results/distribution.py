"""How often each rating is given, by origin: sampled and exact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from prefs.results import figures
from prefs.results.result import Result, Table, figure
from prefs.results.stability import NOT_ASKED
from prefs.results.tables import by_origin, columns, numeric
from prefs.statistics.estimates import Estimate
from prefs.statistics.exact import exact_moments, exact_summary
from prefs.statistics.groups import Group
from prefs.statistics.measured import Measured
from prefs.statistics.sampled import distribution

if TYPE_CHECKING:
    from prefs.stages.context import CellContext


def cell_distribution(cell: CellContext) -> Result:
    """A cell's ratings by origin."""
    table = distribution_table(cell.measured, cell.groups)
    title = f"Ratings by origin: {cell.title}"
    return Result(
        title="Distribution of ratings",
        tables=(Table("distribution", table),),
        figures=(figure("ratings_by_origin", figures.rating_distribution, title=title, table=by_origin(table)),),
    )


def distribution_table(measured: Measured, groups: Sequence[Group]) -> pd.DataFrame:
    """One row an origin and option, in order of value: its share of valid sampled ratings, and its exact share.

    The exact share is the mean over tasks of the option's renormalised probability: what sampling for ever would give
    if every task had the same number of valid answers.
    """
    rows = []
    for group in groups:
        sampled = distribution(measured.sampled[group.tasks], measured.values, group.draws)
        exact = _exact_shares(measured, group)
        for option in np.argsort(measured.values):
            row: dict[str, object] = {"origin": group.origin, "n": len(group.tasks)}
            row |= {"option": measured.says[option], "value": measured.values[option]}
            rows.append(row | columns("sampled_share", sampled[option]) | columns("exact_share", exact[option]))
    return numeric(pd.DataFrame(rows), words=("origin", "option"))


def _exact_shares(measured: Measured, group: Group) -> list[Estimate]:
    if measured.mass is None:
        return [Estimate.missing(NOT_ASKED, len(group.tasks))] * len(measured.values)
    mass = measured.mass[group.tasks]
    # On a scale where one option is worth 1 and the others 0, the mean is that option's probability.
    return [exact_moments(exact_summary(mass, scale), group.draws).mean for scale in np.eye(mass.shape[1])]
