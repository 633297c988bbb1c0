"""Figures, as PNG files. Each function takes plain tables, writes one file and returns its path."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from prefs.errors import UserError

# Okabe & Ito's palette: told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DPI = 150
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
def probe_by_layer(path: Path, *, title: str, table: pd.DataFrame) -> Path:
    """Held-out R² by layer for each target, with its noise ceiling (dashed) and origin-mean baseline (dotted).

    ``table`` has columns target, layer, n, r2, baseline_r2, ceiling_r2.
    """
    figure, axes = _figure(width=7.5)
    lowest = 0.0
    for at, (target, rows) in enumerate(table.groupby("target", sort=False)):
        colour = COLOURS[at % len(COLOURS)]
        layers, r2 = rows["layer"].to_numpy(dtype=int), rows["r2"].to_numpy(dtype=float)
        axes.plot(layers, r2, marker="o", markersize=3, color=colour, label=f"{target} (n = {rows['n'].iloc[0]})")
        for column, style, name in (
            ("ceiling_r2", "--", "noise ceiling"),
            ("baseline_r2", ":", "origin-mean baseline"),
        ):
            level = float(rows[column].astype(float).iloc[0])
            if not np.isnan(level):
                axes.axhline(
                    level, linestyle=style, color=colour, linewidth=1.2, label=f"{target}: {name}, {level:.2f}"
                )
        if not np.isnan(r2).all():
            lowest = min(lowest, float(np.nanmin(r2)))
    axes.axhline(0, color="black", linewidth=0.8)
    # A probe can be arbitrarily worse than the mean; what matters is between 0 and 1.
    axes.set_ylim(max(lowest * 1.1, -1.0) - 0.05, 1.05)
    axes.set_xlabel("layer (residual stream after the block)")
    axes.set_ylabel("held-out R²")
    axes.set_title(title)
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
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
def matrices(path: Path, *, title: str, panels: Mapping[str, pd.DataFrame]) -> Path:
    """Correlation matrices side by side, the numbers written in. Each panel is a square frame named on both sides."""
    names = list(panels)
    size = max(len(frame) for frame in panels.values())
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
        ticks = np.arange(len(frame))
        axes.set_xticks(ticks, [str(each) for each in frame.columns], rotation=45, ha="right", fontsize="small")
        axes.set_yticks(ticks, [str(each) for each in frame.index], fontsize="small")
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if abs(value) > 0.6 else "black"
            text = "–" if np.isnan(value) else f"{value:.2f}"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize="small")
        if name:
            axes.set_title(name, fontsize="medium")
    if image is not None:
        figure.colorbar(image, ax=figure.axes, shrink=0.6, label="Pearson r over tasks")
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
    reach = np.nan_to_num(np.clip(np.stack([share - low, high - share]), 0, None))
    axes.errorbar(share, y, xerr=reach, fmt="none", ecolor="black", capsize=3)
    for at, value in enumerate(share):
        end = value if np.isnan(high[at]) else max(value, high[at])
        axes.annotate(f"{value:.1%}", (end, at), xytext=(5, 0), textcoords="offset points", va="center")
    axes.set_yticks(y, list(table["source"]))
    axes.set_xlabel("share of the variance of one sampled rating, 95 % interval over tasks")
    axes.margins(x=0.12)
    axes.set_title(title)
    return _save(figure, path)


def _option(say: str, value: float) -> str:
    return say if say == f"{value:g}" else f"{say}\n({value:g})"


def _name_ticks(axes: Axes, names: Iterable[str]) -> None:
    """Names below the bars, slanted where they would run into each other."""
    names = [name if len(name) <= 48 else f"{name[:47]}…" for name in map(str, names)]
    slanted = max((len(name) for name in names), default=0) > 14
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
        figure.savefig(path, dpi=DPI)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    return path
