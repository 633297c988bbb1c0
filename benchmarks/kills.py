"""Jobs that are killed (SIGKILL) at random moments and begun again, until one gets through: are its tables the same?

Whole jobs, ``prefs.pipeline.run_job`` with the shipped config, on a tiny model of random weights: completions, ratings,
vectors, probes, tables (no figures, no W&B). Each is a process of its own, a fork of one that has the model loaded, on
a store of its own; whoever is begun after a kill is killed as well, with a probability of one half. By kind of trial:

``kill``
    Nothing else happens.
``torn part``
    After each kill a part of the store is cut off at a random byte, or a temporary file is left behind.
``full disk``
    The store has room for some of the records only; when the job has ended with that, it gets more.
``no locks``
    Leases are granted to whoever asks, and two jobs run at once, of which one is killed.

Prints a Markdown table: ``python benchmarks/kills.py --trials 200``. Needs Linux, and root for the full disk.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

os.environ["OMP_NUM_THREADS"] = "1"  # a fork has no other thread

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import LlamaConfig, LlamaForCausalLM

from prefs import pipeline
from prefs.config import CONF, Config, register, typed
from prefs.errors import UserError
from prefs.job import JobCounts
from prefs.models.embedded import smollm2_folder
from prefs.models.loading import Models, ModelSpec
from prefs.pipeline import RunFolder, run_job
from prefs.results import files
from prefs.store import leases

JOB = (
    *("dataset.limit=12", "completer.max_new_tokens=4", "rating.seeds=[0]", "rating.max_new_tokens=2"),
    *("template=[likert]", "capture.layers=[1]", "capture.positions=[rating]", "probe.positions=[rating]"),
    *("model=hf", "model.batch_tokens=900", "model.dtype=float32", "stats.bootstrap=20", "wandb.mode=disabled"),
    *("probe.folds=3", "probe.penalties=[1,100]", "probe.controls.texts=false"),
    *("probe.controls.permutations=2", "probe.controls.random_directions=2"),
)
KINDS = ("kill", "torn part", "full disk", "no locks")
AGAIN = 0.5
ROOM, MORE_ROOM = "128k", "64m"
MENDABLE = 2


@dataclass
class Counts:
    """Of one kind of trial: how many, kills in all and in a row, and how often a table was not the same."""

    trials: int = 0
    kills: int = 0
    most: int = 0
    different: int = 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    drawn, counts = random.Random(given.seed), {kind: Counts() for kind in given.kinds}
    with tempfile.TemporaryDirectory(prefix="prefs-kills-") as name:
        job = Job.prepared(Path(name))
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C tells what there is
            for number in range(given.trials):
                kind = given.kinds[number % len(given.kinds)]
                _trial(kind, job, Path(name) / str(number), drawn, counts[kind])
                print(f"{number + 1} of {given.trials}", end="\r", file=sys.stderr)
    print(f"A job that nobody kills takes {job.whole_s:.1f} s and writes {job.parts} parts.\n")
    print("| trial | trials | kills | most in a row | tables that differ |\n|---|---|---|---|---|")
    for kind, count in counts.items():
        print(f"| {kind} | {count.trials} | {count.kills} | {count.most} | {count.different} |")
    sys.exit(any(count.different for count in counts.values()))


@dataclass
class Job:
    """A job whose model is loaded, what it writes when nobody kills it, and how long that takes."""

    config: Config
    plain: dict[str, Any]
    models: Models
    tables: dict[str, bytes] = field(default_factory=dict)
    whole_s: float = 0.0
    parts: int = 0

    @classmethod
    def prepared(cls, folder: Path) -> Job:
        register()
        logging.disable()
        torch.set_num_threads(1)
        pipeline.write = lambda result, folder: files.write(replace(result, figures=()), folder)
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("config", overrides=[*JOB, f"model.path={_tiny_model(folder / 'model')}"])
        job = cls(typed(cfg), cast(Any, OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)), Models())
        job.models.get(ModelSpec.from_config(job.config.model))
        with contextlib.redirect_stdout(io.StringIO()):
            _run(job, folder / "first", folder / "first")  # here, so that the others find what it imports
        begun = time.monotonic()
        assert _ended(_begun(job, folder / "alone", folder / "alone")) == 0
        job.whole_s = time.monotonic() - begun
        job.tables, job.parts = _written(folder / "alone"), len(_parts(folder / "alone"))
        assert job.tables == _written(folder / "first")
        return job


def _tiny_model(folder: Path) -> Path:
    sizes = {"vocab_size": 49152, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.15)).save_pretrained(folder)
    for path in smollm2_folder().iterdir():
        if path.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(path, folder)
    return folder


def _run(job: Job, store: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    config = replace(job.config, store=replace(job.config.store, dir=str(store / "store")))
    run_job(config, RunFolder(out / "out"), job.models, JobCounts(logged=False), plain_config=job.plain)


def _begun(job: Job, store: Path, out: Path, *, locks: bool = True) -> int:
    """A process that runs the job on a store; its number."""
    if process := os.fork():
        return process
    code = 1
    try:
        with (out.parent / "log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        if not locks:
            leases._Leases.take = lambda self, names: True
        _run(job, store, out)
        code = 0
    except UserError:
        code = MENDABLE
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _ended(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _killed(process: int, after_s: float) -> bool:
    """Kill a process after some time; whether it was still at work."""
    time.sleep(after_s)
    os.kill(process, signal.SIGKILL)
    return _ended(process) == -signal.SIGKILL


def _trial(kind: str, job: Job, folder: Path, drawn: random.Random, counts: Counts) -> None:
    folder.mkdir()
    store, outs = folder, [folder / "a"]
    mounted = folder / "store"
    if kind == "full disk":
        mounted.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "none", str(mounted)], check=True)
        assert _ended(_begun(job, store, outs[0])) == MENDABLE, "it had room for everything"
        subprocess.run(["mount", "-o", f"remount,size={MORE_ROOM}", str(mounted)], check=True)
    locks = kind != "no locks"
    beside = None if locks else _begun(job, store, folder / "b", locks=False)
    row = 0
    while row == 0 or drawn.random() < AGAIN:
        counts.kills += _killed(_begun(job, store, outs[0], locks=locks), drawn.uniform(0, job.whole_s))
        row += 1
        if kind == "torn part":
            _tear(store, drawn)
    counts.most = max(counts.most, row)
    codes = [_ended(_begun(job, store, outs[0], locks=locks))]
    if beside is not None:
        codes.append(_ended(beside))
        outs.append(folder / "b")
    if any(codes):
        raise SystemExit(f"a job ended with {codes}: {(folder / 'log').read_text()}")
    counts.trials += 1
    counts.different += any(_written(out) != job.tables for out in outs)
    if kind == "full disk":
        subprocess.run(["umount", str(mounted)], check=True)
    shutil.rmtree(folder)


def _tear(store: Path, drawn: random.Random) -> None:
    """Cut off a part at a random byte, as a disk does that loses its power; or leave a part of one behind."""
    if parts := _parts(store):
        part = drawn.choice(parts)
        content = part.read_bytes()
        if drawn.random() < AGAIN:
            part = part.with_name(".part-torn")
        part.write_bytes(content[: drawn.randrange(len(content))])


def _parts(store: Path) -> list[Path]:
    return sorted(path for path in (store / "store").rglob("*") if path.suffix in (".parquet", ".safetensors"))


def _written(out: Path) -> dict[str, bytes]:
    """The tables below a run's folder, by name."""
    paths = [path for path in (out / "out").rglob("*") if path.suffix in (".parquet", ".csv")]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


if __name__ == "__main__":
    main()
