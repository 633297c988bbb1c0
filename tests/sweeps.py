"""Sweeps of real jobs, run by whatever launcher, and held against each other."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pandas as pd

# Small batches, so that there is something to share out and to be killed at.
SWEEP = [
    "-m",
    "model=smollm2,smollm2_plain",
    "template=anchored,likert",
    "completer=smollm2",
    "model.batch_tokens=800",
    "completer.model.batch_tokens=200",
    "dataset.limit=16",
    "completer.max_new_tokens=8",
    "rating.seeds=[0,1]",
    "rating.max_new_tokens=4",
    "capture.layers=[0,14]",
    "capture.positions=[last_prompt,rating]",
    "probe=none",
]


# What a sweep does, as its jobs' records call it.
STAGES = ("completions", "sampled ratings", "exact ratings", "residual")


def environment(store: Path, **more: str) -> dict[str, str]:
    """One thread a job, since sums of several threads can differ in their last digit."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "HYDRA", "PREFS", "RAY"))}
    return clean | {"PREFS_STORE": str(store), "COLUMNS": "80", "OMP_NUM_THREADS": "1", **more}


def start(folder: Path, environment: dict[str, str], *arguments: str) -> subprocess.Popen:
    """Start the sweep, in ``sweep`` below a folder; what it prints goes to ``log`` there."""
    command = [sys.executable, "-m", "prefs.run", *SWEEP, f"hydra.sweep.dir={folder / 'sweep'}", *arguments]
    with (folder / "log").open("w") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)


def sweep(folder: Path, environment: dict[str, str], *arguments: str, timeout_s: float = 900) -> str:
    """Run the sweep to its end; what it printed."""
    with start(folder, environment, *arguments) as process:
        try:
            code = process.wait(timeout_s)
        finally:
            process.kill()
    printed = (folder / "log").read_text()
    assert code == 0, printed
    return printed


def processes(wanted: Callable[[Sequence[bytes]], bool]) -> list[int]:
    """The processes of this machine whose command line, in words, is wanted."""
    numbers = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if wanted((folder / "cmdline").read_bytes().split(b"\0")):
                numbers.append(int(folder.name))
    return numbers


def jobs(folder: Path) -> list[dict]:
    """The jobs' own records, by number."""
    records = sorted((folder / "sweep").glob("*/job.json"), key=lambda path: int(path.parent.name))
    return [job(path.parent) for path in records]


def job(folder: Path) -> dict:
    """The record of the job of a folder."""
    return json.loads((folder / "job.json").read_text())


def assert_same_tables(one: Path, other: Path, more_than: int = 20) -> None:
    """Every table below two folders, of sweeps and their comparison or of single jobs, to the last digit; but for what
    a comparison tells of how it was run: the jobs' overrides and folders, what they found and what they spent."""
    names = sorted(path.relative_to(one) for path in one.rglob("*.parquet"))
    assert names == sorted(path.relative_to(other) for path in other.rglob("*.parquet"))
    assert len(names) > more_than
    for name in names:
        if name.name in ("jobs.parquet", "work.parquet", "spent.parquet"):
            continue
        left, right = (pd.read_parquet(folder / name) for folder in (one, other))
        pd.testing.assert_frame_equal(left, right, check_exact=True, obj=str(name))


def computed(jobs: Iterable[dict], stage: str) -> int:
    """How many records of a stage these jobs computed together, of which there must be some."""
    made = sum(work["computed"] for job in jobs for work in job["work"] if work["stage"].startswith(stage))
    assert made, f"nothing is called {stage}"
    return made


def free_port() -> int:
    """Below the range that the system gives to clients, of which the cluster has many."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")
