"""Sweeps on a real Ray cluster of two workers on this machine: the same tables, nothing made twice, whoever dies."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sweeps import assert_same_tables, command, computed, environment, jobs, sweep

pytestmark = pytest.mark.ray

LAUNCHER = "hydra/launcher=ray"
KILLS = 20
# From before a worker has imported anything until it is through with a job.
LIVES_S = (0.5, 16.0)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[str]:
    """The address of a cluster of two nodes of one processor each, started in some other folder."""
    pytest.importorskip("ray")
    pytest.importorskip("hydra_plugins.hydra_ray_launcher.ray_launcher")
    folder = tmp_path_factory.mktemp("elsewhere")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--num-cpus=1", "--num-gpus=0"]
    common = {"cwd": folder, "env": environment(folder) | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}, "check": True}
    head = ["--head", "--node-ip-address=127.0.0.1", f"--port={address.partition(':')[2]}", "--include-dashboard=false"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*ray, *head, "--disable-usage-stats"], **common, **quiet)
    try:
        subprocess.run([*ray, f"--address={address}"], **common, **quiet)
        yield address
    finally:
        subprocess.run([ray[0], "stop", "--force"], check=False, **quiet)


@pytest.fixture(scope="module")
def serial(tmp_path_factory) -> Path:
    """The same sweep by Hydra's own launcher: one job after another, in one process."""
    folder = tmp_path_factory.mktemp("serial")
    sweep(folder, environment(folder / "store"), "wandb.mode=disabled")
    return folder


def test_the_canonical_sweep(serial, cluster, tmp_path):
    printed = sweep(tmp_path, environment(tmp_path / "store", RAY_ADDRESS=cluster), LAUNCHER, "wandb.mode=offline")
    assert_same_tables(serial, tmp_path)
    assert "Comparison · 4 cells of 4 jobs" in printed
    for stage in ("completions", "ratings", "residual"):
        assert computed(jobs(tmp_path), stage) == computed(jobs(serial), stage), stage
    assert {job["status"] for job in jobs(tmp_path)} == {"finished"}
    assert len({job["group"] for job in jobs(tmp_path)}) == 1
    assert len(list(tmp_path.glob("sweep/*/wandb/offline-run-*"))) == 4 + 1, "a run a job, and their comparison's"
    assert sorted(path.name for path in (tmp_path / "store" / "leases").iterdir()) == ["holders", "visits"]


def workers() -> list[int]:
    """The processes that run a job just now: Ray gives a worker its task's name."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(b"ray::_run_job"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def test_workers_killed_at_random_points(serial, cluster, tmp_path):
    print(f"seed {(seed := random.randrange(1 << 32))}")
    chance = random.Random(seed)
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        command(tmp_path, LAUNCHER, "wandb.mode=disabled"),
        cwd=tmp_path,
        env=environment(tmp_path / "store", RAY_ADDRESS=cluster),
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    ends: dict[int, float] = {}  # when each worker is to die
    killed: list[int] = []  # what was in the store then
    while process.poll() is None and len(killed) < KILLS:
        for worker in workers():
            ends.setdefault(worker, time.monotonic() + chance.uniform(*LIVES_S))
            if time.monotonic() > ends[worker]:
                ends[worker] = float("inf")
                os.kill(worker, signal.SIGKILL)
                killed.append(len(list((tmp_path / "store").rglob("*.parquet"))))
        time.sleep(0.05)
    assert process.wait(timeout=600) == 0, (tmp_path / "log").read_text()
    assert len(killed) == KILLS
    assert len(set(killed)) > 2, "some died in the middle of their work"
    assert_same_tables(serial, tmp_path)
    assert {job["status"] for job in jobs(tmp_path)} == {"finished"}
