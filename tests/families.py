"""An engine of any family against plain transformers: what is asked of it, and how far its numbers are off."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from engine_calls import complete, dose_replies, observe
from plain import Change, Plain

from prefs.config import ThinkingConfig
from prefs.models.loading import Models, ModelSpec
from prefs.models.local.engine import LocalEngine
from prefs.models.positions import POSITIONS, token_ranges
from prefs.models.prompts import THOUGHT, encode_prompt
from prefs.models.sampling import Stops
from prefs.models.types import Capture, Conversation, Message, Question, Reply, Sampling, Steering

ROWS: list[Conversation] = [
    (Message("user", "What is 2 + 2?"), Message("assistant", "4.")),
    (
        Message("system", "You are a poet."),
        Message("user", "Name three rivers."),
        Message("assistant", "The Rhine, the Po and the Loire flow on, " * 3),
    ),
    (Message("user", "Why is the sky blue? " * 4), Message("assistant", "Scattering.\n\n1. Light\n2. Air")),
]
# Options of one token and of several, none of which opens another.
QUESTION = Question("Did you like it?", ("yes", "not at all"), "Answer: ")
SAMPLING = Sampling(1.0, 1.0, 3)
THINKING = ThinkingConfig(open="", close=".", gap=" ", max_tokens=16, force_close=True)

Errors = dict[str, float]


def errors(spec: ModelSpec, rows: Sequence[Conversation] = ROWS) -> dict[str, Errors]:
    """The largest error of each thing asked, of the rows in one batch and of the last alone: of a log-probability, of a
    vector (by its norm), of texts (1 where any differs)."""
    engine = Models().get(spec)
    assert isinstance(engine, LocalEngine)
    thinking = LocalEngine(engine.bridge, engine.encoder.tokenizer, dataclasses.replace(spec, thinking=THINKING))
    thinking.passes.sharing = engine.passes.sharing
    # One token in eight ends a text, so that thoughts and answers are of unequal lengths.
    engine.decoder.stops = thinking.decoder.stops = Stops(frozenset(range(0, 1 << 16, 8)))
    plain = Plain(spec, engine.n_layers)
    table: dict[str, Errors] = {}
    for name, batches in {"batch": [list(rows)], "alone": [[rows[-1]]]}.items():
        own = table.setdefault(name, {})
        for batch in batches:
            for kind, ask in {"observed": observed, "steered": steered}.items():
                _merge(own, kind, ask, engine, plain, batch)
            for kind, ask in {"thought": thought, "completed": completed}.items():
                _merge(own, kind, ask, thinking, plain, batch)
    return table


def _merge(own: Errors, kind: str, ask, engine, plain: Plain, batch: list[Conversation]) -> None:
    for name, error in ask(engine, plain, batch).items():
        own[name] = max(own.get(name, 0.0), error)


def observed(engine, plain: Plain, rows: list[Conversation]) -> Errors:
    capture = Capture(tuple(range(engine.n_layers)), tuple(POSITIONS))
    replies = [reply for (reply,) in observe(engine, rows, [QUESTION], SAMPLING, seeds=(0,), capture=capture)]
    worst = {"scores": 0.0, "samples": 0.0, "residuals": 0.0}
    for row, reply in zip(rows, replies, strict=True):
        prompt = encode_prompt(engine.encoder, row, QUESTION)
        worst["scores"] = max(worst["scores"], _off(reply, plain.log_masses(prompt)))
        turns = (*row, Message("user", QUESTION.text))
        ids = plain.drawn(prompt.ids, 0, turns, SAMPLING, engine.decoder.stops.tokens)
        worst["samples"] = max(worst["samples"], float(_text(engine, ids) != reply.samples[0].text))
        _, residuals = plain.run(prompt.ids)
        for position, (start, end) in token_ranges(prompt.spans, list(POSITIONS)).items():
            expected = residuals[:, start:end].mean(dim=1)
            off = (reply.residuals[position] - expected).norm(dim=-1) / expected.norm(dim=-1)
            worst["residuals"] = max(worst["residuals"], float(off.max()))
    return worst


def steered(engine, plain: Plain, rows: list[Conversation]) -> Errors:
    vector = torch.randn(engine.d_model, generator=torch.Generator().manual_seed(0))
    doses = [(), (Steering(2, vector, 3.0, "completion"),)]
    by_dose = dose_replies(engine, rows, QUESTION, SAMPLING, doses, seeds=(0,))
    worst = {"steered": 0.0, "nll": 0.0}
    for dose, replies in zip(doses, by_dose, strict=True):
        for row, reply in zip(rows, replies, strict=True):
            prompt = encode_prompt(engine.encoder, row, QUESTION)
            start, end = prompt.spans.completion
            change = None
            if dose:
                change = Change(2, 3.0 * vector, start, end)
            worst["steered"] = max(worst["steered"], _off(reply, plain.log_masses(prompt, change)))
            log_probs, _ = plain.run(prompt.ids, change)
            nll = -sum(float(log_probs[place - 1, prompt.ids[place]]) for place in range(start, end)) / (end - start)
            worst["nll"] = max(worst["nll"], abs(nll - reply.nll))
    return worst


def thought(engine, plain: Plain, rows: list[Conversation]) -> Errors:
    """Scores, answers and vectors after thoughts that end at different lengths."""
    capture = Capture(tuple(range(engine.n_layers)), ("mean_completion", "rating"))
    wanted = {"seeds": (0,), "scores": (0, 1), "capture": capture}
    replies = [reply for (reply,) in observe(engine, rows, [QUESTION], SAMPLING, **wanted)]
    worst = {
        "scores after thoughts": 0.0,
        "samples after thoughts": 0.0,
        "residuals after thoughts": 0.0,
        "thoughts": 0.0,
    }
    for row, reply in zip(rows, replies, strict=True):
        turns = (*row, Message("user", QUESTION.text))
        for seed, score in reply.scores.items():
            prompt = encode_prompt(engine.encoder, row, QUESTION, score.thought)
            worst["scores after thoughts"] = max(
                worst["scores after thoughts"], _off(reply, plain.log_masses(prompt), seed)
            )
            if seed == 0:
                ids = plain.drawn(prompt.ids, seed, turns, SAMPLING, engine.decoder.stops.tokens)
                if _text(engine, ids) != reply.samples[0].text:
                    worst["samples after thoughts"] = 1.0
                _, residuals = plain.run(prompt.ids)
                off = reply.residuals["rating"] - residuals[:, len(prompt.ids) - 1]
                off = (off.norm(dim=-1) / residuals[:, len(prompt.ids) - 1].norm(dim=-1)).max()
                worst["residuals after thoughts"] = max(worst["residuals after thoughts"], float(off))
    # A thought is many tokens: of the first row only.
    if not _thinks_alike(engine, plain, (*rows[0], Message("user", QUESTION.text)), replies[0].scores[0].thought):
        worst["thoughts"] = 1.0
    return worst


def completed(engine, plain: Plain, rows: list[Conversation]) -> Errors:
    """Completions after thoughts."""
    prompts, worst = [row[:-1] for row in rows], {"completions": 0.0}
    for turns, sample in zip(prompts, complete(engine, prompts, 0, SAMPLING), strict=True):
        ids = engine.encoder.encode(turns, answer="", thought=sample.thought).ids
        drawn = plain.drawn(ids, 0, turns, SAMPLING, engine.decoder.stops.tokens)
        worst["completions"] = max(worst["completions"], float(_text(engine, drawn) != sample.text))
    return worst


def _thinks_alike(engine, plain: Plain, turns: Conversation, text: str) -> bool:
    budget = dataclasses.replace(SAMPLING, max_new_tokens=THINKING.max_tokens)
    stops = frozenset([*engine.decoder.stops.tokens, engine.encoder.thought_end])
    ids = plain.drawn(engine.encoder.open_thought(turns), 0, (*turns, THOUGHT), budget, stops)
    return _text(engine, ids) == text


def _text(engine, ids: Sequence[int]) -> str:
    return engine.encoder.tokenizer.decode(ids, skip_special_tokens=True)


def _off(reply: Reply, log_masses: Sequence[float], seed: int = 0) -> float:
    score = reply.scores[seed]
    if score.mass is None or not all(mass > 0 for mass in score.mass):
        return math.inf
    return max(abs(math.log(mass) - expected) for mass, expected in zip(score.mass, log_masses, strict=True))
