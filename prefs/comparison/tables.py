"""Cells side by side: the tables of a comparison. Pure functions of cells that are on the same tasks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from prefs.comparison.cells import SEED, Cell
from prefs.data.task import ALL
from prefs.results.summary import (
    Group,
    Stability,
    columns,
    distribution_table,
    groups_by_origin,
    numeric,
    refusal_table,
    refusals,
    stability,
    stability_table,
)
from prefs.statistics.agreement import correlation
from prefs.statistics.estimates import Resamples
from prefs.statistics.variance import pomp, variance_decomposition

AGREEMENT_COLUMNS = (
    "between", "of", "a", "b", "completion_seed", "condition", "means", "n", "r", "r_low", "r_high", "r_reason",
)  # fmt: skip
# Cells by the indices of completion seed, template and rater.
Grid = Mapping[tuple[int, ...], Cell]
NAMES = ("cell", "rater", "template", "completer", "dataset", "condition")


@dataclass(frozen=True)
class Block:
    """Cells on the same tasks in the same order, and the stability of each, by group of tasks (all of them first)."""

    cells: tuple[Cell, ...]
    groups: tuple[Group, ...]
    stability: tuple[tuple[Stability, ...], ...]

    @classmethod
    def of(cls, cells: Sequence[Cell], *, resamples: int, seed: int, target_r: float) -> Block:
        """Describe cells; they share their resamples, so that their intervals can be compared."""
        groups = groups_by_origin(cells[0].measured.origins, resamples, seed)
        rows = tuple(tuple(stability(cell.measured, groups, target_r)) for cell in cells)
        return cls(tuple(cells), tuple(groups), rows)

    @property
    def all_tasks(self) -> Group:
        return self.groups[0]


def cell_table(blocks: Sequence[Block]) -> pd.DataFrame:
    """One row a cell and origin: everything that `prefs.results.summary.stability_table` has."""
    return _stack(
        (cell, stability_table(rows))
        for block in blocks
        for cell, rows in zip(block.cells, block.stability, strict=True)
    )


def refusals_of_cells(blocks: Sequence[Block]) -> pd.DataFrame:
    """One row a cell and origin: refusal × rating."""
    return _stack(
        (cell, refusal_table(refusals(cell.measured, block.groups))) for block in blocks for cell in block.cells
    )


def distributions(blocks: Sequence[Block]) -> pd.DataFrame:
    """One row a cell, origin and option: how often each rating is given."""
    return _stack((cell, distribution_table(cell.measured, block.groups)) for block in blocks for cell in block.cells)


def refused_distribution(cell: Cell) -> pd.DataFrame:
    """One row an origin, verdict and option: ratings of refused tasks and of the others, as `plots` draws them.

    Shares are of the exact distribution where there is one, else of the valid sampled ratings.
    """
    measured = cell.measured
    origins = np.array(measured.origins, dtype=object)
    share = "sampled_share" if measured.exact is None else "exact_share"
    tables = []
    for verdict in (1, 0):
        chosen = {ALL: np.flatnonzero(measured.refused == verdict)}
        chosen |= {origin: chosen[ALL][origins[chosen[ALL]] == origin] for origin in dict.fromkeys(measured.origins)}
        groups = [Group(origin, tasks, Resamples.none(len(tasks))) for origin, tasks in chosen.items()]
        table = distribution_table(measured, groups).assign(refused=verdict)
        tables.append(table.rename(columns={share: "share"}))
    return pd.concat(tables, ignore_index=True).loc[:, ["origin", "option", "value", "refused", "n", "share"]]


def stability_by(blocks: Sequence[Block]) -> pd.DataFrame:
    """Stability by template, by rater, by origin, and of each cell: what the report's bars show.

    Cross-seed and informative r are means over all pairs of seeds of a group's cells, with the SD over these pairs; d
    and the predicted r are means over its cells. By origin, a cell counts with that origin's tasks.
    """
    rows: list[dict[str, object]] = []
    every = [(cell, of_cell) for block in blocks for cell, of_cell in zip(block.cells, block.stability, strict=True)]
    origins = list(dict.fromkeys(row.origin for _, of_cell in every for row in of_cell[1:]))
    ways: dict[str, Callable[[Cell], str]] = {
        "template": lambda cell: cell.key,
        "rater": lambda cell: cell.rater,
        "cell": lambda cell: cell.name,
    }
    for way, name in ways.items():
        for group in dict.fromkeys(name(cell) for cell, _ in every):
            chosen = [of_cell[0] for cell, of_cell in every if name(cell) == group]
            rows.append({"by": way, "group": group, **_pooled(chosen)})
    for origin in origins:
        chosen = [row for _, of_cell in every for row in of_cell if row.origin == origin]
        rows.append({"by": "origin", "group": origin, **_pooled(chosen)})
    return numeric(pd.DataFrame(rows), words=("by", "group"))


def _pooled(rows: Sequence[Stability]) -> dict[str, object]:
    across = [row.cross_seed for row in rows]
    pooled: dict[str, object] = {"cells": len(rows)}
    for name, kinds in (
        ("cross_seed_r", [each.pearson for each in across]),
        ("informative_r", [each.informative.r for each in across]),
    ):
        r = [pair.r.value for kind in kinds for pair in kind.pairs if pair.r.value is not None]
        pooled |= {name: np.mean(r) if r else None, f"{name}_sd": np.std(r, ddof=1) if len(r) > 1 else None}
        pooled[f"{name}_pairs"] = len(r)
    predicted = [row.exact.predicted_r.value if row.exact is not None else None for row in rows]
    pooled["d"] = _mean_of_known(each.informative.d.value for each in across)
    pooled["predicted_r"] = _mean_of_known(predicted)
    return pooled


def agreement(blocks: Sequence[Block]) -> pd.DataFrame:
    """Correlation over tasks between templates (of one rater) and between raters (of one template).

    Of exact means where both cells have them, else of the means over seeds, whose noise lowers every correlation. One
    row a pair, for each completion seed and condition in which both were measured.
    """
    rows: list[dict[str, object]] = []
    for block in blocks:
        for a, b in itertools.combinations(block.cells, 2):
            if a.extra != b.extra or (a.rater == b.rater) == (a.key == b.key):
                continue
            between = "templates" if a.rater == b.rater else "raters"
            exact = a.measured.exact is not None and b.measured.exact is not None
            x, y = (each.measured.task_means if exact else each.measured.seed_means for each in (a, b))
            r = correlation(x, y, block.all_tasks.draws)
            names = (a.key, b.key) if between == "templates" else (a.rater, b.rater)
            rows.append(
                {
                    "between": between,
                    "of": a.rater if between == "templates" else a.key,
                    "a": names[0],
                    "b": names[1],
                    "completion_seed": a.completion_seed,
                    "condition": a.condition,
                    "means": "exact" if exact else "over seeds",
                    "n": r.n,
                    **columns("r", r),
                }
            )
    table = pd.DataFrame(rows, columns=AGREEMENT_COLUMNS)
    return numeric(table, words=("between", "of", "a", "b", "condition", "means"))


def agreement_matrices(table: pd.DataFrame, between: str) -> dict[str, pd.DataFrame]:
    """Square matrices of `agreement`, one for each rater (or template) and condition; means over completion seeds."""
    found: dict[str, dict[tuple[str, str], list[float]]] = {}
    for row in table.to_dict("records"):
        if row["between"] != between:
            continue
        panel = " ".join(part for part in (row["of"], row["condition"]) if part)
        found.setdefault(panel, {}).setdefault((row["a"], row["b"]), []).append(row["r"])
    panels = {}
    for panel, pairs in found.items():
        names = list(dict.fromkeys(name for pair in pairs for name in pair))
        square = pd.DataFrame(np.eye(len(names)), index=names, columns=names)
        for (a, b), r in pairs.items():
            square.loc[a, b] = square.loc[b, a] = np.mean(r)
        panels[panel] = square
    return panels


@dataclass(frozen=True)
class Variances:
    """Where the noise comes from: one row a condition and source, and what to know when reading it."""

    table: pd.DataFrame
    remarks: tuple[str, ...]


def variance(blocks: Sequence[Block]) -> Variances:
    """Variance decomposition over task, template, rater, completion seed and rating seed, in each condition.

    Ratings are rescaled to 0..1, so that scales of different lengths count alike. Exact ratings are used where all
    cells have them: then the rating seed's share is known without sampling.
    """
    rows: list[dict[str, object]] = []
    remarks: list[str] = []
    seen: list[str] = []
    for block in blocks:
        by_condition: dict[str, list[Cell]] = {}
        for cell in block.cells:
            by_condition.setdefault(cell.condition, []).append(cell)
        for condition, cells in by_condition.items():
            seen.append(condition)
            if seen.count(condition) > 1:  # the same settings on other tasks
                condition = f"{condition} (other tasks {seen.count(condition) - 1})".strip()
            grid, left_out = _full_grid(cells)
            where = f" ({condition})" if condition else ""
            if left_out:
                remarks.append(f"Variance decomposition{where}: without {', '.join(left_out)}, which lack cells.")
            exact = all(cell.measured.sampling_known for cell in cells)
            found = variance_decomposition(*_facets(grid, exact), block.all_tasks.draws)
            for each in found.components:
                row: dict[str, object] = {"condition": condition, "source": each.name, "holds": ", ".join(each.holds)}
                row |= columns("share", each.share) | columns("variance", each.variance)
                row |= {"n": found.n, "left_out": found.left_out, "ratings": "exact" if exact else "sampled"}
                row |= {
                    facet.replace(" ", "_") + "s": count for facet, count in found.levels.items() if facet != "task"
                }
                rows.append(row)
            if found.left_out:
                remarks.append(
                    f"Variance decomposition{where}: without {found.left_out} tasks that lack a rating in some cell."
                )
    return Variances(numeric(pd.DataFrame(rows), words=("condition", "source", "holds", "ratings")), tuple(remarks))


def _full_grid(cells: Sequence[Cell]) -> tuple[Grid, list[str]]:
    """Cells by completion seed, template and rater, none missing, and the levels left out to make it so."""
    facets: dict[str, Callable[[Cell], str]] = {
        SEED: lambda cell: str(cell.completion_seed),
        "template": lambda cell: cell.key,
        "rater": lambda cell: cell.rater,
    }
    levels = {name: list(dict.fromkeys(map(of, cells))) for name, of in facets.items()}
    there = {tuple(of(cell) for of in facets.values()): cell for cell in cells}
    left_out: list[str] = []
    while True:
        combinations = list(itertools.product(*levels.values()))
        if all(each in there for each in combinations):
            break
        # The level with the smallest share of its cells goes, the last of several.
        worst = min(
            ((at, level) for at, name in enumerate(facets) for level in reversed(levels[name])),
            key=lambda pair: np.mean([each in there for each in combinations if each[pair[0]] == pair[1]]),
        )
        name = list(facets)[worst[0]]
        levels[name].remove(worst[1])
        left_out.append(f"{name} {worst[1]}")
    shape = tuple(len(each) for each in levels.values())
    return {at: there[each] for at, each in zip(np.ndindex(shape), combinations, strict=True)}, left_out


def _facets(grid: Grid, exact: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rating, variance of one sampled rating, and variance of the rating itself, each [T, C, M, R] on 0..1."""
    tasks = len(grid[0, 0, 0].measured.tasks)
    shape = [1 + most for most in max(grid)]
    y, sampling, noise = (np.full((tasks, *shape), np.nan) for _ in range(3))
    for at, cell in grid.items():
        measured = cell.measured
        low, high = min(measured.values), max(measured.values)
        here = (slice(None), *at)
        if exact and measured.exact is not None:
            y[here] = pomp(measured.exact.mean, low, high)
            sampling[here] = measured.exact.variance / (high - low) ** 2
            noise[here] = measured.exact.uncertainty / (high - low) ** 2
        else:
            x = pomp(measured.sampled, low, high)
            k = np.isfinite(x).sum(axis=1)
            y[here] = pomp(measured.seed_means, low, high)
            within = np.nansum((x - y[here][:, None]) ** 2, axis=1)
            # Pooled over tasks: one task's own variance of a few ratings is mostly chance.
            pooled = within.sum() / (k - 1).clip(min=0).sum() if (k > 1).any() else np.nan
            sampling[here] = pooled
            noise[here] = np.divide(pooled, k, out=np.full(tasks, np.nan), where=k > 0)
    return y, sampling, noise


def _stack(parts: Iterable[tuple[Cell, pd.DataFrame]]) -> pd.DataFrame:
    """Tables of cells under each other, each row with its cell's names."""
    frames = []
    for cell, table in parts:
        names = dict(
            zip(NAMES, (cell.name, cell.rater, cell.key, cell.completer, cell.dataset, cell.condition), strict=True)
        )
        frames.append(
            table.assign(**names, completion_seed=cell.completion_seed)[[*names, "completion_seed", *table.columns]]
        )
    return pd.concat(frames, ignore_index=True)


def _mean_of_known(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
