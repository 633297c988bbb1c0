"""Figures, as PNG files. Each function takes the path to write and plain tables, and returns the path."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prefs.results.drawing import (
    COLOURS,
    counted,
    diamonds,
    error_bars,
    first_in_row,
    floats,
    labelled,
    layer_axis,
    legend,
    lowest_score,
    name_ticks,
    new_panel,
    new_panels,
    nth_colour,
    nth_marker,
    option_labels,
    short,
    to_file,
)
from prefs.results.tables import distinct

# Values of which a density says nothing.
FEW_VALUES = 5


@to_file
def rating_distribution(*, title: str, table: pd.DataFrame, by: str = "origin") -> Figure:
    """Share of each option by group: bars for sampled ratings, diamonds for the exact distribution.

    ``table`` has columns option, value, n, sampled_share, exact_share (NaN: none), and the groups in column `by`.
    """
    # Options by their rank on the scale: templates of one length share an axis, whatever their words.
    groups = {str(name): rows.sort_values("value") for name, rows in table.groupby(by, sort=False)}
    levels = max((len(rows) for rows in groups.values()), default=0)
    figure, axes = new_panel(title, width=max(6.0, 0.25 * levels * len(groups) + 3.0))
    width = 0.8 / max(len(groups), 1)
    for place, (name, rows) in enumerate(groups.items()):
        x = np.arange(len(rows)) + (place - (len(groups) - 1) / 2) * width
        axes.bar(
            x, rows["sampled_share"].fillna(0), width, color=nth_colour(place), label=labelled(name, rows["n"].iloc[0])
        )
        if rows["exact_share"].notna().to_numpy().any():
            diamonds(axes, x, rows["exact_share"], "exact" if place == len(groups) - 1 else None, size=18)
    scales = {tuple(option_labels(rows)) for rows in groups.values()}
    longest = max(scales, key=len, default=())
    labels = longest if len(scales) == 1 else [f"{rank + 1} of {levels}" for rank in range(levels)]
    axes.set_xticks(np.arange(len(labels)), labels)
    axes.set(xlabel="rating", ylabel="share of valid ratings")
    axes.legend(fontsize="small")
    return figure


@to_file
def stability_bars(*, title: str, table: pd.DataFrame) -> Figure:
    """Cross-seed r over all tasks and over the informative ones, with its SD over pairs of seeds; d is written above.

    ``table`` has columns group, cross_seed_r, cross_seed_r_sd, informative_r, informative_r_sd, d, predicted_r.
    """
    figure, axes = new_panel(title, width=max(6.0, 1.3 * len(table) + 1.5), height=4.8)
    x, tops = np.arange(len(table)), np.zeros(len(table))
    for place, (name, label) in enumerate((("cross_seed_r", "all tasks"), ("informative_r", "informative tasks"))):
        r, sd = floats(table, name, f"{name}_sd")
        beside, sd = x + (place - 0.5) * 0.38, np.nan_to_num(sd)
        axes.bar(beside, r, 0.36, color=nth_colour(place), label=f"{label}: mean over pairs of seeds ± SD")
        axes.errorbar(beside, r, yerr=sd, fmt="none", ecolor="black", capsize=4)
        tops = np.fmax(tops, r + sd)
    (predicted,) = floats(table, "predicted_r")
    if not np.isnan(predicted).all():
        diamonds(axes, x - 0.19, predicted, "predicted from exact ratings (temperature 1)")
    tops = np.fmax(tops, predicted)
    for place, (r, d) in enumerate(zip(*floats(table, "cross_seed_r", "d"), strict=True)):
        text = "no r" if np.isnan(r) else "" if np.isnan(d) else f"d = {d:.0%}"
        below = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center", "fontsize": "small"}
        axes.annotate(text, (place, tops[place]), **below)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylabel("cross-seed r (Pearson over tasks)")
    axes.margins(y=0.15)
    name_ticks(axes, table["group"])
    legend(figure)
    return figure


@to_file
def probe_by_layer(*, title: str, table: pd.DataFrame, metric: str = "R²") -> Figure:
    """Held-out score by layer, a panel for each position and a line for each target, with its 95 % interval.

    Beside it stand the noise ceiling (dashed), what the origin alone gives (dotted) and where 95 % of shuffled targets
    score (grey). ``table`` has columns target, position, layer, n, score, score_low, score_high, null_low, null_high,
    ceiling, origin_mean; any number may be NaN.
    """
    positions, targets = distinct(table, "position") or [""], distinct(table, "target")
    labels = {target: f"{target} ({counted(rows)})" for target, rows in table.groupby("target", sort=False)}
    columns = 2 if len(positions) == 4 else min(len(positions), 3)
    below = 0.24 * (2 * len(targets) + 1)  # for the legend
    around = (0.0, below + 0.6)
    figure, panels = new_panels(title, positions, columns, 4.2, 3.4, least=7.5, around=around, sharey=True)
    for position, axes in zip(positions, panels, strict=True):
        here = table.loc[table["position"] == position, :]
        for target, of_target in here.groupby("target", sort=False):
            colour = nth_colour(targets.index(target))
            _probe_curve(axes, of_target.sort_values("layer"), str(target), labels[target], colour)
        axes.axhline(0, color="black", linewidth=0.8)
        layer_axis(axes)
        if first_in_row(axes):
            axes.set_ylabel(f"held-out {metric}")
    panels[-1].set_ylim(lowest_score(*floats(table, "score")), 1.05)
    legend(figure, columns=2)
    return figure


def _probe_curve(axes: Axes, rows: pd.DataFrame, target: str, label: str, colour: str) -> None:
    layers = rows["layer"].to_numpy(dtype=int)
    score, low, high, null_low, null_high = floats(rows, "score", "score_low", "score_high", "null_low", "null_high")
    if not np.isnan(null_low).all():
        axes.fill_between(
            layers, null_low, null_high, color="grey", alpha=0.15, linewidth=0, label="95 % of shuffled targets"
        )
    axes.fill_between(layers, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(layers, score, marker="o", markersize=3, color=colour, label=label)
    for column, style, name in (("ceiling", "--", "noise ceiling"), ("origin_mean", ":", "mean of the origin")):
        levels = rows[column].dropna().to_numpy(dtype=float)
        if len(levels):
            text = f"{target}: {name}, {levels[0]:.2f}"
            axes.axhline(levels[0], linestyle=style, color=colour, linewidth=1.2, label=text)


@to_file
def origins_held_out(*, title: str, table: pd.DataFrame, metric: str = "R²") -> Figure:
    """Score on each origin by a probe that trained on none of its tasks, beside that within k folds (hatched).

    ``table`` has columns target, origin, n, score, score_low, score_high, within, score_reason; where there is no score
    the reason is written in its place.
    """
    origins, targets = distinct(table, "origin"), distinct(table, "target")
    bars = max(1, 2 * len(targets))
    figure, axes = new_panel(title, width=max(6.0, (0.3 * bars + 0.5) * len(origins) + 1.5), height=4.8)
    bottom, width = lowest_score(*floats(table, "score", "within")), 0.8 / bars
    small: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": "x-small"}
    for place, target in enumerate(targets):
        colour = nth_colour(place)
        rows = table.loc[table["target"] == target, :].set_index("origin").reindex(origins)
        score, low, high, within = floats(rows, "score", "score_low", "score_high", "within")
        x = np.arange(len(origins)) + (2 * place - len(targets) + 0.5) * width
        axes.bar(x, score, 0.92 * width, color=colour, label=f"{short(target)}: trained on other origins only")
        axes.errorbar(x, score, yerr=error_bars(score, low, high), fmt="none", ecolor="black", capsize=3)
        axes.bar(
            x + width, within, 0.92 * width, facecolor="white", edgecolor=colour, hatch="///",
            label=f"{short(target)}: trained on this origin too (k-fold)",
        )  # fmt: skip
        for left, value, reason in zip(x, score, rows["score_reason"], strict=True):
            if np.isnan(value) and isinstance(reason, str):
                axes.text(left, 0.02, short(reason), rotation=90, **small)
        for left, value in [*zip(x, score, strict=True), *zip(x + width, within, strict=True)]:
            if value < bottom:  # the bar goes on below the axes
                text, box = f"{value:.1f}".replace("-", "−"), {"facecolor": "white", "edgecolor": "none", "pad": 1}
                axes.text(left, bottom + 0.02, text, bbox=box, **small)
    axes.axhline(0, color="black", linewidth=0.8)
    # From side to side, where an origin has nothing but a reason, too.
    axes.set(ylim=(bottom, 1.05), xlim=(-0.5, max(len(origins), 1) - 0.5))
    counts = {origin: counted(rows) for origin, rows in table.groupby("origin", sort=False)}
    axes.set_xticks(np.arange(len(origins)), [f"{short(origin)}\n{counts[origin]}" for origin in origins])
    axes.set_ylabel(f"{metric} on tasks not trained on")
    legend(figure)
    return figure


@to_file
def predicted_against_measured(*, title: str, table: pd.DataFrame) -> Figure:
    """Held-out prediction of each task against its target, a panel for each target, coloured by origin.

    ``table`` has columns target, origin, measured, predicted; rows with a NaN are left out.
    """
    targets, origins = distinct(table, "target") or [""], distinct(table, "origin")
    table = table.loc[np.isfinite(floats(table, "measured", "predicted")).all(axis=0), :]
    below = 0.24 * -(-len(origins) // 3) + 0.5
    figure, panels = new_panels(title, targets, min(len(targets), 3), 4.0, 4.1, around=(0.0, below))
    for target, axes in zip(targets, panels, strict=True):
        here = table.loc[table["target"] == target, :]
        measured, predicted = floats(here, "measured", "predicted")
        # Many points: small and light, so that where they are dense is seen.
        crowd = np.clip(len(here) / 200, 1, 50)
        for number, origin in enumerate(origins):
            chosen = (here["origin"] == origin).to_numpy()
            axes.scatter(
                measured[chosen], predicted[chosen], s=18 / crowd**0.5, alpha=max(0.3, 0.8 / crowd**0.5),
                color=nth_colour(number), marker=nth_marker(number), linewidths=0, rasterized=True,
                label=labelled(origin),
            )  # fmt: skip
        if len(here):
            ends = [min(measured.min(), predicted.min()), max(measured.max(), predicted.max())]
            axes.plot(ends, ends, color="black", linewidth=0.8, zorder=0.5)
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_title(f"{target}\n{_fit(measured, predicted)}", fontsize="medium")
        axes.set_xlabel("measured")
        if first_in_row(axes):
            axes.set_ylabel("predicted by a probe that did not see the task")
    for handle in legend(figure, columns=3):
        handle.set(alpha=1.0, sizes=[24.0])
    return figure


def _fit(measured: np.ndarray, predicted: np.ndarray) -> str:
    """R² and r, or a dash for what is not defined."""
    varied = [len(values) > 2 and np.ptp(values) > 1e-9 * np.abs(values).max() for values in (measured, predicted)]
    r2 = r = "–"
    if varied[0]:
        r2 = f"{1 - ((measured - predicted) ** 2).sum() / ((measured - measured.mean()) ** 2).sum():.2f}"
    if all(varied):
        r = f"{np.corrcoef(measured, predicted)[0, 1]:.2f}"
    return f"R² = {r2}, r = {r}, n = {len(measured)}"


@to_file
def concept_by_layer(*, title: str, tests: pd.DataFrame, lines: pd.DataFrame) -> Figure:
    """What a concept's vectors separate (above) and where they point (below), by layer, a column for each position.

    ``tests`` has columns test, position, layer, n, auc, auc_low, auc_high, the first test's interval being drawn;
    ``lines`` has columns line, position, layer, value, from -1 to 1. Any number may be NaN.
    """
    positions = distinct(tests, "position") or [""]
    columns = len(positions)
    names = [*positions, *[""] * columns]
    figure, panels = new_panels(title, names, columns, 4.4, 4.3, least=7.5, around=(0.0, 0.0))
    for position, above, below in zip(positions, panels[:columns], panels[columns:], strict=True):
        for number, (test, rows) in enumerate(tests.groupby("test", sort=False)):
            here = rows.loc[rows["position"] == position, :].sort_values(by="layer")
            auc, low, high = floats(here, "auc", "auc_low", "auc_high")
            above.plot(
                here["layer"], auc, color=nth_colour(number), linestyle=("-", "--", ":")[number // len(COLOURS) % 3],
                linewidth=2.2 if number == 0 else 1.2, label=f"{short(test)} ({counted(rows)})",
            )  # fmt: skip
            if number == 0:
                above.fill_between(here["layer"], low, high, color=COLOURS[0], alpha=0.2, linewidth=0)
        for number, (line, rows) in enumerate(lines.groupby("line", sort=False)):
            here = rows.loc[rows["position"] == position, :].sort_values(by="layer")
            below.plot(
                here["layer"], *floats(here, "value"), marker=nth_marker(number), markersize=3,
                color=nth_colour(number), label=short(line),
            )  # fmt: skip
        above.axhline(0.5, color="black", linewidth=0.8)
        below.axhline(0, color="black", linewidth=0.8)
        layer_axis(above, label="")
        layer_axis(below)
        above.set_ylim(-0.03, 1.03)
        below.set_ylim(-1.05, 1.05)
    panels[0].set_ylabel("AUC of the projection")
    panels[columns].set_ylabel("cosine, or r with the rating")
    legend(figure, columns=2)
    return figure


def transfer(path: Path, *, title: str, table: pd.DataFrame) -> Path:
    """Correlation of predictions and targets where a probe of one cell reads another's activations.

    ``table`` has columns trained_on, tested_on, r, one row a pair; pairs that are not there are left open.
    """
    wide = table.pivot(index="trained_on", columns="tested_on", values="r")
    wide = wide.reindex(index=distinct(table, "trained_on"), columns=distinct(table, "tested_on"))
    sides = ("trained on", "tested on")
    return matrices(path, title=title, panels={"": wide}, label="r of prediction and target", sides=sides)


@to_file
def matrices(
    *,
    title: str,
    panels: Mapping[str, pd.DataFrame],
    label: str = "Pearson r over tasks",
    sides: tuple[str, str] = ("", ""),
) -> Figure:
    """Correlation matrices side by side, the numbers written in.

    Each panel is a frame named on both sides; `sides` says what its rows and columns are, `label` what the colours.
    """
    columns = min(3, len(panels))
    side = 1.9 + 0.62 * max(max(frame.shape) for frame in panels.values())
    figure, all_axes = new_panels(title, list(panels), columns, side, side, least=0.0, around=(0.8, 0.5))
    image = None
    for axes, frame in zip(all_axes, panels.values(), strict=True):
        values = frame.to_numpy(dtype=float)
        axes.spines[["top", "right"]].set_visible(True)
        image = axes.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r")
        slanted: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(np.arange(values.shape[1]), map(short, frame.columns), fontsize="small", **slanted)
        axes.set_yticks(np.arange(values.shape[0]), map(short, frame.index), fontsize="small")
        axes.set(ylabel=sides[0], xlabel=sides[1])
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if abs(value) > 0.6 else "black"
            text = "–" if np.isnan(value) else f"{value:.2f}"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize="small")
    if image is not None:
        figure.colorbar(image, ax=all_axes, shrink=0.6, label=label)
    return figure


@to_file
def refused_by_origin(*, title: str, table: pd.DataFrame) -> Figure:
    """Distribution of ratings by origin, tasks that were refused and tasks that were not beside each other.

    ``table`` has columns origin, option, value, refused (0 or 1), n, share (NaN: no such task).
    """
    origins = distinct(table, "origin")
    figure, panels = new_panels(title, origins, len(origins), 3.0, 3.6, around=(0.0, 0.0))
    for origin, axes in zip(origins, panels, strict=True):
        for side, (refused, name) in enumerate(((1, "refused"), (0, "not refused"))):
            chosen = (table["origin"] == origin) & (table["refused"] == refused)
            rows = table.loc[chosen, :].sort_values(by="value")
            x = np.arange(len(rows)) + (side - 0.5) * 0.4
            label = f"{name} (n = {rows['n'].iloc[0]})"
            axes.bar(x, rows["share"].fillna(0), 0.38, color=COLOURS[1 - side], label=label)
            axes.set_xticks(np.arange(len(rows)), option_labels(rows))
        axes.set_ylim(0, 1.05)
        axes.legend(fontsize="small")
    panels[0].set_ylabel("share of ratings")
    figure.supxlabel("rating")
    return figure


@to_file
def variance_shares(*, title: str, table: pd.DataFrame) -> Figure:
    """Share of the variance of one sampled rating by source, with its 95 % interval.

    ``table`` has columns source, share, share_low, share_high; a missing share is left out.
    """
    table = table[table["share"].notna()].iloc[::-1]
    figure, axes = new_panel(title, width=7.5, height=max(2.4, 0.36 * len(table) + 1.4))
    y = np.arange(len(table))
    share, low, high = floats(table, "share", "share_low", "share_high")
    axes.barh(y, share, 0.6, color=COLOURS[0])
    axes.errorbar(share, y, xerr=error_bars(share, low, high), fmt="none", ecolor="black", capsize=3)
    for row, (value, end) in enumerate(zip(share, np.fmax(share, high), strict=True)):
        axes.annotate(f"{value:.1%}", (end, row), xytext=(5, 0), textcoords="offset points", va="center")
    axes.set_yticks(y, list(table["source"]))
    axes.set_xlabel("share of the variance of one sampled rating, 95 % interval over tasks")
    axes.margins(x=0.12)
    return figure


@to_file
def violins(*, title: str, table: pd.DataFrame, means: pd.DataFrame, label: str = "") -> Figure:
    """Distributions of values over tasks: a panel for each row and panel of the tables, violins side by side in it.

    Each violin has its mean and interval in it and its n below; of fewer than 5 values, or of values that are all the
    same, the values themselves are drawn. ``table`` has columns row, panel, violin, value (NaN: left out), one row a
    value; ``means`` has row, panel, violin, n, mean, mean_low, mean_high. `label` says what the violins are.
    """
    rows, columns, names = (distinct(table, name) for name in ("row", "panel", "violin"))
    width, titles = 0.9 * len(names) + 0.7, columns * len(rows)
    figure, panels = new_panels(title, titles, len(columns), width, 3.3, around=(1.0, 0.6), sharey=True)
    values = table.groupby(["row", "panel", "violin"])["value"]
    numbers = {(row["row"], row["panel"], row["violin"]): row for row in means.to_dict("records")}
    for axes, (row, column) in zip(panels, itertools.product(rows, columns), strict=True):
        counts = []
        for place, name in enumerate(names):
            key = (row, column, name)
            here = values.get_group(key).dropna().to_numpy(dtype=float) if key in values.indices else np.empty(0)
            _violin(axes, place, here, nth_colour(place))
            if key in numbers:
                mean, low, high = (float(numbers[key][end]) for end in ("mean", "mean_low", "mean_high"))
                reach = error_bars(mean, low, high)
                axes.errorbar(place, mean, yerr=reach, fmt="o", markersize=4, color="black", capsize=4)
            counts.append(f"{short(name)}\nn = {len(here)}")
        name_ticks(axes, counts)
        axes.set_xlim(-0.6, len(names) - 0.4)
        if column == columns[0]:
            axes.set_ylabel(short(row))
        else:
            axes.tick_params(labelleft=False)
    figure.supxlabel(label, fontsize="medium")
    return figure


def _violin(axes: Axes, place: int, values: np.ndarray, colour: str) -> None:
    """A violin where there is a density to estimate, else a line for each value."""
    if len(values) >= FEW_VALUES and np.ptp(values) > 1e-6 * np.abs(values).max():
        before = len(axes.collections)
        axes.violinplot([values], [place], widths=0.85, showextrema=False)
        for body in axes.collections[before:]:
            body.set(facecolor=colour, edgecolor=colour, alpha=0.45)
    else:
        axes.hlines(np.unique(values), place - 0.3, place + 0.3, color=colour, alpha=0.45, linewidth=3)


@to_file
def dose_response(
    *,
    title: str,
    table: pd.DataFrame,
    dose: str = "coefficient of the vector",
    label: str = "mean rating",
) -> Figure:
    """Mean rating by steering coefficient, a panel for each panel and a line for each line of the table.

    Doses that are not coherent are hollow: what is measured there is a broken model. ``table`` has columns panel, line,
    coefficient, mean, mean_low, mean_high (NaN: none), coherent; a dose without a mean is left out.
    """
    table = table.loc[np.isfinite(*floats(table, "mean")), :]
    names, lines = distinct(table, "panel") or [""], distinct(table, "line")
    around = (0.0, 0.24 * (-(-len(lines) // 3) + 1) + 0.6)
    figure, panels = new_panels(title, names, min(len(names), 3), 3.6, 3.3, around=around, sharey=True)
    for name, axes in zip(names, panels, strict=True):
        for line, doses in table.loc[table["panel"] == name, :].groupby("line", sort=False):
            _dose_curve(axes, doses.sort_values("coefficient"), str(line), lines.index(line))
        axes.axvline(0, color="black", linewidth=0.8, zorder=0.5)
        axes.set_xlabel(dose)
        if first_in_row(axes):
            axes.set_ylabel(label)
    if not table["coherent"].to_numpy(dtype=bool).all():
        panels[-1].plot([], [], "o", color="grey", markerfacecolor="white", markersize=5, label="not coherent")
    legend(figure, columns=3)
    return figure


def _dose_curve(axes: Axes, rows: pd.DataFrame, name: str, number: int) -> None:
    colour = nth_colour(number)
    coefficient, mean, low, high = floats(rows, "coefficient", "mean", "mean_low", "mean_high")
    axes.errorbar(coefficient, mean, yerr=error_bars(mean, low, high), color=colour, linewidth=1.2, capsize=2)
    for coherent, fill in ((True, colour), (False, "white")):
        chosen = rows["coherent"].to_numpy(dtype=bool) == coherent
        axes.plot(
            coefficient[chosen], mean[chosen], nth_marker(number), color=colour, markerfacecolor=fill, markersize=5,
            label=labelled(name),
        )  # fmt: skip
