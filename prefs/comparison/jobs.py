"""The jobs that a comparison is of: which ended and how, what they took, and what of them is left out."""

from __future__ import annotations

from dataclasses import asdict

import pandas as pd

from prefs import sweep as multirun
from prefs.comparison.cells import CONDITIONS, Sweep
from prefs.comparison.probes import probed_cells
from prefs.job import FAILED, FINISHED, ModelUsage, StageCounts, summed
from prefs.results.result import Result, Table


def left_out(sweep: Sweep) -> Result:
    """What a comparison is without, and what tells its cells apart unsaid: remarks, before all others."""
    probed = [cell for _, cell in probed_cells(sweep)]
    doubles = [f"{cell.folder}{' (but for its probes)' * (cell in probed)}" for cell in sweep.doubles]
    differing = also_different(sweep)
    remarks = (
        unfinished(sweep),
        f"Measured again by a later job, and left out: {', '.join(doubles)}." if doubles else None,
        sweep.alignment[1],
        f"Cells differ in more than their names say: {', '.join(differing)}." if differing else None,
    )
    return Result(remarks=tuple(remark for remark in remarks if remark))


def unfinished(sweep: Sweep) -> str | None:
    """The jobs that the comparison is without, named."""
    failed = [f"{job} ({job.error})" for job in sweep.jobs if job.status == FAILED]
    running = [str(job) for job in sweep.jobs if job.status not in (FAILED, FINISHED)]
    missing = 0
    for folder in dict.fromkeys(sweep.folders):
        begun = sum(job.folder.is_relative_to(folder) for job in sweep.jobs)
        missing += max(0, (multirun.job_count(folder) or 0) - begun)
    parts = [f"Failed: {'; '.join(failed)}."] if failed else []
    parts += [f"Begun but not finished: {'; '.join(running)}."] if running else []
    parts += [f"Not begun: {missing}."] if missing else []
    finished = sum(job.status == FINISHED for job in sweep.jobs)
    total = len(sweep.jobs) + missing
    return " ".join([f"Of {total} jobs {finished} finished.", *parts]) if parts else None


def also_different(sweep: Sweep) -> list[str]:
    """Config keys in which cells differ though nothing in their names says so (a temperature, beside the rater)."""
    named = {key for cell in sweep.cells for key in cell.extra}
    named |= {key.replace("condition", "system_prompt") for key in named.intersection(CONDITIONS)}
    keys = {key for cell in sweep.cells for key in cell.facts if not key.startswith(("model.", "template."))} - named
    return sorted(key for key in keys if len({cell.facts.get(key) for cell in sweep.cells}) > 1)


def work(sweep: Sweep) -> list[StageCounts]:
    return summed(counts for job in sweep.jobs for counts in job.work)


def spent(sweep: Sweep) -> list[ModelUsage]:
    return summed(usage for job in sweep.jobs for usage in job.spent)


def jobs(sweep: Sweep) -> Result:
    """One row a job; and what they did and spent together."""
    rows = [
        {"job": str(job), "status": job.status, "error": job.error or "", "folder": str(job.folder)}
        for job in sweep.jobs
    ]
    done = pd.DataFrame(map(asdict, work(sweep)), columns=["stage", "reused", "computed", "bytes"])
    tables = [
        Table("jobs", pd.DataFrame(rows), "Jobs"),
        Table("work", done, "Work", "Records found in the store, and records computed."),
    ]
    usage = pd.DataFrame(map(asdict, spent(sweep)))
    if len(usage):
        tables.append(Table("spent", usage, "Spent", "US dollars where the config gives prices."))
    return Result("Jobs", tables=tuple(tables))
