"""What a sweep found, side by side: ``python -m prefs.compare multirun/DATE/TIME [more ...]``.

Runs by itself when a multirun ends. Writes tables (CSV and Parquet), figures (PNG) and ``report.html``, prints one
table of all cells, and logs one summary run to W&B.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from prefs.comparison.cautions import cautions, unfinished
from prefs.comparison.cells import Sweep, align, read_sweep
from prefs.comparison.conditions import EXACT, condition_effects, condition_remarks, condition_table, grids
from prefs.comparison.figures import draw
from prefs.comparison.page import comparison_page
from prefs.comparison.probe_tables import probe_cosines, probe_table, probe_transfer
from prefs.comparison.probed import Probed, read_probes
from prefs.comparison.steered import CONCEPT, read_steered, steering_table
from prefs.comparison.tables import (
    Block,
    agreement,
    cell_table,
    distributions,
    refusals_of_cells,
    stability_by,
    variance,
)
from prefs.config import StatsConfig, WandbConfig
from prefs.data.task import ALL
from prefs.errors import UserError
from prefs.results.html import write_report
from prefs.results.terminal import MISSING, new_table, number, show, show_files, with_interval
from prefs.results.wandb import tracker
from prefs.statistics.measured import DIRECT
from prefs.store.files import write_table

log = logging.getLogger("prefs")

FOLDER = "comparison"
# Metrics of each cell and origin in the W&B summary.
SUMMARY = ("cross_seed_r", "informative_r", "d", "icc1", "predicted_r", "valid_mass")


# Conditions beyond which the sources of noise of each would fill the screen; the report has them all.
MOST_CONDITIONS = 4


@dataclass(frozen=True)
class Comparison:
    """What was compared and found: blocks of cells on the same tasks, tables and figures by name, and cautions."""

    blocks: tuple[Block, ...]
    tables: dict[str, pd.DataFrame]
    figures: dict[str, Path]
    remarks: tuple[str, ...]


def compare(folders: Sequence[Path], out: Path | None = None, wandb_mode: str | None = None) -> Path:
    """Compare the cells in some run folders, and write, print and log what comes out.

    Parameters
    ----------
    folders
        Of multiruns, or of single runs.
    out
        Where to; by default ``comparison`` in the folder, or with several folders ``comparisons/DATE/TIME`` here.
    wandb_mode
        In place of the first job's ``wandb.mode``.

    Returns
    -------
    Path
        The folder that was written.

    Raises
    ------
    UserError
        If there is nothing to compare, or the disk refuses.
    """
    now = datetime.datetime.now()
    found = read_sweep(folders)
    if not found.cells:
        why = "no job has finished"
        if any(job.is_shard for job in found.jobs):
            why = "these jobs made shards; the same command without shard= finds them in the store and shows the whole"
        raise UserError(f"nothing to compare: {unfinished(folders, found) or why}")
    if out is None:
        out = folders[0] / FOLDER if len(folders) == 1 else Path("comparisons") / now.strftime("%Y-%m-%d/%H-%M-%S")
    first = found.jobs[0]
    compared = _compare(folders, found, out, StatsConfig(**first.config["stats"]))
    page = write_report(
        out / "report.html",
        comparison_page(folders, found, compared.blocks, compared.tables, compared.figures, compared.remarks, now),
    )
    settings = WandbConfig(**first.config["wandb"])
    if wandb_mode is not None:
        settings = replace(settings, mode=wandb_mode)
    config = {"folders": [str(folder) for folder in folders], "cells": [cell.name for cell in found.cells]}
    with tracker(settings, name=FOLDER, group=first.group, folder=out, run_config=config, job_type="compare") as track:
        for row in compared.tables["cells"].to_dict("records"):
            cell = f"{row['cell']}/{row['origin']}"
            track.metrics({f"compare/{name}/{cell}": row[name] for name in SUMMARY if pd.notna(row[name])})
        for row in compared.tables["probes"].to_dict("records") if "probes" in compared.tables else ():
            if pd.notna(row["score"]):
                track.metrics({f"compare/probe/{row['cell']}/{row['target']}": row["score"]})
        for row in compared.tables["condition_effects"].to_dict("records") if "conditions" in compared.tables else ():
            if pd.notna(row["points"]):
                name = f"{row['grid']}/{row['ratings']}/{row['of']}/{row['contrast']}"
                track.metrics({f"compare/condition/{name}": row["points"]})
        for name, table in compared.tables.items():
            track.table(name, table)
        for name, path in compared.figures.items():
            track.figure(name, path)
        track.page("report", page)
    synced = {FOLDER: track.folder} if track.offline and track.folder is not None else {}
    _print(found, compared, out, page, synced)
    return out


def _compare(folders: Sequence[Path], found: Sweep, out: Path, stats: StatsConfig) -> Comparison:
    aligned, alignment = align(found.cells)
    blocks = tuple(
        Block.of(cells, resamples=stats.bootstrap, seed=stats.seed, target_r=stats.target_r) for cells in aligned
    )
    variances = variance(blocks)
    tables = {
        "cells": cell_table(blocks),
        "stability_by": stability_by(blocks),
        "distribution": distributions(blocks),
        "agreement": agreement(blocks),
        "variance": variances.table,
        "refusals": refusals_of_cells(blocks),
    }
    probed, damaged = read_probes(found)
    of_probes, without = _probe_tables(probed, found, stats)
    tables |= of_probes
    of_conditions = grids(found.cells)
    effects = condition_effects(of_conditions, resamples=stats.bootstrap, seed=stats.seed)
    steered, not_steered = read_steered(found)
    optional = {
        "conditions": condition_table(of_conditions, resamples=stats.bootstrap, seed=stats.seed),
        "condition_effects": effects.effects,
        "condition_shares": effects.shares,
        "steering": steering_table(steered),
    }
    tables |= {name: table for name, table in optional.items() if len(table)}
    for name, table in tables.items():
        write_table(table, out / name)
    figures = draw(out / "figures", blocks, probed, of_conditions, steered, tables)
    left_out = unfinished(folders, found)
    doubles = [
        f"{cell.job.folder}/{cell.key}{' (but for its probes)' * any(each.cell is cell for each in probed)}"
        for cell in found.doubles
    ]
    remarks = [
        *([left_out] if left_out else []),
        *([f"Measured again by a later job, and left out: {', '.join(doubles)}."] if doubles else []),
        *([alignment] if alignment else []),
        *cautions(found.cells, blocks, tables),
        *variances.remarks,
        *condition_remarks(of_conditions, effects),
        *damaged,
        *without,
        *not_steered,
    ]
    return Comparison(blocks, tables, figures, tuple(remarks))


def _probe_tables(
    probed: Sequence[Probed], found: Sweep, stats: StatsConfig
) -> tuple[dict[str, pd.DataFrame], tuple[str, ...]]:
    """The tables that there is something for, and what was left out."""
    cosines, without = probe_cosines(probed)
    tables = {
        "probes": probe_table(probed),
        "probe_cosines": cosines,
        "probe_transfer": probe_transfer(probed, found.cells, resamples=stats.bootstrap, seed=stats.seed),
    }
    return {name: table for name, table in tables.items() if len(table)}, without


def _print(found: Sweep, compared: Comparison, out: Path, page: Path, synced: dict[str, Path]) -> None:
    console = Console(markup=False, highlight=False, emoji=False)
    lines = [cell_lines(compared.tables["cells"])]
    variances = compared.tables["variance"]
    if variances["share"].notna().to_numpy().any() and len(set(variances["condition"])) <= MOST_CONDITIONS:
        lines.append(variance_lines(variances))
    if "conditions" in compared.tables:
        lines += condition_lines(compared.tables)
    if "steering" in compared.tables:
        lines.append(steering_lines(compared.tables["steering"]))
    if "probes" in compared.tables:
        lines.append(probe_lines(compared.tables["probes"]))
    counts = (len(found.cells), "cell"), (len(found.jobs), "job")
    title = "Comparison · " + " of ".join(f"{count} {what}{'s' * (count != 1)}" for count, what in counts)
    show(console, title=title, tables=lines, said=compared.remarks)
    show_files(console, [*found.work(), *found.spent()], out, None, synced)
    console.print(f"report              {page}", soft_wrap=True)


def cell_lines(frame: pd.DataFrame) -> Table:
    """All cells, over all their tasks. What is the same for all of them is said once, above."""
    whole = frame.loc[frame["origin"] == ALL, :]
    counts = sorted(set(whole["n"]))
    tasks = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    one_rater = whole["rater"].nunique() == 1
    said = f"{whole['rater'].iloc[0]} on {tasks} tasks" if one_rater else f"{tasks} tasks"
    table = new_table(f"{said}: r is cross-seed r, mean ± SD over pairs of seeds; mode with its share", first="cell")
    for name in ("r ± SD", "inf. r", "d", "mode", "pred. r", "mass"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in whole.to_dict("records"):
        name, r = _with_conditions(str(row["cell"])), number(row["cross_seed_r"])
        kind = "" if row["kind"] == DIRECT else f" ({row['kind']})"
        table.add_row(
            (name.removeprefix(f"{row['rater']}-") if one_rater else name) + kind,
            r if r == MISSING else f"{r} ± {number(row['cross_seed_r_sd'])}",
            number(row["informative_r"]),
            number(row["d"]),
            MISSING if pd.isna(row["modal_rating"]) else f"{row['modal_rating']:g} ({number(row['modal_share'])})",
            number(row["predicted_r"]),
            number(row["valid_mass"]),
        )
    table.columns[0].no_wrap, table.columns[0].overflow, table.columns[0].min_width = False, "fold", 24
    return table


def _with_conditions(name: str) -> str:
    """A cell's name with its conditions in words short enough for a table."""
    return name.replace("completer.condition=", "completed: ").replace("rating.condition=", "rated: ")


def variance_lines(frame: pd.DataFrame) -> Table:
    """Where the noise of one sampled rating comes from: the sources that can be told apart, by condition."""
    table = new_table("Where the noise comes from: share of the variance of one sampled rating", first="source")
    table.add_column("share [95 % over tasks]", justify="right", no_wrap=True)
    table.add_column("not told apart from it", style="dim")
    for condition in dict.fromkeys(frame["condition"]):
        if condition:
            table.add_row(str(condition), style="bold")
        for row in frame.loc[(frame["condition"] == condition) & frame["share"].notna(), :].to_dict("records"):
            table.add_row(str(row["source"]), with_interval(row, "share"), str(row["holds"]))
    return table


def probe_lines(frame: pd.DataFrame) -> Table:
    """Each cell's probes by target, beside the best control that never looks into the model."""
    metrics = " or ".join(dict.fromkeys(frame["metric"]))
    one_rater = len(set(frame["rater"])) == 1
    counts = sorted(set(frame["n"]))
    tasks = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    title = f"Probes: {metrics} on {tasks} held-out tasks; control: the best without the model"
    table = new_table(title, first="target")
    for name in (f"{metrics} [95 %]", "p", "ceiling", "control"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("layer, position", no_wrap=True)
    for cell, rows in frame.groupby("cell", sort=False):
        prefix = f"{rows['rater'].iloc[0]}-" if one_rater else ""
        table.add_row(str(cell).removeprefix(prefix), style="bold")
        for row in rows.to_dict("records"):
            score = with_interval(row, "score")
            numbers = (number(row[name]) for name in ("p", "ceiling", "best_control_score"))
            table.add_row(f"  {row['target']}", score, *numbers, f"{row['layer']}, {row['position']}")
    table.columns[0].no_wrap, table.columns[0].overflow, table.columns[0].min_width = False, "fold", 18
    return table


def condition_lines(tables: Mapping[str, pd.DataFrame]) -> list[Table]:
    """Of each grid: means by the two conditions, then main effects and interaction with their shares of variation.

    Of exact ratings, where there are any.
    """
    lines = []
    for grid, rows in tables["conditions"].groupby("grid", sort=False):
        kind = rows["ratings"].iloc[0]
        rows = rows.loc[(rows["ratings"] == kind) & (rows["origin"] == ALL), :]
        effects, shares = (
            table.loc[(table["grid"] == grid) & (table["ratings"] == kind), :]
            for table in (tables["condition_effects"], tables["condition_shares"])
        )
        of = "exact ratings" if kind == EXACT else "means over seeds"
        lines += [_mean_lines(str(grid), of, rows), _effect_lines(effects, shares)]
    return lines


def _mean_lines(grid: str, of: str, rows: pd.DataFrame) -> Table:
    table = new_table(f"{grid}: {of} by condition, mean [95 % over tasks]", first="completed under")
    levels = list(dict.fromkeys(rows["rating"]))
    for level in levels:
        table.add_column(f"rated: {level}", justify="right")
    for completing, there in rows.groupby("completing", sort=False):
        of_level = {row["rating"]: with_interval(row, "mean") for row in there.to_dict("records")}
        table.add_row(str(completing), *(of_level.get(level, MISSING) for level in levels))
    return table


def _effect_lines(effects: pd.DataFrame, shares: pd.DataFrame) -> Table:
    """The effects of each source below its share of the variation within tasks."""
    table = new_table(f"What conditions do to the same {effects['n'].iloc[0]} tasks", first="effect")
    for name in ("points [95 %]", "in SDs", "share of variation"):
        table.add_column(name, justify="right", no_wrap=True)
    for share in shares.to_dict("records"):
        rows = effects.loc[effects["of"] == share["source"], :]
        if len(rows) or pd.notna(share["share"]):
            table.add_row(str(share["source"]), "", "", with_interval(share, "share"), style="bold")
        for row in rows.to_dict("records"):
            table.add_row(f"  {row['contrast']}", with_interval(row, "points"), number(row["standardised"]), "")
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
    return table


def steering_lines(frame: pd.DataFrame) -> Table:
    """Each cell's slope along the concept's vector, beside the largest along one that means nothing."""
    table = new_table("Steering: rating points a unit of the coefficient; Δ at coefficients −1 and 1", first="cell")
    for name in ("layer", "slope [95 %]", "null", "Δ at −1", "Δ at 1"):
        table.add_column(name, justify="right", no_wrap=True)
    one_rater = len(set(frame["rater"])) == 1
    rows = frame.loc[frame["control"] == CONCEPT, :].to_dict("records")
    several = len({row["vector"] for row in rows}) > 1
    for row in rows:
        name = _with_conditions(str(row["cell"])).removeprefix(f"{row['rater']}-" if one_rater else "")
        numbers = (number(row[each]) for each in ("null_slope", "delta_minus", "delta_plus"))
        slope = with_interval(row, "slope")
        table.add_row(f"{name} {row['vector']}" if several else name, f"{row['layer']}", slope, *numbers)
    table.columns[0].no_wrap, table.columns[0].overflow, table.columns[0].min_width = False, "fold", 18
    return table


def main(arguments: Iterable[str] | None = None) -> None:
    """The command line; what the user can mend ends in one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m prefs.compare", description="What a sweep found, side by side.")
    parser.add_argument("folders", nargs="+", type=Path, help="multirun/DATE/TIME, or outputs/DATE/TIME; several")
    parser.add_argument("--out", type=Path, help="where to write (default: comparison in the folder)")
    parser.add_argument(
        "--wandb", choices=("auto", "online", "offline", "disabled"), help="in place of the jobs' wandb.mode"
    )
    given = parser.parse_args(None if arguments is None else list(arguments))
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s][%(levelname)s] %(message)s")
    try:
        compare([folder.absolute() for folder in given.folders], given.out, given.wandb)
    except UserError as error:
        sys.stderr.write(f"prefs: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
