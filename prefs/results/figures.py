"""Figures, as PNG files. Each function takes the path to write and plain tables, and returns the path."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from prefs.errors import UserError

# Okabe & Ito's palette: told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D")
DPI = 150
# Values of which a density says nothing.
FEW_VALUES = 5
LAYER = "layer (residual stream after the block)"
CROSS_SEED = "cross-seed r (Pearson over tasks)"
PREDICTED = "predicted from exact ratings (temperature 1)"

P = ParamSpec("P")


def to_file(draw: Callable[P, Figure]) -> Callable[Concatenate[Path, P], Path]:
    """Have a figure written to a path. Origins and options are the user's text: a dollar sign in them is no formula."""

    @functools.wraps(draw)
    def write(path: Path, *given: P.args, **named: P.kwargs) -> Path:
        with rc_context({"text.parse_math": False}):
            return _save(draw(*given, **named), path)

    return write


def _save(figure: Figure, path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI, pil_kwargs={"compress_level": 4})  # twice as fast as 6, and 2 % larger
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    return path


@to_file
def rating_distribution(*, title: str, table: pd.DataFrame, by: str = "origin") -> Figure:
    """Share of each option by group: bars for sampled ratings, diamonds for the exact distribution.

    ``table`` has columns option, value, n, sampled_share, exact_share (NaN: none), and the groups in column `by`.
    """
    # Options by their rank on the scale: templates of one length share an axis, whatever their words.
    groups = {str(name): rows.sort_values("value") for name, rows in table.groupby(by, sort=False)}
    levels = max((len(rows) for rows in groups.values()), default=0)
    figure, axes = _one_panel(title, width=max(6.0, 0.25 * levels * len(groups) + 3.0))
    width = 0.8 / max(len(groups), 1)
    for place, (name, rows) in enumerate(groups.items()):
        x = np.arange(len(rows)) + (place - (len(groups) - 1) / 2) * width
        axes.bar(x, rows["sampled_share"].fillna(0), width, color=_colour(place), label=_label(name, rows["n"].iloc[0]))
        if rows["exact_share"].notna().to_numpy().any():
            _diamonds(axes, x, rows["exact_share"], "exact" if place == len(groups) - 1 else None, size=18)
    scales = {tuple(_options(rows)) for rows in groups.values()}
    longest = max(scales, key=len, default=())
    labels = longest if len(scales) == 1 else [f"{rank + 1} of {levels}" for rank in range(levels)]
    axes.set_xticks(np.arange(len(labels)), labels)
    axes.set(xlabel="rating", ylabel="share of valid ratings")
    axes.legend(fontsize="small")
    return figure


@to_file
def cross_seed_by_origin(*, title: str, table: pd.DataFrame) -> Figure:
    """Mean cross-seed r by origin with its SD over pairs of seeds, d written above, beside the predicted r.

    ``table`` has columns origin, n, cross_seed_r, cross_seed_r_sd, d, predicted_r.
    """
    figure, axes = _one_panel(title, width=max(6.0, 1.2 * len(table) + 1.5))
    x = np.arange(len(table))
    r, sd, predicted = _numbers(table, "cross_seed_r", "cross_seed_r_sd", "predicted_r")
    axes.bar(x, r, 0.6, color=COLOURS[0], label="mean over pairs of seeds, ± SD")
    axes.errorbar(x, r, yerr=np.nan_to_num(sd), fmt="none", ecolor="black", capsize=4)
    _diamonds(axes, x, predicted, PREDICTED)
    _write_d(axes, table, np.fmax(np.fmax(r + np.nan_to_num(sd), predicted), 0.0), undefined="undefined")
    axes.set_xticks(x, [f"{origin}\nn = {n}" for origin, n in zip(table["origin"], table["n"], strict=True)])
    axes.legend(fontsize="small")
    return figure


@to_file
def stability_bars(*, title: str, table: pd.DataFrame) -> Figure:
    """Cross-seed r over all tasks and over the informative ones, with its SD over pairs of seeds; d is written above.

    ``table`` has columns group, cross_seed_r, cross_seed_r_sd, informative_r, informative_r_sd, d, predicted_r.
    """
    figure, axes = _one_panel(title, width=max(6.0, 1.3 * len(table) + 1.5), height=4.8)
    x, tops = np.arange(len(table)), np.zeros(len(table))
    for place, (name, label) in enumerate((("cross_seed_r", "all tasks"), ("informative_r", "informative tasks"))):
        r, sd = _numbers(table, name, f"{name}_sd")
        beside, sd = x + (place - 0.5) * 0.38, np.nan_to_num(sd)
        axes.bar(beside, r, 0.36, color=_colour(place), label=f"{label}: mean over pairs of seeds ± SD")
        axes.errorbar(beside, r, yerr=sd, fmt="none", ecolor="black", capsize=4)
        tops = np.fmax(tops, r + sd)
    (predicted,) = _numbers(table, "predicted_r")
    if not np.isnan(predicted).all():
        _diamonds(axes, x - 0.19, predicted, PREDICTED)
    _write_d(axes, table, np.fmax(tops, predicted), undefined="no r")
    _name_ticks(axes, table["group"])
    _legend(figure)
    return figure


@to_file
def probe_by_layer(*, title: str, table: pd.DataFrame, metric: str = "R²") -> Figure:
    """Held-out score by layer, a panel for each position and a line for each target, with its 95 % interval.

    Beside it stand the noise ceiling (dashed), what the origin alone gives (dotted) and where 95 % of shuffled targets
    score (grey). ``table`` has columns target, position, layer, n, score, score_low, score_high, null_low, null_high,
    ceiling, origin_mean; any number may be NaN.
    """
    positions, targets = _names(table, "position") or [""], _names(table, "target")
    labels = {target: f"{target} ({_counted(rows)})" for target, rows in table.groupby("target", sort=False)}
    columns = 2 if len(positions) == 4 else min(len(positions), 3)
    rows = -(-len(positions) // columns)
    below = 0.24 * (2 * len(targets) + 1)  # for the legend
    size = (max(7.5, 4.2 * columns), 3.4 * rows + below + 0.6)
    figure, panels = _panels(title, size, rows, columns, positions, sharey=True)
    for place, (position, axes) in enumerate(zip(positions, panels, strict=True)):
        here = table.loc[table["position"] == position, :]
        for target, of_target in here.groupby("target", sort=False):
            colour = _colour(targets.index(target))
            _probe_curve(axes, of_target.sort_values("layer"), str(target), labels[target], colour)
        axes.axhline(0, color="black", linewidth=0.8)
        _by_layer(axes)
        if place % columns == 0:
            axes.set_ylabel(f"held-out {metric}")
    panels[-1].set_ylim(_lowest(*_numbers(table, "score")), 1.05)
    _legend(figure, columns=2)
    return figure


def _probe_curve(axes: Axes, rows: pd.DataFrame, target: str, label: str, colour: str) -> None:
    layers = rows["layer"].to_numpy(dtype=int)
    score, low, high, null_low, null_high = _numbers(rows, "score", "score_low", "score_high", "null_low", "null_high")
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
    origins, targets = _names(table, "origin"), _names(table, "target")
    bars = max(1, 2 * len(targets))
    figure, axes = _one_panel(title, width=max(6.0, (0.3 * bars + 0.5) * len(origins) + 1.5), height=4.8)
    bottom, width = _lowest(*_numbers(table, "score", "within")), 0.8 / bars
    small: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": "x-small"}
    for place, target in enumerate(targets):
        colour = _colour(place)
        rows = table.loc[table["target"] == target, :].set_index("origin").reindex(origins)
        score, low, high, within = _numbers(rows, "score", "score_low", "score_high", "within")
        x = np.arange(len(origins)) + (2 * place - len(targets) + 0.5) * width
        axes.bar(x, score, 0.92 * width, color=colour, label=f"{_short(target)}: trained on other origins only")
        axes.errorbar(x, score, yerr=_reach(score, low, high), fmt="none", ecolor="black", capsize=3)
        axes.bar(
            x + width, within, 0.92 * width, facecolor="white", edgecolor=colour, hatch="///",
            label=f"{_short(target)}: trained on this origin too (k-fold)",
        )  # fmt: skip
        for left, value, reason in zip(x, score, rows["score_reason"], strict=True):
            if np.isnan(value) and isinstance(reason, str):
                axes.text(left, 0.02, _short(reason), rotation=90, **small)
        for left, value in [*zip(x, score, strict=True), *zip(x + width, within, strict=True)]:
            if value < bottom:  # the bar goes on below the axes
                text, box = f"{value:.1f}".replace("-", "−"), {"facecolor": "white", "edgecolor": "none", "pad": 1}
                axes.text(left, bottom + 0.02, text, bbox=box, **small)
    axes.axhline(0, color="black", linewidth=0.8)
    # From side to side, where an origin has nothing but a reason, too.
    axes.set(ylim=(bottom, 1.05), xlim=(-0.5, max(len(origins), 1) - 0.5))
    counts = {origin: _counted(rows) for origin, rows in table.groupby("origin", sort=False)}
    axes.set_xticks(np.arange(len(origins)), [f"{_short(origin)}\n{counts[origin]}" for origin in origins])
    axes.set_ylabel(f"{metric} on tasks not trained on")
    _legend(figure)
    return figure


@to_file
def predicted_against_measured(*, title: str, table: pd.DataFrame) -> Figure:
    """Held-out prediction of each task against its target, a panel for each target, coloured by origin.

    ``table`` has columns target, origin, measured, predicted; rows with a NaN are left out.
    """
    targets, origins = _names(table, "target") or [""], _names(table, "origin")
    table = table.loc[np.isfinite(_numbers(table, "measured", "predicted")).all(axis=0), :]
    columns = min(len(targets), 3)
    rows = -(-len(targets) // columns)
    size = (max(6.0, 4.0 * columns), 4.1 * rows + 0.24 * -(-len(origins) // 3) + 0.5)
    figure, panels = _panels(title, size, rows, columns, targets)
    for place, (target, axes) in enumerate(zip(targets, panels, strict=True)):
        here = table.loc[table["target"] == target, :]
        measured, predicted = _numbers(here, "measured", "predicted")
        # Many points: small and light, so that where they are dense is seen.
        crowd = np.clip(len(here) / 200, 1, 50)
        for number, origin in enumerate(origins):
            chosen = (here["origin"] == origin).to_numpy()
            axes.scatter(
                measured[chosen], predicted[chosen], s=18 / crowd**0.5, alpha=max(0.3, 0.8 / crowd**0.5),
                color=_colour(number), marker=_marker(number), linewidths=0, rasterized=True, label=_label(origin),
            )  # fmt: skip
        if len(here):
            ends = [min(measured.min(), predicted.min()), max(measured.max(), predicted.max())]
            axes.plot(ends, ends, color="black", linewidth=0.8, zorder=0.5)
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_title(f"{target}\n{_fit(measured, predicted)}", fontsize="medium")
        axes.set_xlabel("measured")
        if place % columns == 0:
            axes.set_ylabel("predicted by a probe that did not see the task")
    for handle in _legend(figure, columns=3):
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
    positions = _names(tests, "position") or [""]
    columns = len(positions)
    figure, panels = _panels(title, (max(7.5, 4.4 * columns), 8.6), 2, columns, [*positions, *[""] * columns])
    for position, above, below in zip(positions, panels[:columns], panels[columns:], strict=True):
        for number, (test, rows) in enumerate(tests.groupby("test", sort=False)):
            here = rows.loc[rows["position"] == position, :].sort_values(by="layer")
            auc, low, high = _numbers(here, "auc", "auc_low", "auc_high")
            above.plot(
                here["layer"], auc, color=_colour(number), linestyle=("-", "--", ":")[number // len(COLOURS) % 3],
                linewidth=2.2 if number == 0 else 1.2, label=f"{_short(test)} ({_counted(rows)})",
            )  # fmt: skip
            if number == 0:
                above.fill_between(here["layer"], low, high, color=COLOURS[0], alpha=0.2, linewidth=0)
        for number, (line, rows) in enumerate(lines.groupby("line", sort=False)):
            here = rows.loc[rows["position"] == position, :].sort_values(by="layer")
            below.plot(
                here["layer"], *_numbers(here, "value"), marker=_marker(number), markersize=3, color=_colour(number),
                label=_short(line),
            )  # fmt: skip
        above.axhline(0.5, color="black", linewidth=0.8)
        below.axhline(0, color="black", linewidth=0.8)
        _by_layer(above, label="")
        _by_layer(below)
        above.set_ylim(-0.03, 1.03)
        below.set_ylim(-1.05, 1.05)
    panels[0].set_ylabel("AUC of the projection")
    panels[columns].set_ylabel("cosine, or r with the rating")
    _legend(figure, columns=2)
    return figure


def transfer(path: Path, *, title: str, table: pd.DataFrame) -> Path:
    """Correlation of predictions and targets where a probe of one cell reads another's activations.

    ``table`` has columns trained_on, tested_on, r, one row a pair; pairs that are not there are left open.
    """
    wide = table.pivot(index="trained_on", columns="tested_on", values="r")
    wide = wide.reindex(index=_names(table, "trained_on"), columns=_names(table, "tested_on"))
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
    rows = -(-len(panels) // columns)
    side = 1.9 + 0.62 * max(max(frame.shape) for frame in panels.values())
    figure, all_axes = _panels(title, (columns * side + 0.8, rows * side + 0.5), rows, columns, list(panels))
    image = None
    for axes, frame in zip(all_axes, panels.values(), strict=True):
        values = frame.to_numpy(dtype=float)
        axes.spines[["top", "right"]].set_visible(True)
        image = axes.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r")
        slanted: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(np.arange(values.shape[1]), map(_short, frame.columns), fontsize="small", **slanted)
        axes.set_yticks(np.arange(values.shape[0]), map(_short, frame.index), fontsize="small")
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
    origins = _names(table, "origin")
    figure, panels = _panels(title, (max(6.0, 3.0 * len(origins)), 3.6), 1, len(origins), origins)
    for origin, axes in zip(origins, panels, strict=True):
        for side, (refused, name) in enumerate(((1, "refused"), (0, "not refused"))):
            chosen = (table["origin"] == origin) & (table["refused"] == refused)
            rows = table.loc[chosen, :].sort_values(by="value")
            x = np.arange(len(rows)) + (side - 0.5) * 0.4
            label = f"{name} (n = {rows['n'].iloc[0]})"
            axes.bar(x, rows["share"].fillna(0), 0.38, color=COLOURS[1 - side], label=label)
            axes.set_xticks(np.arange(len(rows)), _options(rows))
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
    figure, axes = _one_panel(title, width=7.5, height=max(2.4, 0.36 * len(table) + 1.4))
    y = np.arange(len(table))
    share, low, high = _numbers(table, "share", "share_low", "share_high")
    axes.barh(y, share, 0.6, color=COLOURS[0])
    axes.errorbar(share, y, xerr=_reach(share, low, high), fmt="none", ecolor="black", capsize=3)
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
    rows, columns, names = (_names(table, name) for name in ("row", "panel", "violin"))
    size = (max(6.0, (0.9 * len(names) + 0.7) * len(columns) + 1.0), 3.3 * max(len(rows), 1) + 0.6)
    titles = [str(column) for _ in rows for column in columns]
    figure, panels = _panels(title, size, len(rows), len(columns), titles, sharey=True)
    values = table.groupby(["row", "panel", "violin"])["value"]
    numbers = {(row["row"], row["panel"], row["violin"]): row for row in means.to_dict("records")}
    for axes, (row, column) in zip(panels, itertools.product(rows, columns), strict=True):
        counts = []
        for place, name in enumerate(names):
            key = (row, column, name)
            here = values.get_group(key).dropna().to_numpy(dtype=float) if key in values.indices else np.empty(0)
            _violin(axes, place, here, _colour(place))
            if key in numbers:
                mean, low, high = (float(numbers[key][end]) for end in ("mean", "mean_low", "mean_high"))
                reach = _reach(mean, low, high)
                axes.errorbar(place, mean, yerr=reach, fmt="o", markersize=4, color="black", capsize=4)
            counts.append(f"{_short(name)}\nn = {len(here)}")
        _name_ticks(axes, counts)
        axes.set_xlim(-0.6, len(names) - 0.4)
        if column == columns[0]:
            axes.set_ylabel(_short(row))
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
    table = table.loc[np.isfinite(*_numbers(table, "mean")), :]
    names, lines = _names(table, "panel") or [""], _names(table, "line")
    columns = min(len(names), 3)
    rows = -(-len(names) // columns)
    size = (max(6.0, 3.6 * columns), 3.3 * rows + 0.24 * (-(-len(lines) // 3) + 1) + 0.6)
    figure, panels = _panels(title, size, rows, columns, names, sharey=True)
    for place, (name, axes) in enumerate(zip(names, panels, strict=True)):
        for line, doses in table.loc[table["panel"] == name, :].groupby("line", sort=False):
            _dose_curve(axes, doses.sort_values("coefficient"), str(line), lines.index(line))
        axes.axvline(0, color="black", linewidth=0.8, zorder=0.5)
        axes.set_xlabel(dose)
        if place % columns == 0:
            axes.set_ylabel(label)
    if not table["coherent"].to_numpy(dtype=bool).all():
        panels[-1].plot([], [], "o", color="grey", markerfacecolor="white", markersize=5, label="not coherent")
    _legend(figure, columns=3)
    return figure


def _dose_curve(axes: Axes, rows: pd.DataFrame, name: str, number: int) -> None:
    colour = _colour(number)
    coefficient, mean, low, high = _numbers(rows, "coefficient", "mean", "mean_low", "mean_high")
    axes.errorbar(coefficient, mean, yerr=_reach(mean, low, high), color=colour, linewidth=1.2, capsize=2)
    for coherent, fill in ((True, colour), (False, "white")):
        chosen = rows["coherent"].to_numpy(dtype=bool) == coherent
        axes.plot(
            coefficient[chosen], mean[chosen], _marker(number), color=colour, markerfacecolor=fill, markersize=5,
            label=_label(name),
        )  # fmt: skip


def _one_panel(title: str, width: float, height: float = 4.2) -> tuple[Figure, Axes]:
    figure, (axes,) = _panels("", (width, height), 1, 1, [title], fontsize="large")
    return figure, axes


def _panels(
    title: str,
    size: tuple[float, float],
    rows: int,
    columns: int,
    names: Iterable[object],
    *,
    sharey: bool = False,
    fontsize: str = "medium",
) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each name, in rows of so many columns."""
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels: list[Axes] = []
    for place, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, place + 1, sharey=panels[0] if sharey and panels else None)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(str(name), fontsize=fontsize)
        panels.append(axes)
    if title:
        figure.suptitle(title)
    return figure, panels


def _by_layer(axes: Axes, label: str = LAYER) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(label)


def _diamonds(axes: Axes, x: np.ndarray, y: Any, label: str | None, size: float = 30) -> None:
    axes.scatter(x, y, marker="D", s=size, color="white", edgecolor="black", zorder=3, label=label)


def _write_d(axes: Axes, table: pd.DataFrame, tops: np.ndarray, undefined: str) -> None:
    """d above what is drawn of each row, on the axis of cross-seed r."""
    for place, (r, d) in enumerate(zip(*_numbers(table, "cross_seed_r", "d"), strict=True)):
        text = undefined if np.isnan(r) else "" if np.isnan(d) else f"d = {d:.0%}"
        axes.annotate(
            text, (place, tops[place]), xytext=(0, 5), textcoords="offset points", ha="center", fontsize="small"
        )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylabel(CROSS_SEED)
    axes.margins(y=0.15)


def _legend(figure: Figure, columns: int = 1) -> list[Artist]:
    """One legend below all panels, each label once; returns its handles."""
    named: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    legend = figure.legend(
        list(named.values()), list(named), fontsize="small", loc="outside lower center", ncols=columns, frameon=False
    )
    return [handle for handle in legend.legend_handles if handle is not None]


def _name_ticks(axes: Axes, names: Iterable[str]) -> None:
    """Names below the bars, slanted where they would run into each other."""
    names = [_short(name) for name in names]
    slanted = max((len(line) for name in names for line in name.splitlines()), default=0) > 14
    axes.set_xticks(np.arange(len(names)), names, rotation=25 if slanted else 0, ha="right" if slanted else "center")


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _marker(number: int) -> str:
    """That tells those apart that have the same colour."""
    return MARKERS[number // len(COLOURS) % len(MARKERS)]


def _label(name: object, n: object = None) -> str:
    """A label with a name of the user's; one that begins with an underscore would not be shown."""
    return f"\u200b{_short(name)}" + ("" if n is None else f" (n = {n})")


def _options(rows: pd.DataFrame) -> list[str]:
    pairs = zip(rows["option"], rows["value"], strict=True)
    return [say if say == f"{value:g}" else f"{say}\n({value:g})" for say, value in pairs]


def _short(name: object) -> str:
    return text if len(text := str(name)) <= 48 else f"{text[:47]}…"


def _names(table: pd.DataFrame, column: str) -> list[Any]:
    """Different values in the order of their first appearance."""
    return list(dict.fromkeys(table[column]))


def _numbers(table: pd.DataFrame, *names: str) -> list[np.ndarray]:
    return [table[name].to_numpy(dtype=float) for name in names]


def _counted(rows: pd.DataFrame) -> str:
    """How many tasks there are in each row."""
    n = rows["n"].dropna().astype(int)
    low, high = (n.min(), n.max()) if len(n) else (0, 0)
    return f"n = {low}" if low == high else f"n = {low}–{high}"


def _lowest(*scores: np.ndarray) -> float:
    """Where an axis of scores begins: one can be arbitrarily worse than the mean; what matters is between 0 and 1."""
    together = np.concatenate(scores)
    return max(float(np.min(together[np.isfinite(together)], initial=0.0)) * 1.1, -1.0) - 0.05


def _reach(value: np.ndarray | float, low: np.ndarray | float, high: np.ndarray | float) -> np.ndarray:
    """[2, N] how far an interval reaches below and above its value; 0 where there is none."""
    value, low, high = np.atleast_1d(value), np.atleast_1d(low), np.atleast_1d(high)
    return np.nan_to_num(np.clip(np.stack([value - low, high - value]), 0, None))
