"""What a sweep found, side by side: ``python -m prefs.compare multirun/DATE/TIME [more ...]``.

Runs by itself when a multirun ends. Writes tables (CSV and Parquet), figures (PNG) and ``report.html``, prints one
table of all cells, and logs one summary run to W&B.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from prefs import sweep as multirun
from prefs.comparison import examples
from prefs.comparison.agreement import agreement
from prefs.comparison.cells import Sweep, read_sweep
from prefs.comparison.conditions import conditions
from prefs.comparison.distribution import distributions
from prefs.comparison.jobs import jobs, left_out, spent, unfinished, work
from prefs.comparison.probes import probes
from prefs.comparison.refusals import refusals_of_cells
from prefs.comparison.stability import stability_of_cells
from prefs.comparison.steering import steering
from prefs.comparison.variance import variance
from prefs.config import WandbConfig
from prefs.config.folders import new_folder
from prefs.errors import UserError
from prefs.results import files, terminal
from prefs.results.html import Report, write_report
from prefs.results.result import Result, joined
from prefs.results.wandb import tracker

FOLDER = "comparison"
# Everything that is compared, in the order of the report: one module a kind.
COMPARISONS: tuple[Callable[[Sweep], Result | None], ...] = (
    left_out,
    stability_of_cells,
    distributions,
    agreement,
    variance,
    refusals_of_cells,
    conditions,
    steering,
    probes,
    jobs,
)


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
    sweep = read_sweep(folders)
    if not sweep.cells:
        why = "no job has finished"
        if any(job.is_shard for job in sweep.jobs):
            why = "these jobs made shards; the same command without shard= finds them in the store and shows the whole"
        raise UserError(f"nothing to compare: {unfinished(sweep) or why}")
    if out is None and len(folders) == 1:
        out = folders[0] / FOLDER
    elif out is None:
        named = Path("comparisons") / now.strftime("%Y-%m-%d/%H-%M-%S")
        try:
            out = new_folder(named)
        except OSError as error:
            raise UserError(f"cannot write to {named}: {error.strerror}") from None
    results = [result for comparison in COMPARISONS if (result := comparison(sweep)) is not None]
    whole = joined(results)
    written = files.write(whole, out)
    first = sweep.jobs[0]
    report = Report(
        title=first.group or "Comparison",
        when=now.strftime("%Y-%m-%d %H:%M"),
        command="\n".join(multirun.command(folder) or str(folder) for folder in folders),
        results=results,
        figures=written.figures,
        examples=examples.examples(sweep),
        examples_note=examples.NOTE,
        configs=[
            (str(job), yaml.safe_dump(dict(job.config), sort_keys=False, allow_unicode=True)) for job in sweep.jobs
        ],
    )
    page = write_report(out / "report.html", report)
    settings = WandbConfig(**first.config["wandb"])
    settings = settings if wandb_mode is None else replace(settings, mode=wandb_mode)
    config = {"folders": [str(folder) for folder in folders], "cells": [cell.name for cell in sweep.cells]}
    with tracker(settings, name=FOLDER, group=first.group, folder=out, run_config=config, job_type="compare") as track:
        track.log(whole, written)
        track.page("report", page)
    counts = (len(sweep.cells), "cell"), (len(sweep.jobs), "job")
    title = "Comparison · " + " of ".join(f"{count} {what}{'s' * (count != 1)}" for count, what in counts)
    console = terminal.console()
    terminal.show(console, whole, title=title)
    offline = {FOLDER: track.folder} if track.offline and track.folder is not None else {}
    terminal.show_files(console, [*work(sweep), *spent(sweep)], folder=out, wandb=offline)
    console.print(f"report              {page}", soft_wrap=True)
    return out


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
