"""Random batches of conversations, held against each conversation alone."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from engine_calls import observe
from families import QUESTION, SAMPLING, THINKING

from prefs.models.local.engine import LocalEngine
from prefs.models.sampling import Stops
from prefs.models.types import Capture, Conversation, Message, Reply

WORDS = ("red", "river", "night", "five", "glass", "green", "seven", "never", "apple", "house", "or", "stone")


@dataclass
class Worst:
    """Over all rows of all batches: the largest error of a log-probability and of a vector (relative to its norm), the
    rows whose texts differ, and the widest padding before a row, in tokens."""

    rows: int = 0
    scores: float = 0.0
    vectors: float = 0.0
    texts: int = 0
    padding: int = 0


def pool(size: int, seed: int) -> list[Conversation]:
    """Conversations whose lengths differ by up to 64 words, which are tokens."""
    draw = random.Random(seed)
    lengths = [draw.randint(0, 64) for _ in range(size)]
    texts = [" ".join(draw.choices(WORDS, k=1 + length)) for length in lengths]
    return [(Message("user", f"Say {n}."), Message("assistant", text)) for n, text in enumerate(texts)]


def thinking(engine: LocalEngine) -> LocalEngine:
    """The same model, thinking before it answers; its thoughts end at different lengths."""
    spec = dataclasses.replace(engine.spec, thinking=THINKING)
    thinker = LocalEngine(engine.bridge, engine.encoder.tokenizer, spec)
    thinker.passes.sharing = engine.passes.sharing
    thinker.decoder.stops = Stops(frozenset(range(0, 1 << 16, 8)))
    return thinker


def worst_of_batches(engine: LocalEngine, batches: int, conversations: Sequence[Conversation], seed: int) -> Worst:
    """Ask batches of 2 to 8 conversations in random orders, and compare with what each says alone."""
    alone = [_asked(engine, [row])[0] for row in conversations]
    lengths = [len(engine.encoder.encode(row).ids) for row in conversations]
    draw, worst = random.Random(seed), Worst()
    for _ in range(batches):
        rows = draw.sample(range(len(conversations)), draw.randint(2, 8))
        worst.padding = max(worst.padding, max(lengths[row] for row in rows) - min(lengths[row] for row in rows))
        for row, reply in zip(rows, _asked(engine, [conversations[row] for row in rows]), strict=True):
            _compare(worst, reply, alone[row])
    return worst


def _asked(engine: LocalEngine, rows: Sequence[Conversation]) -> list[Reply]:
    capture = Capture((0, engine.n_layers - 1), ("mean_completion", "rating"))
    return [reply for (reply,) in observe(engine, rows, [QUESTION], SAMPLING, seeds=(0,), capture=capture)]


def _compare(worst: Worst, reply: Reply, alone: Reply) -> None:
    worst.rows += 1
    if (reply.samples, reply.scores[0].thought) != (alone.samples, alone.scores[0].thought):
        worst.texts += 1
        return  # after another thought, all else is another's
    for one, other in zip(reply.scores[0].mass or (), alone.scores[0].mass or (), strict=True):
        worst.scores = max(worst.scores, abs(math.log(one) - math.log(other)))
    for position, vectors in alone.residuals.items():
        off = torch.linalg.vector_norm(reply.residuals[position] - vectors, dim=-1) / vectors.norm(dim=-1)
        worst.vectors = max(worst.vectors, float(off.max()))
