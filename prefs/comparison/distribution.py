"""How often each rating is given."""

from __future__ import annotations

from prefs.comparison.cells import Sweep
from prefs.comparison.show import table
from prefs.results import figures
from prefs.results.distribution import distribution_table
from prefs.results.result import Result, figure
from prefs.results.tables import whole


def distributions(sweep: Sweep) -> Result:
    """One row a cell, origin and option; a figure a template."""
    shares = sweep.stacked(lambda block, cell: distribution_table(cell.measured, block.groups))
    drawn = []
    named = [
        rater + cell.removeprefix(f"{rater}-{template}")
        for cell, rater, template in zip(shares["cell"], shares["rater"], shares["template"], strict=True)
    ]
    for template, rows in whole(shares.assign(named=named)).groupby("template", sort=False):
        name, title = f"ratings_{template}", f"Ratings by rater: {template}"
        drawn.append(figure(name, figures.rating_distribution, title=title, table=rows, by="named"))
    return Result(
        "Ratings",
        "How often each rating is given: bars sampled, diamonds exact.",
        (table("distribution", shares, "Shares of each rating"),),
        figures=tuple(drawn),
    )
