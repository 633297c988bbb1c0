"""Sweeps on a real Slurm on this machine: the same tables, nothing made twice, killed jobs queued again."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from sweeps import STAGES, assert_same_tables, computed, environment, free_port, jobs, processes, start, sweep
from waiting import until

from prefs.config import CONF as CONFIGS

pytestmark = pytest.mark.slurm

SLURM = ["hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "wandb.mode=disabled"]
CONF = """
ClusterName=prefs
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
# A job that is queued again waits until its old credential is out of date.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
MpiDefault=none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Slurm:
    """A cluster of this machine alone, with two processors for jobs whatever it has."""

    folder: Path

    def environment(self, store: Path) -> dict[str, str]:
        return environment(store, SLURM_CONF=str(self.folder / "slurm.conf"))

    def output(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.environment(self.folder), capture_output=True, text=True, timeout=60, check=False
        )
        return done.stdout + done.stderr

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in self.folder.glob("*log"))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Slurm]:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher.submitit_launcher")
    if missing := [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]:
        pytest.skip(f"no {', '.join(missing)} on this machine")
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons want to be started by root")
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    for name in ("state", "spool", "munge"):
        (cluster.folder / name).mkdir(mode=0o755)
    # munged is particular about who else could write to the folders above its socket.
    key = cluster.folder / "munge" / "key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    (cluster.folder / "slurm.conf").write_text(
        CONF.format(host=socket.gethostname(), folder=cluster.folder, ports=[free_port(), free_port()])
    )
    files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    munge = [f"--{option}={cluster.folder / 'munge' / name}" for option, name in files.items()]
    daemons: list[subprocess.Popen] = []
    with (cluster.folder / "log").open("w") as log:
        for daemon in (["munged", "--foreground", "--force", *munge], ["slurmctld", "-D"], ["slurmd", "-D"]):
            daemons.append(
                subprocess.Popen(
                    daemon, env=cluster.environment(cluster.folder), stdout=log, stderr=log, cwd=cluster.folder
                )
            )
            time.sleep(1)
        try:
            until(lambda: "idle" in cluster.output("sinfo", "--noheader"), 60, cluster.logs)
            yield cluster
        finally:
            cluster.output("scancel", "--user=root")
            for daemon in reversed(daemons):
                daemon.terminate()
            for daemon in daemons:
                daemon.wait(timeout=60)


def test_the_canonical_sweep(serial, slurm, tmp_path):
    sweep(tmp_path, slurm.environment(tmp_path / "store"), *SLURM)
    assert_same_tables(serial / "sweep", tmp_path / "sweep")
    for stage in STAGES:
        assert computed(jobs(tmp_path), stage) == computed(jobs(serial), stage), stage
    assert {job["status"] for job in jobs(tmp_path)} == {"finished"}
    scripts = list((tmp_path / "sweep" / ".submitit").glob("*/*_submission.sh"))
    assert len(scripts) == 1, "one array"
    assert "#SBATCH --array=0-3%" in scripts[0].read_text()
    assert "gpus" not in scripts[0].read_text(), "the embedded model asks for none"


def workers(folder: Path) -> list[int]:
    """The processes that run a job of a sweep just now."""

    def is_worker(words: Sequence[bytes]) -> bool:
        ours = b"submitit.core._submit" in words and any(word.startswith(os.fsencode(folder)) for word in words)
        return ours and b"python" in words[0]  # and not the srun that started it

    return processes(is_worker)


def test_jobs_that_are_stopped_are_queued_again(serial, slurm, tmp_path):
    process = start(tmp_path, slurm.environment(tmp_path / "store"), *SLURM)
    try:
        # When they have begun to write, and have more to do.
        until(lambda: len(workers(tmp_path)) == 2 and any((tmp_path / "store").rglob("*.parquet")), 120, slurm.logs)
        killed, preempted = workers(tmp_path)
        os.kill(killed, signal.SIGKILL)  # as by a node that is out of memory
        os.kill(preempted, signal.SIGUSR2)  # as by Slurm, before it needs the place or when the time is over
        assert process.wait(timeout=300) == 0, (tmp_path / "log").read_text() + slurm.logs()
    finally:
        process.kill()
    assert_same_tables(serial / "sweep", tmp_path / "sweep")
    assert {job["status"] for job in jobs(tmp_path)} == {"finished"}


def test_a_cancelled_job_is_not_queued_again(slurm, tmp_path):
    (setup,) = OmegaConf.load(CONFIGS / "hydra" / "launcher" / "slurm.yaml").setup
    (tmp_path / "job.sh").write_text(f"#!/bin/bash\n{setup}\nsrun --output={tmp_path}/begun hostname\nsrun sleep 600\n")
    job = slurm.output("sbatch", "--parsable", f"--output={tmp_path}/log", str(tmp_path / "job.sh")).strip()
    until((tmp_path / "begun").exists, 60, slurm.logs)
    slurm.output("scancel", job)
    until(lambda: slurm.output("squeue", "--noheader", "--job", job).strip() == "", 90, slurm.logs)
    assert "JobState=CANCELLED" in slurm.output("scontrol", "show", "job", job)


@pytest.mark.parametrize(
    ("overrides", "path", "line"),
    [
        (["hydra.launcher.partition=none"], None, "sbatch did not take the jobs: invalid partition specified: none; "),
        ([], "/nowhere", "there are no sbatch and srun here; "),
    ],
)
def test_a_cluster_that_takes_no_jobs_is_one_line(slurm, tmp_path, overrides, path, line):
    env = slurm.environment(tmp_path / "store") | ({"PATH": path} if path else {})
    process = start(tmp_path, env, *SLURM, *overrides)
    assert process.wait(timeout=100) == 2
    *_, last = (tmp_path / "log").read_text().splitlines()
    assert last.startswith(f"prefs: hydra/launcher=slurm: {line}")
    assert "Traceback" not in (tmp_path / "log").read_text()
