"""The figures of a comparison."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from prefs.comparison.conditions import Grid, violin_tables
from prefs.comparison.probe_tables import cosine_matrices
from prefs.comparison.probed import Probed
from prefs.comparison.steered import Steered, dose_tables
from prefs.comparison.tables import Block, agreement_matrices, refused_distribution
from prefs.data.task import ALL
from prefs.results import figures as plots
from prefs.results.summary import by_origin

# Figures of single cells, beyond which they crowd out the rest.
MOST_CELLS = 12
# Names at a side of a matrix, beyond which nobody reads it.
MOST_NAMES = 24
# Characters of a file's name, its ending apart.
LONGEST = 100


def draw(
    folder: Path,
    blocks: Sequence[Block],
    probed: Sequence[Probed],
    grids: Sequence[Grid],
    steered: Sequence[Steered],
    tables: Mapping[str, pd.DataFrame],
) -> dict[str, Path]:
    """The report's figures, each where there is something to show."""
    figures: dict[str, Path] = {}
    by = tables["stability_by"]
    counts = by["by"].value_counts().to_dict()
    for way in ("template", "rater", "origin", "cell"):
        rows = by.loc[by["by"] == way, :]
        # By cell says more only where neither template nor rater tells all cells apart.
        redundant = way == "cell" and (len(rows) in (counts["template"], counts["rater"]) or len(rows) > 2 * MOST_CELLS)
        alone = way == "rater" and len(rows) == 1 < counts["template"]
        if len(rows) and not redundant and not alone:
            name = f"stability_by_{way}"
            figures[name] = plots.stability_bars(folder / f"{name}.png", title=f"Stability by {way}", table=rows)
    shares = tables["distribution"]
    extra = {cell.name: "".join(f" {k}={v}" for k, v in cell.extra.items()) for block in blocks for cell in block.cells}
    names = zip(shares["rater"], shares["cell"], strict=True)
    shares = shares.assign(named=[f"{rater}{extra[cell]}" for rater, cell in names])
    for template, rows in shares.loc[shares["origin"] == ALL, :].groupby("template", sort=False):
        name = f"ratings_{template}"
        figures[name] = plots.rating_distribution(
            folder / f"{_plain(name)}.png", title=f"Ratings by rater: {template}", table=rows, by="named"
        )
    for between, of in (("templates", "rater"), ("raters", "template")):
        panels = agreement_matrices(tables["agreement"], between)
        if panels:
            name = f"agreement_{between}"
            figures[name] = plots.matrices(
                folder / f"{name}.png", title=f"Agreement between {between}, by {of}", panels=panels
            )
    for at, (condition, rows) in enumerate(tables["variance"].groupby("condition", sort=False)):
        if rows["share"].notna().to_numpy().any():
            name = f"variance_{at}" if at else "variance"
            title = "Where the noise comes from" + (f": {condition}" if condition else "")
            figures[name] = plots.variance_shares(folder / f"{name}.png", title=title, table=rows)
    for cell in [cell for block in blocks for cell in block.cells][:MOST_CELLS]:
        if (cell.measured.refused == 1).any():
            name = f"refused_{cell.name}"
            figures[name] = plots.refused_by_origin(
                folder / f"{_plain(name)}.png",
                title=f"Ratings of refused tasks and of the others: {cell.name}",
                table=by_origin(refused_distribution(cell)),
            )
    return figures | _of_conditions(folder, grids, steered, tables) | _of_probes(folder, probed, tables)


def _of_conditions(
    folder: Path, grids: Sequence[Grid], steered: Sequence[Steered], tables: Mapping[str, pd.DataFrame]
) -> dict[str, Path]:
    figures: dict[str, Path] = {}
    for at, grid in enumerate(grids[:MOST_CELLS]):
        name = f"conditions_{at}" if at else "conditions"
        values, means = violin_tables(grid, tables["conditions"])
        figures[name] = plots.violins(
            folder / f"{name}.png",
            title=f"Ratings by condition: {grid.name}",
            table=values,
            means=means,
            label="condition the completion was written in",
        )
    for at, (title, doses) in enumerate(list(dose_tables(steered, grids).items())[:MOST_CELLS]):
        name = f"steering_{at}" if at else "steering"
        figures[name] = plots.dose_response(folder / f"{name}.png", title=f"Steered ratings: {title}", table=doses)
    return figures


def _of_probes(folder: Path, probed: Sequence[Probed], tables: Mapping[str, pd.DataFrame]) -> dict[str, Path]:
    figures: dict[str, Path] = {}
    if "probe_cosines" in tables:
        panels = cosine_matrices(tables["probe_cosines"], probed, all_targets=MOST_CELLS, most=MOST_NAMES)
        # A figure each: names are long, and side by side too small to be read.
        for at, (title, square) in enumerate(panels.items()):
            name = f"probe_cosines_{at}" if at else "probe_cosines"
            figures[name] = plots.matrices(
                folder / f"{name}.png",
                title="Cosine similarity of probes",
                panels={title: square},
                label="cosine of the directions",
            )
    if "probe_transfer" in tables:
        table = tables["probe_transfer"]
        if max(len(set(table[side])) for side in ("trained_on", "tested_on")) <= MOST_NAMES:
            figures["probe_transfer"] = plots.transfer(
                folder / "probe_transfer.png",
                title="Probe transfer\nthe probe reads the row's model;\nscored against the column's ratings",
                table=table.drop_duplicates(["trained_on", "tested_on"]),
            )
    return figures


def _plain(name: str) -> str:
    """A name as a file can have it anywhere: no odd characters, and not too long."""
    plain = "".join(each if each.isascii() and (each.isalnum() or each in "-_.=") else "_" for each in name)
    if plain == name and len(plain) <= LONGEST:
        return plain
    return f"{plain[: LONGEST - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
