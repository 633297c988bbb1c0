"""The rating stage: sampled and exact ratings of all templates, and the captured residuals, in one pass.

For each batch of conversations (task + completion) the rater runs the conversation once; every template's question
goes on from its keys and values, its options are scored from the same logits that its answers are sampled from, and
the residual vectors are kept as they pass by. What the store already has is not asked for again.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from prefs.data.template import Invalid, Template
from prefs.job import StageCounts
from prefs.models.loading import Models, ModelSpec, recorded, scored_by
from prefs.models.options import MASS
from prefs.models.types import Capture, Conversation, Message, Question, Request, Sampling, as_dicts
from prefs.stages.records import (
    Answer,
    Completion,
    Rated,
    Ratings,
    Residuals,
    Thoughts,
    conversation,
    own_text,
    sample_row,
    score_row,
)
from prefs.store.keys import digest
from prefs.store.missing import Record, ReplyTable, ReplyVectors, Unit, Wanted, fill
from prefs.store.table import Store

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

Messages = list[dict[str, str]]
# Vectors at one position, and the key of each row's.
_Captured = tuple[ReplyVectors, Mapping[int, str]]

# Tokens that a batch's budget sets aside for each row's question and answer, whatever is asked: batches do not depend
# on which templates a job has.
QUESTION_ALLOWANCE = 256


def rate(
    completions: Sequence[Completion],
    rater: ModelSpec,
    templates: Mapping[str, Template],
    sampling: Sampling,
    *,
    seeds: Sequence[int],
    exact: bool,
    thoughts: int = 1,
    capture: Capture | None,
    dtype: str = "bfloat16",
    system_prompt: str | None,
    store: Store,
    models: Models,
) -> Rated:
    """Rate completions with every template and capture residuals, doing only what the store lacks.

    A conversation that a question does not fit behind is not asked it, and is ``too_long``; nor is a task without a
    completion, for the reason that this has. A rater that thinks is scored after so many ``thoughts``; sampled answers
    of the same seeds come after the same ones. Vectors are stored in ``dtype``.
    """
    turns = {
        row: conversation(completion.task.prompt, system_prompt, completion.text)
        for row, completion in enumerate(completions)
        if completion.text is not None
    }
    messages = {row: as_dicts(conversed) for row, conversed in turns.items()}
    spec = {"model": recorded(rater), "dtype": dtype}
    # The vectors at positions that lie before any question.
    early = capture and replace(capture, positions=tuple(name for name in capture.positions if name != "rating"))
    positions = {
        name: _captured(store, {**spec, "position": name}, capture.layers if capture else (), messages)
        for name in (early.positions if early else ())
    }
    cells = {
        name: _Cell(template, rater, sampling, tuple(seeds), thoughts if exact else 0, capture, spec, messages, store)
        for name, template in templates.items()
    }
    units = []
    for row, conversed in turns.items():
        wanted = [cell.wanted(row, conversed) for cell in cells.values()]
        if positions:
            records = tuple(Record(kept, keys[row], position) for position, (kept, keys) in positions.items())
            wanted.insert(0, Wanted(Request(conversed, capture=early), records))
        units.append(Unit(digest(messages[row]), Request(conversed), QUESTION_ALLOWANCE, tuple(wanted)))
    fill(units, partial(models.get, rater), rater.batch_tokens, store, label="Rating")
    at_rating = {name: cell.rating for name, cell in cells.items() if cell.rating is not None}
    work = [work for cell in cells.values() for work in cell.work()]
    if capture:
        vectors = [*positions.values(), *at_rating.values()]
        made, total = sum(len(kept.vectors.made) for kept, _ in vectors), sum(len(keys) for _, keys in vectors)
        written = sum(kept.vectors.bytes_made for kept, _ in vectors)
        work.append(StageCounts("residual vectors", total - made, made, written))

    def residuals(position: str, captured: _Captured) -> Residuals:
        kept, keys = captured
        return Residuals(position, kept.layers, [keys.get(row) for row in range(len(completions))], kept.vectors)

    return Rated(
        ratings={name: cell.ratings(completions) for name, cell in cells.items()},
        residuals={position: residuals(position, captured) for position, captured in positions.items()},
        rating_residuals={name: residuals("rating", captured) for name, captured in at_rating.items()},
        work=work,
    )


def _captured(
    store: Store, spec: Mapping[str, Any], layers: tuple[int, ...], messages: Mapping[int, Messages]
) -> _Captured:
    vectors = store.vectors("residuals", spec)
    keys = {row: vectors.key(messages=turns) for row, turns in messages.items()}
    return ReplyVectors(vectors, layers, spec["dtype"]), keys


def thoughts_drawn(rater: ModelSpec, sampling: Sampling) -> dict[str, Any]:
    """What of the sampling determines the options' scores: how the thoughts before them are drawn, if there are any."""
    return {"temperature": sampling.temperature, "top_p": sampling.top_p} if rater.thinking is not None else {}


def scores_table(store: Store, rater: ModelSpec, question: Question, sampling: Sampling) -> ReplyTable:
    """Where the options' scores are kept, of all questions with these options and this opening."""
    asked = {"options": list(question.options), "prefill": question.prefill, "also": list(map(list, question.also))}
    how = {**scored_by(rater), "mass": MASS, **thoughts_drawn(rater, sampling)}
    return ReplyTable(store.table("scores", {"model": recorded(rater), **how, **asked}, SCORES), "scores", score_row)


def answers_table(store: Store, rater: ModelSpec, question: Question, sampling: Sampling) -> ReplyTable:
    """Where sampled answers are kept, of all questions with these options and this opening."""
    asked = {"options": list(question.options), "prefill": question.prefill, "sampling": asdict(sampling)}
    return ReplyTable(store.table("answers", {"model": recorded(rater), **asked}, ANSWERS), "samples", sample_row)


class _Cell:
    """One template's records: keys by row and seed, and where they are kept.

    ``thoughts`` are the seeds of the thoughts after which options are scored: one 0 for a rater that answers at once,
    none where exact ratings are not wanted. ``rating`` are the vectors at that position.
    """

    def __init__(
        self,
        template: Template,
        rater: ModelSpec,
        sampling: Sampling,
        seeds: tuple[int, ...],
        thoughts: int,
        capture: Capture | None,
        spec: Mapping[str, Any],
        messages: Mapping[int, Messages],
        store: Store,
    ) -> None:
        self.template, self.sampling, self.seeds = template, sampling, seeds
        prefill = rater.prefill if template.prefill is None else template.prefill
        self.question = Question(template.question, template.says, prefill, template.also)
        self.thinks = rater.thinking is not None
        self.thoughts = thought_seeds(seeds, thoughts) if self.thinks else (0,) * bool(thoughts)
        asked = {"options": list(template.says), "prefill": prefill}
        drawn = thoughts_drawn(rater, sampling)
        self.scores = scores_table(store, rater, self.question, sampling)
        self.answers = answers_table(store, rater, self.question, sampling)
        scores, answers = self.scores.table, self.answers.table
        turns = {row: [*before, *as_dicts([Message("user", self.question.text)])] for row, before in messages.items()}
        self.score_keys = {
            (row, seed): scores.key(messages=conversed, **({"thought": seed} if self.thinks else {}))
            for row, conversed in turns.items()
            for seed in self.thoughts
        }
        self.answer_keys = {
            (row, seed): answers.key(messages=conversed, seed=seed)
            for row, conversed in turns.items()
            for seed in seeds
        }
        # The thought that residuals at ``rating`` are captured after.
        self.thought = (*self.thoughts, *seeds, 0)[0] if self.thinks else None
        self.capture = self.rating = None
        if capture and "rating" in capture.positions:
            thought = {"thought": self.thought} if self.thinks else {}
            rating = {**spec, "position": "rating", **asked, **thought, **drawn}
            self.capture = replace(capture, positions=("rating",))
            self.rating = _captured(store, rating, capture.layers, turns)

    def wanted(self, row: int, turns: Conversation) -> Wanted:
        thought = self.thought if self.rating else None
        first = () if thought is None else (thought,)
        request = Request(
            turns,
            self.question,
            self.sampling,
            seeds=self.seeds,
            scores=tuple(dict.fromkeys((*first, *self.thoughts))),
            capture=self.capture,
        )
        records = [Record(self.scores, self.score_keys[row, seed], seed) for seed in self.thoughts]
        records += [Record(self.answers, self.answer_keys[row, seed], seed) for seed in self.seeds]
        records += [Record(self.rating[0], self.rating[1][row], "rating")] if self.rating else []
        return Wanted(request, tuple(records), thought)

    def work(self) -> list[StageCounts]:
        return [
            StageCounts(f"{kind} ratings, {self.template.name}", len(keys) - len(kept.table.made), len(kept.table.made))
            for kind, wanted, keys, kept in (
                ("sampled", self.seeds, self.answer_keys, self.answers),
                ("exact", self.thoughts, self.score_keys, self.scores),
            )
            if wanted
        ]

    def ratings(self, completions: Sequence[Completion]) -> Ratings:
        """The ratings of all completions, read by the template."""
        thoughts = self._after_thoughts(completions) if self.thoughts else None
        mass, without = None, {}
        if thoughts is not None:
            ended = np.isfinite(thoughts.mass).all(axis=2).sum(axis=1)[:, None]
            total = np.nansum(thoughts.mass, axis=1)
            mass = np.divide(total, ended, out=np.full(total.shape, np.nan), where=ended > 0)
            none = np.flatnonzero(ended[:, 0] == 0).tolist()
            without = {row: next(filter(None, thoughts.invalid[row]), Invalid.not_finite) for row in none}
        return Ratings(
            template=self.template,
            question=self.question,
            sampling=self.sampling,
            completions=completions,
            seeds=self.seeds,
            answers=[
                tuple(self._read(row, seed, completion.invalid) for seed in self.seeds)
                for row, completion in enumerate(completions)
            ],
            mass=mass,
            thinks=self.thinks,
            thoughts=thoughts if self.thinks else None,
            without_mass=without,
        )

    def _after_thoughts(self, completions: Sequence[Completion]) -> Thoughts:
        """What was scored, [tasks, thoughts, options]; a rater that answers at once has one thought, an empty one."""
        mass = np.full((len(completions), len(self.thoughts), len(self.template.options)), np.nan)
        texts: list[list[str | None]] = []
        invalid: list[list[Invalid | None]] = []
        unasked = dict.fromkeys(("thought", "mass"))
        for row, completion in enumerate(completions):
            if completion.invalid is not None:
                scores = [{**unasked, "invalid": completion.invalid}] * len(self.thoughts)
            else:
                scores = [self.scores.table.rows[self.score_keys[row, seed]] for seed in self.thoughts]
            for number, score in enumerate(scores):
                if score["invalid"] is None:
                    mass[row, number] = score["mass"]
            texts.append([score["thought"] for score in scores])
            invalid.append([score["invalid"] and Invalid(score["invalid"]) for score in scores])
        return Thoughts(self.thoughts, mass, texts, invalid)

    def _read(self, row: int, seed: int, unasked: Invalid | None) -> Answer:
        """A sampled answer, or the reason why it was not asked for."""
        if unasked is not None:
            return Answer(seed, None, None, unasked)
        answer = self.answers.table.rows[self.answer_keys[row, seed]]
        text, thought, reason = own_text(answer["text"], answer["finished"], answer["thought"], answer["invalid"])
        value = reason if text is None else self.template.read(text, finished=bool(answer["finished"]))
        number, reason = (None, value) if isinstance(value, Invalid) else (value, None)
        return Answer(seed, text, number, reason, thought)


def thought_seeds(seeds: Sequence[int], count: int) -> tuple[int, ...]:
    """Seeds of so many thoughts: first those of the sampled ratings, which then come after the same thoughts."""
    others = (seed for seed in itertools.count() if seed not in seeds)
    return tuple(itertools.islice(itertools.chain(seeds, others), count))
