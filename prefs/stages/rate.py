"""The rating stage: sampled and exact ratings of all templates, and the captured residuals, in one pass.

For each batch of conversations (task + completion) the rater runs the conversation once; every template's question
goes on from its keys and values, its options are scored from the same logits that its answers are sampled from, and
the residual vectors are kept as they pass by. What the store already has is not asked for again.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import torch

from prefs.data.template import Invalid, Template
from prefs.models.loading import Models, ModelSpec, identity
from prefs.models.tokens import Message, as_dicts
from prefs.models.types import (
    Ask,
    Backend,
    CaptureRequest,
    Conversation,
    Interrupted,
    Observation,
    Question,
    Sample,
    Sampling,
)
from prefs.progress import progress
from prefs.results.job_record import Work
from prefs.stages.complete import conversation
from prefs.stages.records import Answer, Completion, Rated, Ratings, Residuals, Thoughts
from prefs.store.missing import Found, share
from prefs.store.table import Store, Vectors, batches, digest

SCORES = pa.schema([("mass", pa.list_(pa.float64())), ("thought", pa.string()), ("invalid", pa.string())])
ANSWERS = pa.schema(
    [
        ("text", pa.string()),
        ("tokens", pa.int32()),
        ("finished", pa.bool_()),
        ("thought", pa.string()),
        ("invalid", pa.string()),
    ]
)

# Tokens that a batch's budget sets aside for each row's question and answer, whatever is asked.
QUESTION_ALLOWANCE = 256


@dataclass(frozen=True)
class CapturePlan:
    """What to capture: layers (0-based), positions, and the precision it is stored in."""

    layers: tuple[int, ...]
    positions: tuple[str, ...]
    dtype: str


def rate(
    completions: Sequence[Completion],
    rater: ModelSpec,
    templates: Mapping[str, Template],
    sampling: Sampling,
    *,
    seeds: Sequence[int],
    exact: bool,
    thoughts: int = 1,
    capture: CapturePlan | None,
    system_prompt: str | None,
    store: Store,
    models: Models,
) -> Rated:
    """Rate completions with every template and capture residuals, doing only what the store lacks.

    A conversation that a question does not fit behind is not asked it, and is ``too_long``; nor is a task without a
    completion, for the reason that this has. A rater that thinks is scored after so many ``thoughts``; sampled answers
    of the same seeds come after the same ones.
    """
    rows = {
        at: (*conversation(each.task.prompt, system_prompt), Message("assistant", each.text))
        for at, each in enumerate(completions)
        if each.text is not None
    }
    model = identity(rater)
    cells = {
        name: _Cell.open(template, rater, model, sampling, tuple(seeds), thoughts if exact else 0, rows, store)
        for name, template in templates.items()
    }
    positions = _Positions.open(capture, cells, model, rows, store) if capture else _Positions(None, {}, {}, {})
    if any(positions.lacks(row) or any(cell.lacks(row) for cell in cells.values()) for row in rows):
        _compute(rows, cells, positions, rater, sampling, store, models.get(rater))
    work = [work for cell in cells.values() for work in cell.work()] + positions.work()
    return Rated(
        ratings={name: cell.ratings(completions, rows) for name, cell in cells.items()},
        residuals=positions.residuals(len(completions)),
        rating_residuals=positions.rating_residuals(len(completions)),
        work=work,
    )


@dataclass(frozen=True)
class _Cell:
    """One template's records: keys by row and seed, and what the store holds.

    ``thoughts`` are the seeds of the thoughts after which options are scored: one 0 for a rater that answers at once,
    none where exact ratings are not wanted.
    """

    template: Template
    question: Question
    sampling: Sampling
    seeds: tuple[int, ...]
    thinks: bool
    thoughts: tuple[int, ...]
    scores: Found
    answers: Found
    score_keys: Mapping[tuple[int, int], str]
    answer_keys: Mapping[tuple[int, int], str]

    @classmethod
    def open(
        cls,
        template: Template,
        rater: ModelSpec,
        model: Mapping[str, object],
        sampling: Sampling,
        seeds: tuple[int, ...],
        thoughts: int,
        rows: Mapping[int, Conversation],
        store: Store,
    ) -> _Cell:
        prefill = rater.prefill if template.prefill is None else template.prefill
        question = Question(template.question, template.says, prefill)
        spec = {"model": model, "options": list(question.says), "prefill": prefill}
        thinks = rater.thinking is not None
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p} if thinks else {}
        scores = store.table("scores", {**spec, **drawn}, SCORES)
        after = thought_seeds(seeds, thoughts) if thinks else (0,) * bool(thoughts)
        answers = store.table("answers", {**spec, "sampling": asdict(sampling)}, ANSWERS)
        messages = {row: as_dicts((*turns, Message("user", question.text))) for row, turns in rows.items()}
        return cls(
            template=template,
            question=question,
            sampling=sampling,
            seeds=seeds,
            thinks=thinks,
            thoughts=after,
            scores=Found(scores),
            answers=Found(answers),
            score_keys={
                (row, seed): scores.key(messages=turns, **({"thought": seed} if thinks else {}))
                for row, turns in messages.items()
                for seed in after
            },
            answer_keys={
                (row, seed): answers.key(messages=turns, seed=seed) for row, turns in messages.items() for seed in seeds
            },
        )

    def missing_scores(self, row: int) -> tuple[int, ...]:
        return tuple(seed for seed in self.thoughts if self.score_keys[row, seed] not in self.scores.rows)

    @property
    def first_thought(self) -> int:
        """The thought that residuals at ``rating`` are captured after."""
        return (*self.thoughts, *self.seeds, 0)[0]

    def missing_seeds(self, row: int) -> tuple[int, ...]:
        return tuple(seed for seed in self.seeds if self.answer_keys[row, seed] not in self.answers.rows)

    def lacks(self, row: int) -> bool:
        return bool(self.missing_scores(row) or self.missing_seeds(row))

    def work(self) -> list[Work]:
        kinds = {"sampled": (self.seeds, self.answer_keys, self.answers)}
        kinds |= {"exact": (self.thoughts, self.score_keys, self.scores)}
        return [
            Work(f"{kind} ratings, {self.template.name}", len(keys) - len(found.made), len(found.made))
            for kind, (wanted, keys, found) in kinds.items()
            if wanted
        ]

    def leases(self, row: int, turns: str, *, captured: bool) -> list[str]:
        """What a job holds while it asks this question after a conversation (of digest `turns`), or captures at it."""
        wanted = captured or self.lacks(row)
        return [self.scores.table.key(conversation=turns, question=self.question.text)] if wanted else []

    def refresh(self) -> None:
        """Read what other jobs have written since."""
        self.scores.refresh()
        self.answers.refresh()

    def record_too_long(self, unscored: Sequence[int], unanswered: Sequence[int]) -> None:
        """Write down behind which conversations the question does not fit, and behind which its answer does not."""
        reason = Invalid.too_long.value
        self._write(
            {
                self.score_keys[row, seed]: {"mass": None, "thought": None, "invalid": reason}
                for row in unscored
                for seed in self.missing_scores(row)
            },
            {
                self.answer_keys[row, seed]: asdict(Sample(None, 0, True, invalid=reason))
                for row in unanswered
                for seed in self.missing_seeds(row)
            },
        )

    def record(self, rows: Sequence[int], observations: Sequence[Observation | None], at: int) -> None:
        """Write what a batch brought for this template (its ``at``-th question), where it was missing."""
        scores, answers = {}, {}
        for row, observation in zip(rows, observations, strict=True):
            if observation is None:
                continue
            answer = observation.answers[at]
            for seed in self.missing_scores(row):
                if seed in answer.scores:
                    scores[self.score_keys[row, seed]] = asdict(answer.scores[seed])
            for seed in self.missing_seeds(row):
                if seed in answer.samples:
                    answers[self.answer_keys[row, seed]] = asdict(answer.samples[seed])
        self._write(scores, answers)

    def _write(self, scores: dict[str, dict], answers: dict[str, dict]) -> None:
        self.scores.write(scores)
        self.answers.write(answers)

    def ratings(self, completions: Sequence[Completion], rows: Mapping[int, Conversation]) -> Ratings:
        """The ratings of all completions, read by the template."""
        thoughts = self._after_thoughts(completions, rows) if self.thoughts else None
        mass = None
        if thoughts is not None:
            ended = np.isfinite(thoughts.mass).all(axis=2).sum(axis=1)[:, None]
            total = np.nansum(thoughts.mass, axis=1)
            mass = np.divide(total, ended, out=np.full(total.shape, np.nan), where=ended > 0)
        return Ratings(
            template=self.template,
            question=self.question,
            sampling=self.sampling,
            completions=completions,
            seeds=self.seeds,
            answers=[
                tuple(
                    self._read(row, seed) if row in rows else Answer(seed, None, None, completion.invalid)
                    for seed in self.seeds
                )
                for row, completion in enumerate(completions)
            ],
            mass=mass,
            thinks=self.thinks,
            thoughts=thoughts if self.thinks else None,
        )

    def _after_thoughts(self, completions: Sequence[Completion], rows: Mapping[int, Conversation]) -> Thoughts:
        """What was scored, [tasks, thoughts, options]; a rater that answers at once has one thought, an empty one."""
        mass = np.full((len(completions), len(self.thoughts), len(self.template.options)), np.nan)
        texts: list[tuple[str | None, ...]] = []
        invalid: list[tuple[Invalid | None, ...]] = []
        for row, completion in enumerate(completions):
            if row not in rows:
                texts.append((None,) * len(self.thoughts))
                invalid.append((completion.invalid,) * len(self.thoughts))
                continue
            found = [self.scores.rows[self.score_keys[row, seed]] for seed in self.thoughts]
            for at, each in enumerate(found):
                if each["invalid"] is None:
                    mass[row, at] = each["mass"]
            texts.append(tuple(each["thought"] for each in found))
            invalid.append(tuple(Invalid(each["invalid"]) if each["invalid"] else None for each in found))
        return Thoughts(self.thoughts, mass, texts, invalid)

    def _read(self, row: int, seed: int) -> Answer:
        found = self.answers.rows[self.answer_keys[row, seed]]
        thought = found["thought"]
        if found["invalid"] is not None:
            return Answer(seed, found["text"], None, Invalid(found["invalid"]), thought)
        value = self.template.read(found["text"], finished=bool(found["finished"]))
        if isinstance(value, Invalid):
            return Answer(seed, found["text"], None, value, thought)
        return Answer(seed, found["text"], value, None, thought)


def thought_seeds(seeds: Sequence[int], count: int) -> tuple[int, ...]:
    """Seeds of so many thoughts: first those of the sampled ratings, which then come after the same thoughts."""
    others = (seed for seed in itertools.count() if seed not in seeds)
    return tuple(itertools.islice(itertools.chain(seeds, others), count))


@dataclass(frozen=True)
class _Positions:
    """The captured positions' records. ``rating`` has one collection a template, the others one for all."""

    plan: CapturePlan | None
    shared: Mapping[str, tuple[Vectors, Mapping[int, str]]]
    at_rating: Mapping[str, tuple[Vectors, Mapping[int, str]]]
    leased: Mapping[int, str]

    @classmethod
    def open(
        cls,
        plan: CapturePlan,
        cells: Mapping[str, _Cell],
        model: Mapping[str, object],
        rows: Mapping[int, Conversation],
        store: Store,
    ) -> _Positions:
        spec = {"model": model, "dtype": plan.dtype}
        shared = {}
        for position in plan.positions:
            if position != "rating":
                vectors = store.vectors("residuals", {**spec, "position": position})
                shared[position] = (
                    vectors,
                    {row: vectors.key(messages=as_dicts(turns)) for row, turns in rows.items()},
                )
        at_rating = {}
        for name, cell in cells.items() if "rating" in plan.positions else ():
            asked = {"options": list(cell.question.says), "prefill": cell.question.prefill}
            if cell.thinks:
                drawn = {"temperature": cell.sampling.temperature, "top_p": cell.sampling.top_p}
                asked |= {"thought": cell.first_thought, **drawn}
            vectors = store.vectors("residuals", {**spec, "position": "rating", **asked})
            question = Message("user", cell.question.text)
            at_rating[name] = (
                vectors,
                {row: vectors.key(messages=as_dicts((*turns, question))) for row, turns in rows.items()},
            )
        leased = {row: digest({"residuals": spec, "messages": as_dicts(turns)}) for row, turns in rows.items()}
        return cls(plan, shared, at_rating, leased)

    def _lacks(self, of: tuple[Vectors, Mapping[int, str]], row: int) -> bool:
        assert self.plan is not None
        return not of[0].has(of[1][row], self.plan.layers)

    def lacks_shared(self, row: int) -> bool:
        return any(self._lacks(of, row) for of in self.shared.values())

    def lacks_rating(self, row: int, name: str) -> bool:
        return name in self.at_rating and self._lacks(self.at_rating[name], row)

    def lacks(self, row: int) -> bool:
        return self.lacks_shared(row) or any(self.lacks_rating(row, name) for name in self.at_rating)

    def work(self) -> list[Work]:
        if self.plan is None:
            return []
        collections = [*self.shared.values(), *self.at_rating.values()]
        made = sum(len(vectors.made) for vectors, _ in collections)
        total = sum(len(keys) for _, keys in collections)
        return [Work("residual vectors", total - made, made, sum(vectors.bytes_made for vectors, _ in collections))]

    def leases(self, row: int) -> list[str]:
        """What a job holds while it captures at the positions that all templates share."""
        return [self.leased[row]] if self.lacks_shared(row) else []

    def refresh(self) -> None:
        """Read what other jobs have written since."""
        for vectors, _ in (*self.shared.values(), *self.at_rating.values()):
            vectors.refresh()

    def request(self, rows: Sequence[int], names: Sequence[str]) -> CaptureRequest | None:
        """What to capture for a batch that is asked these templates."""
        if self.plan is None:
            return None
        positions = [position for position, of in self.shared.items() if any(self._lacks(of, row) for row in rows)]
        if any(self.lacks_rating(row, name) for row in rows for name in names):
            positions.append("rating")
        return CaptureRequest(self.plan.layers, tuple(positions)) if positions else None

    def record_too_long(self, rows: Sequence[int], fit: _Fit) -> None:
        """Write down that these conversations have no vectors: they, or the questions behind them, do not fit."""
        nothing = [None] * len(rows)
        for of in self.shared.values() if not fit.conversation else ():
            self._write(of, rows, nothing)
        for name, of in self.at_rating.items():
            if name not in fit.questions:
                self._write(of, rows, nothing)

    def record(
        self,
        rows: Sequence[int],
        observations: Sequence[Observation],
        names: Sequence[str],
        captured: Sequence[str],
    ) -> None:
        """Write what a batch brought at the positions captured, where it was missing."""
        for position, of in self.shared.items():
            if position in captured:
                self._write(of, rows, [each.residuals.get(position) for each in observations])
        for at, name in enumerate(names):
            if name in self.at_rating and "rating" in captured:
                self._write(self.at_rating[name], rows, [each.answers[at].residual for each in observations])

    def _write(
        self, of: tuple[Vectors, Mapping[int, str]], rows: Sequence[int], brought: Sequence[torch.Tensor | None]
    ) -> None:
        assert self.plan is not None
        vectors, keys = of
        new = [(keys[row], vector) for row, vector in zip(rows, brought, strict=True) if self._lacks(of, row)]
        there = [(key, vector) for key, vector in new if vector is not None]
        stacked = torch.stack([vector for _, vector in there]) if there else torch.empty(0, len(self.plan.layers), 0)
        absent = [key for key, vector in new if vector is None]
        vectors.append([key for key, _ in there], self.plan.layers, stacked.to(getattr(torch, self.plan.dtype)), absent)

    def _residuals(self, position: str, of: tuple[Vectors, Mapping[int, str]], count: int) -> Residuals:
        assert self.plan is not None
        vectors, keys = of
        vectors.refresh()
        there = [keys.get(row) for row in range(count)]
        known = [key if key is not None and vectors.has(key, self.plan.layers) else None for key in there]
        return Residuals(position, self.plan.layers, known, vectors)

    def residuals(self, count: int) -> dict[str, Residuals]:
        return {position: self._residuals(position, of, count) for position, of in self.shared.items()}

    def rating_residuals(self, count: int) -> dict[str, Residuals]:
        return {name: self._residuals("rating", of, count) for name, of in self.at_rating.items()}


@dataclass(frozen=True)
class _Fit:
    """What of a job fits into the context behind a conversation: itself, questions, and questions with an answer."""

    conversation: bool
    questions: tuple[str, ...]
    answers: tuple[str, ...]


def _compute(
    rows: Mapping[int, Conversation],
    cells: Mapping[str, _Cell],
    positions: _Positions,
    rater: ModelSpec,
    sampling: Sampling,
    store: Store,
    backend: Backend,
) -> None:
    """Ask and capture what is missing, batch by batch; each batch is written before the next is begun.

    A conversation is leased for each question, and once for the positions that all questions share.

    Batches are cut by the conversations alone, with the same allowance for any question, so that they do not depend on
    which templates a job has or in what order the tasks came.
    """
    fits: dict[_Fit, list[int]] = {}
    lengths = {row: backend.conversation_tokens(turns) for row, turns in rows.items()}
    for row, turns in rows.items():
        asked = {name: backend.question_tokens(turns, cell.question) for name, cell in cells.items()}
        fit = _Fit(
            conversation=lengths[row] <= backend.max_context,
            questions=tuple(name for name, length in asked.items() if length <= backend.max_context),
            answers=tuple(n for n, length in asked.items() if length + sampling.max_new_tokens <= backend.max_context),
        )
        fits.setdefault(fit, []).append(row)
    for fit, members in fits.items():
        for name, cell in cells.items():
            cell.record_too_long(
                members if name not in fit.questions else [], members if name not in fit.answers else []
            )
        positions.record_too_long(members, fit)
    turns = {row: digest(as_dicts(of)) for row, of in rows.items()}
    lacking = {row for row in rows if any(cell.lacks(row) for cell in cells.values()) or positions.lacks(row)}
    with progress("Rating", len(lacking)) as advance:

        def wanted(batch: _Batch) -> list[str]:
            held = [lease for row in batch.rows for lease in positions.leases(row)]
            held += [
                lease
                for row in batch.rows
                for name, cell in cells.items()
                for lease in cell.leases(row, turns[row], captured=positions.lacks_rating(row, name))
            ]
            if not held:
                advance(len(lacking.intersection(batch.rows)))
                lacking.difference_update(batch.rows)
            return held

        def compute(batch: _Batch) -> None:
            here = [row for row in batch.rows if any(c.lacks(row) for c in cells.values()) or positions.lacks(row)]
            for together in _lacking_alike(here, cells) if rater.rows_apart else [batch.rows]:
                _compute_batch(together, rows, batch.fit, cells, positions, sampling, backend)

        def refresh() -> None:
            positions.refresh()
            for cell in cells.values():
                cell.refresh()

        cut = [
            batch
            for fit, members in fits.items()
            if fit.conversation
            for batch in _batches(fit, members, turns, lengths, rater.batch_tokens)
        ]
        share(cut, store.leases, lacking=wanted, compute=compute, refresh=refresh)


@dataclass(frozen=True)
class _Batch:
    """Conversations that are run together; the same of them fits behind each."""

    fit: _Fit
    rows: tuple[int, ...]


def _batches(
    fit: _Fit, rows: Sequence[int], turns: Mapping[int, str], lengths: Mapping[int, int], budget: int
) -> list[_Batch]:
    by_key = {turns[row]: row for row in rows}
    budgeted = {key: lengths[row] + QUESTION_ALLOWANCE for key, row in by_key.items()}
    return [_Batch(fit, tuple(by_key[key] for key in batch)) for batch in batches(budgeted, budget)]


def _lacking_alike(rows: Collection[int], cells: Mapping[str, _Cell]) -> list[list[int]]:
    """Rows in groups that lack the same scores and answers: where each is paid for, nothing is asked for twice."""
    groups: dict[object, list[int]] = {}
    for row in sorted(rows):
        lacks = tuple((cell.missing_scores(row), cell.missing_seeds(row)) for cell in cells.values())
        groups.setdefault(lacks, []).append(row)
    return list(groups.values())


def _compute_batch(
    batch: Sequence[int],
    rows: Mapping[int, Conversation],
    fit: _Fit,
    cells: Mapping[str, _Cell],
    positions: _Positions,
    sampling: Sampling,
    backend: Backend,
) -> None:
    wanted: dict[str, Ask] = {}
    for name in fit.questions:
        cell = cells[name]
        lacking = {seed for row in batch for seed in cell.missing_seeds(row)} if name in fit.answers else set()
        unscored = {seed for row in batch for seed in cell.missing_scores(row)}
        captured = any(positions.lacks_rating(row, name) for row in batch)
        if captured and cell.thinks:
            unscored.add(cell.first_thought)
        if lacking or unscored or captured:
            first = (cell.first_thought, *cell.thoughts)
            wanted[name] = Ask(
                cell.question,
                tuple(seed for seed in cell.seeds if seed in lacking),
                tuple(seed for seed in dict.fromkeys(first) if seed in unscored),
            )
    request = positions.request(batch, list(wanted))
    if not wanted and request is None:
        return
    try:
        observations = backend.observe([rows[row] for row in batch], list(wanted.values()), sampling, request)
    except Interrupted as interrupted:
        for at, name in enumerate(wanted):
            done = [each if isinstance(each, Observation) else None for each in interrupted.done]
            cells[name].record(batch, done, at)
        raise
    for at, name in enumerate(wanted):
        cells[name].record(batch, observations, at)
    if request is not None:
        positions.record(batch, observations, list(wanted), request.positions)
