"""Whether time and memory grow with the number of tasks, and no faster.

Whole jobs, ``prefs.pipeline.run_job`` with the shipped config, on tasks of a file: completions, four seeds and exact
ratings, vectors of 2 layers x 64 numbers at four positions, a judging model, statistics, tables and figures (no
probes, no W&B). Only the model is simulated: its answers and vectors are drawn from a hash of what it is asked, which
costs next to nothing. Then the same job once more, with everything in the store and no model. Each number of tasks has
a store of its own, and each job a process. Prints a Markdown table: ``python benchmarks/many_tasks.py``. Needs Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Threads would wait for each other wherever other work is done on the machine.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import torch
import xxhash

from prefs.models.types import Capture, Conversation, Reply, Request, Sample, Score, Usage

LAYERS, WIDTH = 2, 64
RUNS = ("computed", "found")
ORIGINS = ("BAILBENCH", "WILDCHAT", "ALPACA", "MATH")
WORDS = tuple("please tell me in a few plain words how one would best go about the following matter".split())  # noqa: SIM905


class Simulated:
    """A `prefs.models.types.Engine` whose every answer is a hash of what it is asked."""

    max_context = 1_000_000
    rows_apart = False

    def tokens(self, request: Request) -> int:
        return sum(message.content.count(" ") + 4 for message in request.turns)

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        for number, request in enumerate(requests):
            yield number, self._reply(request)

    def _reply(self, request: Request) -> Reply:
        if request.choose:
            assert request.question is not None
            return Reply(choice=request.question.options["I'm sorry" not in request.turns[-1].content])
        question = request.question
        random = np.random.default_rng(_hash(request.messages, "" if question is None else question.text))
        if question is None:
            samples, scores = {seed: self._completion(request.messages, seed) for seed in request.seeds}, {}
        else:
            mass = random.dirichlet(np.ones(len(question.options)))
            drawn = random.choice(len(mass), len(request.seeds), p=mass)
            samples = {
                seed: Sample(question.options[option], 1, True)
                for seed, option in zip(request.seeds, drawn, strict=True)
            }
            scores = {seed: Score(tuple(0.9 * mass)) for seed in request.scores}
        capture = request.capture
        residuals = {} if capture is None else {name: _vectors(random, capture) for name in capture.positions}
        return Reply(samples, scores, residuals=residuals)

    def _completion(self, messages: Conversation, seed: int) -> Sample:
        number = _hash(messages, f"{seed}")
        opening = "I'm sorry, but I can't help." if number % 7 == 0 else "Of course."
        text = f"{opening} {' '.join(WORDS[: number % len(WORDS)])} {number}"
        return Sample(text, text.count(" ") + 1, True)

    def usage(self) -> Usage:
        return Usage()

    def close(self) -> None:
        pass


def _hash(conversation: Conversation, more: str) -> int:
    return xxhash.xxh3_64_intdigest("\0".join([*(message.content for message in conversation), more]).encode())


def _vectors(random: np.random.Generator, capture: Capture) -> torch.Tensor:
    return torch.from_numpy(random.standard_normal((len(capture.layers), WIDTH), dtype=np.float32))


def resident(which: str) -> float:
    """Resident memory of this process, now (``VmRSS``) or at its highest (``VmHWM``), MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1024


def write_tasks(path: Path, count: int) -> None:
    """Tasks of four origins and some lengths."""
    with path.open("w") as file:
        for at in range(count):
            prompt = f"{' '.join(WORDS[: 1 + at * 7 % len(WORDS)])}: number {at}."
            file.write(json.dumps({"id": f"task-{at}", "prompt": prompt, "origin": ORIGINS[at % 4]}) + "\n")


def write_model(folder: Path) -> None:
    """A folder that is a model as far as its identity and its config go."""
    folder.mkdir()
    config: dict[str, Any] = {"model_type": "simulated", "num_hidden_layers": LAYERS, "hidden_size": WIDTH}
    config["max_position_embeddings"] = Simulated.max_context
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"")


@contextlib.contextmanager
def timed(seconds: Counter[str], owner: Any, *names: str) -> Iterator[None]:
    """Add up the time that some of a module's functions take."""
    plain = {name: getattr(owner, name) for name in names}

    def wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                seconds[name] += time.perf_counter() - begun

        return call

    for name, function in plain.items():
        setattr(owner, name, wrapped(name, function))
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(owner, name, function)


def job(folder: Path, *, simulated: bool) -> dict[str, Any]:
    """The job of a folder with its tasks, and what it took. Without a simulated model nothing can be computed."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from prefs import pipeline as job
    from prefs.config import CONF, register, typed
    from prefs.job import JobCounts
    from prefs.models.loading import Models, ModelSpec
    from prefs.stages import measure as stages

    register()
    overrides = ["model=hf", f"model.path={folder / 'model'}", "model.dtype=float32", "model.device=cpu", "probe=none"]
    overrides += ["completer.max_new_tokens=64", "dataset=file", f"dataset.path={folder / 'tasks.jsonl'}", "judge=llm"]
    overrides += ["model@judge.model=hf", f"judge.model.path={folder / 'model'}", "judge.model.dtype=float32"]
    overrides += [
        "judge.model.device=cpu",
        "completer.max_new_tokens=64",
        "wandb.mode=disabled",
        f"store.dir={folder / 'store'}",
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", overrides=overrides)
    plain: Any = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    config = typed(composed)
    engine = ModelSpec.from_config(config.model).engine
    logging.basicConfig(level=logging.WARNING)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets how high memory was
    seconds: Counter[str] = Counter()
    asking, after = ("load_tasks", "complete", "rate", "judge"), ("joined", "write")
    begun, ran = time.perf_counter(), time.process_time()
    with timed(seconds, stages, *asking), timed(seconds, job, *after), contextlib.redirect_stdout(sys.stderr):
        loaded = Models({engine: Simulated()} if simulated else {})
        job.run_job(config, job.RunFolder(folder / "run"), loaded, JobCounts(), plain_config=plain)
    took = {"seconds": time.perf_counter() - begun, "processor": time.process_time() - ran}
    return {**took, "peak": resident("VmHWM") - before, "stages": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[1000, 3000, 10_000, 30_000, 100_000])
    parser.add_argument("--scratch", type=Path, help="a folder on the disk to be measured (default: the system's)")
    parser.add_argument("--stages", action="store_true", help="print each stage's time, too")
    parser.add_argument("--child", choices=RUNS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        print(json.dumps(job(given.scratch, simulated=given.child == "computed")))
        return
    columns = [f"{name}: {what}" for name in RUNS for what in ("ms a task", "of processor", "MiB")]
    print(f"| tasks | {' | '.join(columns)} | parts |")
    print("|---|---|---|---|---|---|---|---|")
    for count in given.tasks:
        with tempfile.TemporaryDirectory(dir=given.scratch) as folder:
            write_tasks(Path(folder) / "tasks.jsonl", count)
            write_model(Path(folder) / "model")
            found = {}
            for name in RUNS:
                command = [sys.executable, __file__, "--child", name, "--scratch", folder]
                found[name] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            files = sum(len(names) for _, _, names in os.walk(Path(folder) / "store"))
        numbers = [f"{count:,}"]
        for name in RUNS:
            numbers += [f"{1000 * found[name][took] / count:.2f}" for took in ("seconds", "processor")]
            numbers.append(f"{found[name]['peak']:,.0f}")
        numbers.append(f"{files:,}")
        print(f"| {' | '.join(numbers)} |", flush=True)
        if given.stages:
            for name in RUNS:
                each = {stage: f"{1000 * took / count:.2f}" for stage, took in found[name]["stages"].items()}
                print(f"  {name}, ms a task: {each}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
