"""Steered ratings read back from run folders, and the table of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from prefs.comparison.cells import Cell, Sweep, flat, read_table, telling
from prefs.comparison.conditions import Grid, level
from prefs.errors import UserError
from prefs.results.summary import numeric

DOSES, SLOPES = "steering_doses.parquet", "steering_slopes.parquet"
# What makes other steered ratings of the same cell.
SETTINGS = ("steering", "concept", "capture")
FIRST = ("steering.name", "steering.vector", "steering.layers", "steering.at", "steering.position")
CONCEPT = "concept"
# Vectors of the same norm that mean nothing.
EMPTY = ("random", "shuffled")
ESTIMATES = ("slope", "delta_minus", "delta_plus")
PARTS = ("", "_low", "_high", "_reason")


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


def read_steered(found: Sweep) -> tuple[tuple[Steered, ...], tuple[str, ...]]:
    """The steered ratings of a sweep's cells, and a line for each whose files are missing or damaged.

    A cell that was measured twice counts once, but with all its steering where the settings of that differ.
    """
    steered: list[Steered] = []
    remarks: list[str] = []
    seen: set[tuple[str, str]] = set()
    # The later job first: of two with the same settings it is the one that counts.
    for cell in [*found.cells, *reversed(found.doubles)]:
        config = cell.job.config
        wanted = (config.get("steering") or {}).get("vector", "none") != "none"
        settings = (cell.name, json.dumps({name: config.get(name) for name in SETTINGS}, sort_keys=True))
        folder = cell.job.folder / cell.key
        if settings in seen or not (wanted or (folder / DOSES).exists() or (folder / SLOPES).exists()):
            continue
        seen.add(settings)
        try:
            steered.append(_read(cell))
        except UserError as error:
            remarks.append(f"{cell.name}: its steered ratings are left out ({error}).")
    order = {cell.name: at for at, cell in enumerate(found.cells)}
    return tuple(sorted(_told_apart(steered), key=lambda each: order[each.cell.name])), tuple(remarks)


def _read(cell: Cell) -> Steered:
    folder = cell.job.folder / cell.key
    which = ("vector", "control", "layer")
    doses = read_table(folder / DOSES, *which, "coefficient", "mean", "mean_low", "mean_high", "coherent")
    estimates = [f"{name}{part}" for name in ESTIMATES for part in PARTS]
    slopes = read_table(folder / SLOPES, *which, "n", "doses", *estimates)
    if doses.empty or slopes.empty:
        raise UserError(f"{folder / (DOSES if doses.empty else SLOPES)} has no rows; run its job again")
    return Steered(cell.name, cell, doses, slopes)


def _told_apart(steered: Sequence[Steered]) -> list[Steered]:
    """Steered ratings with names of their own, where one cell has several."""
    facts = [flat({name: each.cell.job.config.get(name) for name in SETTINGS}) for each in steered]
    names = [each.name for each in steered]
    several = [at for at, name in enumerate(names) if names.count(name) > 1]
    extras = telling([(names[at],) for at in several], [facts[at] for at in several], FIRST)
    named = list(steered)
    for at, extra in zip(several, extras, strict=True):
        named[at] = replace(named[at], name=" ".join([names[at], *(f"{key}={value}" for key, value in extra.items())]))
    return named


def steering_table(steered: Sequence[Steered]) -> pd.DataFrame:
    """One row a cell, vector and layer: slope and changes at coefficients -1 and 1, with the cell's conditions.

    ``null_slope`` is the largest slope, without its sign, of the vectors that mean nothing (random directions and
    shuffled labels) at the same layer.
    """
    rows: list[dict[str, object]] = []
    for each in steered:
        slopes = each.slopes
        nothing = slopes.loc[slopes["control"].isin(EMPTY), :]
        null: dict[int, float] = {}
        for layer, slope in zip(nothing["layer"], nothing["slope"], strict=True):
            null[layer] = np.fmax(null.get(layer, np.nan), abs(float(slope)))
        for row in slopes.to_dict("records"):
            named: dict[str, object] = {"cell": each.name, "rater": each.cell.rater, "template": each.cell.key}
            named |= {"completing": level(each.cell, "completer"), "rating": level(each.cell, "rating")}
            named |= {name: row[name] for name in ("vector", "control", "layer", "n", "doses")}
            named |= {f"{name}{part}": row[f"{name}{part}"] for name in ESTIMATES for part in PARTS}
            rows.append(named | {"null_slope": null.get(row["layer"])})
    words = ("cell", "rater", "template", "completing", "rating", "vector", "control")
    return numeric(pd.DataFrame(rows), words=words) if rows else pd.DataFrame()


def dose_tables(steered: Sequence[Steered], found: Sequence[Grid]) -> dict[str, pd.DataFrame]:
    """What `plots.dose_response` draws of each grid, vector and layer, by title; of cells in no grid, by template.

    In a grid a panel is a condition of rating and a line one of completing; without one, a line is a cell.
    """
    in_grid = {cell.name: (grid, pair) for grid in found for pair, cell in grid.cells.items()}
    # As the levels are ordered, so are panels and lines.
    order = {name: (grid.rating.index(r), grid.completing.index(c)) for name, (grid, (c, r)) in in_grid.items()}
    parts: dict[tuple[str, str, int], list[pd.DataFrame]] = {}
    for each in sorted(steered, key=lambda each: order.get(each.cell.name, (0, 0))):
        of, panel, line = each.cell.key, each.cell.key, each.name
        if each.cell.name in in_grid:
            grid, (completing, rating) = in_grid[each.cell.name]
            told = each.name.removeprefix(each.cell.name)  # what tells several of a cell apart
            of, panel, line = grid.name, f"rated: {rating}", f"completed: {completing}{told}"
        doses = each.doses.loc[each.doses["control"] == CONCEPT, :]
        for layer, vector in doses[["layer", "vector"]].drop_duplicates().itertuples(index=False):
            rows = doses.loc[(doses["layer"] == layer) & (doses["vector"] == vector), :]
            parts.setdefault((of, vector, layer), []).append(rows.assign(panel=panel, line=line))
    return {f"{of}\n{vector}, layer {layer}": pd.concat(tables) for (of, vector, layer), tables in parts.items()}
