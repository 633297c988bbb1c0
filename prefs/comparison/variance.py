"""Where the noise of one sampled rating comes from: variance over task, template, rater, completion and rating seed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from rich.table import Column

from prefs.comparison.cells import SEED, Cell, Sweep
from prefs.comparison.show import numbered, numbers, table
from prefs.results import figures
from prefs.results.result import Result, View, figure
from prefs.results.tables import columns, distinct, numeric
from prefs.results.terminal import with_interval
from prefs.statistics.variance import pomp, variance_decomposition

# Conditions beyond which the sources of noise of each would fill the screen; the report has them all.
MOST_CONDITIONS = 4
NOTE = (
    "Random-effects variance components of one sampled rating, on scales from 0 to 1. Intervals are over tasks: of a"
    " handful of templates or raters they do not say how others would differ. A negative variance counts as 0 in the"
    " shares."
)
# Cells by the indices of completion seed, template and rater.
Grid = Mapping[tuple[int, ...], Cell]


def variance(sweep: Sweep) -> Result:
    """Variance decomposition in each condition.

    Ratings are rescaled to 0..1, so that scales of different lengths count alike. Exact ratings are used where all
    cells have them: then the rating seed's share is known without sampling.
    """
    rows: list[dict[str, object]] = []
    remarks: list[str] = []
    seen: list[str] = []
    for block in sweep.blocks:
        for condition in dict.fromkeys(cell.condition for cell in block.cells):
            cells = [cell for cell in block.cells if cell.condition == condition]
            seen.append(condition)
            if seen.count(condition) > 1:  # the same settings on other tasks
                condition = f"{condition} (other tasks {seen.count(condition) - 1})".strip()
            remark = "Variance decomposition" + (f" ({condition})" if condition else "")
            grid, left_out = full_grid(cells)
            if left_out:
                remarks.append(f"{remark}: without {', '.join(left_out)}, which lack cells.")
            exact = all(cell.measured.sampling_known for cell in cells)
            result = variance_decomposition(*_facets(grid, exact), block.groups[0].draws)
            if result.left_out:
                remarks.append(f"{remark}: without {result.left_out} tasks that lack a rating in some cell.")
            counts = {"n": result.n, "left_out": result.left_out, "ratings": "exact" if exact else "sampled"}
            counts |= {
                f"{facet.replace(' ', '_')}s": count for facet, count in result.levels.items() if facet != "task"
            }
            for part in result.components:
                row = {"condition": condition, "source": part.name, "holds": ", ".join(part.holds)}
                rows.append(row | columns("share", part.share) | columns("variance", part.variance) | counts)
    frame = numeric(pd.DataFrame(rows), words=("condition", "source", "holds", "ratings"))
    drawn = []
    for number, (condition, parts) in enumerate(frame.groupby("condition", sort=False)):
        if parts["share"].notna().to_numpy().any():
            title = "Where the noise comes from" + (f": {condition}" if condition else "")
            drawn.append(figure(numbered("variance", number), figures.variance_shares, title=title, table=parts))
    return Result(
        "Where the noise comes from",
        NOTE,
        (table("variance", frame, "Variance components"),),
        (_view(frame),) if drawn and len(distinct(frame, "condition")) <= MOST_CONDITIONS else (),
        tuple(drawn),
        tuple(remarks),
    )


def _view(frame: pd.DataFrame) -> View:
    """The sources that can be told apart, by condition."""
    rows: list[tuple[str, ...]] = []
    headings = set()
    for condition, parts in frame.groupby("condition", sort=False):
        if condition:
            headings.add(len(rows))
            rows.append((str(condition),))
        for row in parts.loc[parts["share"].notna(), :].to_dict("records"):
            rows.append((row["source"], with_interval(row, "share"), row["holds"]))
    title = "Where the noise comes from: share of the variance of one sampled rating"
    heads = ("source", *numbers("share [95 % over tasks]"), Column("not told apart from it", style="dim"))
    return View(title, heads, rows, frozenset(headings))


def full_grid(cells: Sequence[Cell]) -> tuple[Grid, list[str]]:
    """Cells by completion seed, template and rater, none missing, and the levels left out to make it so."""
    facets: dict[str, Callable[[Cell], str]] = {
        SEED: lambda cell: str(cell.completion_seed),
        "template": lambda cell: cell.key,
        "rater": lambda cell: cell.rater,
    }
    levels = {name: list(dict.fromkeys(map(facet, cells))) for name, facet in facets.items()}
    by_levels = {tuple(facet(cell) for facet in facets.values()): cell for cell in cells}
    left_out: list[str] = []
    while True:
        keys = list(itertools.product(*levels.values()))
        if all(key in by_levels for key in keys):
            break
        # The level with the smallest share of its cells goes, the last of several.
        facet, level = min(
            ((facet, level) for facet, name in enumerate(facets) for level in reversed(levels[name])),
            key=lambda pair: np.mean([key in by_levels for key in keys if key[pair[0]] == pair[1]]),
        )
        name = list(facets)[facet]
        levels[name].remove(level)
        left_out.append(f"{name} {level}")
    shape = tuple(map(len, levels.values()))
    return {index: by_levels[key] for index, key in zip(np.ndindex(shape), keys, strict=True)}, left_out


def _facets(grid: Grid, exact: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rating, variance of one sampled rating, and variance of the rating itself, each [T, C, M, R] on 0..1."""
    tasks = len(grid[0, 0, 0].measured.tasks)
    y, sampling, noise = (np.full((tasks, *(1 + last for last in max(grid))), np.nan) for _ in range(3))
    for index, cell in grid.items():
        measured = cell.measured
        low, high = min(measured.values), max(measured.values)
        place = (slice(None), *index)
        if exact and measured.exact is not None:
            y[place] = pomp(measured.exact.mean, low, high)
            sampling[place] = measured.exact.variance / (high - low) ** 2
            noise[place] = measured.exact.uncertainty / (high - low) ** 2
        else:
            x = pomp(measured.sampled, low, high)
            k = np.isfinite(x).sum(axis=1)
            y[place] = pomp(measured.seed_means, low, high)
            within = np.nansum((x - y[place][:, None]) ** 2, axis=1)
            # Pooled over tasks: one task's own variance of a few ratings is mostly chance.
            pooled = within.sum() / (k - 1).clip(min=0).sum() if (k > 1).any() else np.nan
            sampling[place] = pooled
            noise[place] = np.divide(pooled, k, out=np.full(tasks, np.nan), where=k > 0)
    return y, sampling, noise
