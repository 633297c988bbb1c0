"""How stable and informative each cell's ratings are, and the groups of cells by template, rater and origin."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from prefs.comparison.cells import Sweep
from prefs.comparison.show import MOST_CELLS, counted, names_column, numbers, short_names, telling_columns
from prefs.results import figures
from prefs.results.result import Excerpt, Figure, Result, Table, View, figure
from prefs.results.stability import Stability, mode, r_and_sd, stability_table
from prefs.results.tables import by_origin, distinct, numeric, whole
from prefs.results.terminal import number
from prefs.statistics.measured import DIRECT

NOTE = (
    "Cross-seed r: Pearson over tasks between two rating seeds, mean over pairs. Informative r: the same where at least"
    " one of the two ratings is off the cell's mode; d is the share of such tasks. Predicted r and valid mass are from"
    " exact ratings. Of a rater that thinks these are after one thought, or of the mixture over several (kind)."
    " Brackets are 95 % intervals over tasks."
)
METRICS = ("cross_seed_r", "informative_r", "d", "icc1", "predicted_r", "valid_mass")


def stability_of_cells(sweep: Sweep) -> Result:
    """Every cell's stability by origin, and pooled."""
    cells = sweep.stacked(lambda block, cell: stability_table(block.stability[cell]))
    pooled = stability_by(sweep)
    all_tasks = whole(cells)
    shown = (
        Excerpt("All cells", telling_columns(all_tasks.drop(columns="origin"))),
        Excerpt("Cells by origin", telling_columns(by_origin(cells))),
    )
    return Result(
        "Stability",
        NOTE,
        (
            Table("cells", cells, excerpts=shown),
            Table("stability_by", pooled, "By template, rater and origin", "Pooled over pairs of seeds and cells."),
        ),
        (_view(all_tasks),),
        _figures(pooled),
        tuple(remark for row in all_tasks.to_dict("records") for remark in _remarks(row)),
        {
            f"compare/{name}/{row['cell']}/{row['origin']}": row[name]
            for row in cells.to_dict("records")
            for name in METRICS
        },
    )


def stability_by(sweep: Sweep) -> pd.DataFrame:
    """Stability by template, by rater, of each cell, and by origin.

    Cross-seed and informative r are means over all pairs of seeds of a group's cells, with the SD over these pairs; d
    and the predicted r are means over its cells. By origin, a cell counts with that origin's tasks.
    """
    groups: dict[tuple[str, str], list[Stability]] = {}
    rows = [(cell, block.stability[cell]) for block in sweep.blocks for cell in block.cells]
    for way, name in (("template", "key"), ("rater", "rater"), ("cell", "name")):
        for cell, of_cell in rows:
            groups.setdefault((way, getattr(cell, name)), []).append(of_cell[0])
    for row in (row for _, of_cell in rows for row in of_cell[1:]):
        groups.setdefault(("origin", row.origin), []).append(row)
    pooled = [{"by": way, "group": group, **_pooled(members)} for (way, group), members in groups.items()]
    return numeric(pd.DataFrame(pooled), words=("by", "group"))


def _pooled(rows: Sequence[Stability]) -> dict[str, object]:
    pooled: dict[str, object] = {"cells": len(rows)}
    for name, pairs in (
        ("cross_seed_r", [r for row in rows for r in row.cross_seed.pearson.pairs.values()]),
        ("informative_r", [r for row in rows for r in row.cross_seed.informative.r.pairs.values()]),
    ):
        r = [pair.value for pair in pairs if pair.value is not None]
        pooled |= {name: np.mean(r) if r else None, f"{name}_sd": np.std(r, ddof=1) if len(r) > 1 else None}
        pooled[f"{name}_pairs"] = len(r)
    pooled["d"] = _mean(row.cross_seed.informative.d.value for row in rows)
    pooled["predicted_r"] = _mean(row.predicted_r.value for row in rows)
    return pooled


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _view(cells: pd.DataFrame) -> View:
    """All cells, over all their tasks. What is the same for all of them is said once, above."""
    raters = distinct(cells, "rater")
    rater = f"{raters[0]} on " if len(raters) == 1 else ""
    title = f"{rater}{counted(cells)} tasks: r is cross-seed r, mean ± SD over pairs of seeds; mode with its share"
    rows = [
        (
            name + ("" if row["kind"] == DIRECT else f" ({row['kind']})"),
            r_and_sd(row),
            number(row["informative_r"]),
            number(row["d"]),
            mode(row),
            number(row["predicted_r"]),
            number(row["valid_mass"]),
        )
        for name, row in zip(short_names(cells), cells.to_dict("records"), strict=True)
    ]
    return View(title, (names_column("cell", 24), *numbers("r ± SD", "inf. r", "d", "mode", "pred. r", "mass")), rows)


def _figures(pooled: pd.DataFrame) -> tuple[Figure, ...]:
    counts = pooled["by"].value_counts().to_dict()
    drawn = []
    for way in ("template", "rater", "origin", "cell"):
        rows = pooled.loc[pooled["by"] == way, :]
        # By cell says more only where neither template nor rater tells all cells apart.
        redundant = way == "cell" and (len(rows) in (counts["template"], counts["rater"]) or len(rows) > 2 * MOST_CELLS)
        alone = way == "rater" and len(rows) == 1 < counts["template"]
        if len(rows) and not redundant and not alone:
            title = f"Stability by {way}"
            drawn.append(figure(f"stability_by_{way}", figures.stability_bars, title=title, table=rows))
    return tuple(drawn)


def _remarks(row: dict) -> list[str]:
    """What would mislead a reader of a cell's numbers."""
    name, remarks = row["cell"], []
    if pd.isna(row["cross_seed_r"]):
        remarks.append(f"{name}: no cross-seed r ({row['cross_seed_r_reason']}).")
    if row["modal_share"] > 0.8:
        remarks.append(
            f"{name}: {row['modal_share']:.0%} of the ratings are {row['modal_rating']:g}, which flatters r;"
            f" informative r is {number(row['informative_r'])} on the {number(row['d'])} of tasks that are told apart."
        )
    if row["valid_mass"] < 0.5:
        remarks.append(
            f"{name}: only {row['valid_mass']:.0%} of the model's probability is on the options; that part is what is"
            " measured."
        )
    return remarks
