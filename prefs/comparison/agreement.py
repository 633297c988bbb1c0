"""Whether templates, and raters, order the same tasks alike."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd

from prefs.comparison.cells import Sweep
from prefs.comparison.show import square, table
from prefs.comparison.stability import stability_by
from prefs.results import figures
from prefs.results.result import Result, figure
from prefs.results.tables import columns, numeric
from prefs.results.terminal import number
from prefs.statistics.agreement import correlation

COLUMNS = (
    "between", "of", "a", "b", "completion_seed", "condition", "means", "n", "r", "r_low", "r_high", "r_reason",
)  # fmt: skip
NOTE = "Correlation over tasks of exact means: a template that is stable but measures something else shows here."


def agreement(sweep: Sweep) -> Result:
    """Agreement between templates and between raters, and what does not agree."""
    pairs = agreement_table(sweep)
    drawn = []
    for between, by in (("templates", "rater"), ("raters", "template")):
        if panels := agreement_matrices(pairs, between):
            title = f"Agreement between {between}, by {by}"
            drawn.append(figure(f"agreement_{between}", figures.matrices, title=title, panels=panels))
    remarks = (*_own_completions(sweep), *_odd_templates(pairs, stability_by(sweep)))
    return Result("Agreement", NOTE, (table("agreement", pairs, "Pairs"),), figures=tuple(drawn), remarks=remarks)


def agreement_table(sweep: Sweep) -> pd.DataFrame:
    """Correlation over tasks between templates (of one rater) and between raters (of one template).

    Of exact means where both cells have them, else of the means over seeds, whose noise lowers every correlation. One
    row a pair, for each completion seed and condition in which both were measured.
    """
    rows: list[dict[str, object]] = []
    for block in sweep.blocks:
        for a, b in itertools.combinations(block.cells, 2):
            if a.extra != b.extra or (a.rater == b.rater) == (a.key == b.key):
                continue
            between, same, names = (
                ("templates", a.rater, (a.key, b.key)) if a.rater == b.rater else ("raters", a.key, (a.rater, b.rater))
            )
            exact = a.measured.exact is not None and b.measured.exact is not None
            x, y = (cell.measured.task_means if exact else cell.measured.seed_means for cell in (a, b))
            r = correlation(x, y, block.groups[0].draws)
            row = (between, same, *names, a.completion_seed, a.condition, "exact" if exact else "over seeds", r.n)
            rows.append(dict(zip(COLUMNS, row, strict=False)) | columns("r", r))
    return numeric(pd.DataFrame(rows, columns=COLUMNS), words=("between", "of", "a", "b", "condition", "means"))


def agreement_matrices(pairs: pd.DataFrame, between: str) -> dict[str, pd.DataFrame]:
    """Square matrices of r, one for each rater (or template) and condition; means over completion seeds."""
    panels: dict[str, dict[tuple[str, str], list[float]]] = {}
    for row in pairs.loc[pairs["between"] == between, :].to_dict("records"):
        panel = f"{row['of']} {row['condition']}".strip()
        panels.setdefault(panel, {}).setdefault((row["a"], row["b"]), []).append(row["r"])
    return {panel: square({pair: float(np.mean(r)) for pair, r in pairs.items()}) for panel, pairs in panels.items()}


def _own_completions(sweep: Sweep) -> list[str]:
    """Whether raters are compared that rated different completions."""
    for block in sweep.blocks:
        texts: dict[tuple[int, str], dict[str, tuple[str, ...]]] = {}
        for cell in block.cells:
            by_rater = texts.setdefault((cell.completion_seed, cell.condition), {})
            by_rater[cell.rater] = tuple(cell.texts["completion"].fillna(""))
        if any(len(set(by_rater.values())) > 1 for by_rater in texts.values()):
            return ["Raters rated different completions; set one completer for all to compare raters (completer=...)."]
    return []


def _odd_templates(pairs: pd.DataFrame, pooled: pd.DataFrame) -> list[str]:
    """Templates that are stable but order the tasks unlike the others: stable, and a measure of something else."""
    agreements: dict[str, list[float]] = {}
    for row in pairs.loc[(pairs["between"] == "templates") & pairs["r"].notna(), :].to_dict("records"):
        for name in (row["a"], row["b"]):
            agreements.setdefault(name, []).append(row["r"])
    remarks = []
    for row in pooled.loc[pooled["by"] == "template", :].to_dict("records"):
        name, r = row["group"], np.nanmax([-1.0, row["cross_seed_r"], row["predicted_r"]])
        # Not the mean: with two templates that agree and one that does not, all means are low.
        most = max(agreements.get(name, [1.0]))
        if r >= 0.5 and most < 0.5:
            remarks.append(
                f"{name} is stable (r {number(float(r))}) but orders tasks unlike every other template (agreement at"
                f" most {number(most)}): it measures something else."
            )
    return remarks
