"""Sweeps on a real Ray cluster of two workers on this machine: the same tables, nothing made twice, whoever dies."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sweeps import STAGES, assert_same_tables, computed, environment, free_port, jobs, processes, start, sweep

pytestmark = pytest.mark.ray

LAUNCHER = "hydra/launcher=ray"
KILLS = 20


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[str]:
    """The address of a cluster of two nodes of one processor each, started in some other folder."""
    pytest.importorskip("ray")
    pytest.importorskip("hydra_plugins.hydra_ray_launcher.ray_launcher")
    folder = tmp_path_factory.mktemp("elsewhere")
    port = free_port()
    address = f"127.0.0.1:{port}"
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--num-cpus=1", "--num-gpus=0"]
    head = ["--head", "--node-ip-address=127.0.0.1", f"--port={port}", "--include-dashboard=false"]
    common = {"cwd": folder, "env": environment(folder), "timeout": 120}
    # Into a file: the daemons keep what they were given open for as long as they live.
    with (folder / "log").open("w") as log:
        try:
            for arguments in ([*head, "--disable-usage-stats"], [f"--address={address}"]):
                done = subprocess.run([*ray, *arguments], stdout=log, stderr=log, **common)
                assert done.returncode == 0, (folder / "log").read_text()
            yield address
        finally:
            subprocess.run([ray[0], "stop", "--force"], stdout=log, stderr=log, **common)


def test_the_canonical_sweep(serial, cluster, tmp_path):
    printed = sweep(tmp_path, environment(tmp_path / "store", RAY_ADDRESS=cluster), LAUNCHER, "wandb.mode=offline")
    assert_same_tables(serial / "sweep", tmp_path / "sweep")
    assert "Comparison · 4 cells of 4 jobs" in printed
    for stage in STAGES:
        assert computed(jobs(tmp_path), stage) == computed(jobs(serial), stage), stage
    assert {job["status"] for job in jobs(tmp_path)} == {"finished"}
    assert len({job["group"] for job in jobs(tmp_path)}) == 1
    assert len(list(tmp_path.glob("sweep/*/wandb/offline-run-*"))) == 4 + 1, "a run a job, and their comparison's"
    assert not any((tmp_path / "store" / "leases").iterdir()), "nothing is held any more"


def workers() -> list[int]:
    """The processes that run a job just now: Ray gives a worker its task's name."""
    return processes(lambda words: words[0].startswith(b"ray::_run_job"))


def killed_sweep(folder: Path, cluster: str, chance: random.Random) -> list[int]:
    """Run the sweep while workers are killed at random points, `KILLS` at most; how many parts were there each time.

    Workers are let live a little longer where the store has not grown since the last one died, and shorter where it
    has: few get to the end of a job before all are killed, and many die in the middle of their work, however fast the
    machine.
    """
    store, reach_s = folder / "store", 3.0
    process = start(folder, environment(store, RAY_ADDRESS=cluster), LAUNCHER, "wandb.mode=disabled")
    ends: dict[int, float] = {}
    killed: list[int] = []
    while process.poll() is None and len(killed) < KILLS:
        for worker in workers():
            ends.setdefault(worker, time.monotonic() + chance.uniform(0.2, reach_s))
            if time.monotonic() > ends[worker]:
                ends[worker] = float("inf")
                os.kill(worker, signal.SIGKILL)
                killed.append(len([*store.rglob("*.parquet"), *store.rglob("*.safetensors")]))
                reach_s *= 1.2 if killed[-1] == killed[-2:][0] else 1 / 1.5
        time.sleep(0.05)
    assert process.wait(timeout=600) == 0, (folder / "log").read_text()
    return killed


def test_workers_killed_at_random_points(serial, cluster, tmp_path):
    print(f"seed {(seed := random.randrange(1 << 32))}")
    chance = random.Random(seed)
    killed: list[int] = []
    for attempt in range(3):
        if len(killed) == KILLS:
            break
        folder = tmp_path / str(attempt)
        folder.mkdir()
        killed = killed_sweep(folder, cluster, chance)
        assert_same_tables(serial / "sweep", folder / "sweep")
        assert {job["status"] for job in jobs(folder)} == {"finished"}
    assert len(killed) == KILLS, "three sweeps ended before so many were killed"
    assert len(set(killed)) > 1, "some died in the middle of their work"
