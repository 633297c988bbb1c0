"""Figures of choices and utilities. Each function takes the path to write and plain tables, and returns the path."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from prefs.results.drawing import (
    COLOURS,
    floats,
    labelled,
    name_ticks,
    new_panel,
    nth_colour,
    nth_marker,
    short,
    to_file,
)
from prefs.results.tables import distinct


@to_file
def utilities_by_origin(*, title: str, table: pd.DataFrame) -> Figure:
    """The utility of every task with its standard error, in order within each origin.

    ``table`` has columns origin, utility, se, one row a task; a task without a utility is left out.
    """
    table = table.loc[np.isfinite(floats(table, "utility")[0]), :]
    origins = distinct(table, "origin")
    figure, axes = new_panel(title, width=max(6.0, 1.6 * len(origins) + 2.0))
    names = []
    for place, origin in enumerate(origins):
        rows = table.loc[table["origin"] == origin, :].sort_values("utility")
        u, se = floats(rows, "utility", "se")
        x = place + np.linspace(-0.38, 0.38, len(rows))
        axes.errorbar(
            x, u, yerr=se, fmt="o", markersize=3, color=nth_colour(place), ecolor="lightgrey", elinewidth=0.8,
            label="utility ± standard error" if place == 0 else None,
        )  # fmt: skip
        axes.hlines(u.mean(), place - 0.42, place + 0.42, color="black", linewidth=1.2)
        names.append(f"{short(origin)}\nn = {len(rows)}")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylabel("utility (log odds)")
    name_ticks(axes, names)
    return figure


@to_file
def choice_position(*, title: str, table: pd.DataFrame) -> Figure:
    """The probability of a task shown first against its probability shown second: on the diagonal the order does
    nothing, right of it being first helps.

    ``table`` has columns p_shown_first and p_shown_second; pairs without one of them are left out.
    """
    first, second = floats(table, "p_shown_first", "p_shown_second")
    known = np.isfinite(first) & np.isfinite(second)
    # The other task of a pair has the rest: each is as good as the other.
    x = np.concatenate([first[known], 1 - second[known]])
    y = np.concatenate([second[known], 1 - first[known]])
    figure, axes = new_panel(title, width=5.6, height=5.2)
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    axes.axhline(0.5, color="grey", linewidth=0.6)
    axes.axvline(0.5, color="grey", linewidth=0.6)
    size = 14 / np.clip(len(x) / 500, 1, 20) ** 0.5
    axes.scatter(x, y, s=size, alpha=0.5, color=COLOURS[0], linewidths=0, rasterized=True)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.set_aspect("equal")
    axes.set_xlabel("P(a task is chosen), shown first")
    axes.set_ylabel("the same task of the same pair, shown second")
    axes.text(0.98, 0.02, f"{int(known.sum())} pairs, both tasks of each", ha="right", fontsize="small")
    return figure


@to_file
def choice_rounds(*, title: str, table: pd.DataFrame) -> Figure:
    """Median standard error of the utilities by the pairs asked so far; ``table`` has columns pairs, median_se."""
    figure, axes = new_panel(title, width=6.0, height=3.8)
    axes.plot(*floats(table, "pairs", "median_se"), marker="o", color=COLOURS[0])
    axes.set_ylim(bottom=0)
    axes.set(xlabel="pairs, each in both orders", ylabel="median standard error (log odds)")
    return figure


@to_file
def utility_against_rating(*, title: str, table: pd.DataFrame, label: str = "utility (log odds)") -> Figure:
    """Utility of each task against its rating; ``table`` has columns origin, rating, utility; a task without one of
    them is left out."""
    table = table.loc[np.isfinite(floats(table, "rating", "utility")).all(axis=0), :]
    figure, axes = new_panel(title, width=6.0, height=4.8)
    for number, origin in enumerate(distinct(table, "origin")):
        rows = table.loc[table["origin"] == origin, :]
        axes.scatter(
            *floats(rows, "rating", "utility"), s=18, alpha=0.7, linewidths=0, color=nth_colour(number),
            marker=nth_marker(number), label=labelled(origin, len(rows)), rasterized=True,
        )  # fmt: skip
    axes.set(xlabel="rating", ylabel=label)
    if len(table):
        axes.legend(fontsize="small")
    return figure
