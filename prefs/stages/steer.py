"""The steering stage: exact ratings while vectors are added to the residual stream, and what became of the model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from prefs.data.template import Invalid, Template
from prefs.job import StageCounts
from prefs.models.loading import Models, ModelSpec, recorded
from prefs.models.options import MASS
from prefs.models.types import Message, Question, Reply, Request, Sampling, Steering, as_dicts
from prefs.stages.rate import QUESTION_ALLOWANCE
from prefs.stages.records import Completion, conversation, own_text
from prefs.store.keys import digest
from prefs.store.missing import Record, ReplyTable, Unit, Wanted, fill
from prefs.store.table import Store

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
# Which tokens are steered; see `prefs.models.types.Steering`.
Tokens = Literal["all", "last", "completion", "question"]
Control = Literal["concept", "random", "shuffled", "probe", "ablation"]


@dataclass(frozen=True, eq=False)
class SteeringVector:
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


@dataclass(frozen=True, eq=False)
class Dose:
    """One vector at one coefficient; none is the unsteered model."""

    vector: SteeringVector | None
    coefficient: float = 0.0

    def steering(self, tokens: Tokens) -> tuple[Steering, ...]:
        if self.vector is None:
            return ()
        kind = "project_out" if self.vector.control == "ablation" else "add"
        return (Steering(self.vector.layer, self.vector.vector, self.coefficient, tokens, kind),)


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

    @property
    def rated(self) -> np.ndarray:
        """[T] which of those asked the unsteered model rates, so that doses can be compared with it."""
        return self.asked & self.finite[0]


def steer(
    completions: Sequence[Completion],
    rater: ModelSpec,
    template: Template,
    vectors: Sequence[SteeringVector],
    coefficients: Sequence[float],
    sampling: Sampling,
    *,
    tokens: Tokens,
    seeds: Sequence[int],
    system_prompt: str | None,
    store: Store,
    models: Models,
) -> tuple[Responses, StageCounts]:
    """Rate completions under every dose, doing only what the store lacks.

    Each vector is given at each coefficient, an ablation at 1, and no vector once for all of them.

    Parameters
    ----------
    sampling, seeds
        Of sampled answers, one a seed, beside the exact rating; they say how many answers are still ratings.
    tokens
        Which are steered.

    Raises
    ------
    UserError
        If a vector does not fit the model.
    """
    prefill = rater.prefill if template.prefill is None else template.prefill
    question = Question(template.question, template.says, prefill, template.also)
    given = [
        Dose(vector, coefficient)
        for vector in vectors
        for coefficient in ([1.0] if vector.control == "ablation" else sorted(coefficients))
        if coefficient != 0
    ]
    doses = (Dose(None), *given)
    spec = {"model": recorded(rater), "options": list(question.options), "prefill": question.prefill}
    spec |= {"also": list(map(list, template.also)), "mass": MASS}
    table = store.table("steered", {**spec, "sampling": asdict(sampling)}, STEERED)
    kept = ReplyTable(table, "reply", partial(_row, seeds=seeds))
    steerings = [dose.steering(tokens) for dose in doses]
    identities = [_identity(steering) for steering in steerings]
    # Doses are run a layer after another; what they share is found by the engine.
    order = sorted(range(len(doses)), key=lambda dose: -1 if (vector := doses[dose].vector) is None else vector.layer)
    keys: dict[tuple[int, int], str] = {}
    units = []
    for row, completion in enumerate(completions):
        if completion.text is None:
            continue
        turns = conversation(completion.task.prompt, system_prompt, completion.text)
        messages = as_dicts((*turns, Message("user", question.text)))
        wanted = []
        for dose in order:
            key = table.key(messages=messages, seeds=list(seeds), steering=identities[dose])
            keys[dose, row] = key
            request = Request(
                turns, question, sampling, tuple(seeds), scores=(0,), steering=steerings[dose], likelihood=True
            )
            wanted.append(Wanted(request, (Record(kept, key),)))
        units.append(Unit(digest(as_dicts(turns)), Request(turns), QUESTION_ALLOWANCE, tuple(wanted)))
    engine = partial(models.get, rater)
    fill(units, engine, rater.batch_tokens, store, label="Steering", at_once=DOSES_AT_ONCE)
    total = len(set(keys.values()))
    work = StageCounts(f"steered ratings, {template.name}", total - len(table.made), len(table.made))
    return _responses(doses, template, len(completions), keys, table.rows, len(seeds)), work


def _identity(steering: tuple[Steering, ...]) -> dict[str, Any] | None:
    """What of it goes into store keys; nothing where it changes nothing."""
    for change in steering:
        content = change.vector.float().contiguous().numpy().tobytes()
        return {
            "vector": hashlib.sha256(content).hexdigest(),
            "layer": change.layer,
            "coefficient": float(change.coefficient),
            "at": change.at,
            "kind": change.kind,
        }
    return None


def _row(reply: Reply | None, _: None, seeds: Sequence[int]) -> dict[str, Any]:
    """What is stored of a reply."""
    if reply is None:
        nothing = {"nll": None, "texts": [None] * len(seeds), "finished": [True] * len(seeds)}
        return {"mass": None, "invalid": Invalid.too_long.value, **nothing}
    score, samples = reply.scores[0], [reply.samples[seed] for seed in seeds]
    return {
        "mass": None if score.mass is None else list(score.mass),
        "invalid": score.invalid,
        "nll": reply.nll,
        "texts": [sample.text for sample in samples],
        "finished": [sample.finished for sample in samples],
    }


def _responses(
    doses: tuple[Dose, ...],
    template: Template,
    count: int,
    keys: Mapping[tuple[int, int], str],
    rows: Mapping[str, Mapping[str, Any]],
    seeds: int,
) -> Responses:
    mass = np.full((len(doses), count, len(template.says)), np.nan)
    nll, finite = np.full((len(doses), count), np.nan), np.ones((len(doses), count), dtype=bool)
    sampled, asked = np.full((len(doses), count, seeds), np.nan), np.zeros(count, dtype=bool)
    for (dose, task), key in keys.items():
        record = rows[key]
        asked[task] = record["invalid"] != Invalid.too_long.value
        finite[dose, task] = record["invalid"] != Invalid.not_finite.value
        if record["mass"] is not None:
            mass[dose, task] = record["mass"]
        if record["nll"] is not None:
            nll[dose, task] = record["nll"]
        for number, (text, finished) in enumerate(zip(record["texts"], record["finished"], strict=True)):
            text, _, reason = own_text(text, finished, None, None)
            value = reason or Invalid.not_finite if text is None else template.read(text, finished=bool(finished))
            if not isinstance(value, Invalid):
                sampled[dose, task, number] = value
    return Responses(doses, mass, finite, nll, sampled, asked)
