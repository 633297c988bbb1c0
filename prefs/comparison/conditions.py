"""Ratings by the condition a completion was written in and the one it is rated in: grids of cells, and their tables.

Pure functions of cells. The completions differ by design, so tasks are matched by id and prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from prefs.comparison.cells import FIRST, Cell, flat, telling
from prefs.data.task import ALL
from prefs.results.summary import columns, groups_by_origin, numeric
from prefs.results.terminal import with_interval
from prefs.statistics.estimates import Estimate, known_mean
from prefs.statistics.factorial import Contrast, Factorial, factorial
from prefs.statistics.measured import Measured

# The first factor and the second, by the section of the config that has the condition.
ROLES = ("completer", "rating")
COMPLETING, RATING, INTERACTION, RESIDUAL = "completing", "rating", "completing × rating", "task × condition"
RATING_OVER_COMPLETING = "rating over completing"
EXACT, SAMPLED = "exact", "sampled"
# The level of a job that names no condition and has no system prompt.
NONE = "no condition"
NO_RATING = "no valid rating"
WORDS = ("grid", "rater", "template", "completing", "rating", "origin", "ratings", "of", "contrast", "over", "source")


@dataclass(frozen=True, eq=False)
class Grid:
    """Cells that differ in nothing but the conditions of completing and of rating.

    Attributes
    ----------
    name
        Rater and template, and what else tells the grid from others of the sweep.
    completing, rating
        Levels of the two factors, in the order of the concept's conditions.
    cells
        By the two levels; some may be missing.
    tasks, origins
        All tasks of any cell, and where each is from.
    """

    name: str
    rater: str
    key: str
    completing: tuple[str, ...]
    rating: tuple[str, ...]
    cells: Mapping[tuple[str, str], Cell]
    tasks: tuple[tuple[str, str], ...]
    origins: tuple[str, ...]

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of ratings there are: exact, and means over sampled seeds. The same for all cells of a grid."""
        some = next(iter(self.cells.values())).measured
        there = {EXACT: some.exact is not None, SAMPLED: some.sampled.shape[1] > 0}
        return tuple(kind for kind, has in there.items() if has)

    @property
    def seeds(self) -> int:
        return next(iter(self.cells.values())).measured.sampled.shape[1]

    @property
    def missing(self) -> list[str]:
        """The combinations of levels without a cell."""
        pairs = [(c, r) for c in self.completing for r in self.rating]
        return [f"completed {c} and rated {r}" for c, r in pairs if (c, r) not in self.cells]

    def values(self, kind: str) -> np.ndarray:
        """[T, C, R] rating of each task in each cell, NaN where there is none: the exact mean, or that over seeds."""
        y = np.full((len(self.tasks), len(self.completing), len(self.rating)), np.nan)
        for (c, r), cell in self.cells.items():
            means = _means(cell, kind)
            at = self._rows[c, r]
            y[at, self.completing.index(c), self.rating.index(r)] = means
        return y

    def valid(self, pair: tuple[str, str], kind: str) -> np.ndarray:
        """[T] valid mass of each task's exact rating, or the share of its sampled answers that are valid."""
        measured = self.cells[pair].measured
        share = measured.exact.valid_mass if kind == EXACT and measured.exact is not None else _share_valid(measured)
        valid = np.full(len(self.tasks), np.nan)
        valid[self._rows[pair]] = share
        return valid

    @cached_property
    def _rows(self) -> dict[tuple[str, str], list[int]]:
        where = {task: row for row, task in enumerate(self.tasks)}
        return {pair: [where[task] for task in cell.tasks()] for pair, cell in self.cells.items()}


def _means(cell: Cell, kind: str) -> np.ndarray:
    measured = cell.measured
    return measured.exact.mean if kind == EXACT and measured.exact is not None else measured.seed_means


def _share_valid(measured: Measured) -> np.ndarray:
    return np.isfinite(measured.sampled).mean(axis=1)


def grids(cells: Sequence[Cell]) -> list[Grid]:
    """Groups of cells that differ in their conditions alone, where at least one role has several."""
    found: dict[str, dict[tuple[str, str], Cell]] = {}
    facts: dict[str, dict[str, str]] = {}
    for cell in cells:
        base = _base(cell)
        same = json.dumps([cell.rater, cell.key, base], sort_keys=True)
        found.setdefault(same, {})[level(cell, "completer"), level(cell, "rating")] = cell
        facts[same] = base
    several = {same: there for same, there in found.items() if len(there) > 1}
    firsts = [next(iter(there.values())) for there in several.values()]
    names = [(cell.rater, cell.key) for cell in firsts]
    extras = telling(names, [facts[same] for same in several], ("concept.name", *FIRST))
    made = []
    for (rater, key), extra, there in zip(names, extras, several.values(), strict=True):
        name = " ".join([f"{rater}-{key}", *(f"{fact}={value}" for fact, value in extra.items())])
        tasks = {
            task: origin
            for cell in there.values()
            for task, origin in zip(cell.tasks(), cell.measured.origins, strict=True)
        }
        first, second = (_ordered(there, at) for at in range(2))
        made.append(Grid(name, rater, key, first, second, there, tuple(tasks), tuple(tasks.values())))
    return made


def _base(cell: Cell) -> dict[str, str]:
    """What a cell is but for its conditions; with the concept, in which a condition's name has its meaning."""
    config, aside = cell.job.config, set()
    for role in ROLES:
        aside.add(f"{role}.condition")
        if config[role].get("condition") is not None or config[role].get("system_prompt") is None:
            aside.add(f"{role}.system_prompt")
    concept = next(iter((config.get("concept") or {}).values()), {})
    meaning = {name: concept.get(name) for name in ("name", "conditions")}
    return {key: value for key, value in cell.facts.items() if key not in aside} | flat({"concept": meaning})


def level(cell: Cell, role: str) -> str:
    """The condition a cell is in when it completes (``completer``) or rates (``rating``)."""
    name = cell.job.config[role].get("condition")
    return NONE if name is None else str(name)


def _ordered(there: Mapping[tuple[str, str], Cell], at: int) -> tuple[str, ...]:
    """Levels of a factor in the order of the concept's conditions, then others as they come."""
    used = dict.fromkeys(pair[at] for pair in there)
    concepts = next(iter(there.values())).job.config.get("concept") or {}
    conditions = next(iter(concepts.values()), {}).get("conditions") or {}
    return tuple(dict.fromkeys([*(name for name in conditions if name in used), *used]))


def condition_table(found: Sequence[Grid], *, resamples: int, seed: int) -> pd.DataFrame:
    """One row a grid, condition of completing, condition of rating, origin and kind of rating.

    ``mean`` and ``sd`` are over the tasks that have a rating there (``n``); ``valid`` is the mean valid mass of exact
    ratings, or the share of sampled answers that are valid.
    """
    rows: list[dict[str, object]] = []
    for grid in found:
        groups = groups_by_origin(grid.origins, resamples, seed)
        for kind in grid.kinds:
            y = grid.values(kind)
            for pair in _pairs(grid):
                of_cell = y[:, grid.completing.index(pair[0]), grid.rating.index(pair[1])]
                valid = grid.valid(pair, kind)
                for group in groups:
                    values = of_cell[group.tasks]
                    mean = known_mean(values, group.draws, NO_RATING)
                    row = _named(grid) | {"completing": pair[0], "rating": pair[1], "origin": group.origin}
                    row |= {"ratings": kind, "n": mean.n, **columns("mean", mean)}
                    row["sd"] = np.nanstd(values, ddof=1) if mean.n > 1 else None
                    rows.append(row | {"valid": _mean(valid[group.tasks])})
    return numeric(pd.DataFrame(rows), words=WORDS) if rows else pd.DataFrame()


def _mean(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def _pairs(grid: Grid) -> list[tuple[str, str]]:
    """The levels of the cells that are there, in order."""
    return [(c, r) for c in grid.completing for r in grid.rating if (c, r) in grid.cells]


def _named(grid: Grid) -> dict[str, object]:
    return {"grid": grid.name, "rater": grid.rater, "template": grid.key}


@dataclass(frozen=True, eq=False)
class Effects:
    """What conditions do: `effects`, one row a grid, kind of rating and contrast; `shares`, one a source of variation.

    Contrasts are in rating points, and ``standardised`` by the SD over tasks. Of a main effect ``over`` are the levels
    of the other factor that it is averaged over. ``rating over completing`` is by how much the outermost contrast of
    rating is larger than that of completing, without their signs.
    """

    effects: pd.DataFrame
    shares: pd.DataFrame


def condition_effects(found: Sequence[Grid], *, resamples: int, seed: int) -> Effects:
    """Main effects, interaction, and shares of the variation within tasks, over tasks that have all their ratings."""
    effects: list[dict[str, object]] = []
    shares: list[dict[str, object]] = []
    for grid in found:
        draws = groups_by_origin(grid.origins, resamples, seed)[0].draws
        for kind in grid.kinds:
            result = factorial(grid.values(kind), draws)
            names = _named(grid) | {"ratings": kind}
            counts = {"n": result.n, "left_out": result.left_out}
            effects += [names | row | counts for row in _effect_rows(grid, result)]
            of = result.shares
            sources = {COMPLETING: of.first, RATING: of.second, INTERACTION: of.interaction, RESIDUAL: of.residual}
            shares += [names | {"source": name} | columns("share", each) | counts for name, each in sources.items()]
    if not effects:
        return Effects(pd.DataFrame(), pd.DataFrame())
    return Effects(*(numeric(pd.DataFrame(rows), words=WORDS) for rows in (effects, shares)))


def _effect_rows(grid: Grid, result: Factorial) -> list[dict[str, object]]:
    def row(of: str, contrast: str, over: Sequence[str], points: Estimate, standardised: Estimate) -> dict[str, object]:
        row: dict[str, object] = {"of": of, "contrast": contrast, "over": ", ".join(over)}
        return row | columns("points", points) | columns("standardised", standardised)

    def main(of: str, contrast: Contrast, pair: Sequence[str], over: Sequence[str]) -> dict[str, object]:
        return row(of, " − ".join(pair), over, contrast.points, contrast.standardised)

    rows = []
    for each in result.first:
        rows.append(main(COMPLETING, each, _of(grid.completing, each.first), _of(grid.rating, each.second)))
    for each in result.second:
        rows.append(main(RATING, each, _of(grid.rating, each.second), _of(grid.completing, each.first)))
    crossed = result.interaction
    if crossed is not None:
        outer = _of(grid.completing, crossed.first), _of(grid.rating, crossed.second)
        text = " × ".join(f"({' − '.join(pair)})" for pair in outer)
        rows.append(row(INTERACTION, text, (), crossed.points, crossed.standardised))
        text = " − ".join(f"|{' − '.join(pair)}|" for pair in reversed(outer))
        none = Estimate.missing("a difference of two effects", result.n)
        rows.append(row(RATING_OVER_COMPLETING, text, (), result.second_over_first, none))
    return rows


def _of(levels: Sequence[str], chosen: Sequence[int]) -> list[str]:
    return [levels[at] for at in chosen]


def condition_remarks(found: Sequence[Grid], found_effects: Effects) -> list[str]:
    """Which context dominates in each grid, in plain words, and what to know when reading it."""
    said: list[str] = []
    for grid in found:
        kind = grid.kinds[0]
        rows, shares = (
            table.loc[(table["grid"] == grid.name) & (table["ratings"] == kind), :].to_dict("records")
            for table in (found_effects.effects, found_effects.shares)
        )
        said.append(f"{grid.name}: {_dominance(grid, rows)}{_shares(shares)}")
        if grid.missing:
            said.append(
                f"{grid.name}: there is no cell {' or '.join(grid.missing)}; main effects are over the levels that have"
                " both sides, and shares of variation are not known."
            )
        left_out = int(rows[0]["left_out"])
        if left_out:
            said.append(f"{grid.name}: effects are without {left_out} tasks that lack a rating in some cell.")
        said += _own_completions(grid)
    seeds = sorted({grid.seeds for grid in found if SAMPLED in grid.kinds})
    if seeds:
        counts = " or ".join(map(str, seeds))
        said.append(
            f"Sampled ratings by condition are of {counts} rating seed{'s' * (seeds != [1])} a task, whose noise widens"
            " their spread and lowers the shares of variation; exact ratings have none of it."
        )
    return said


def _dominance(grid: Grid, rows: Sequence[Mapping]) -> str:
    outer = {COMPLETING: grid.completing, RATING: grid.rating}
    contrasts = {of: " − ".join((levels[0], levels[-1])) for of, levels in outer.items()}
    of = {row["of"]: row for row in rows if contrasts.get(row["of"], row["contrast"]) == row["contrast"]}
    if RATING_OVER_COMPLETING not in of:
        varied = COMPLETING if len(grid.completing) > 1 else RATING
        effect = of[varied]
        if pd.isna(effect["points"]):
            return f"what the condition of {varied} does is not known ({effect['points_reason']})."
        return (
            f"{varied} under {outer[varied][0]} instead of {outer[varied][-1]} moves ratings by"
            f" {with_interval(effect, 'points')} points; the other context was not varied."
        )
    difference = of[RATING_OVER_COMPLETING]
    if pd.isna(difference["points"]):
        return f"which context dominates is not known ({difference['points_reason']})."
    low, high = difference["points_low"], difference["points_high"]
    if pd.isna(low):
        verdict = "without intervals (stats.bootstrap=0) there is no saying which dominates"
    elif low > 0 or high < 0:
        verdict = f"the {RATING if low > 0 else COMPLETING} context dominates"
    else:
        verdict = f"neither context clearly dominates (they differ by {with_interval(difference, 'points')})"
    rated, completed = (
        f"under {outer[role][0]} instead of {outer[role][-1]}{moves} by {with_interval(of[role], 'points')}"
        for role, moves in ((RATING, " moves ratings"), (COMPLETING, ""))
    )
    return f"being rated {rated} points, having been completed {completed}: {verdict}."


def _shares(rows: Sequence[Mapping]) -> str:
    """The levels between the outermost count here too."""
    of = {row["source"]: with_interval(row, "share") for row in rows if pd.notna(row["share"])}
    if RATING not in of or COMPLETING not in of:
        return ""
    return f" Of the variation within tasks, {of[RATING]} is rating's and {of[COMPLETING]} completing's."


def _own_completions(grid: Grid) -> list[str]:
    """Whether cells that were completed under the same condition rated different texts."""
    for level in grid.completing:
        texts: dict[tuple[str, str], str] = {}
        for (c, _), cell in grid.cells.items():
            for task, text in zip(cell.tasks(), cell.texts["completion"].fillna(""), strict=True) if c == level else ():
                if texts.setdefault(task, text) != text:
                    return [
                        f"{grid.name}: cells completed under {level} rated different completions, so effects of rating"
                        " hold what these differ by."
                    ]
    return []


def violin_tables(grid: Grid, table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What `plots.violins` draws of a grid, and its means from `condition_table`.

    A row a kind of rating, a panel a condition of rating, a violin a condition of completing.
    """
    labels = {EXACT: "exact mean of a task", SAMPLED: f"mean of {grid.seeds} sampled ratings"}
    parts = []
    for kind in grid.kinds:
        y = grid.values(kind)
        for c, r in np.ndindex(*y.shape[1:]):
            names = {"row": labels[kind], "panel": f"rated: {grid.rating[r]}", "violin": grid.completing[c]}
            parts.append(pd.DataFrame({**names, "value": y[:, c, r]}))
    means = table.loc[(table["grid"] == grid.name) & (table["origin"] == ALL), :]
    means = means.assign(
        row=means["ratings"].map(labels), panel="rated: " + means["rating"].astype(str), violin=means["completing"]
    )
    shown = ["row", "panel", "violin", "n", "mean", "mean_low", "mean_high"]
    return pd.concat(parts, ignore_index=True), means.loc[:, shown]
