"""Steered ratings, read back from run folders: how far a vector moves the ratings of each cell."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from prefs.comparison.cells import Cell, Sweep, read_table
from prefs.comparison.conditions import grids, level
from prefs.comparison.show import MOST_CELLS, names_column, numbered, numbers, short_names, table
from prefs.errors import UserError
from prefs.results import figures
from prefs.results.result import Result, View, figure
from prefs.results.tables import distinct, numeric
from prefs.results.terminal import number, used, with_interval

DOSES, SLOPES = "steering_doses.parquet", "steering_slopes.parquet"
# What makes other steered ratings of the same cell, and what of it is looked at first for telling them apart.
SETTINGS = ("steering", "concept", "capture")
FIRST = ("steering.name", "steering.vector", "steering.layers", "steering.at", "steering.position")
CONCEPT = "concept"
# Vectors of the same norm that mean nothing.
EMPTY = ("random", "shuffled")
ESTIMATES = [
    f"{name}{part}"
    for name in ("slope", "delta_minus", "delta_plus")
    for part in ("", "_low", "_high", "_n", "_reason")
]
WORDS = ("cell", "rater", "template", "completing", "rating", "vector", "control")
NOTE = (
    "Mean rating with a vector added to the residual stream, by its coefficient; doses after which the model no longer"
    " answers coherently are hollow, and in no slope."
)
TABLE_NOTE = (
    "slope is in rating points a unit of the coefficient, over the n tasks with a rating at each dose that counts (the"
    " others are left_out); delta_minus and delta_plus are the changes at the"
    " coefficients -1 and 1, where these were given. null_slope is the largest slope, without its sign, of the"
    " vectors of the layer that mean nothing (random directions, shuffled labels): a vector that does no more does"
    " nothing of its own."
)


@dataclass(frozen=True, eq=False)
class Steered:
    """The steered ratings of one cell.

    Attributes
    ----------
    name
        The cell's name; where jobs differ in nothing but how they steer, with what tells these apart.
    doses, slopes
        The tables of the job: one row a vector, layer and coefficient; a vector and layer.
    """

    name: str
    cell: Cell
    doses: pd.DataFrame
    slopes: pd.DataFrame


def steering(sweep: Sweep) -> Result | None:
    """The slopes of all cells, and the curves; None where no cell is steered."""
    steered, remarks = read_steered(sweep)
    if not steered:
        return Result(remarks=tuple(remarks))
    slopes = steering_table(steered)
    curves = list(dose_tables(sweep, steered).items())[:MOST_CELLS]
    drawn = [
        figure(numbered("steering", count), figures.dose_response, title=f"Steered ratings: {title}", table=rows)
        for count, (title, rows) in enumerate(curves)
    ]
    tables = (table("steering", slopes, "Slopes and changes", TABLE_NOTE),)
    remarks += [
        f"{row['cell']}: the slope along {row['vector']} at layer {row['layer']} is of {used(row)} tasks; the others"
        " have no rating at some of its doses."
        for row in slopes.loc[(slopes["control"] == CONCEPT) & (slopes["left_out"] > 0), :].to_dict("records")
    ]
    return Result("Steering", NOTE, tables, (_view(slopes),), tuple(drawn), tuple(remarks))


def read_steered(sweep: Sweep) -> tuple[list[Steered], list[str]]:
    """The steered ratings of a sweep's cells, and a sentence for each whose files are missing or damaged."""

    def has(cell: Cell) -> bool:
        wanted = (cell.job.config.get("steering") or {}).get("vector", "none") != "none"
        return wanted or (cell.folder / DOSES).exists() or (cell.folder / SLOPES).exists()

    steered: list[Steered] = []
    remarks: list[str] = []
    columns = ("vector", "control", "layer")
    for name, cell in sweep.variants(SETTINGS, FIRST, has):
        try:
            doses = read_table(
                cell.folder / DOSES, *columns, "coefficient", "mean", "mean_low", "mean_high", "coherent"
            )
            slopes = read_table(cell.folder / SLOPES, *columns, "n", "left_out", "doses", *ESTIMATES)
            for path, frame in ((DOSES, doses), (SLOPES, slopes)):
                if frame.empty:
                    raise UserError(f"{cell.folder / path} has no rows; run its job again")
        except UserError as error:
            remarks.append(f"{cell.name}: its steered ratings are left out ({error}).")
        else:
            steered.append(Steered(name, cell, doses, slopes))
    return steered, remarks


def steering_table(steered: list[Steered]) -> pd.DataFrame:
    """One row a cell, vector and layer: slope and changes at coefficients -1 and 1, with the cell's conditions.

    ``null_slope`` is the largest slope, without its sign, of the vectors that mean nothing (random directions and
    shuffled labels) at the same layer.
    """
    frames = []
    for one in steered:
        slopes = one.slopes
        empty = slopes.loc[slopes["control"].isin(EMPTY), :]
        null = empty["slope"].astype(float).abs().groupby(empty["layer"]).max()
        names = {"cell": one.name, "rater": one.cell.rater, "template": one.cell.key}
        names |= {"completing": level(one.cell, "completer"), "rating": level(one.cell, "rating")}
        shown = slopes.assign(**names, null_slope=slopes["layer"].map(null))
        frames.append(shown[[*names, "vector", "control", "layer", "n", "left_out", "doses", *ESTIMATES, "null_slope"]])
    return numeric(pd.concat(frames, ignore_index=True), words=WORDS)


def _view(slopes: pd.DataFrame) -> View:
    """Each cell's slope along the concept's vector, beside the largest along one that means nothing."""
    slopes = slopes.loc[slopes["control"] == CONCEPT, :]
    several = len(distinct(slopes, "vector")) > 1
    rows = [
        (
            f"{name} {row['vector']}" if several else name,
            f"{row['layer']}",
            used(row),
            with_interval(row, "slope"),
            *(number(row[column]) for column in ("null_slope", "delta_minus", "delta_plus")),
        )
        for name, row in zip(short_names(slopes), slopes.to_dict("records"), strict=True)
    ]
    title = "Steering: rating points a unit of the coefficient; Δ at coefficients −1 and 1"
    return View(
        title, (names_column("cell"), *numbers("layer", "n", "slope [95 %]", "null", "Δ at −1", "Δ at 1")), rows
    )


def dose_tables(sweep: Sweep, steered: list[Steered]) -> dict[str, pd.DataFrame]:
    """What `figures.dose_response` draws of each grid, vector and layer, by title; of cells in no grid, by template.

    In a grid a panel is a condition of rating and a line one of completing; without one, a line is a cell.
    """
    in_grid = {cell.name: (grid, *pair) for grid in grids(sweep.cells) for pair, cell in grid.cells.items()}

    def order(one: Steered) -> tuple[int, int]:
        """As the levels of a grid are ordered, so are panels and lines."""
        if one.cell.name not in in_grid:
            return 0, 0
        grid, completing, rating = in_grid[one.cell.name]
        return grid.rating.index(rating), grid.completing.index(completing)

    parts: dict[str, list[pd.DataFrame]] = {}
    for one in sorted(steered, key=order):
        title, panel, line = one.cell.key, one.cell.key, one.name
        if one.cell.name in in_grid:
            grid, completing, rating = in_grid[one.cell.name]
            apart = one.name.removeprefix(one.cell.name)  # what tells several of a cell apart
            title, panel, line = grid.name, f"rated: {rating}", f"completed: {completing}{apart}"
        doses = one.doses.loc[one.doses["control"] == CONCEPT, :].assign(panel=panel, line=line)
        for (layer, vector), rows in doses.groupby(["layer", "vector"], sort=False):
            parts.setdefault(f"{title}\n{vector}, layer {layer}", []).append(rows)
    return {title: pd.concat(tables) for title, tables in parts.items()}
