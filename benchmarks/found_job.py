"""What a job costs that finds everything in the store: the main job, beyond the time its imports take.

``python benchmarks/found_job.py`` runs the main job once into a store of its own (minutes), and then again and again,
each time in a fresh process. Its overhead is the wall time of such a process less that of one that does nothing but
import the same modules, in the same order: those that are there when the job has ended. The parts are measured in yet
another process, which imports those modules before it runs the job; what a part spends in another one is the other's.
Prints Markdown tables. Other jobs by Hydra overrides: ``python benchmarks/found_job.py template=likert``.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

MODES = ("disabled", "offline")


def run(folder: Path, store: Path, arguments: list[str]) -> float:
    """Wall time of one process of this file or of the program."""
    begun = time.perf_counter()
    environment = os.environ | {"PREFS_STORE": str(store)}
    subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def record(file: Path) -> None:
    """Run the job, and write down which modules it has imported."""
    from prefs.run import main

    main()
    file.write_text(json.dumps([name for name in sys.modules if name != "__main__"]))


def imported(file: Path) -> None:
    """Import the same modules, as the job does without the garbage collector."""
    gc.disable()
    lacking = []
    for name in json.loads(file.read_text()):
        try:
            importlib.import_module(name)
        except ImportError:  # made by a package for itself, and not there by that name
            lacking.append(name)
    gc.freeze()
    gc.enable()
    print(len(lacking), "modules could not be imported by name:", *lacking, file=sys.stderr)


class Clock:
    """Seconds by part. Where one part calls another, only the inner one runs."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inside: list[str] = []
        self._since = 0.0

    def _turn(self) -> None:
        now = time.perf_counter()
        if self._inside:
            self.seconds[self._inside[-1]] += now - self._since
        self._since = now

    def timed(self, part: str, function: Any) -> Any:
        """The function, whose time is the part's."""

        @functools.wraps(function)
        def wrapped(*arguments: Any, **named: Any) -> Any:
            self._turn()
            self._inside.append(part)
            try:
                return function(*arguments, **named)
            finally:
                self._turn()
                self._inside.pop()

        return wrapped

    def watch(self, part: str, owner: Any, *names: str) -> None:
        """Time attributes of a module or class."""
        for name in names:
            setattr(owner, name, self.timed(part, getattr(owner, name)))


def parts(file: Path, output: Path) -> None:
    """Import the modules, then run the job and time its parts."""
    begun = time.perf_counter()
    imported(file)
    importing = time.perf_counter() - begun
    from prefs import pipeline as job
    from prefs import run
    from prefs.results import files
    from prefs.results import wandb as track
    from prefs.stages.probe import ProbeReport
    from prefs.store import table as store

    clock = Clock()
    clock.watch("keys, conversations, verdicts: the stages' own work", job, "measure", "job_tasks", "sites")
    clock.watch("reading the store", store.Table, "read", "read_new")
    clock.watch("reading the store", store.Vectors, "refresh", "gather")
    clock.watch("reading the store", store.Result, "read")
    clock.watch("probes: their key, what was found, transfer", job, "probe")
    clock.watch("probes: saved in the run folder", ProbeReport, "save")
    for stage in job.STAGES:
        object.__setattr__(stage, "run", clock.timed(f"stage: {stage.name}", stage.run))
    clock.watch("tables", files, "write_table")
    clock.watch("figures", job, "write")
    clock.watch("closing tables", job, "show", "show_files")
    start = track._start

    def started(*arguments: Any, **named: Any) -> Any:
        tracked, offline = start(*arguments, **named)
        tracked.finish = clock.timed("W&B: finish", tracked.finish)
        return tracked, offline

    track._start = clock.timed("W&B: init", started)
    clock.watch("W&B: logging", track.Tracker, "log", "metrics")
    begun = time.perf_counter()
    clock.timed("Hydra, and all else", run.main)()
    whole = time.perf_counter() - begun
    output.write_text(json.dumps({"imports": importing, "whole": whole, "parts": clock.seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="processes of each kind; medians are printed")
    parser.add_argument("--store", type=Path, help="where the job has been computed, or is to be (default: a new one)")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, this = Path(scratch), str(Path(__file__).resolve())
        store = (arguments.store or folder / "store").resolve()
        run(folder, store, ["-m", "prefs.run", "wandb.mode=disabled", *arguments.overrides])
        tables = []
        for mode in MODES:
            overrides = [f"wandb.mode={mode}", *arguments.overrides]
            modules, measured = folder / f"{mode}.json", folder / f"parts-{mode}.json"
            run(folder, store, [this, "record", str(modules), *overrides])
            whole, importing, beyond = [], [], []
            for _ in range(arguments.repeats):
                whole.append(run(folder, store, ["-m", "prefs.run", *overrides]))
                importing.append(run(folder, store, [this, "import", str(modules)]))
                run(folder, store, [this, "parts", str(modules), str(measured), *overrides])
                beyond.append(json.loads(measured.read_text()))
            names = {name for each in beyond for name in each["parts"]}
            middle = {name: statistics.median(each["parts"].get(name, 0) for each in beyond) for name in names}
            tables.append((mode, len(json.loads(modules.read_text())), whole, importing, beyond, middle))
    print("| W&B | found job (s) | imports alone (s) | modules | overhead (s) | the same, timed inside (s) |")
    print("|---|---|---|---|---|---|")
    for mode, count, whole, importing, beyond, _ in tables:
        job, alone = statistics.median(whole), statistics.median(importing)
        inside = statistics.median(each["whole"] for each in beyond)
        print(f"| {mode} | {job:.2f} | {alone:.2f} | {count:,} | {job - alone:.2f} | {inside:.2f} |")
    print(f"\n| part (s) | {' | '.join(f'W&B {mode}' for mode, *_ in tables)} |\n|---|{'---|' * len(tables)}")
    for name in sorted({name for *_, middle in tables for name in middle}, key=lambda name: -tables[0][5].get(name, 0)):
        print(f"| {name} | {' | '.join(f'{middle.get(name, 0):.2f}' for *_, middle in tables)} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["record"]:
        file = Path(sys.argv.pop(2))
        del sys.argv[1]
        record(file)
    elif sys.argv[1:2] == ["import"]:
        imported(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["parts"]:
        files = Path(sys.argv[2]), Path(sys.argv[3])
        del sys.argv[1:4]
        parts(*files)
    else:
        main()
