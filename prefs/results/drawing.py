"""What figures have in common: the file, panels, legends, names and colours."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
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

P = ParamSpec("P")


def to_file(draw: Callable[P, Figure]) -> Callable[Concatenate[Path, P], Path]:
    """Have a figure written to a path. Origins and options are the user's text: a dollar sign in them is no formula."""

    @functools.wraps(draw)
    def write(path: Path, *given: P.args, **named: P.kwargs) -> Path:
        with rc_context({"text.parse_math": False}):
            return save(draw(*given, **named), path)

    return write


def save(figure: Figure, path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI, pil_kwargs={"compress_level": 4})  # twice as fast as 6, and 2 % larger
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    return path


def new_panel(title: str, width: float, height: float = 4.2) -> tuple[Figure, Axes]:
    figure, (axes,) = new_panels("", [title], 1, width, height, around=(0, 0), fontsize="large")
    return figure, axes


def new_panels(
    title: str,
    names: Sequence[object],
    columns: int,
    width: float,
    height: float,
    *,
    least: float = 6.0,
    around: tuple[float, float] = (0.0, 0.6),
    sharey: bool = False,
    fontsize: str = "medium",
) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each name, in rows of so many columns.

    Sizes are in inches: of a panel, the `least` width of the figure, and what is `around` the panels, across and down.
    """
    rows = max(1, -(-len(names) // columns)) if columns else 1
    size = (max(least, width * columns + around[0]), height * rows + around[1])
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


def first_in_row(axes: Axes) -> bool:
    place = axes.get_subplotspec()
    return place is not None and place.is_first_col()


def layer_axis(axes: Axes, label: str = "layer (residual stream after the block)") -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(label)


def diamonds(axes: Axes, x: np.ndarray, y: Any, label: str | None, size: float = 30) -> None:
    axes.scatter(x, y, marker="D", s=size, color="white", edgecolor="black", zorder=3, label=label)


def legend(figure: Figure, columns: int = 1) -> list[Artist]:
    """One legend below all panels, each label once; returns its handles."""
    named: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    legend = figure.legend(
        list(named.values()), list(named), fontsize="small", loc="outside lower center", ncols=columns, frameon=False
    )
    return [handle for handle in legend.legend_handles if handle is not None]


def name_ticks(axes: Axes, names: Iterable[str]) -> None:
    """Names below the bars, slanted where they would run into each other."""
    names = [short(name) for name in names]
    slanted = max((len(line) for name in names for line in name.splitlines()), default=0) > 14
    axes.set_xticks(np.arange(len(names)), names, rotation=25 if slanted else 0, ha="right" if slanted else "center")


def nth_colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def nth_marker(number: int) -> str:
    """That tells those apart that have the same colour."""
    return MARKERS[number // len(COLOURS) % len(MARKERS)]


def labelled(name: object, n: object = None) -> str:
    """A label with a name of the user's; one that begins with an underscore would not be shown."""
    return f"\u200b{short(name)}" + ("" if n is None else f" (n = {n})")


def option_labels(rows: pd.DataFrame) -> list[str]:
    pairs = zip(rows["option"], rows["value"], strict=True)
    return [say if say == f"{value:g}" else f"{say}\n({value:g})" for say, value in pairs]


def short(name: object) -> str:
    return text if len(text := str(name)) <= 48 else f"{text[:47]}…"


def floats(table: pd.DataFrame, *names: str) -> list[np.ndarray]:
    return [table[name].to_numpy(dtype=float) for name in names]


def counted(rows: pd.DataFrame) -> str:
    """How many tasks there are in each row."""
    counts = sorted({int(n) for n in rows["n"].dropna()}) or [0]
    return f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]}–{counts[-1]}"


def lowest_score(*scores: np.ndarray) -> float:
    """Where an axis of scores begins: one can be arbitrarily worse than the mean; what matters is between 0 and 1."""
    together = np.concatenate(scores)
    return max(float(np.min(together[np.isfinite(together)], initial=0.0)) * 1.1, -1.0) - 0.05


def error_bars(value: np.ndarray | float, low: np.ndarray | float, high: np.ndarray | float) -> np.ndarray:
    """[2, N] how far an interval reaches below and above its value; 0 where there is none."""
    value, low, high = np.atleast_1d(value), np.atleast_1d(low), np.atleast_1d(high)
    return np.nan_to_num(np.clip(np.stack([value - low, high - value]), 0, None))
