"""Whether host memory stays flat as the tasks of a capture grow in number.

The rating stage itself captures three layers at three positions of the embedded model, for made-up tasks of a few
tokens, into an empty store; each number of tasks has a process of its own. Nothing is rated, so each conversation stops
at the deepest of the layers. Prints a Markdown table of resident memory: when the model is loaded, the highest after
that, and at the end, with every vector indexed. Needs Linux.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def resident(which: str) -> float:
    """Resident memory of this process, now (``VmRSS``) or at its highest (``VmHWM``), MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1024


def capture(count: int, batch_tokens: int) -> dict[str, float]:
    """Capture `count` tasks and tell what memory that took."""
    from prefs.data.task import Task
    from prefs.models.loading import Models, ModelSpec
    from prefs.models.types import Sampling
    from prefs.stages.rate import CapturePlan, rate
    from prefs.stages.records import Completion
    from prefs.store.table import Store

    spec = ModelSpec(name="smollm2", path="embedded:smollm2", dtype="float32", batch_tokens=batch_tokens)
    models = Models()
    models.get(spec)
    loaded, begun = resident("VmRSS"), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")  # forgets how high it was while loading
    completions = [
        Completion(Task(f"t{n}", f"Say {n % 9973} twice.", "MADE_UP"), f"{n} {n}." + " Yes." * (n % 5))
        for n in range(count)
    ]
    plan = CapturePlan((0, 1, 2), ("last_prompt", "last_completion", "mean_completion"), "bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        rated = rate(
            completions, spec, {}, Sampling(1.0, 1.0, 1),
            seeds=(), exact=False, capture=plan, system_prompt="Be brief.", store=Store.open(folder), models=models,
        )  # fmt: skip
        assert all(each.present().all() for each in rated.residuals.values())
        found = {"loaded": loaded, "peak": resident("VmHWM"), "end": resident("VmRSS")}
    return {**found, "seconds": time.perf_counter() - begun}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[1000, 20_000])
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        print(json.dumps(capture(given.child, given.batch_tokens)))
        return
    print("| tasks | model loaded (MiB) | peak (MiB) | at the end (MiB) | s |\n|---|---|---|---|---|")
    for count in given.tasks:
        command = [sys.executable, __file__, "--child", str(count), "--batch-tokens", str(given.batch_tokens)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        found = json.loads(done.stdout)
        numbers = " | ".join(f"{found[name]:,.0f}" for name in ("loaded", "peak", "end", "seconds"))
        print(f"| {count:,} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
