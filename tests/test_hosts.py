"""Whole jobs on hosts that share one store: network namespaces with a client each that keeps what it knows of a folder.

A host is a network, process and host name of its own, and sees the store through an sshfs mount of its own: as over
NFS, a folder that another host has written to is seen as it was for up to a minute. Full disks and such as can only be
read are real ones too.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from sweeps import STAGES, assert_same_tables, computed, environment, job
from waiting import until

from prefs.store.files import file_checksum

SERVER = Path("/usr/lib/openssh/sftp-server")
pytestmark = pytest.mark.hosts

# Several batches of each kind, so that there is something to share.
JOB = [
    *("dataset.limit=12", "completer.max_new_tokens=8", "rating.seeds=[0,1]", "rating.max_new_tokens=4"),
    *("capture.layers=[0]", "capture.positions=[rating]", "model.batch_tokens=200"),
    *("probe=none", "wandb.mode=disabled", "hydra.run.dir=out"),
]
TERM = "store.lease_s=4"
# Attributes are asked for anew, as when NFS opens a file; names are not.
SEE = "sshfs -o ssh_command={server},dcache_stat_timeout=0,dcache_dir_timeout=60,attr_timeout=0 far:{disk} {seen}"


class Site:
    """A disk, and hosts by name that see it under one path."""

    def __init__(self, folder: Path):
        self.folder, self.disk, self.seen = folder, folder / "disk", folder / "seen"
        for made in (self.disk, self.seen):
            made.mkdir()
        server = folder / "server"  # which sshfs runs in the place of ssh
        server.write_text(f"#!/bin/sh\nexec {SERVER}\n")
        server.chmod(0o755)
        self.see = SEE.format(server=server, disk=self.disk, seen=self.seen)

    def begin(self, host: str, script: str, *overrides: str) -> subprocess.Popen[str]:
        """Run shell commands on a host, where ``job`` is the program on the store as the host sees it."""
        folder = self.folder / host
        folder.mkdir(exist_ok=True)
        words = [sys.executable, "-m", "prefs.run", *JOB, *overrides]
        job = f'job() {{ {" ".join(map(repr, words))} "$@"; }}'
        begin = f"set -e; hostname {host}; cd {folder}; {job}; {script}"
        alone = ["unshare", "--net", "--uts", "--ipc", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
        return subprocess.Popen(
            [*alone, "bash", "-c", begin],
            env=environment(self.seen), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    def out(self, host: str) -> Path:
        return self.folder / host / "out"

    def held(self) -> set[str]:
        """The leases."""
        return {path.name for path in self.disk.glob("leases/*")}

    def completed(self) -> set[str]:
        """The completions that are stored."""
        return {key for part in self.disk.glob("completions/*/*.parquet") for key in pd.read_parquet(part)["key"]}

    def checksums(self) -> dict[Path, str]:
        """Of all files on the disk."""
        return {path: file_checksum(path) for path in self.disk.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", autouse=True)
def possible(tmp_path_factory) -> None:
    """Skip where there is no unshare, sshfs or sftp-server, and where namespaces or mounts are not allowed."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare on this machine")
    site = Site(tmp_path_factory.mktemp("tried"))
    tried = site.begin("tried", f"{site.see}; touch {site.seen}/there")
    printed, _ = tried.communicate(timeout=60)
    if tried.returncode:
        pytest.skip(f"no hosts can be made here: {printed.strip()}")


@pytest.fixture
def site(tmp_path) -> Site:
    return Site(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Site:
    """A disk with all of the job, which one host made."""
    site = Site(tmp_path_factory.mktemp("alone"))
    ended(site.begin("alone", f"mount --bind {site.disk} {site.seen}; job"))
    return site


@pytest.fixture(scope="module")
def alone(whole) -> Path:
    """What the job finds on a host with a disk of its own."""
    return whole.out("alone")


def ended(process: subprocess.Popen[str]) -> str:
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed


def test_two_hosts_share_the_work_and_nothing_is_made_twice(site, alone):
    together = [site.begin(host, f"{site.see}; job") for host in ("node1", "node2")]
    printed = [ended(process) for process in together]
    for stage in STAGES:
        made = [computed([job(site.out(host))], stage) for host in ("node1", "node2")]
        assert sum(made) == computed([job(alone)], stage), (stage, printed)
    for host in ("node1", "node2"):
        assert_same_tables(site.out(host), alone, more_than=4)
    assert not site.held()


def stopped_with_a_lease(site: Site, host: subprocess.Popen[str]) -> bool:
    """Stop a host in the middle of a batch; where it is between two it goes on. Its mount is of another group."""
    if not site.held():
        return False
    os.killpg(host.pid, signal.SIGSTOP)
    time.sleep(0.2)  # what it has asked the file system for is done
    held = bool(site.held())
    if not held:
        os.killpg(host.pid, signal.SIGCONT)
    return held


def test_a_host_that_dies_is_inherited_from_after_a_term(site, alone):
    killed = site.begin("killed", f"{site.see}; job", TERM)
    until(
        lambda: killed.poll() is not None or (0 < len(site.completed()) < 12 and stopped_with_a_lease(site, killed)),
        at_most_s=280,
    )
    assert killed.poll() is None, killed.communicate()[0]
    (lease,) = site.held()
    killed.kill()
    killed.communicate()
    ended(site.begin("heir", f"{site.see}; job", TERM))
    assert not site.held()
    last = max(site.disk.glob("completions/*/*.parquet"), key=lambda part: part.stat().st_mtime_ns)
    keys = "".join(pd.read_parquet(last)["key"])
    assert lease.startswith(hashlib.sha256(keys.encode()).hexdigest()), "what the dead host held came last"
    made, whole = (computed([job(out)], "completions") for out in (site.out("heir"), alone))
    assert made < whole, "it made what was left"
    assert_same_tables(site.out("heir"), alone, more_than=4)


def test_a_full_disk_is_one_line_and_with_more_room_the_job_goes_on(site, alone):
    small = f"mount -t tmpfs -o size=64k none {site.seen}"
    kept = f"sha256sum $(find {site.seen} -name '*.parquet' -o -name '*.safetensors') > kept; wc -l < kept"
    more = f"mount -o remount,size=64m {site.seen}; sha256sum --quiet --check kept && echo kept"
    printed = ended(site.begin("node", f"{small}; job || echo code $?; echo parts $({kept}); {more}; job"))
    refused, _, rest = printed.partition("parts ")
    assert refused.splitlines()[-1] == "code 2"
    assert refused.splitlines()[-2].startswith(f"prefs: cannot write to the store at {site.seen}")
    assert "No space left on device" in refused.splitlines()[-2]
    assert "Traceback" not in printed
    assert int(rest.splitlines()[0]) > 0, "something had been stored"
    assert rest.splitlines()[1] == "kept"
    assert_same_tables(site.out("node"), alone, more_than=4)


def test_a_store_that_can_only_be_read_serves_whoever_lacks_nothing(whole, alone):
    site, before = whole, whole.checksums()
    read_only = f"mount --bind {site.disk} {site.seen}; mount -o remount,bind,ro {site.seen}"
    printed = ended(site.begin("reader", f"{read_only}; job; job rating.seeds=[0,1,2] || echo code $?"))
    assert_same_tables(site.out("reader"), alone, more_than=4)
    *_, line, code = printed.splitlines()
    assert code == "code 2"
    assert line.startswith(f"prefs: cannot write to the store at {site.seen}")
    assert line.endswith("Read-only file system")
    assert "Traceback" not in printed
    assert site.checksums() == before
