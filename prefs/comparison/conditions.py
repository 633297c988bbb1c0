"""Ratings by the condition a completion was written in and the one it is rated in: grids of cells.

The completions differ by design, so tasks are matched by id and prompt.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from prefs.comparison.cells import FIRST, Cell, Sweep, flat, named, telling
from prefs.comparison.show import MOST_CELLS, names_column, numbered, numbers, table, telling_columns
from prefs.results import figures
from prefs.results.result import Excerpt, Result, Table, View, figure
from prefs.results.tables import by_origin, columns, distinct, numeric, whole
from prefs.results.terminal import MISSING, number, with_interval
from prefs.statistics.estimates import Estimate, known_mean
from prefs.statistics.factorial import Factorial, factorial

# The first factor and the second, by the section of the config that has the condition.
ROLES = ("completer", "rating")
COMPLETING, RATING, INTERACTION, RESIDUAL = "completing", "rating", "completing × rating", "task × condition"
RATING_OVER_COMPLETING = "rating over completing"
EXACT, SAMPLED = "exact", "sampled"
# The level of a job that names no condition and has no system prompt.
NONE = "no condition"
WORDS = ("grid", "rater", "template", "completing", "rating", "origin", "ratings", "of", "contrast", "over", "source")
NOTE = (
    "How much does the condition that a completion was written in move its rating, and how much the condition it is"
    " rated in? The same tasks in all; cells completed under one condition share their completions. Violins are over"
    " tasks; dots are means with 95 % intervals over tasks."
)
MEANS_NOTE = (
    "Over the tasks that have a rating there. valid is the mean valid mass of exact ratings, or the share of sampled"
    " answers that are valid."
)
EFFECTS_NOTE = (
    "Differences in rating points, over the tasks that have all their ratings; of a main effect, averaged over the"
    " levels of the other factor (over). standardised is divided by the SD over tasks: the root of the mean over"
    " conditions of the variance over tasks. The interaction is a difference of differences. rating over completing"
    " compares the two outermost contrasts without their signs."
)
SHARES_NOTE = (
    "Sums of squares of a task's ratings about the task's mean over conditions. What differs from task to task in how"
    " conditions move it is task × condition, which in sampled ratings holds the seeds' noise."
)


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
    tasks
        All tasks of any cell, with where each is from.
    """

    name: str
    completing: tuple[str, ...]
    rating: tuple[str, ...]
    cells: Mapping[tuple[str, str], Cell]
    tasks: Mapping[tuple[str, str], str]

    @property
    def first(self) -> Cell:
        return next(iter(self.cells.values()))

    @property
    def names(self) -> dict[str, object]:
        return {"grid": self.name, "rater": self.first.rater, "template": self.first.key}

    @property
    def seeds(self) -> int:
        return self.first.measured.sampled.shape[1]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of ratings: exact, and means over sampled seeds. The same for all cells of a grid."""
        kinds = {EXACT: self.first.measured.exact is not None, SAMPLED: self.seeds > 0}
        return tuple(kind for kind, measured in kinds.items() if measured)

    def ratings(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Of each task in each cell [T, C, R], NaN where there is none.

        Returns
        -------
        ratings
            The exact mean, or that over seeds.
        valid
            The valid mass of the exact rating, or the share of sampled answers that are valid.
        """
        row = {task: number for number, task in enumerate(self.tasks)}
        ratings, valid = np.full((2, len(row), len(self.completing), len(self.rating)), np.nan)
        for c, r, pair in self.pairs():
            if pair in self.cells:
                measured = self.cells[pair].measured
                place = [row[task] for task in self.cells[pair].tasks()], c, r
                if kind == EXACT and measured.exact is not None:
                    ratings[place], valid[place] = measured.exact.mean, measured.exact.valid_mass
                else:
                    ratings[place] = measured.seed_means
                    valid[place] = np.isfinite(measured.sampled).mean(axis=1)
        return ratings, valid

    def pairs(self) -> Iterator[tuple[int, int, tuple[str, str]]]:
        for (c, completing), (r, rating) in itertools.product(enumerate(self.completing), enumerate(self.rating)):
            yield c, r, (completing, rating)


def grids(cells: Sequence[Cell]) -> list[Grid]:
    """Groups of cells that differ in their conditions alone, where at least one role has several."""
    groups: dict[str, dict[tuple[str, str], Cell]] = {}
    for cell in cells:
        same = json.dumps([cell.rater, cell.key, _base(cell)], sort_keys=True)
        groups.setdefault(same, {})[level(cell, "completer"), level(cell, "rating")] = cell
    several = [group for group in groups.values() if len(group) > 1]
    firsts = [next(iter(group.values())) for group in several]
    names = [(cell.rater, cell.key) for cell in firsts]
    extras = telling(names, [_base(cell) for cell in firsts], ("concept.name", *FIRST))
    made = []
    for (rater, key), extra, group in zip(names, extras, several, strict=True):
        name = named(f"{rater}-{key}", extra)
        tasks = {
            task: origin
            for cell in group.values()
            for task, origin in zip(cell.tasks(), cell.measured.origins, strict=True)
        }
        made.append(Grid(name, _ordered(group, 0), _ordered(group, 1), group, tasks))
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


def _ordered(group: Mapping[tuple[str, str], Cell], factor: int) -> tuple[str, ...]:
    """Levels of a factor in the order of the concept's conditions, then others as they come."""
    used = dict.fromkeys(pair[factor] for pair in group)
    concepts = next(iter(group.values())).job.config.get("concept") or {}
    conditions = next(iter(concepts.values()), {}).get("conditions") or {}
    return tuple(dict.fromkeys([*(name for name in conditions if name in used), *used]))


def conditions(sweep: Sweep) -> Result | None:
    """What the two contexts do to the ratings; None where cells do not differ in their conditions."""
    made = grids(sweep.cells)
    if not made:
        return None
    means = condition_means(made, sweep)
    effects, shares = condition_effects(made, sweep)
    excerpts = [Excerpt("Means by condition", telling_columns(whole(means).drop(columns="origin")), MEANS_NOTE)]
    if len(distinct(means, "origin")) > 2:
        excerpts.append(Excerpt("Means by condition and origin", telling_columns(by_origin(means))))
    tables = (
        Table("conditions", means, excerpts=tuple(excerpts)),
        table("condition_effects", effects, "Main effects and interaction", EFFECTS_NOTE),
        table("condition_shares", shares, "Shares of the variation within tasks", SHARES_NOTE),
    )
    views, remarks = [], []
    for grid in made:
        # Of exact ratings, where there are any.
        rows = [
            frame.loc[(frame["grid"] == grid.name) & (frame["ratings"] == grid.kinds[0]), :]
            for frame in (whole(means), effects, shares)
        ]
        views += [_means_view(grid, rows[0]), _effects_view(*rows[1:])]
        remarks += _remarks(grid, *rows[1:])
    seeds = sorted({grid.seeds for grid in made if SAMPLED in grid.kinds})
    if seeds:
        remarks.append(
            f"Sampled ratings by condition are of {' or '.join(map(str, seeds))} rating seed{'s' * (seeds != [1])} a"
            " task, whose noise widens their spread and lowers the shares of variation; exact ratings have none of it."
        )
    drawn = []
    for count, grid in enumerate(made[:MOST_CELLS]):
        values, rows = violin_tables(grid, means)
        title, label = f"Ratings by condition: {grid.name}", "condition the completion was written in"
        name = numbered("conditions", count)
        drawn.append(figure(name, figures.violins, title=title, table=values, means=rows, label=label))
    metrics = {
        f"compare/condition/{row['grid']}/{row['ratings']}/{row['of']}/{row['contrast']}": row["points"]
        for row in effects.to_dict("records")
    }
    return Result("Conditions", NOTE, tables, tuple(views), tuple(drawn), tuple(remarks), metrics)


def condition_means(made: Sequence[Grid], sweep: Sweep) -> pd.DataFrame:
    """One row a grid, condition of completing, condition of rating, origin and kind of rating.

    ``mean`` and ``sd`` are over the tasks that have a rating there (``n``); ``valid`` is the mean valid mass of exact
    ratings, or the share of sampled answers that are valid.
    """
    rows: list[dict[str, object]] = []
    for grid in made:
        groups = sweep.groups(tuple(grid.tasks.values()))
        for kind in grid.kinds:
            ratings, valid = grid.ratings(kind)
            for (c, r, pair), group in itertools.product(grid.pairs(), groups):
                if pair in grid.cells:
                    values, known = ratings[group.tasks, c, r], valid[group.tasks, c, r]
                    mean = known_mean(values, group.draws, "no valid rating")
                    row = grid.names | {"completing": pair[0], "rating": pair[1], "origin": group.origin}
                    row |= {"ratings": kind, "n": mean.n} | columns("mean", mean)
                    row["sd"] = np.nanstd(values, ddof=1) if mean.n > 1 else None
                    known = known[np.isfinite(known)]
                    rows.append(row | {"valid": float(known.mean()) if len(known) else None})
    return numeric(pd.DataFrame(rows), words=WORDS)


def condition_effects(made: Sequence[Grid], sweep: Sweep) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What conditions do, over the tasks that have all their ratings.

    Returns
    -------
    effects
        One row a grid, kind of rating and contrast, in rating points and (``standardised``) by the SD over tasks. Of a
        main effect ``over`` are the levels of the other factor that it is averaged over. ``rating over completing`` is
        by how much the outermost contrast of rating is larger than that of completing, without their signs.
    shares
        One row a source of the variation within tasks.
    """
    effects: list[dict[str, object]] = []
    shares: list[dict[str, object]] = []
    for grid in made:
        draws = sweep.groups(tuple(grid.tasks.values()))[0].draws
        for kind in grid.kinds:
            result = factorial(grid.ratings(kind)[0], draws)
            names = grid.names | {"ratings": kind}
            counts = {"n": result.n, "left_out": result.left_out}
            for source, contrast, over, points, standardised in _contrasts(grid, result):
                row = names | {"of": source, "contrast": contrast, "over": over}
                effects.append(row | columns("points", points) | columns("standardised", standardised) | counts)
            parts = result.shares
            sources = {COMPLETING: parts.first, RATING: parts.second}
            sources |= {INTERACTION: parts.interaction, RESIDUAL: parts.residual}
            shares += [names | {"source": name} | columns("share", part) | counts for name, part in sources.items()]
    return numeric(pd.DataFrame(effects), words=WORDS), numeric(pd.DataFrame(shares), words=WORDS)


def _contrasts(grid: Grid, result: Factorial) -> Iterator[tuple[str, str, str, Estimate, Estimate]]:
    """Source, contrast in words, the levels it is averaged over, points and standardised points of each effect."""
    main = [(COMPLETING, effect) for effect in result.first] + [(RATING, effect) for effect in result.second]
    for source, effect in main:
        pair, over = _levels(grid, effect.first, effect.second)[:: 1 if source == COMPLETING else -1]
        yield source, " − ".join(pair), ", ".join(over), effect.points, effect.standardised
    crossed = result.interaction
    if crossed is not None:
        completing, rating = map(" − ".join, _levels(grid, crossed.first, crossed.second))
        yield INTERACTION, f"({completing}) × ({rating})", "", crossed.points, crossed.standardised
        none = Estimate.missing("a difference of two effects", result.n)
        yield RATING_OVER_COMPLETING, f"|{rating}| − |{completing}|", "", result.second_over_first, none


def _levels(grid: Grid, first: Sequence[int], second: Sequence[int]) -> tuple[list[str], list[str]]:
    return [grid.completing[index] for index in first], [grid.rating[index] for index in second]


def _means_view(grid: Grid, means: pd.DataFrame) -> View:
    ratings = "exact ratings" if grid.kinds[0] == EXACT else "means over seeds"
    cells = {(row["completing"], row["rating"]): with_interval(row, "mean") for row in means.to_dict("records")}
    return View(
        f"{grid.name}: {ratings} by condition, mean [95 % over tasks]",
        ["completed under", *numbers(*(f"rated: {rating}" for rating in grid.rating))],
        [
            [completing, *(cells.get((completing, rating), MISSING) for rating in grid.rating)]
            for completing in grid.completing
        ],
    )


def _effects_view(effects: pd.DataFrame, shares: pd.DataFrame) -> View:
    """The effects of each source below its share of the variation within tasks."""
    rows: list[tuple[str, ...]] = []
    headings = set()
    for share in shares.to_dict("records"):
        below = effects.loc[effects["of"] == share["source"], :]
        if len(below) or pd.notna(share["share"]):
            headings.add(len(rows))
            rows.append((share["source"], "", "", with_interval(share, "share")))
        for row in below.to_dict("records"):
            rows.append((f"  {row['contrast']}", with_interval(row, "points"), number(row["standardised"])))
    title = f"What conditions do to the same {effects['n'].iloc[0]} tasks"
    return View(
        title,
        (names_column("effect", 0), *numbers("points [95 %]", "in SDs", "share of variation")),
        rows,
        frozenset(headings),
    )


def _remarks(grid: Grid, effects: pd.DataFrame, shares: pd.DataFrame) -> list[str]:
    """Which context dominates in a grid, in plain words, and what to know when reading it."""
    known = {row["source"]: with_interval(row, "share") for row in shares.to_dict("records") if pd.notna(row["share"])}
    # The levels between the outermost count here too.
    variation = (
        f" Of the variation within tasks, {known[RATING]} is rating's and {known[COMPLETING]} completing's."
        if {RATING, COMPLETING} <= set(known)
        else ""
    )
    remarks = [f"{grid.name}: {_dominance(grid, effects)}{variation}"]
    missing = [f"completed {pair[0]} and rated {pair[1]}" for *_, pair in grid.pairs() if pair not in grid.cells]
    if missing:
        remarks.append(
            f"{grid.name}: there is no cell {' or '.join(missing)}; main effects are over the levels that have both"
            " sides, and shares of variation are not known."
        )
    left_out = int(effects["left_out"].iloc[0])
    if left_out:
        remarks.append(f"{grid.name}: effects are without {left_out} tasks that lack a rating in some cell.")
    texts: dict[tuple[str, tuple[str, str]], set[str]] = {}
    for (completing, _), cell in grid.cells.items():
        for task, text in zip(cell.tasks(), cell.texts["completion"].fillna(""), strict=True):
            texts.setdefault((completing, task), set()).add(text)
    differing = {completing for (completing, _), several in texts.items() if len(several) > 1}
    if differing:
        completing = min(differing, key=grid.completing.index)
        remarks.append(
            f"{grid.name}: cells completed under {completing} rated different completions, so effects of rating hold"
            " what these differ by."
        )
    return remarks


def _dominance(grid: Grid, effects: pd.DataFrame) -> str:
    outer = {COMPLETING: grid.completing, RATING: grid.rating}
    contrasts = {source: " − ".join((levels[0], levels[-1])) for source, levels in outer.items()}
    effect = {
        row["of"]: row
        for row in effects.to_dict("records")
        if contrasts.get(row["of"], row["contrast"]) == row["contrast"]
    }
    if RATING_OVER_COMPLETING not in effect:
        varied = COMPLETING if len(grid.completing) > 1 else RATING
        if pd.isna(effect[varied]["points"]):
            return f"what the condition of {varied} does is not known ({effect[varied]['points_reason']})."
        return (
            f"{varied} under {outer[varied][0]} instead of {outer[varied][-1]} moves ratings by"
            f" {with_interval(effect[varied], 'points')} points; the other context was not varied."
        )
    difference = effect[RATING_OVER_COMPLETING]
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
        f"under {outer[source][0]} instead of {outer[source][-1]}{moves} by {with_interval(effect[source], 'points')}"
        for source, moves in ((RATING, " moves ratings"), (COMPLETING, ""))
    )
    return f"being rated {rated} points, having been completed {completed}: {verdict}."


def violin_tables(grid: Grid, means: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What `figures.violins` draws of a grid, and its means from `condition_means`.

    A row a kind of rating, a panel a condition of rating, a violin a condition of completing.
    """
    labels = {EXACT: "exact mean of a task", SAMPLED: f"mean of {grid.seeds} sampled ratings"}
    parts = []
    for kind in grid.kinds:
        ratings, _ = grid.ratings(kind)
        for c, r, (completing, rating) in grid.pairs():
            names = {"row": labels[kind], "panel": f"rated: {rating}", "violin": completing}
            parts.append(pd.DataFrame({**names, "value": ratings[:, c, r]}))
    means = whole(means.loc[means["grid"] == grid.name, :])
    means = means.assign(
        row=[labels[kind] for kind in means["ratings"]], panel="rated: " + means["rating"], violin=means["completing"]
    )
    return pd.concat(parts, ignore_index=True), means
