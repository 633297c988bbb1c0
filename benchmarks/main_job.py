"""How long a user waits: the main job with an empty store, and again with everything in it.

Run it on an otherwise idle machine: ``python benchmarks/main_job.py``. Each run is a process of its own, as for a user;
the embedded model has been unpacked before. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from prefs.models.embedded import smollm2_folder


def seconds(folder: Path, store: Path, overrides: list[str]) -> float:
    """Wall-clock time of one run."""
    command = [sys.executable, "-m", "prefs.run", "wandb.mode=offline", *overrides]
    begun = time.perf_counter()
    subprocess.run(
        command, cwd=folder, env=os.environ | {"PREFS_STORE": str(store)}, check=True, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind; medians are printed")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, such as template=likert")
    arguments = parser.parse_args()
    smollm2_folder()
    empty, full = [], []
    for _ in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as scratch:
            store = Path(scratch) / "store"
            empty.append(seconds(Path(scratch), store, arguments.overrides))
            full.append(seconds(Path(scratch), store, arguments.overrides))
    print("| store | median (s) | all (s) |\n|---|---|---|")
    for name, times in (("empty", empty), ("full", full)):
        print(f"| {name} | {statistics.median(times):.1f} | {', '.join(f'{t:.1f}' for t in times)} |")


if __name__ == "__main__":
    main()
