"""Prompts as tokens: a conversation, the question after it, the options as whole strings, and a thought in between."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from prefs.data.template import Invalid
from prefs.errors import UserError
from prefs.models.options import NO_OPTION, Path, spellings
from prefs.models.positions import Spans
from prefs.models.tokens import ChatEncoder
from prefs.models.types import Conversation, Message, Question, Reply, Request, Sample, Score

# Ends the messages that a thought's random numbers are drawn for, so that they are not those of the answer.
THOUGHT = Message("assistant", "<thought>")

# Ends of prompts whose options are remembered: bounds the memory where each has a thought of its own.
MOST_ANSWERS = 1000


@dataclass(frozen=True)
class Prompt:
    """A conversation with a question put to it, as tokens.

    Attributes
    ----------
    ids
        Ends where the answer begins.
    tails
        The tokens that each option adds to it as it is said, never empty.
    beginnings
        What an answer may begin with, as tokens → the number of the option that it then is (`NO_OPTION`: none); see
        `prefs.models.options`.
    """

    ids: tuple[int, ...]
    tails: tuple[Path, ...]
    beginnings: Mapping[Path, int]
    spans: Spans

    @property
    def as_said(self) -> Prompt:
        """For an answer that is held to the options as they are said."""
        return replace(self, beginnings={tail: number for number, tail in enumerate(self.tails)})


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
    # Text is joined between control tokens alone, so that rows whose ends are alike have the same options.
    control = max((n for n, token in enumerate(opened.ids) if token in encoder.control_ids), default=0)
    end = (question, opened.ids[control:])
    if end not in encoder.answers:
        if len(encoder.answers) > MOST_ANSWERS:
            encoder.answers.clear()
        encoder.answers[end] = _answers(encoder, turns, question, thought, opened.ids)
    shared, tails, beginnings = encoder.answers[end]
    ids = opened.ids[: len(opened.ids) - shared]
    return Prompt(ids, tails, beginnings, Spans(opened.spans, len(ids)))


def _answers(
    encoder: ChatEncoder, turns: Conversation, question: Question, thought: str | None, opened: Path
) -> tuple[int, tuple[Path, ...], dict[Path, int]]:
    """How many of the last tokens options change, their tails, and what answers may begin with: see `Prompt`."""

    def encode(answer: str) -> Path:
        return encoder.encode(turns, answer=answer, thought=thought).ids

    said = [encode(question.prefill + option) for option in question.options]
    shared = min([common_prefix(opened, ids) for ids in said] + [len(ids) - 1 for ids in said] + [len(opened)])
    tails = tuple(ids[shared:] for ids in said)
    for number, tail in enumerate(tails):
        if tail in tails[:number]:
            first, second = question.options[tails.index(tail)], question.options[number]
            name = encoder.tokenizer.name_or_path
            raise UserError(f"the tokenizer of {name} cannot tell the options {first!r} and {second!r} apart")
    beginnings = {tail: number for number, tail in enumerate(tails)}
    further: dict[Path, int] = {}
    for text, number in spellings(question.words):
        answer = question.prefill.removesuffix(" ") + text
        ids = encode(answer)
        if ids[:shared] != opened[:shared] or len(ids) == shared or beginnings.get(ids[shared:], number) != number:
            continue
        beginnings[ids[shared:]] = number
        if text[-1].isdecimal():
            # A tokenizer that writes the longer number with other tokens never goes on to it from these.
            longer = [encode(answer + digit) for digit in "0123456789"]
            further |= {whole[shared:]: NO_OPTION for whole in longer if whole[: len(ids)] == ids}
    return len(opened) - shared, tails, further | beginnings


def request_tokens(encoder: ChatEncoder, request: Request) -> int:
    """Tokens of a request's prompt; see `prefs.models.types.Engine.tokens`."""
    if request.question is None and not request.seeds:
        return encode_prompt(encoder, request.messages, None).spans.question[0]
    if request.question is None or request.choose:
        return len(encoder.encode(request.turns, answer="").ids) + encoder.thought_room
    prompt = encode_prompt(encoder, request.messages, request.question)
    return len(prompt.ids) + max(map(len, prompt.beginnings), default=0) + encoder.thought_room


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
