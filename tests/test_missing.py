"""The one loop: what is lacking is asked for once, whoever dies is inherited from, and jobs share the work."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from filelock import SoftFileLease
from hypothesis import given, settings
from hypothesis import strategies as st

from prefs.errors import UserError
from prefs.models.types import Capture, Message, Question, Reply, Request, Sample, Sampling, Score
from prefs.stages.rate import ANSWERS, SCORES
from prefs.stages.records import sample_row, score_row
from prefs.store.leases import share
from prefs.store.missing import Record, ReplyTable, ReplyVectors, Unit, Wanted, batches, fill
from prefs.store.table import Store

TERM_S = 1.0
SEEDS, OPTIONS = (0, 1), ("1", "2")


@given(st.dictionaries(st.text(max_size=4), st.integers(1, 50), max_size=40), st.integers(1, 200), st.randoms())
def test_batches_hold_every_row_once_within_the_budget_in_any_order(lengths, budget, random):
    cut = batches(lengths, budget)
    assert sorted(key for batch in cut for key in batch) == sorted(lengths)
    for batch in cut:
        assert len(batch) == 1 or len(batch) * max(lengths[key] for key in batch) <= budget
    items = list(lengths.items())
    random.shuffle(items)
    assert batches(dict(items), budget) == cut


class Counting:
    """An engine that answers by what it is asked, notes what that is, and can stop: no real one stops when it is to."""

    max_context = 100

    def __init__(self, *, rows_apart: bool, stops_after: int | None = None):
        self.rows_apart, self.stops_after = rows_apart, stops_after
        self.asked: list[list[Request]] = []

    def tokens(self, request: Request) -> int:
        return sum(len(message.content) for message in request.turns)

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        self.asked.append(list(requests))
        for number in reversed(range(len(requests))):
            if self.stops_after is not None and len(requests) - number > self.stops_after:
                raise UserError("the server is gone (some rows of this batch were answered and are kept)")
            request = requests[number]
            text = request.messages[0].content
            samples = {seed: Sample(f"{text} {seed}", 1, True) for seed in request.seeds}
            vectors = {position: torch.full((1, 2), len(text)) for position in (request.capture or CAPTURE).positions}
            yield number, Reply(samples, {seed: Score((0.5, 0.25)) for seed in request.scores}, residuals=vectors)


CAPTURE = Capture((3,), ("last_prompt", "rating"))


class Job:
    """Texts that are captured, and asked two questions each."""

    def __init__(self, store: Store, texts: Sequence[str]):
        self.store = store
        self.scores = ReplyTable(store.table("scores", {}, SCORES), "scores", score_row)
        self.answers = ReplyTable(store.table("answers", {}, ANSWERS), "samples", sample_row)
        self.vectors = {
            p: ReplyVectors(store.vectors("residuals", {"at": p}), (3,), "float32") for p in CAPTURE.positions
        }
        self.units = [self.unit(text) for text in texts]

    def unit(self, text: str) -> Unit:
        messages = (Message("user", text),)
        shared = Request(messages, capture=Capture((3,), ("last_prompt",)))
        wanted = [Wanted(shared, (self.vector(text, "last_prompt"),))]
        for asked in ("?", "??"):
            question = Question(asked, OPTIONS)
            request = Request(messages, question, Sampling(1, 1, 10), SEEDS, (0,), capture=Capture((3,), ("rating",)))
            key = f"{text} {asked}"
            records = [Record(self.scores, f"{key} score", 0), self.vector(key, "rating")]
            records += [Record(self.answers, f"{key} {seed}", seed) for seed in SEEDS]
            wanted.append(Wanted(request, tuple(records)))
        return Unit(text, shared, 0, tuple(wanted))

    def vector(self, key: str, position: str) -> Record:
        return Record(self.vectors[position], f"{key} {position}", position)

    def run(self, engine: Counting, budget: int = 12) -> None:
        fill(self.units, lambda: engine, budget, self.store, label="Testing")

    @property
    def records(self) -> list[Record]:
        return [record for unit in self.units for wanted in unit.wanted for record in wanted.records]


def parts(request: Request) -> int:
    positions = request.capture.positions if request.capture else ()
    return len(request.seeds) + len(request.scores) + len(positions)


TEXTS = ["a", "bb", "cc", "ddd", "eeeee"]


@settings(max_examples=30)
@given(stored=st.sets(st.integers(0, 44)), rows_apart=st.booleans())
def test_what_is_lacking_is_asked_for_and_nothing_else(tmp_path_factory, stored, rows_apart):
    store = Store(tmp_path_factory.mktemp("store"), lease_s=0.0)
    job = Job(store, TEXTS)
    whole = Counting(rows_apart=rows_apart)
    job.run(whole)
    expected = {text: row["text"] for text, row in job.answers.table.rows.items()}
    some = Job(other := Store(tmp_path_factory.mktemp("other"), lease_s=0.0), TEXTS)
    for number, record in enumerate(some.records):
        if number in stored:
            vectors = {position: torch.ones(1, 2) for position in CAPTURE.positions}
            samples = {seed: Sample(expected.get(record.key, ""), 1, True) for seed in SEEDS}
            record.kept.write([(record, Reply(samples, {0: Score((0.5, 0.25))}, residuals=vectors))])
    lacking = [record for record in some.records if record.lacking]
    engine = Counting(rows_apart=rows_apart)
    some.run(engine)
    assert not any(record.lacking for record in some.records)
    assert {text: row["text"] for text, row in some.answers.table.rows.items()} == expected
    asked = sum(parts(request) for batch in engine.asked for request in batch)
    if rows_apart:
        assert asked == len(lacking)
    else:
        assert len(lacking) <= asked <= len(some.records)
        for batch in engine.asked:  # a batch is the one that it is where nothing is there
            texts = {request.messages for request in batch}
            assert texts in [{request.messages for request in other} for other in whole.asked]
    nothing = Job(other, TEXTS)
    fill(nothing.units, lambda: pytest.fail("no engine is needed"), 12, other, label="Testing")


def test_replies_that_came_before_an_error_are_kept(tmp_path):
    store = Store(tmp_path)
    job = Job(store, TEXTS)
    with pytest.raises(UserError, match="the server is gone"):
        job.run(Counting(rows_apart=True, stops_after=4), budget=1000)
    assert 0 < sum(not record.lacking for record in job.records) < len(job.records)
    engine = Counting(rows_apart=True)
    again = Job(store, TEXTS)
    again.run(engine)
    assert sum(parts(request) for batch in engine.asked for request in batch) < len(job.records)
    assert not any(record.lacking for record in again.records)


def test_what_is_too_long_is_known_and_not_asked(tmp_path):
    job = Job(Store(tmp_path), ["a", "b" * 89, "c" * 99, "d" * 101])
    engine = Counting(rows_apart=False)
    job.run(engine)
    rows = {**job.answers.table.rows, **job.scores.table.rows}
    too_long = {key for key, row in rows.items() if row["invalid"] == "too_long"}
    b, c, d = (text * times for text, times in (("b", 89), ("c", 99), ("d", 101)))
    answers = {f"{text} {asked} {seed}" for text in (c, d) for asked in ("?", "??") for seed in SEEDS}
    # Of the first, the longer question leaves no room for an answer, but a score.
    assert too_long == answers | {f"{b} ?? 0", f"{b} ?? 1", f"{c} ?? score", f"{d} ? score", f"{d} ?? score"}
    assert job.vectors["last_prompt"].vectors.absent == {f"{d} last_prompt"}
    assert job.vectors["rating"].vectors.absent == {f"{c} ?? rating", f"{d} ? rating", f"{d} ?? rating"}
    assert {len(request.messages[0].content) for batch in engine.asked for request in batch} == {1, 89, 99}


def _work(folder: Path, number: int, term_s: float, deaths: float) -> None:
    """A job that makes 60 records in batches of 4; a record is an empty file, and who made it."""
    random.seed(number)
    records = folder / "records"
    known: set[str] = set()

    def refresh() -> None:
        known.update(path.name.partition("-")[0] for path in records.iterdir())

    def compute(batch: list[str]) -> None:
        time.sleep(0.005)
        for key in batch:
            if key not in known:
                if random.random() < deaths:
                    os.kill(os.getpid(), signal.SIGKILL)
                (records / f"{key}-{number}").touch()
                known.add(key)

    def leases(batch: list[str]) -> list[str]:
        return [] if known.issuperset(batch) else batch[:1]

    refresh()
    all_batches = [[f"{n:02d}" for n in range(start, start + 4)] for start in range(0, 60, 4)]
    share(all_batches, Store(folder, term_s), leases=leases, compute=compute, refresh=refresh)
    assert len(known) == 60


@pytest.mark.parametrize("deaths", [0.0, 0.03])
def test_jobs_make_each_record_once_though_some_are_killed(tmp_path, deaths):
    """Those that are killed on this host are inherited from at once: the term is far longer than the test."""
    (tmp_path / "records").mkdir()
    context = multiprocessing.get_context("fork")
    started: list[multiprocessing.Process] = []
    # Asking whether one is alive reaps it: a zombie still has its number, and is inherited from after a term.
    while len(started) < 4 + (killed := sum(not job.is_alive() and job.exitcode != 0 for job in started)) or any(
        job.is_alive() for job in started
    ):
        if len(started) < 4 + killed:
            started.append(context.Process(target=_work, args=(tmp_path, len(started), 600.0, deaths)))
            started[-1].start()
        time.sleep(0.01)
    assert {job.exitcode for job in started} == ({0, -signal.SIGKILL} if deaths else {0})
    made = sorted(path.name.partition("-")[0] for path in (tmp_path / "records").iterdir())
    assert made == [f"{n:02d}" for n in range(60)]
    assert not list((tmp_path / "leases").iterdir())


def _hold(path: Path, ready) -> None:
    lease = SoftFileLease(path, lease_duration=TERM_S, timeout=0)
    lease.acquire()
    ready.set()
    time.sleep(60)


def test_a_job_that_gives_no_sign_of_life_is_taken_for_dead_after_a_term_and_not_before(tmp_path):
    """Stopped, it is there, but as if its host had lost power."""
    (tmp_path / "leases").mkdir()
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "leases" / f"a-{TERM_S:g}", ready))
    process.start()
    assert ready.wait(30)
    made: list[float] = []
    started = time.monotonic()

    def compute(batch: str) -> None:
        made.append(time.monotonic() - started)

    try:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        share(
            ["a"],
            Store(tmp_path, TERM_S),
            leases=lambda batch: [] if made else [batch],
            compute=compute,
            refresh=lambda: None,
        )
        assert made[0] >= 0.9 * TERM_S
    finally:
        process.kill()
        process.join()


def test_a_living_job_is_waited_for_however_long_it_takes(tmp_path, prefs_log):
    lease = SoftFileLease(tmp_path / "leases" / f"a-{TERM_S:g}", lease_duration=TERM_S, timeout=0)
    (tmp_path / "leases").mkdir()
    lease.acquire()
    made: list[str] = []
    end = time.monotonic() + 2.5 * TERM_S

    def refresh() -> None:
        assert not made
        if time.monotonic() > end and lease.is_locked:
            lease.release()

    share(
        ["a"],
        Store(tmp_path, TERM_S),
        leases=lambda batch: [] if made else [batch],
        compute=made.append,
        refresh=refresh,
    )
    assert made == ["a"]
    assert time.monotonic() >= end
    assert f"Waiting for what other jobs are computing (process {os.getpid()} on" in prefs_log.text
