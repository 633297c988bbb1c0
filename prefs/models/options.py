"""Options as token sequences: how a question's options hang together, and their probabilities as whole strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prefs.errors import UserError
from prefs.models.tokens import ChatEncoder, Encoded, Message
from prefs.models.types import Conversation, Question


@dataclass(frozen=True)
class Asked:
    """A conversation with a question put to it, as tokens.

    ``ids`` ends where the answer begins; ``tails[v]`` are the tokens that option v adds to it, never empty.
    ``question_start`` is the index of the question's first token, and ``spans`` the token ranges of the messages.
    """

    ids: tuple[int, ...]
    tails: tuple[tuple[int, ...], ...]
    question_start: int
    spans: tuple[tuple[int, int], ...]


def ask(encoder: ChatEncoder, conversation: Conversation, question: Question, thought: str | None = None) -> Asked:
    """Encode a question after a conversation, with every option joined on as the tokenizer would join it.

    A thinking model's `thought` stands between the question and the answer.

    An option is encoded together with the prefill before it, so that "Answer: " + "Agree" gives the token " Agree"
    and not a blank and "Agree"; ``ids`` are the tokens that all of these share with the bare prefill.

    Raises
    ------
    UserError
        If the tokenizer gives two options the same tokens.
    """
    messages = (*conversation, Message("user", question.text))
    opened = encoder.encode(messages, answer=question.prefill, thought=thought)
    whole = [encoder.encode(messages, answer=question.prefill + say, thought=thought).ids for say in question.says]
    shared = min([common_prefix(opened.ids, ids) for ids in whole] + [len(ids) - 1 for ids in whole])
    tails = tuple(ids[shared:] for ids in whole)
    for at, tail in enumerate(tails):
        if tail in tails[:at]:
            first, second = question.says[tails.index(tail)], question.says[at]
            name = encoder.tokenizer.name_or_path
            raise UserError(f"the tokenizer of {name} cannot tell the options {first!r} and {second!r} apart")
    return Asked(opened.ids[:shared], tails, _question_start(opened), opened.spans)


def unasked(encoder: ChatEncoder, conversation: Conversation) -> Asked:
    """A conversation as it is before any question; there are no options, and what follows it means nothing."""
    opened = encoder.encode((*conversation, Message("user", "?")), answer="")
    return Asked(opened.ids, (), _question_start(opened), opened.spans)


def branchings(tails: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Where options part: every beginning of an option's tokens (also the empty one) → the tokens that go on from it.

    The probability of each option follows from one look at the model after each of these beginnings. Options of one
    token that differ there need a single look.
    """
    following: dict[tuple[int, ...], dict[int, None]] = {}
    for tail in tails:
        for at, token in enumerate(tail):
            following.setdefault(tail[:at], {})[token] = None
    return {beginning: tuple(tokens) for beginning, tokens in following.items()}


def option_masses(log_probs: np.ndarray, tails: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Disjoint probabilities of options from the log-probabilities of their token sequences.

    Where one option's tokens open another's ("1" and "10"), the shorter keeps what the longer does not take:
    mass(1) = P(1) - P(10). The masses of a row therefore add up to P(the answer begins with an option).

    Parameters
    ----------
    log_probs
        [rows, options], log P(tail of option v) of each row.
    tails
        The options' tokens.

    Returns
    -------
    numpy.ndarray
        [rows, options], non-negative.
    """
    p = np.exp(np.asarray(log_probs, dtype=np.float64))
    mass = p.copy()
    for longer, tail in enumerate(tails):
        openers = [v for v, other in enumerate(tails) if len(other) < len(tail) and tail[: len(other)] == other]
        if openers:
            mass[:, max(openers, key=lambda v: len(tails[v]))] -= p[:, longer]
    return np.clip(mass, 0.0, None)


def _question_start(encoded: Encoded) -> int:
    return encoded.spans[-1][0]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    for at, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return at
    return min(len(a), len(b))
