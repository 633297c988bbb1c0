"""What would mislead a reader of a comparison's tables, in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from prefs import sweep
from prefs.comparison.cells import Cell, Sweep, also_different
from prefs.comparison.tables import Block
from prefs.data.task import ALL
from prefs.results.job_record import FAILED, FINISHED
from prefs.results.terminal import number

# The ceiling on R² below which a target is called noise, and how many probes one line names.
NOISE, MOST = 0.1, 6


def unfinished(folders: Sequence[Path], found: Sweep) -> str | None:
    """One line on the jobs that the comparison is without, named."""
    failed = [f"{job} ({job.error})" for job in found.jobs if job.status == FAILED]
    running = [str(job) for job in found.jobs if job.status not in (FAILED, FINISHED)]
    missing = 0
    for folder in dict.fromkeys(folders):
        expected = sweep.job_count(folder)
        begun = sum(job.folder.is_relative_to(folder) for job in found.jobs)
        missing += max(0, (expected or 0) - begun)
    parts = [f"failed: {'; '.join(failed)}"] if failed else []
    parts += [f"begun but not finished: {'; '.join(running)}"] if running else []
    parts += [f"not begun: {missing}"] if missing else []
    if not parts:
        return None
    done = sum(job.status == FINISHED for job in found.jobs)
    said = " ".join(f"{part[0].upper()}{part[1:]}." for part in parts)
    return f"Of {len(found.jobs) + missing} jobs {done} finished. {said}"


def cautions(cells: Sequence[Cell], blocks: Sequence[Block], tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """What would mislead a reader of the tables, in plain words."""
    said = []
    differ = also_different(cells)
    if differ:
        said.append(f"Cells differ in more than their names say: {', '.join(differ)}.")
    cells_table = tables["cells"]
    for row in cells_table.loc[cells_table["origin"] == ALL, :].to_dict("records"):
        name = row["cell"]
        if pd.isna(row["cross_seed_r"]):
            said.append(f"{name}: no cross-seed r ({row['cross_seed_r_reason']}).")
        if row["modal_share"] > 0.8:
            informative = number(row["informative_r"])
            said.append(
                f"{name}: {row['modal_share']:.0%} of the ratings are {row['modal_rating']:g}, which flatters r;"
                f" informative r is {informative} on the {number(row['d'])} of tasks that are told apart."
            )
        if row["valid_mass"] < 0.5:
            said.append(
                f"{name}: only {row['valid_mass']:.0%} of the model's probability is on the options; that part"
                " is what is measured."
            )
    said += _own_completions(blocks)
    said += _odd_templates(tables)
    if "probes" in tables:
        said += probe_cautions(tables["probes"])
    return said


def _own_completions(blocks: Sequence[Block]) -> list[str]:
    """Whether raters are compared that rated different completions."""
    for block in blocks:
        texts: dict[tuple[int, str], dict[str, tuple[str, ...]]] = {}
        for cell in block.cells:
            of_rater = texts.setdefault((cell.completion_seed, cell.condition), {})
            of_rater[cell.rater] = tuple(cell.texts["completion"].fillna(""))
        if any(len(set(of_rater.values())) > 1 for of_rater in texts.values()):
            return ["Raters rated different completions; set one completer for all to compare raters (completer=...)."]
    return []


def _odd_templates(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Templates that are stable but order the tasks unlike the others: stable, and a measure of something else."""
    agreements: dict[str, list[float]] = {}
    for row in tables["agreement"].to_dict("records"):
        if row["between"] == "templates" and not pd.isna(row["r"]):
            for name in (row["a"], row["b"]):
                agreements.setdefault(name, []).append(row["r"])
    said = []
    for row in tables["stability_by"].to_dict("records"):
        name, r = row["group"], np.nanmax([-1.0, row["cross_seed_r"], row["predicted_r"]])
        # Not the mean: with two templates that agree and one that does not, all means are low.
        if row["by"] == "template" and r >= 0.5 and max(agreements.get(name, [1.0])) < 0.5:
            said.append(
                f"{name} is stable (r {number(float(r))}) but orders tasks unlike every other template (agreement at"
                f" most {number(max(agreements[name]))}): it measures something else."
            )
    return said


def probe_cautions(table: pd.DataFrame) -> list[str]:
    """Which probes are not to be believed, and why: each is named once, for the first reason that holds."""
    noise, chance, blind, above = [], [], [], []
    for row in table.to_dict("records"):
        name, score, ceiling = f"{row['cell']}: {row['target']}", row["score"], row["ceiling"]
        if ceiling < NOISE:
            noise.append(f"{name} ({number(ceiling)})")
        elif pd.isna(score) or score <= (0.5 if row["metric"] == "AUC" else 0.0) or row["p"] > 0.05:
            chance.append(f"{name} ({number(score)})")
        elif row["best_control_score"] >= score:
            blind.append(f"{name} ({row['best_control']} {number(row['best_control_score'])})")
        elif score > ceiling + 0.05:
            above.append(f"{name} ({number(score)} of {number(ceiling)})")
    said = []
    if noise:
        said.append(
            f"Targets that are mostly noise (the best R² that any probe can reach is under {number(NOISE)}):"
            f" {_some(noise)}. What their probes score, and where they point, says next to nothing."
        )
    if chance:
        said.append(
            f"Probes that predict held-out tasks no better than chance does: {_some(chance)}. Cosines with them and"
            " their transfer mean nothing."
        )
    if blind:
        said.append(f"Probes that do not beat a control that never looks into the model: {_some(blind)}.")
    if above:
        said.append(
            f"Probes that score above the noise ceiling, which is an estimate too: {_some(above)}. Do not believe more"
            " than the ceiling."
        )
    return said


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST]) + (f" and {len(names) - MOST} more" if len(names) > MOST else "")
