"""Prompts as tokens: a conversation, the question after it, the options as whole strings, and a thought in between."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from prefs.data.template import Invalid
from prefs.errors import UserError
from prefs.models.positions import Spans
from prefs.models.tokens import ChatEncoder
from prefs.models.types import Conversation, Message, Question, Reply, Request, Sample, Score

# Ends the messages that a thought's random numbers are drawn for, so that they are not those of the answer.
THOUGHT = Message("assistant", "<thought>")


@dataclass(frozen=True)
class Prompt:
    """A conversation with a question put to it, as tokens.

    ``ids`` ends where the answer begins; ``tails[v]`` are the tokens that option v adds to it, never empty.
    """

    ids: tuple[int, ...]
    tails: tuple[tuple[int, ...], ...]
    spans: Spans


def encode_prompt(
    encoder: ChatEncoder, messages: Conversation, question: Question | None, thought: str | None = None
) -> Prompt:
    """Encode a question after a conversation, with every option joined on as the tokenizer would join it.

    An option is encoded together with the prefill before it, so that "Answer: " + "Agree" gives the token " Agree"
    and not a blank and "Agree"; ``ids`` are the tokens that all of these share with the bare prefill.

    Parameters
    ----------
    question
        None: the conversation as it is before any question. There are no options, and the tokens from
        ``spans.question`` on mean nothing.
    thought
        What a thinking model thought between the question and the answer.

    Raises
    ------
    UserError
        If the tokenizer gives two options the same tokens.
    """
    question = question or Question("?", ())
    turns = (*messages, Message("user", question.text))
    opened = encoder.encode(turns, answer=question.prefill, thought=thought)
    whole = [encoder.encode(turns, answer=question.prefill + say, thought=thought).ids for say in question.options]
    shared = min(
        [common_prefix(opened.ids, ids) for ids in whole] + [len(ids) - 1 for ids in whole] + [len(opened.ids)]
    )
    tails = tuple(ids[shared:] for ids in whole)
    for number, tail in enumerate(tails):
        if tail in tails[:number]:
            first, second = question.options[tails.index(tail)], question.options[number]
            name = encoder.tokenizer.name_or_path
            raise UserError(f"the tokenizer of {name} cannot tell the options {first!r} and {second!r} apart")
    return Prompt(opened.ids[:shared], tails, Spans(opened.spans, shared))


def request_tokens(encoder: ChatEncoder, request: Request) -> int:
    """Tokens of a request's prompt; see `prefs.models.types.Engine.tokens`."""
    if request.question is None and not request.seeds:
        return encode_prompt(encoder, request.messages, None).spans.question[0]
    if request.question is None or request.choose:
        return len(encoder.encode(request.turns, answer="").ids) + encoder.thought_room
    prompt = encode_prompt(encoder, request.messages, request.question)
    return len(prompt.ids) + max(map(len, prompt.tails), default=0) + encoder.thought_room


def shared_prefix(prompts: Sequence[Prompt]) -> tuple[int, ...]:
    """The tokens before several questions to one conversation that are the same for all of them.

    Raises
    ------
    UserError
        If they end before the completion does, so that it would not be the same to all questions.
    """
    prefix = prompts[0].ids[: prompts[0].spans.question[0]]
    for other in prompts[1:]:
        prefix = prefix[: common_prefix(prefix, other.ids[: other.spans.question[0]])]
    if len(prefix) < max(prompt.spans.completion[1] for prompt in prompts):
        raise UserError(
            "this model's chat template writes earlier turns in another way with another question after them; rate one"
            " template a job (-m template=a,b in place of template=[a,b])"
        )
    return prefix


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    for number, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return number
    return min(len(a), len(b))


def branchings(tails: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Where options part: every beginning of an option's tokens (also the empty one) → the tokens that go on from it.

    The probability of each option follows from one look at the model after each of these beginnings. Options of one
    token that differ there need a single look.
    """
    following: dict[tuple[int, ...], dict[int, None]] = {}
    for tail in tails:
        for length, token in enumerate(tail):
            following.setdefault(tail[:length], {})[token] = None
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


def scored(mass: Sequence[float]) -> Score:
    """The options' masses; the reason in their place where one of them is no number, since logits were not finite."""
    if all(map(math.isfinite, mass)):
        return Score(tuple(mass))
    return Score(None, invalid=Invalid.not_finite.value)


def chosen(request: Request, reply: Reply) -> Reply:
    """The likeliest of a request's options by the score in a reply; or why there is none."""
    assert request.question is not None
    (score,) = reply.scores.values()
    if score.mass is None:
        return Reply(invalid=score.invalid)
    return Reply(choice=request.question.options[int(np.argmax(score.mass))])


@dataclass(frozen=True)
class Thought:
    """What a model thought, without its marks; ``invalid`` is why no answer follows it (a value of `Invalid`)."""

    text: str
    tokens: int
    invalid: str | None = None

    def sample(self, sample: Sample) -> Sample:
        """The sample drawn after this thought: none where no answer follows it."""
        if self.invalid is not None:
            return Sample(None, self.tokens, False, self.text, self.invalid)
        return replace(sample, thought=self.text)

    def reply(self, reply: Reply) -> Reply:
        """The reply given after this thought: none where no answer follows it."""
        samples = {seed: self.sample(sample) for seed, sample in reply.samples.items()}
        if self.invalid is not None:
            return Reply(samples, dict.fromkeys(reply.scores, Score(None, self.text, self.invalid)))
        scores = {seed: replace(score, thought=self.text) for seed, score in reply.scores.items()}
        return replace(reply, samples=samples, scores=scores)
