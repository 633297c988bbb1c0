"""Figures, as PNG files. Each function takes plain tables, writes one file and returns its path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe & Ito's palette: told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DPI = 150
# Origins and options are the user's text: a dollar sign in them is no formula.
as_written = rc_context({"text.parse_math": False})


@as_written
def ratings_by_origin(
    path: Path,
    *,
    title: str,
    labels: Sequence[str],
    shares: Mapping[str, np.ndarray],
    exact: Mapping[str, np.ndarray] | None,
    counts: Mapping[str, str],
) -> Path:
    """Share of each option by origin: bars for sampled ratings, diamonds for the exact distribution.

    Parameters
    ----------
    labels
        The options, in order of value.
    shares, exact
        By origin, [options] shares that add up to 1 (NaN: none).
    counts
        By origin, what n stands for, as written in the legend.
    """
    figure, axes = _figure(width=max(6.0, 1.1 * len(labels) + 2.5))
    width = 0.8 / max(len(shares), 1)
    for at, (origin, share) in enumerate(shares.items()):
        x = np.arange(len(labels)) + (at - (len(shares) - 1) / 2) * width
        axes.bar(x, share, width, color=COLOURS[at % len(COLOURS)], label=f"\u200b{origin} ({counts[origin]})")
        if exact is not None:
            label = "exact" if at == len(shares) - 1 else None
            axes.scatter(x, exact[origin], marker="D", s=18, color="white", edgecolor="black", zorder=3, label=label)
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


def _figure(width: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return path
