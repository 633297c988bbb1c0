"""The steering stage: exact ratings while vectors are added to the residual stream, and what became of the model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import torch

from prefs.data.template import Invalid, Template
from prefs.models.loading import Models, ModelSpec, identity
from prefs.models.tokens import Message, as_dicts
from prefs.models.types import Ask, Conversation, Dosed, Question, Sampling, SteerableBackend, Steering
from prefs.progress import progress
from prefs.results.job_record import Work
from prefs.stages.complete import conversation
from prefs.stages.rate import QUESTION_ALLOWANCE
from prefs.stages.records import Completion
from prefs.store.missing import Found, share
from prefs.store.table import Store, batches, digest

STEERED = pa.schema(
    [
        ("mass", pa.list_(pa.float64())),
        ("invalid", pa.string()),
        ("nll", pa.float64()),
        ("texts", pa.list_(pa.string())),
        ("finished", pa.list_(pa.bool_())),
    ]
)
# Doses that are run, and written, together; what they share is computed once for so many.
DOSES_AT_ONCE = 24
Place = Literal["all", "last", "completion", "question"]
Control = Literal["concept", "random", "shuffled", "probe", "ablation"]


@dataclass(frozen=True, eq=False)
class Arrow:
    """A vector to steer with.

    Attributes
    ----------
    name
        What it is, for tables.
    control
        Which kind of thing it is; ``concept`` is what the others are compared with.
    layer
        Where it is added, after the block.
    vector
        [d] float32: what a coefficient of 1 adds. Of an ``ablation``, the direction that is projected out.
    relative
        Its norm as a multiple of the mean norm of the activations there.
    """

    name: str
    control: Control
    layer: int
    vector: torch.Tensor
    relative: float

    def steering(self, coefficient: float, at: Place) -> Steering:
        kind = "project_out" if self.control == "ablation" else "add"
        return Steering(self.layer, self.vector, coefficient, at, kind)

    def identity(self, coefficient: float, at: Place) -> dict[str, Any] | None:
        """What of it goes into store keys; nothing where it changes nothing."""
        if coefficient == 0:
            return None
        content = self.vector.float().contiguous().numpy().tobytes()
        kind = "project_out" if self.control == "ablation" else "add"
        return {
            "vector": hashlib.sha256(content).hexdigest(),
            "layer": self.layer,
            "coefficient": float(coefficient),
            "at": at,
            "kind": kind,
        }


@dataclass(frozen=True, eq=False)
class Dose:
    """One arrow at one coefficient; none is the unsteered model."""

    arrow: Arrow | None
    coefficient: float = 0.0

    def steering(self, at: Place) -> tuple[Steering, ...]:
        return () if self.arrow is None else (self.arrow.steering(self.coefficient, at),)

    def identity(self, at: Place) -> dict[str, Any] | None:
        return None if self.arrow is None else self.arrow.identity(self.coefficient, at)


UNSTEERED = Dose(None)


@dataclass(frozen=True, eq=False)
class Responses:
    """What the rater answered under D doses, the first of which is none.

    Attributes
    ----------
    doses
        [D].
    mass
        [D, T, V] probabilities of the options before renormalising; NaN for tasks that were not asked, and where the
        steered model's logits were not finite.
    finite
        [D, T] False where they were not.
    nll
        [D, T] nats a token of the completions under the steered model; NaN where there is none.
    sampled
        [D, T, S] sampled ratings, NaN where invalid.
    asked
        [T] which tasks were asked: those with a completion that the question fits behind.
    """

    doses: tuple[Dose, ...]
    mass: np.ndarray
    finite: np.ndarray
    nll: np.ndarray
    sampled: np.ndarray
    asked: np.ndarray


def steer(
    completions: Sequence[Completion],
    rater: ModelSpec,
    template: Template,
    arrows: Sequence[Arrow],
    coefficients: Sequence[float],
    sampling: Sampling,
    *,
    at: Place,
    seeds: Sequence[int],
    system_prompt: str | None,
    store: Store,
    models: Models,
) -> tuple[Responses, Work]:
    """Rate completions under every dose, doing only what the store lacks.

    Each arrow is given at each coefficient, an ablation at 1, and no arrow once for all of them.

    Parameters
    ----------
    sampling, seeds
        Of sampled answers, one a seed, beside the exact rating; they say how many answers are still ratings.
    at
        Which tokens are steered; see `prefs.models.types.Steering`.

    Raises
    ------
    UserError
        If an arrow does not fit the model.
    """
    prefill = rater.prefill if template.prefill is None else template.prefill
    question = Question(template.question, template.says, prefill)
    doses = (UNSTEERED, *_doses(arrows, coefficients))
    rows = {
        row: (*conversation(each.task.prompt, system_prompt), Message("assistant", each.text))
        for row, each in enumerate(completions)
        if each.text is not None
    }
    spec = {"model": identity(rater), "options": list(question.says), "prefill": prefill, "sampling": asdict(sampling)}
    table = store.table("steered", spec, STEERED)
    identities = [dose.identity(at) for dose in doses]
    messages = {row: as_dicts((*turns, Message("user", question.text))) for row, turns in rows.items()}
    keys = {
        (at_dose, row): table.key(messages=turns, seeds=list(seeds), steering=steering)
        for at_dose, steering in enumerate(identities)
        for row, turns in messages.items()
    }
    found = Found(table)
    wanted = set(keys.values())

    def lacks(place: tuple[int, int]) -> bool:
        return keys[place] not in found.rows

    if missing := found.lacking(wanted):
        backend = models.get(rater)
        assert hasattr(backend, "observe_doses"), "the config lets only engines that steer come here"
        engine = cast(SteerableBackend, backend)
        ask = Ask(question, tuple(seeds))
        with progress("Steering", len(missing)) as advance:

            def lacking(group: _Group) -> list[str]:
                return found.lacking(keys[place] for place in group.places)

            def compute(group: _Group) -> None:
                doses_lacking = [each for each in group.doses if any(lacks((each, row)) for row in group.batch.rows)]
                if group.batch.too_long:
                    brought = [[None] * len(group.batch.rows)] * len(doses_lacking)
                else:
                    steerings = [doses[each].steering(at) for each in doses_lacking]
                    turns = [rows[row] for row in group.batch.rows]
                    brought = engine.observe_doses(turns, ask, sampling, steerings)
                new = {
                    keys[each, row]: _record(dosed, seeds)
                    for each, of_dose in zip(doses_lacking, brought, strict=True)
                    for row, dosed in zip(group.batch.rows, of_dose, strict=True)
                    if lacks((each, row))
                }
                found.write(new)
                advance(len(new))

            groups = [
                group
                for batch in _batches(rows, question, rater, sampling.max_new_tokens if seeds else 0, engine)
                for group in _groups(doses, batch, lacks)
            ]
            share(groups, store.leases, lacking=lacking, compute=compute, refresh=found.refresh)
    work = Work(f"steered ratings, {template.name}", len(wanted) - len(found.made), len(found.made))
    return _responses(doses, template, len(completions), rows, keys, found.rows, len(seeds)), work


def _doses(arrows: Sequence[Arrow], coefficients: Sequence[float]) -> list[Dose]:
    return [
        Dose(arrow, coefficient)
        for arrow in arrows
        for coefficient in ([1.0] if arrow.control == "ablation" else sorted(coefficients))
        if coefficient != 0
    ]


@dataclass(frozen=True)
class _Batch:
    rows: tuple[int, ...]
    too_long: bool


def _batches(
    rows: Mapping[int, Conversation], question: Question, rater: ModelSpec, answer: int, backend: SteerableBackend
) -> list[_Batch]:
    """Rows that are run together, cut from all of them; and those that the question does not fit behind."""
    asked = {row: backend.question_tokens(turns, question) + answer for row, turns in rows.items()}
    long = tuple(row for row, length in asked.items() if length > backend.max_context)
    by_key = {digest(as_dicts(turns)): row for row, turns in rows.items() if row not in long}
    lengths = {key: backend.conversation_tokens(rows[row]) + QUESTION_ALLOWANCE for key, row in by_key.items()}
    cut = [_Batch(tuple(by_key[key] for key in batch), False) for batch in batches(lengths, rater.batch_tokens)]
    return cut + ([_Batch(long, True)] if long else [])


@dataclass(frozen=True)
class _Group:
    """A batch with the doses that it is given at once."""

    batch: _Batch
    doses: tuple[int, ...]

    @property
    def places(self) -> list[tuple[int, int]]:
        return [(dose, row) for dose in self.doses for row in self.batch.rows]


def _groups(doses: Sequence[Dose], batch: _Batch, lacks: Callable[[tuple[int, int]], bool]) -> list[_Group]:
    """The doses that a batch lacks, a layer after another, so many at once; what they share is found by the engine."""
    lacking = [at for at in range(len(doses)) if any(lacks((at, row)) for row in batch.rows)]
    lacking.sort(key=lambda at: -1 if (arrow := doses[at].arrow) is None else arrow.layer)
    starts = range(0, len(lacking), DOSES_AT_ONCE)
    return [_Group(batch, tuple(lacking[start : start + DOSES_AT_ONCE])) for start in starts]


def _record(dosed: Dosed | None, seeds: Sequence[int]) -> dict[str, Any]:
    if dosed is None:
        nothing = {"nll": None, "texts": [None] * len(seeds), "finished": [True] * len(seeds)}
        return {"mass": None, "invalid": Invalid.too_long.value, **nothing}
    score = next(iter(dosed.answer.scores.values()))
    samples = [dosed.answer.samples[seed] for seed in seeds]
    return {
        "mass": None if score.mass is None else list(score.mass),
        "invalid": score.invalid,
        "nll": dosed.nll,
        "texts": [sample.text for sample in samples],
        "finished": [sample.finished for sample in samples],
    }


def _responses(
    doses: tuple[Dose, ...],
    template: Template,
    count: int,
    rows: Mapping[int, Conversation],
    keys: Mapping[tuple[int, int], str],
    found: Mapping[str, Mapping[str, Any]],
    seeds: int,
) -> Responses:
    mass = np.full((len(doses), count, len(template.says)), np.nan)
    nll, finite = np.full((len(doses), count), np.nan), np.ones((len(doses), count), dtype=bool)
    sampled, asked = np.full((len(doses), count, seeds), np.nan), np.zeros(count, dtype=bool)
    for (dose, row), key in keys.items():
        record = found[key]
        asked[row] = record["invalid"] != Invalid.too_long.value
        finite[dose, row] = record["invalid"] != Invalid.not_finite.value
        if record["mass"] is not None:
            mass[dose, row] = record["mass"]
        if record["nll"] is not None:
            nll[dose, row] = record["nll"]
        for at, (text, finished) in enumerate(zip(record["texts"], record["finished"], strict=True)):
            value = Invalid.not_finite if text is None else template.read(text, finished=bool(finished))
            if not isinstance(value, Invalid):
                sampled[dose, row, at] = value
    return Responses(doses, mass, finite, nll, sampled, asked)
