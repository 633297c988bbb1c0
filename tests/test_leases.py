"""Leases: one holder at a time, whoever dies is inherited from, and nobody needs a lock or another's clock."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
from waiting import until

from prefs.errors import UserError
from prefs.store.leases import Holder, Leases
from prefs.store.missing import share

TERM_S = 0.6


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "leases"


def holding(folder: Path, keys: list[str], term_s: float = TERM_S) -> Holder:
    holder = Holder(folder, term_s)
    assert holder.take(keys)
    return holder


def stop_beating(holder: Holder) -> None:
    """As if its host had lost power: nothing is let go, and there is no sign of life."""
    holder._over.set()
    assert holder._beating is not None
    holder._beating.join()
    path = holder._holders / holder.name
    path.write_bytes(path.read_bytes().replace(os.uname().nodename.encode(), b"elsewhere"))


def test_one_holder_at_a_time(folder):
    first, second = holding(folder, ["a", "b"]), Holder(folder, TERM_S)
    assert not second.take(["b", "c"])
    assert second.take(["c"]), "what was taken of a vain attempt was let go"
    first.release(["a", "b"])
    assert second.take(["a", "b"])
    first.close()
    second.close()
    assert sorted(path.name for path in folder.iterdir()) == ["holders", "visits"]
    assert not list((folder / "holders").iterdir())


def test_a_living_holder_is_waited_for_however_long_it_takes(folder):
    first, second = holding(folder, ["a"]), Holder(folder, TERM_S)
    end = time.monotonic() + 3 * TERM_S
    while time.monotonic() < end:
        assert not second.take(["a"])
        time.sleep(0.05)
    first.close()
    assert second.take(["a"])
    second.close()


def test_what_a_dead_host_held_is_taken_over_after_a_term_and_not_before(folder):
    first, second = holding(folder, ["a"]), Holder(folder, TERM_S)
    stop_beating(first)
    assert until(lambda: second.take(["a"])) >= TERM_S
    third = Holder(folder, TERM_S)
    assert not third.take(["a"])
    second.release(["a"])
    assert third.take(["a"])
    second.close()
    third.close()


def test_heirs_die_too(folder):
    generations = [holding(folder, ["a"])]
    for _ in range(3):
        stop_beating(generations[-1])
        heir = Holder(folder, TERM_S)
        until(lambda heir=heir: heir.take(["a"]))
        generations.append(heir)
    generations[-1].close()
    assert sorted(path.name for path in folder.iterdir()) == ["holders", "visits"]


def test_a_sleeper_that_was_taken_for_dead_lets_go_of_nothing_that_its_heir_holds(folder):
    sleeper, heir = holding(folder, ["a"]), Holder(folder, TERM_S)
    stop_beating(sleeper)
    until(lambda: heir.take(["a"]))
    sleeper.release(["a"])
    assert not Holder(folder, TERM_S).take(["a"])
    heir.close()


def test_of_many_that_come_for_a_dead_ones_lease_one_gets_it(folder):
    dead = holding(folder, ["a"])
    stop_beating(dead)
    heirs = [Holder(folder, TERM_S) for _ in range(8)]
    for heir in heirs:
        heir.take(["a"])
    time.sleep(1.2 * TERM_S)
    barrier, took = threading.Barrier(len(heirs)), []

    def come(heir: Holder) -> None:
        barrier.wait()
        if heir.take(["a"]):
            took.append(heir)

    threads = [threading.Thread(target=come, args=(heir,)) for heir in heirs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(took) == 1
    for heir in heirs:
        heir.close()


def _hold(folder: Path, ready) -> None:
    holding(folder, ["a"], term_s=60.0)
    ready.set()
    time.sleep(60)


def test_a_process_killed_on_this_host_is_inherited_from_at_once(folder):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(folder, ready))
    process.start()
    assert ready.wait(30)
    second = Holder(folder, term_s=60.0)
    assert not second.take(["a"])
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert second.take(["a"])
    second.close()


def test_what_the_dead_left_is_swept_up_after_a_day(folder):
    dead = holding(folder, ["a", "b"])
    stop_beating(dead)
    old = time.time() - 2 * 24 * 3600
    os.utime(folder / "holders" / dead.name, (old, old))
    holding(folder, ["c"]).close()
    assert sorted(path.name for path in folder.iterdir()) == ["holders", "visits"]
    assert not list((folder / "holders").iterdir())


def test_a_disk_that_refuses_is_one_line(folder, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    holder = holding(folder, ["a"])
    monkeypatch.setattr(os, "link", full)
    with pytest.raises(UserError, match=r"cannot write to the store at .*leases: No space left on device"):
        holder.take(["b"])
    holder.close()


def test_a_file_system_without_hard_links_is_worked_on_without_leases(folder, monkeypatch, caplog):
    def none(*args):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    first, second = holding(folder, ["a"]), holding(folder, ["a"])
    assert f"No leases at {folder} (Operation not permitted)" in caplog.text
    assert first.news()
    first.close()
    second.close()


def test_a_sleeper_that_was_swept_up_goes_on(folder):
    sleeper = holding(folder, ["a"])
    (folder / "holders" / sleeper.name).unlink()
    other = Holder(folder, TERM_S)
    assert other.take(["a"])
    assert sleeper.take(["b"])
    assert not Holder(folder, TERM_S).take(["b"])
    sleeper.close()
    other.close()


def test_an_answer_that_a_server_lost_is_a_lease_all_the_same(folder, monkeypatch):
    link, lost = os.link, []

    def made(source, target):
        link(source, target)
        if not lost:
            lost.append(target)
            raise FileExistsError

    monkeypatch.setattr(os, "link", made)
    holder = holding(folder, ["a"])
    assert lost
    holder.close()


def test_there_is_news_only_while_and_after_others_are_there(folder):
    first = holding(folder, ["a"])
    assert first.news(), "what was written before it came"
    assert not first.news()
    second = holding(folder, ["b"])
    assert [first.news() for _ in range(3)] == [True] * 3
    second.close()
    assert [first.news() for _ in range(3)] == [True, False, False]
    holding(folder, ["c"]).close()
    assert [first.news() for _ in range(3)] == [True, False, False], "who came and left has written in between"
    dead = holding(folder, ["d"])
    first.news()
    stop_beating(dead)
    until(lambda: not first.news())
    first.close()


def test_a_job_that_is_alone_reads_the_store_again_once(folder):
    made, refreshed = [], []
    share(
        [[f"{n}"] for n in range(50)],
        Leases(folder, TERM_S),
        lacking=lambda batch: [key for key in batch if key not in made],
        compute=made.extend,
        refresh=lambda: refreshed.append(len(made)),
    )
    assert len(made) == 50
    assert refreshed == [0]


def test_without_a_term_nothing_is_leased(folder):
    first, second = Holder(folder, 0), Holder(folder, 0)
    assert first.take(["a"])
    assert second.take(["a"])
    first.close()
    second.close()
    assert not folder.exists()


def _work(folder: Path, number: int, term_s: float, deaths: float) -> None:
    """A job that makes 60 records in batches that overlap with those of others; a record is an empty file."""
    random.seed(number)
    records = folder / "records"
    width = 3 + number % 3
    batches = [[f"{n:02d}" for n in range(start, min(start + width, 60))] for start in range(0, 60, width)]
    found: set[str] = set()

    def refresh() -> None:
        found.update(path.name.partition("-")[0] for path in records.iterdir())

    def compute(batch: list[str]) -> None:
        time.sleep(0.005)
        for key in batch:
            if key not in found:
                if random.random() < deaths:
                    os.kill(os.getpid(), signal.SIGKILL)
                (records / f"{key}-{number}").touch()
                found.add(key)

    refresh()
    share(
        batches,
        Leases(folder / "leases", term_s),
        lacking=lambda batch: [key for key in batch if key not in found],
        compute=compute,
        refresh=refresh,
    )
    assert len(found) == 60


@pytest.mark.parametrize("deaths", [0.0, 0.03])
def test_jobs_with_different_batches_make_each_record_once_though_some_are_killed(tmp_path, deaths):
    (tmp_path / "records").mkdir()
    context = multiprocessing.get_context("fork")
    running, started, killed = [], 0, 0
    while True:
        while len(running) < 4 and started < 4 + killed:
            running.append(context.Process(target=_work, args=(tmp_path, started, 60.0, deaths)))
            running[-1].start()
            started += 1
        if not running:
            break
        process = running.pop(0)
        process.join()
        if process.exitcode:
            assert process.exitcode == -signal.SIGKILL
            killed += 1
    made = sorted(path.name.partition("-")[0] for path in (tmp_path / "records").iterdir())
    assert made == [f"{n:02d}" for n in range(60)]
    assert bool(killed) == bool(deaths)
    left = sorted(path.name for path in (tmp_path / "leases").iterdir())
    assert left == ["holders", "visits"] or deaths, "only the killed leave something, for a day"
