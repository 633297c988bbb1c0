"""What is missing in the store, and the one loop that has it made: keys, batches, leases, run, write, counts.

A stage says which conversations it has (`Unit`), what it wants of each (`Wanted`: a whole request, and the records
that are parts of its reply), and where records are kept (`ReplyTable`, `ReplyVectors`). `fill` does the rest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from prefs.progress import progress
from prefs.store.leases import share
from prefs.store.table import Store, Table
from prefs.store.vectors import Vectors

if TYPE_CHECKING:
    from prefs.models.types import Engine, Reply, Request

# A part of a reply: "samples" or "scores" with their seed, "residuals" with their position, "choice", or all of it.
Part = tuple[str, int | str | None]


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
        positions = tuple(p for p in capture.positions if ("residuals", p) in parts) if capture else ()
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
    batches = [
        [replace(unit, wanted=unit.wanted[first:][:at_once]) for unit in batch]
        for batch in _cut(units, model, budget)
        for first in range(0, len(batch[0].wanted), at_once or len(batch[0].wanted))
    ]
    lacking = {unit.key: unit for unit in units if unit.lacking}
    collections = {record.kept: None for record in _records(units)}
    with progress(label, len(lacking)) as advance:

        def leases(batch: Sequence[Unit]) -> list[str]:
            keys: dict[object, list[str]] = {}
            for record in _records(batch):
                keys.setdefault(record.kept, []).append(record.key)
            lacked = {record.kept for record in _records(batch) if record.lacking}
            done = [unit.key for unit in batch if unit.key in lacking and not lacking[unit.key].lacking]
            for key in done:
                del lacking[key]
            advance(len(done))
            return [hashlib.sha256("".join(keys[kept]).encode()).hexdigest() for kept in lacked]

        def compute(batch: Sequence[Unit]) -> None:
            _run(_narrowed(batch, model.rows_apart), model)

        def refresh() -> None:
            for kept in collections:
                kept.refresh()

        share(batches, store, leases=leases, compute=compute, refresh=refresh)


def _records(units: Iterable[Unit]) -> list[Record]:
    return [record for unit in units for wanted in unit.wanted for record in wanted.records]


def _cut(units: Sequence[Unit], engine: Engine, budget: int) -> list[list[Unit]]:
    """Batches of units of which the same fits into the engine's context; what does not is recorded as too long."""
    alike: dict[tuple[int, ...], dict[str, Unit]] = {}
    lengths: dict[str, int] = {}
    too_long: dict[Any, list[tuple[Record, None]]] = {}
    for unit in units:
        *tokens, length = _tokens([*(wanted.request for wanted in unit.wanted), unit.measured], engine)
        fitting = []
        for wanted, count in zip(unit.wanted, tokens, strict=True):
            fits = []
            for record in wanted.records:
                if count + record.room(wanted.request) <= engine.max_context:
                    fits.append(record)
                elif record.lacking:
                    too_long.setdefault(record.kept, []).append((record, None))
            fitting.append(replace(wanted, records=tuple(fits)))
        shape = tuple(len(wanted.records) for wanted in fitting)
        if any(shape):
            lengths[unit.key] = length + unit.allowance
            alike.setdefault(shape, {})[unit.key] = replace(unit, wanted=tuple(fitting))
    for kept, records in too_long.items():
        kept.write(records)
    return [
        [group[key] for key in batch]
        for group in alike.values()
        for batch in batches({key: lengths[key] for key in group}, budget)
    ]


def _tokens(requests: Sequence[Request], engine: Engine) -> list[int]:
    """Tokens of the requests of one conversation, counted once where they differ in their steering alone."""
    counted: dict[object, int] = {}
    for request in requests:
        prompt = request.question, bool(request.seeds)
        if prompt not in counted:
            counted[prompt] = engine.tokens(request)
    return [counted[request.question, bool(request.seeds)] for request in requests]


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
