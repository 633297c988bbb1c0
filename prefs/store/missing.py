"""What is missing in the store, and the one loop that has it made: keys, batches, leases, run, write, counts.

A stage says which conversations it has (`Unit`), what it wants of each (`Wanted`: a whole request, and the records
that are parts of its reply), and where records are kept (`ReplyTable`, `ReplyVectors`). `fill` does the rest.

Leases are files in the store's folder ``leases``, of hosts that share it without locks and without clocks that agree.
Nothing depends on them but work saved: records are keyed by content and parts appear whole or not at all, so that a
job that was taken for dead, and goes on beside its heir, writes the same records a second time.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from filelock import SoftFileLease, Timeout

from prefs.errors import UserError
from prefs.progress import progress
from prefs.store.table import Store, Table
from prefs.store.vectors import Vectors

if TYPE_CHECKING:
    from prefs.models.types import Engine, Reply, Request

log = logging.getLogger(__name__)

LOOK_AGAIN_S = (0.05, 2.0)  # at first, and in the end
# File systems that cannot exchange two files (NFS) leave a dead job's lease to be removed by whoever waits for so long.
REMOVED_AFTER_TERMS = 1.25
# A part of a reply: "samples" or "scores" with their seed, "residuals" with their position, "choice", or all of it.
Part = tuple[str, int | str | None]
Batch = TypeVar("Batch")


@dataclass(frozen=True, eq=False)
class ReplyTable:
    """A table whose rows are parts of replies.

    Attributes
    ----------
    part
        Which: ``samples``, ``scores``, ``choice``, or the whole ``reply``.
    row
        The row of a reply's part with this seed: None where the reply does not have it, as of a batch that was stopped.
        In place of a reply, None stands for a prompt that is too long.
    """

    table: Table
    part: str
    row: Callable[[Reply | None, Any], dict[str, Any] | None]

    def has(self, key: str) -> bool:
        return key in self.table.rows

    def write(self, brought: Sequence[tuple[Record, Reply | None]]) -> None:
        """Write the records that these replies brought."""
        rows = {record.key: self.row(reply, record.which) for record, reply in brought}
        self.table.write({key: row for key, row in rows.items() if row is not None})

    def refresh(self) -> None:
        """Read what other jobs have written since."""
        self.table.refresh()


@dataclass(frozen=True, eq=False)
class ReplyVectors:
    """Vectors of replies at one position; ``dtype`` is that in which they are stored."""

    vectors: Vectors
    layers: tuple[int, ...]
    dtype: str
    part: ClassVar[str] = "residuals"

    def has(self, key: str) -> bool:
        return self.vectors.has(key, self.layers)

    def write(self, brought: Sequence[tuple[Record, Reply | None]]) -> None:
        """Write the vectors that these replies brought; what has no such position, or is too long, is absent."""
        by_key = {record.key: reply and reply.residuals.get(str(record.which)) for record, reply in brought}
        rows = {key: vector for key, vector in by_key.items() if vector is not None}
        stacked = torch.stack(list(rows.values())) if rows else torch.empty(0, len(self.layers), 0)
        absent = by_key.keys() - rows.keys()
        self.vectors.append(list(rows), self.layers, stacked.to(getattr(torch, self.dtype)), absent)

    def refresh(self) -> None:
        """Read what other jobs have written since."""
        self.vectors.refresh()


@dataclass(frozen=True, slots=True)
class Record:
    """One record: where it is kept, its key, and which of a reply's parts it is (a seed, a position)."""

    kept: ReplyTable | ReplyVectors
    key: str
    which: int | str | None = None

    @property
    def lacking(self) -> bool:
        return not self.kept.has(self.key)

    @property
    def part(self) -> Part:
        return self.kept.part, self.which

    def room(self, request: Request) -> int:
        """Tokens that must fit behind the prompt for it."""
        if self.kept.part == "choice":
            return 1
        drawn = self.kept.part == "samples" or (self.kept.part == "reply" and request.seeds)
        return request.sampling.max_new_tokens if drawn and request.sampling else 0


@dataclass(frozen=True, slots=True)
class Wanted:
    """A whole request, and the records that its reply brings.

    ``thought`` is the seed of the thought that the position ``rating`` lies behind, of a rater that thinks.
    """

    request: Request
    records: tuple[Record, ...]
    thought: int | None = None

    @property
    def lacking(self) -> set[Part]:
        """The parts of the reply that the store lacks."""
        return {record.part for record in self.records if record.lacking}

    def narrowed(self, parts: Set[Part]) -> Request:
        """The request for no more than these parts."""
        request = self.request
        if ("reply", None) in parts:
            return request
        capture = request.capture
        positions = tuple(each for each in capture.positions if ("residuals", each) in parts) if capture else ()
        scored = {which for part, which in parts if part == "scores"}
        if "rating" in positions:
            scored.add(self.thought)
        return replace(
            request,
            seeds=tuple(seed for seed in request.seeds if ("samples", seed) in parts),
            scores=tuple(seed for seed in request.scores if seed in scored),
            choose=("choice", None) in parts,
            capture=replace(capture, positions=positions) if capture and positions else None,
        )


@dataclass(frozen=True)
class Unit:
    """A conversation with all that is wanted of it.

    Batches are cut by the ``key``, and by the tokens of the request ``measured`` with an ``allowance`` for what comes
    after it.
    """

    key: str
    measured: Request
    allowance: int
    wanted: tuple[Wanted, ...]

    @property
    def lacking(self) -> bool:
        return any(record.lacking for wanted in self.wanted for record in wanted.records)


def fill(
    units: Iterable[Unit],
    engine: Callable[[], Engine],
    budget: int,
    store: Store,
    *,
    label: str,
    at_once: int | None = None,
) -> None:
    """Have all records made that the store lacks, by this job or by others that are at the same ones.

    Each batch is written before the next is begun. Batches are cut from the whole list, by length and key, so that
    they do not depend on what is missing or on the order of the tasks. What is too long for the engine is recorded so.

    Parameters
    ----------
    engine
        Gives the engine; it is not asked for where nothing is lacking.
    budget
        Tokens a batch.
    at_once
        Requests a conversation that are run together; None: all.

    Raises
    ------
    UserError
        If the engine stops in the middle of a batch; what it has answered is in the store. Or if that refuses.
    """
    units = list({unit.key: unit for unit in units}.values())
    if not any(unit.lacking for unit in units):
        return
    model = engine()
    batches = [part for batch in _cut(units, model, budget) for part in _parted(batch, at_once)]
    lacking = {unit.key: unit for unit in units if unit.lacking}
    kept = {record.kept: None for unit in units for wanted in unit.wanted for record in wanted.records}
    with progress(label, len(lacking)) as advance:

        def leases(batch: Sequence[Unit]) -> list[str]:
            keys: dict[object, list[str]] = {}
            for record in _records(batch):
                keys.setdefault(record.kept, []).append(record.key)
            wanted = {record.kept for record in _records(batch) if record.lacking}
            done = [unit.key for unit in batch if unit.key in lacking and not lacking[unit.key].lacking]
            for key in done:
                del lacking[key]
            advance(len(done))
            return [hashlib.sha256("".join(keys[each]).encode()).hexdigest() for each in wanted]

        def compute(batch: Sequence[Unit]) -> None:
            _run(_narrowed(batch, model.rows_apart), model)

        def refresh() -> None:
            for each in kept:
                each.refresh()

        share(batches, store, leases=leases, compute=compute, refresh=refresh)


def _records(units: Iterable[Unit]) -> list[Record]:
    return [record for unit in units for wanted in unit.wanted for record in wanted.records]


def _cut(units: Sequence[Unit], engine: Engine, budget: int) -> list[list[Unit]]:
    """Batches of units of which the same fits into the engine's context; what does not is recorded as too long."""
    alike: dict[tuple[int, ...], dict[str, Unit]] = {}
    lengths: dict[str, int] = {}
    too_long: dict[object, list[tuple[Record, None]]] = {}
    for unit in units:
        counted: dict[object, int] = {}  # of each question once, however many steerings it has

        def tokens(request: Request, counted: dict[object, int] = counted) -> int:
            counts = request.question, bool(request.seeds)
            if counts not in counted:
                counted[counts] = engine.tokens(request)
            return counted[counts]

        fitting = []
        for wanted in unit.wanted:
            free, fits = engine.max_context - tokens(wanted.request), []
            for record in wanted.records:
                if record.room(wanted.request) <= free:
                    fits.append(record)
                elif record.lacking:
                    too_long.setdefault(record.kept, []).append((record, None))
            fitting.append(replace(wanted, records=tuple(fits)))
        shape = tuple(len(wanted.records) for wanted in fitting)
        if any(shape):
            lengths[unit.key] = tokens(unit.measured) + unit.allowance
            alike.setdefault(shape, {})[unit.key] = replace(unit, wanted=tuple(fitting))
    for records in too_long.values():
        records[0][0].kept.write(records)
    return [
        [group[key] for key in batch]
        for group in alike.values()
        for batch in batches({key: lengths[key] for key in group}, budget)
    ]


def batches(lengths: Mapping[str, int], budget: int) -> list[list[str]]:
    """Cut rows into batches of similar length, of at most `budget` tokens with padding (one row at least).

    Cut from the whole list by length and key, so that a batch is the same whatever is missing and in whatever order
    the tasks came: in bfloat16 a row's numbers depend a little on the rows beside it.
    """
    cut: list[list[str]] = []
    for key in sorted(lengths, key=lambda key: (lengths[key], key)):
        if cut and (len(cut[-1]) + 1) * lengths[key] <= budget:
            cut[-1].append(key)
        else:
            cut.append([key])
    return cut


def _parted(batch: Sequence[Unit], at_once: int | None) -> list[list[Unit]]:
    """A batch in parts of so many requests a conversation."""
    count = len(batch[0].wanted)
    size = at_once or count
    return [
        [replace(unit, wanted=unit.wanted[first : first + size]) for unit in batch] for first in range(0, count, size)
    ]


def _narrowed(batch: Sequence[Unit], rows_apart: bool) -> list[tuple[Wanted, Request]]:
    """The requests of a batch, less what the store has: of each conversation what it lacks, or, where its numbers
    depend a little on those beside it, of all conversations what any of them lacks."""
    union = [set[Part]().union(*(unit.wanted[n].lacking for unit in batch)) for n in range(len(batch[0].wanted))]
    asked = []
    for unit in batch:
        for wanted, any_lacks in zip(unit.wanted, union, strict=True):
            if parts := wanted.lacking if rows_apart else any_lacks:
                asked.append((wanted, wanted.narrowed(parts)))
    return asked


def _run(asked: Sequence[tuple[Wanted, Request]], engine: Engine) -> None:
    """Run a batch, and write what it brought where it was lacking; also what it brought before an error."""
    replies: dict[int, Reply] = {}
    try:
        for number, reply in engine.run([request for _, request in asked]):
            replies[number] = reply
    finally:
        brought: dict[Any, list[tuple[Record, Reply]]] = {}
        for number in sorted(replies):
            for record in asked[number][0].records:
                if record.lacking:
                    brought.setdefault(record.kept, []).append((record, replies[number]))
        for kept, records in brought.items():
            kept.write(records)


def share(
    batches: Sequence[Batch],
    store: Store,
    *,
    leases: Callable[[Batch], Collection[str]],
    compute: Callable[[Batch], None],
    refresh: Callable[[], None],
) -> None:
    """Have all batches computed, by this job or by others that are at the same ones.

    A batch that another job holds is left until the others are done; then it is waited for, or taken over once that
    job is dead.

    Parameters
    ----------
    leases
        The names of the leases that a batch needs, as far as is known. None: the store lacks nothing of it.
    compute
        Computes what is lacking of a batch and writes it to the store.
    refresh
        Reads what others have written since.

    Raises
    ------
    UserError
        If the store cannot be written to.
    """
    left, told, pause = list(batches), False, LOOK_AGAIN_S[0]
    ours = _Leases(store.root / "leases", store.lease_s)
    while left:
        held = []
        for batch in left:
            names = leases(batch)
            if not names:
                continue
            if not ours.take(names):
                held.append(batch)
                continue
            try:
                refresh()  # whoever held it before may have done it
                if leases(batch):
                    compute(batch)
                    leases(batch)
            finally:
                ours.release()
        if held and len(held) == len(left):
            if not told:
                log.info("Waiting for what other jobs are computing (%s)", ", ".join(sorted(ours.others())))
                told = True
            time.sleep(pause)
            pause = min(2 * pause, LOOK_AGAIN_S[1])
            refresh()
        else:
            pause = LOOK_AGAIN_S[0]
        left = held


@dataclass
class _Leases:
    """The leases that this job holds, and those of others that it waits for. With a term of 0 nothing is leased."""

    folder: Path
    term_s: float
    held: list[SoftFileLease] = field(default_factory=list)
    # By name, those that others hold; when each last changed, by this host's clock, tells whether its holder is alive.
    waited_for: dict[str, SoftFileLease] = field(default_factory=dict)
    changed: dict[str, tuple[object, float]] = field(default_factory=dict)

    def take(self, names: Iterable[str]) -> bool:
        """Take all of these leases, or none; in one order, so that of two jobs that want some of the same one gets all.

        Raises
        ------
        UserError
            If the store cannot be written to.
        """
        if not self.term_s:
            return True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in sorted(set(names)):
                # All that contend for a lease must agree on its term.
                path = self.folder / f"{name}-{self.term_s:g}"
                lease = self.waited_for.pop(name, None) or SoftFileLease(path, lease_duration=self.term_s, timeout=0)
                try:
                    lease.acquire()
                except Timeout:
                    self.waited_for[name] = lease
                    self._break_if_dead(name, path)
                    self.release()
                    return False
                self.held.append(lease)
        except OSError as error:
            self.release()
            raise UserError(f"cannot write to the store at {self.folder}: {error.strerror}") from None
        return True

    def _break_if_dead(self, name: str, path: Path) -> None:
        with contextlib.suppress(OSError):
            stat = path.stat()
            state = stat.st_mtime_ns, stat.st_ino
            before, since = self.changed.get(name, (None, 0.0))
            if state != before:
                self.changed[name] = state, time.monotonic()
            elif time.monotonic() - since > REMOVED_AFTER_TERMS * self.term_s:
                self.waited_for[name].break_lock()

    def release(self) -> None:
        """Let go of all that are held."""
        while self.held:
            with contextlib.suppress(OSError):
                self.held.pop().release()

    def others(self) -> set[str]:
        """Who holds what is waited for, for people to read."""
        owners = [lease.owner for lease in self.waited_for.values()]
        return {f"process {owner.pid} on {owner.hostname}" for owner in owners if owner is not None}
