"""Figures, as PNG files. Each function takes plain tables, writes one file and returns its path."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path

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
# Origins and options are the user's text: a dollar sign in them is no formula.
as_written = rc_context({"text.parse_math": False})


@as_written
def rating_distribution(path: Path, *, title: str, table: pd.DataFrame, by: str = "origin") -> Path:
    """Share of each option by group: bars for sampled ratings, diamonds for the exact distribution.

    ``table`` has columns option, value, n, sampled_share, exact_share (NaN: none), and the groups in column `by`.
    """
    # Options by their rank on the scale: templates of one length share an axis, whatever their words.
    groups = {str(name): rows.sort_values("value") for name, rows in table.groupby(by, sort=False)}
    levels = max((len(rows) for rows in groups.values()), default=0)
    figure, axes = _figure(width=max(6.0, 0.25 * levels * len(groups) + 3.0))
    width = 0.8 / max(len(groups), 1)
    for at, (name, rows) in enumerate(groups.items()):
        x = np.arange(len(rows)) + (at - (len(groups) - 1) / 2) * width
        label = f"\u200b{name} (n = {rows['n'].iloc[0]})"
        axes.bar(x, rows["sampled_share"].fillna(0), width, color=COLOURS[at % len(COLOURS)], label=label)
        if rows["exact_share"].notna().to_numpy().any():
            label = "exact" if at == len(groups) - 1 else None
            axes.scatter(
                x, rows["exact_share"], marker="D", s=18, color="white", edgecolor="black", zorder=3, label=label
            )
    scales = {tuple(_option(*pair) for pair in rows[["option", "value"]].to_numpy()) for rows in groups.values()}
    longest = max(scales, key=len, default=())
    labels = longest if len(scales) == 1 else [f"{at + 1} of {levels}" for at in range(levels)]
    axes.set_xticks(np.arange(len(labels)), labels)
    axes.set_xlabel("rating")
    axes.set_ylabel("share of valid ratings")
    axes.set_title(title)
    axes.legend(fontsize="small")
    return _save(figure, path)


@as_written
def cross_seed_by_origin(path: Path, *, title: str, table: pd.DataFrame) -> Path:
    """Mean cross-seed r by origin with its SD over pairs of seeds, d written above, beside the predicted r.

    ``table`` has columns origin, n, cross_seed_r, cross_seed_r_sd, d, predicted_r.
    """
    figure, axes = _figure(width=max(6.0, 1.2 * len(table) + 1.5))
    x = np.arange(len(table))
    r = table["cross_seed_r"].to_numpy(dtype=float)
    sd = table["cross_seed_r_sd"].to_numpy(dtype=float)
    axes.bar(x, r, 0.6, color=COLOURS[0], label="mean over pairs of seeds, ± SD")
    axes.errorbar(x, r, yerr=np.nan_to_num(sd), fmt="none", ecolor="black", capsize=4)
    axes.scatter(
        x, table["predicted_r"].to_numpy(dtype=float), marker="D", s=30, color="white", edgecolor="black", zorder=3,
        label="predicted from exact ratings (temperature 1)",
    )  # fmt: skip
    for at, d in enumerate(table["d"].to_numpy(dtype=float)):
        top = np.nanmax([r[at] + np.nan_to_num(sd[at]), table["predicted_r"].iloc[at], 0.0])
        text = "undefined" if np.isnan(r[at]) else "" if np.isnan(d) else f"d = {d:.0%}"
        axes.annotate(text, (at, top), xytext=(0, 5), textcoords="offset points", ha="center", fontsize="small")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(x, [f"{origin}\nn = {n}" for origin, n in zip(table["origin"], table["n"], strict=True)])
    axes.set_ylabel("cross-seed r (Pearson over tasks)")
    axes.margins(y=0.15)
    axes.set_title(title)
    axes.legend(fontsize="small")
    return _save(figure, path)


@as_written
def probe_by_layer(path: Path, *, title: str, table: pd.DataFrame, metric: str = "R²") -> Path:
    """Held-out score by layer, a panel for each position and a line for each target, with its 95 % interval.

    Beside it stand the noise ceiling (dashed), what the origin alone gives (dotted) and where 95 % of shuffled targets
    score (grey). ``table`` has columns target, position, layer, n, score, score_low, score_high, null_low, null_high,
    ceiling, origin_mean; any number may be NaN.
    """
    positions = list(dict.fromkeys(table["position"])) or [""]
    colours = {target: COLOURS[at % len(COLOURS)] for at, target in enumerate(dict.fromkeys(table["target"]))}
    labels = {
        target: f"{target} ({_counted(rows['n'].to_numpy(dtype=float))})"
        for target, rows in table.groupby("target", sort=False)
    }
    columns = 2 if len(positions) == 4 else min(len(positions), 3)
    lines = -(-len(positions) // columns)
    below = 0.24 * (2 * len(colours) + 1)  # for the legend
    figure = Figure(figsize=(max(7.5, 4.2 * columns), 3.4 * lines + below + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Axes | None = None
    for at, position in enumerate(positions):
        axes = figure.add_subplot(lines, columns, at + 1, sharey=axes)
        axes.spines[["top", "right"]].set_visible(False)
        here = table.loc[table["position"] == position, :]
        for target, rows in here.groupby("target", sort=False):
            _probe_line(axes, rows.sort_values("layer"), str(target), labels[target], colours[target])
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(str(position), fontsize="medium")
        axes.set_xlabel("layer (residual stream after the block)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if at % columns == 0:
            axes.set_ylabel(f"held-out {metric}")
    if axes is not None:
        axes.set_ylim(_lowest(table["score"].to_numpy(dtype=float)), 1.05)
    figure.suptitle(title)
    _legend(figure, columns=2)
    return _save(figure, path)


def _probe_line(axes: Axes, rows: pd.DataFrame, target: str, label: str, colour: str) -> None:
    layers = rows["layer"].to_numpy(dtype=int)
    number = {name: rows[name].to_numpy(dtype=float) for name in rows.columns.difference(["target", "position"])}
    if not np.isnan(number["null_low"]).all():
        axes.fill_between(
            layers, number["null_low"], number["null_high"], color="grey", alpha=0.15, linewidth=0,
            label="95 % of shuffled targets",
        )  # fmt: skip
    axes.fill_between(layers, number["score_low"], number["score_high"], color=colour, alpha=0.2, linewidth=0)
    axes.plot(layers, number["score"], marker="o", markersize=3, color=colour, label=label)
    for column, style, name in (("ceiling", "--", "noise ceiling"), ("origin_mean", ":", "mean of the origin")):
        levels = number[column][~np.isnan(number[column])]
        if len(levels):
            text = f"{target}: {name}, {levels[0]:.2f}"
            axes.axhline(levels[0], linestyle=style, color=colour, linewidth=1.2, label=text)


@as_written
def origins_held_out(path: Path, *, title: str, table: pd.DataFrame, metric: str = "R²") -> Path:
    """Score on each origin by a probe that trained on none of its tasks, beside that within k folds (hatched).

    ``table`` has columns target, origin, n, score, score_low, score_high, within, score_reason; where there is no score
    the reason is written in its place.
    """
    origins, targets = (list(dict.fromkeys(table[name])) for name in ("origin", "target"))
    bars = max(1, 2 * len(targets))
    figure, axes = _figure(width=max(6.0, (0.3 * bars + 0.5) * len(origins) + 1.5), height=4.8)
    bottom, width = _lowest(table[["score", "within"]].to_numpy(dtype=float)), 0.8 / bars
    for at, target in enumerate(targets):
        colour = COLOURS[at % len(COLOURS)]
        rows = table.loc[table["target"] == target, :].set_index("origin").reindex(origins)
        score, low, high, within = (
            rows[name].to_numpy(dtype=float) for name in ("score", "score_low", "score_high", "within")
        )
        x = np.arange(len(origins)) + (2 * at - len(targets) + 0.5) * width
        axes.bar(x, score, 0.92 * width, color=colour, label=f"{_short(target)}: trained on other origins only")
        reach = _reach(score, low, high)
        axes.errorbar(x, score, yerr=reach, fmt="none", ecolor="black", capsize=3)
        axes.bar(
            x + width, within, 0.92 * width, facecolor="white", edgecolor=colour, hatch="///",
            label=f"{_short(target)}: trained on this origin too (k-fold)",
        )  # fmt: skip
        for place, value, reason in zip(x, score, rows["score_reason"], strict=True):
            if np.isnan(value) and isinstance(reason, str):
                axes.text(place, 0.02, _short(reason), rotation=90, ha="center", va="bottom", fontsize="x-small")
        for place, value in [*zip(x, score, strict=True), *zip(x + width, within, strict=True)]:
            if value < bottom:  # the bar goes on below the axes
                shown, box = f"{value:.1f}".replace("-", "−"), {"facecolor": "white", "edgecolor": "none", "pad": 1}
                axes.text(place, bottom + 0.02, shown, ha="center", va="bottom", fontsize="x-small", bbox=box)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylim(bottom, 1.05)
    axes.set_xlim(-0.5, max(len(origins), 1) - 0.5)  # where an origin has nothing but a reason, too
    counts = table.groupby("origin", sort=False)["n"].agg(lambda n: _counted(n.to_numpy(dtype=float)))
    axes.set_xticks(np.arange(len(origins)), [f"{_short(origin)}\n{counts[origin]}" for origin in origins])
    axes.set_ylabel(f"{metric} on tasks not trained on")
    axes.set_title(title)
    _legend(figure)
    return _save(figure, path)


@as_written
def predicted_against_measured(path: Path, *, title: str, table: pd.DataFrame) -> Path:
    """Held-out prediction of each task against its target, a panel for each target, coloured by origin.

    ``table`` has columns target, origin, measured, predicted; rows with a NaN are left out.
    """
    targets, origins = (list(dict.fromkeys(table[name])) for name in ("target", "origin"))
    table = table.loc[np.isfinite(table[["measured", "predicted"]].to_numpy(dtype=float)).all(axis=1), :]
    panels = targets or [""]
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure = Figure(
        figsize=(max(6.0, 4.0 * columns), 4.1 * lines + 0.24 * -(-len(origins) // 3) + 0.5), layout="constrained"
    )
    FigureCanvasAgg(figure)
    for at, target in enumerate(panels):
        axes = figure.add_subplot(lines, columns, at + 1)
        axes.spines[["top", "right"]].set_visible(False)
        rows = table.loc[table["target"] == target, :]
        measured, predicted = (rows[name].to_numpy(dtype=float) for name in ("measured", "predicted"))
        # Many points: small and light, so that where they are dense is seen.
        crowd = np.clip(len(rows) / 200, 1, 50)
        for number, origin in enumerate(origins):
            of_origin = (rows["origin"] == origin).to_numpy()
            axes.scatter(
                measured[of_origin], predicted[of_origin], s=18 / crowd**0.5, alpha=max(0.3, 0.8 / crowd**0.5),
                color=COLOURS[number % len(COLOURS)], marker=MARKERS[number // len(COLOURS) % len(MARKERS)],
                linewidths=0, rasterized=True, label=f"\u200b{_short(origin)}",
            )  # fmt: skip
        if len(rows):
            ends = [min(measured.min(), predicted.min()), max(measured.max(), predicted.max())]
            axes.plot(ends, ends, color="black", linewidth=0.8, zorder=0.5)
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_title(f"{target}\n{_fit(measured, predicted)}", fontsize="medium")
        axes.set_xlabel("measured")
        if at % columns == 0:
            axes.set_ylabel("predicted by a probe that did not see the task")
    figure.suptitle(title)
    for handle in _legend(figure, columns=3):
        handle.set(alpha=1.0, sizes=[24.0])
    return _save(figure, path)


def _fit(measured: np.ndarray, predicted: np.ndarray) -> str:
    """R² and r, or a dash for what is not defined."""
    varied = [len(values) > 2 and np.ptp(values) > 1e-9 * np.abs(values).max() for values in (measured, predicted)]
    r2 = r = "–"
    if varied[0]:
        r2 = f"{1 - ((measured - predicted) ** 2).sum() / ((measured - measured.mean()) ** 2).sum():.2f}"
    if all(varied):
        r = f"{np.corrcoef(measured, predicted)[0, 1]:.2f}"
    return f"R² = {r2}, r = {r}, n = {len(measured)}"


@as_written
def transfer(path: Path, *, title: str, table: pd.DataFrame) -> Path:
    """Correlation of predictions and targets where a probe of one cell reads another's activations.

    ``table`` has columns trained_on, tested_on, r, one row a pair; pairs that are not there are left open.
    """
    wide = table.pivot(index="trained_on", columns="tested_on", values="r")
    names = {name: list(dict.fromkeys(table[name])) for name in ("trained_on", "tested_on")}
    wide = wide.reindex(index=names["trained_on"], columns=names["tested_on"])
    return matrices(
        path, title=title, panels={"": wide}, label="r of prediction and target", sides=("trained on", "tested on")
    )


@as_written
def concept_by_layer(path: Path, *, title: str, tests: pd.DataFrame, lines: pd.DataFrame) -> Path:
    """What a concept's vectors separate (above) and where they point (below), by layer, a column for each position.

    ``tests`` has columns test, position, layer, n, auc, auc_low, auc_high, the first test's interval being drawn;
    ``lines`` has columns line, position, layer, value, from -1 to 1. Any number may be NaN.
    """
    positions = list(dict.fromkeys(tests["position"])) or [""]
    figure = Figure(figsize=(max(7.5, 4.4 * len(positions)), 8.6), layout="constrained")
    FigureCanvasAgg(figure)
    for column, position in enumerate(positions):
        above = figure.add_subplot(2, len(positions), column + 1)
        below = figure.add_subplot(2, len(positions), len(positions) + column + 1)
        for at, (test, rows) in enumerate(tests.groupby("test", sort=False)):
            here = rows.loc[rows["position"] == position, :].sort_values(by="layer")
            layers, auc = here["layer"].to_numpy(dtype=int), here["auc"].to_numpy(dtype=float)
            label = f"{_short(test)} ({_counted(rows['n'].to_numpy(dtype=float))})"
            above.plot(
                layers, auc, color=COLOURS[at % len(COLOURS)], linestyle=("-", "--", ":")[at // len(COLOURS) % 3],
                linewidth=2.2 if at == 0 else 1.2, label=label,
            )  # fmt: skip
            if at == 0:
                low, high = (here[name].to_numpy(dtype=float) for name in ("auc_low", "auc_high"))
                above.fill_between(layers, low, high, color=COLOURS[0], alpha=0.2, linewidth=0)
        for at, (line, rows) in enumerate(lines.groupby("line", sort=False)):
            here = rows.loc[rows["position"] == position, :].sort_values(by="layer")
            layers, value = here["layer"].to_numpy(dtype=int), here["value"].to_numpy(dtype=float)
            marker = MARKERS[at // len(COLOURS) % len(MARKERS)]
            below.plot(layers, value, marker=marker, markersize=3, color=COLOURS[at % len(COLOURS)], label=_short(line))
        above.axhline(0.5, color="black", linewidth=0.8)
        below.axhline(0, color="black", linewidth=0.8)
        above.set_ylim(-0.03, 1.03)
        below.set_ylim(-1.05, 1.05)
        above.set_title(str(position), fontsize="medium")
        below.set_xlabel("layer (residual stream after the block)")
        for axes in (above, below):
            axes.spines[["top", "right"]].set_visible(False)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if column == 0:
            above.set_ylabel("AUC of the projection")
            below.set_ylabel("cosine, or r with the rating")
    figure.suptitle(title)
    _legend(figure, columns=2)
    return _save(figure, path)


@as_written
def stability_bars(path: Path, *, title: str, table: pd.DataFrame) -> Path:
    """Cross-seed r over all tasks and over the informative ones, with its SD over pairs of seeds; d is written above.

    ``table`` has columns group, cross_seed_r, cross_seed_r_sd, informative_r, informative_r_sd, d, predicted_r.
    """
    figure, axes = _figure(width=max(6.0, 1.3 * len(table) + 1.5), height=4.8)
    x = np.arange(len(table))
    tops = np.zeros(len(table))
    for at, (name, label) in enumerate((("cross_seed_r", "all tasks"), ("informative_r", "informative tasks"))):
        r, sd = table[name].to_numpy(dtype=float), np.nan_to_num(table[f"{name}_sd"].to_numpy(dtype=float))
        axes.bar(x + (at - 0.5) * 0.38, r, 0.36, color=COLOURS[at], label=f"{label}: mean over pairs of seeds ± SD")
        axes.errorbar(x + (at - 0.5) * 0.38, r, yerr=sd, fmt="none", ecolor="black", capsize=4)
        tops = np.fmax(tops, np.nan_to_num(r + sd))
    predicted = table["predicted_r"].to_numpy(dtype=float)
    if not np.isnan(predicted).all():
        axes.scatter(
            x - 0.19, predicted, marker="D", s=30, color="white", edgecolor="black", zorder=3,
            label="predicted from exact ratings (temperature 1)",
        )  # fmt: skip
        tops = np.fmax(tops, np.nan_to_num(predicted))
    for at, d in enumerate(table["d"].to_numpy(dtype=float)):
        text = "no r" if np.isnan(table["cross_seed_r"].iloc[at]) else "" if np.isnan(d) else f"d = {d:.0%}"
        axes.annotate(text, (at, tops[at]), xytext=(0, 5), textcoords="offset points", ha="center", fontsize="small")
    axes.axhline(0, color="black", linewidth=0.8)
    _name_ticks(axes, table["group"])
    axes.set_ylabel("cross-seed r (Pearson over tasks)")
    axes.margins(y=0.15)
    axes.set_title(title)
    figure.legend(fontsize="small", loc="outside lower center", ncols=1, frameon=False)
    return _save(figure, path)


@as_written
def matrices(
    path: Path,
    *,
    title: str,
    panels: Mapping[str, pd.DataFrame],
    label: str = "Pearson r over tasks",
    sides: tuple[str, str] = ("", ""),
) -> Path:
    """Correlation matrices side by side, the numbers written in.

    Each panel is a frame named on both sides; `sides` says what its rows and columns are, `label` what the colours.
    """
    names = list(panels)
    size = max(max(frame.shape) for frame in panels.values())
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    side = 1.9 + 0.62 * size
    figure = Figure(figsize=(columns * side + 0.8, rows * side + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    image = None
    for at, name in enumerate(names):
        frame = panels[name]
        axes = figure.add_subplot(rows, columns, at + 1)
        values = frame.to_numpy(dtype=float)
        image = axes.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r")
        slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(
            np.arange(frame.shape[1]), [_short(each) for each in frame.columns], fontsize="small", **slanted
        )
        axes.set_yticks(np.arange(frame.shape[0]), [_short(each) for each in frame.index], fontsize="small")
        axes.set_ylabel(sides[0])
        axes.set_xlabel(sides[1])
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if abs(value) > 0.6 else "black"
            text = "–" if np.isnan(value) else f"{value:.2f}"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize="small")
        if name:
            axes.set_title(name, fontsize="medium")
    if image is not None:
        figure.colorbar(image, ax=figure.axes, shrink=0.6, label=label)
    figure.suptitle(title)
    return _save(figure, path)


@as_written
def refused_by_origin(path: Path, *, title: str, table: pd.DataFrame) -> Path:
    """Distribution of ratings by origin, tasks that were refused and tasks that were not beside each other.

    ``table`` has columns origin, option, value, refused (0 or 1), n, share (NaN: no such task).
    """
    origins = list(dict.fromkeys(table["origin"]))
    figure = Figure(figsize=(max(6.0, 3.0 * len(origins)), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for at, origin in enumerate(origins):
        axes = figure.add_subplot(1, len(origins), at + 1)
        axes.spines[["top", "right"]].set_visible(False)
        for side, (refused, name) in enumerate(((1, "refused"), (0, "not refused"))):
            chosen = (table["origin"] == origin) & (table["refused"] == refused)
            rows = table.loc[chosen, :].sort_values(by="value")
            x = np.arange(len(rows)) + (side - 0.5) * 0.4
            label = f"{name} (n = {rows['n'].iloc[0]})"
            axes.bar(x, rows["share"].fillna(0), 0.38, color=COLOURS[1 - side], label=label)
            axes.set_xticks(np.arange(len(rows)), [_option(*pair) for pair in rows[["option", "value"]].to_numpy()])
        axes.set_title(origin, fontsize="medium")
        axes.set_ylim(0, 1.05)
        axes.legend(fontsize="small")
        if at == 0:
            axes.set_ylabel("share of ratings")
    figure.supxlabel("rating")
    figure.suptitle(title)
    return _save(figure, path)


@as_written
def variance_shares(path: Path, *, title: str, table: pd.DataFrame) -> Path:
    """Share of the variance of one sampled rating by source, with its 95 % interval.

    ``table`` has columns source, share, share_low, share_high; a missing share is left out.
    """
    table = table[table["share"].notna()].iloc[::-1]
    figure, axes = _figure(width=7.5, height=max(2.4, 0.36 * len(table) + 1.4))
    y = np.arange(len(table))
    share = table["share"].to_numpy(dtype=float)
    low, high = (table[name].to_numpy(dtype=float) for name in ("share_low", "share_high"))
    axes.barh(y, share, 0.6, color=COLOURS[0])
    reach = _reach(share, low, high)
    axes.errorbar(share, y, xerr=reach, fmt="none", ecolor="black", capsize=3)
    for at, value in enumerate(share):
        end = value if np.isnan(high[at]) else max(value, high[at])
        axes.annotate(f"{value:.1%}", (end, at), xytext=(5, 0), textcoords="offset points", va="center")
    axes.set_yticks(y, list(table["source"]))
    axes.set_xlabel("share of the variance of one sampled rating, 95 % interval over tasks")
    axes.margins(x=0.12)
    axes.set_title(title)
    return _save(figure, path)


@as_written
def violins(path: Path, *, title: str, table: pd.DataFrame, means: pd.DataFrame, label: str = "") -> Path:
    """Distributions of values over tasks: a panel for each row and panel of the tables, violins side by side in it.

    Each violin has its mean and interval in it and its n below; of fewer than 5 values, or of values that are all the
    same, the values themselves are drawn. ``table`` has columns row, panel, violin, value (NaN: left out), one row a
    value; ``means`` has row, panel, violin, n, mean, mean_low, mean_high. `label` says what the violins are.
    """
    lines, panels, names = (list(dict.fromkeys(table[name])) for name in ("row", "panel", "violin"))
    figure = Figure(
        figsize=(max(6.0, (0.9 * len(names) + 0.7) * len(panels) + 1.0), 3.3 * max(len(lines), 1) + 0.6),
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    axes: Axes | None = None
    values = table.groupby(["row", "panel", "violin"])["value"]
    numbers = {(row["row"], row["panel"], row["violin"]): row for row in means.to_dict("records")}
    for at, (line, panel) in enumerate(itertools.product(lines, panels)):
        axes = figure.add_subplot(len(lines), len(panels), at + 1, sharey=axes)
        axes.spines[["top", "right"]].set_visible(False)
        counts = []
        for place, name in enumerate(names):
            key = (line, panel, name)
            here = values.get_group(key).dropna().to_numpy(dtype=float) if key in values.indices else np.empty(0)
            _violin(axes, place, here, COLOURS[place % len(COLOURS)])
            if key in numbers:
                mean, low, high = (float(numbers[key][name]) for name in ("mean", "mean_low", "mean_high"))
                reach = _reach(mean, low, high)
                axes.errorbar(place, mean, yerr=reach, fmt="o", markersize=4, color="black", capsize=4)
            counts.append(f"{_short(name)}\nn = {len(here)}")
        _name_ticks(axes, counts)
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.set_title(str(panel), fontsize="medium")
        if at % len(panels) == 0:
            axes.set_ylabel(_short(line))
        else:
            axes.tick_params(labelleft=False)
    figure.suptitle(title)
    figure.supxlabel(label, fontsize="medium")
    return _save(figure, path)


def _violin(axes: Axes, place: int, values: np.ndarray, colour: str) -> None:
    """A violin where there is a density to estimate, else a line for each value."""
    if len(values) >= FEW_VALUES and np.ptp(values) > 1e-6 * np.abs(values).max():
        before = len(axes.collections)
        axes.violinplot([values], [place], widths=0.85, showextrema=False)
        for body in axes.collections[before:]:
            body.set(facecolor=colour, edgecolor=colour, alpha=0.45)
    else:
        axes.hlines(np.unique(values), place - 0.3, place + 0.3, color=colour, alpha=0.45, linewidth=3)


def _reach(value: np.ndarray | float, low: np.ndarray | float, high: np.ndarray | float) -> np.ndarray:
    """[2, N] how far an interval reaches below and above its value; 0 where there is none."""
    value, low, high = np.atleast_1d(value), np.atleast_1d(low), np.atleast_1d(high)
    return np.nan_to_num(np.clip(np.stack([value - low, high - value]), 0, None))


@as_written
def dose_response(
    path: Path,
    *,
    title: str,
    table: pd.DataFrame,
    dose: str = "coefficient of the vector",
    label: str = "mean rating",
) -> Path:
    """Mean rating by steering coefficient, a panel for each panel and a line for each line of the table.

    Doses that are not coherent are hollow: what is measured there is a broken model. ``table`` has columns panel, line,
    coefficient, mean, mean_low, mean_high (NaN: none), coherent; a dose without a mean is left out.
    """
    table = table.loc[np.isfinite(table["mean"].to_numpy(dtype=float)), :]
    panels = list(dict.fromkeys(table["panel"])) or [""]
    looks = {name: at for at, name in enumerate(dict.fromkeys(table["line"]))}
    columns = min(len(panels), 3)
    rows, legend = -(-len(panels) // columns), 0.24 * (-(-len(looks) // 3) + 1)
    figure = Figure(figsize=(max(6.0, 3.6 * columns), 3.3 * rows + legend + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Axes | None = None
    for at, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, at + 1, sharey=axes)
        axes.spines[["top", "right"]].set_visible(False)
        for name, lines in table.loc[table["panel"] == panel, :].groupby("line", sort=False):
            _dose_line(axes, lines.sort_values("coefficient"), str(name), looks[name])
        axes.axvline(0, color="black", linewidth=0.8, zorder=0.5)
        axes.set_title(str(panel), fontsize="medium")
        axes.set_xlabel(dose)
        if at % columns == 0:
            axes.set_ylabel(label)
    if axes is not None and not table["coherent"].to_numpy(dtype=bool).all():
        axes.plot([], [], "o", color="grey", markerfacecolor="white", markersize=5, label="not coherent")
    figure.suptitle(title)
    _legend(figure, columns=3)
    return _save(figure, path)


def _dose_line(axes: Axes, rows: pd.DataFrame, name: str, look: int) -> None:
    colour, marker = COLOURS[look % len(COLOURS)], MARKERS[look // len(COLOURS) % len(MARKERS)]
    coefficient, mean, low, high = (
        rows[column].to_numpy(dtype=float) for column in ("coefficient", "mean", "mean_low", "mean_high")
    )
    axes.errorbar(coefficient, mean, yerr=_reach(mean, low, high), color=colour, linewidth=1.2, capsize=2)
    for coherent, fill in ((True, colour), (False, "white")):
        chosen = rows["coherent"].to_numpy(dtype=bool) == coherent
        axes.plot(
            coefficient[chosen], mean[chosen], marker, color=colour, markerfacecolor=fill, markersize=5,
            label=f"\u200b{_short(name)}",
        )  # fmt: skip


def _option(say: str, value: float) -> str:
    return say if say == f"{value:g}" else f"{say}\n({value:g})"


def _short(name: object) -> str:
    return text if len(text := str(name)) <= 48 else f"{text[:47]}…"


def _counted(n: np.ndarray) -> str:
    """How many tasks, of how many there are in each row."""
    low, high = (0, 0) if np.isnan(n).all() else (int(np.nanmin(n)), int(np.nanmax(n)))
    return f"n = {low}" if low == high else f"n = {low}–{high}"


def _lowest(scores: np.ndarray) -> float:
    """Where an axis of scores begins: one can be arbitrarily worse than the mean; what matters is between 0 and 1."""
    return max(float(np.min(scores[np.isfinite(scores)], initial=0.0)) * 1.1, -1.0) - 0.05


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


def _figure(width: float, height: float = 4.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI, pil_kwargs={"compress_level": 4})  # twice as fast as 6, and 2 % larger
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    return path
