"""What an OpenAI-compatible server sends back, read with suspicion: answers, usage, lists of models.

The SDK makes its types from whatever it gets and checks nothing of it, so what is no answer is found out here: whatever
a body is, these functions give a value or raise `Malformed`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from openai.types.chat import ChatCompletion
from openai.types.chat.chat_completion import Choice

from prefs.models.openai.refusals import ending, words
from prefs.models.thoughts import Parted
from prefs.models.types import Usage

if TYPE_CHECKING:
    from prefs.config import ThinkingConfig


@dataclass(frozen=True)
class Position:
    """One token of an answer, and the likeliest tokens in its place with their probabilities: NaN where the server has
    no number for one, as its logits were not finite (JSON has no NaN: some servers send null).

    Tokens are known by their text. Some that differ read the same (one with and one without a leading blank that a
    tokenizer drops), so the probabilities of a text are added up.
    """

    token: str
    top: Mapping[str, float]


@dataclass(frozen=True)
class Answer:
    """One answer. ``positions`` is None where the server sent no log-probabilities.

    ``thought`` is what came apart from the answer; a thought inside ``text`` is still there. ``finish`` is that of
    `prefs.models.openai.refusals.ending`. ``hidden_tokens`` were spent on a thought that may not be shown.
    """

    text: str
    thought: str | None = None
    finish: str | None = None
    positions: tuple[Position, ...] | None = None
    prompt_tokens: int = 0
    tokens: int = 0
    hidden_tokens: int = 0


class Malformed(Exception):
    """A body that is no answer. ``fallback`` is what to make of it if the server sends nothing better."""

    def __init__(self, message: str, fallback: Answer | None = None):
        super().__init__(message)
        self.fallback = fallback


def read_answer(body: ChatCompletion) -> Answer:
    """A chat completion's first choice. Further and repeated choices are left aside.

    Raises
    ------
    Malformed
        If there is no such choice, or it has not the types of one.
    """
    try:
        if error := getattr(body, "error", None):
            raise Malformed(f"an error in place of an answer: {words(error)}")
        choice = next((choice for choice in body.choices if choice.index in (0, None)), None)
        if choice is None:
            raise Malformed("a body without a choice")
        return _answer(body, choice)
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise Malformed("a body that is no answer") from None


def _answer(body: ChatCompletion, choice: Choice) -> Answer:
    message, error = choice.message, getattr(choice, "error", None)
    finish = ending(choice.finish_reason, getattr(choice, "native_finish_reason", None))
    if error or finish == "error":
        raise Malformed(f"an error in place of an answer: {words(error)}")
    thought = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    thought = thought if isinstance(thought, str) else None
    content = message.content or (message.refusal if isinstance(message.refusal, str) else message.content)
    if not isinstance(content, str | None):
        raise TypeError
    usage, hidden = read_usage(body), _count(body, "usage", "completion_tokens_details", "reasoning_tokens")
    positions, tokens = _positions(choice), usage.completion_tokens
    answer = Answer(content or "", thought, finish, positions, usage.prompt_tokens, tokens, hidden)
    if content is None and (finish is None or (finish in ("stop", "length") and not thought and not hidden)):
        raise Malformed("a message without content", answer if finish is not None else None)
    return answer


def _positions(choice: Choice) -> tuple[Position, ...] | None:
    content = getattr(choice.logprobs, "content", None)
    if content is None:
        return None
    positions = []
    for entry in content:
        top: dict[str, float] = {}
        for likely in entry.top_logprobs or ():
            log_prob = math.nan if likely.logprob is None else likely.logprob
            if not isinstance(likely.token, str):
                raise TypeError
            top[likely.token] = top.get(likely.token, 0.0) + math.exp(min(log_prob, 0.0))
        if not isinstance(entry.token, str):
            raise TypeError
        positions.append(Position(entry.token, top))
    return tuple(positions)


def read_usage(body: ChatCompletion) -> Usage:
    """What an answer says that it cost: tokens, and US dollars where the server names them (OpenRouter does)."""
    cost = getattr(getattr(body, "usage", None), "cost", None)
    known = isinstance(cost, int | float) and not isinstance(cost, bool) and math.isfinite(cost) and cost >= 0
    prompt, completion = _count(body, "usage", "prompt_tokens"), _count(body, "usage", "completion_tokens")
    return Usage(0, prompt, completion, cost if known else None)


def _count(value: Any, *names: str) -> int:
    """A number deep in a body; 0 where it is not there."""
    for name in names:
        value = getattr(value, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def read_listing(body: object) -> dict[str, dict[str, Any]]:
    """The models in the answer to ``GET /models``, by id; none where it cannot be read."""
    entries = body.get("data") if isinstance(body, dict) else body
    entries = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return {entry["id"]: entry for entry in entries if isinstance(entry.get("id"), str)}


def part(answer: Answer, thinking: ThinkingConfig | None) -> Parted:
    """The text and the thought of an answer.

    A server may send the thought in a field of its own, leave it in the text between its marks (without the opening
    one, where the chat template writes that), or keep it to itself.
    """
    text, thought, cut_off = answer.text, answer.thought, answer.finish == "length"
    if cut_off and not text.strip() and (thought or answer.hidden_tokens):
        return Parted("", thought, closed=False)
    if thinking is None or thought is not None:
        return Parted(text if thought is None else text.lstrip(), thought, closed=True)
    before, close, after = text.partition(thinking.close)
    opened = before.lstrip().startswith(thinking.open)
    before = before.lstrip().removeprefix(thinking.open) if opened else before
    if close:
        return Parted(after.lstrip(), before, closed=True)
    if opened or (cut_off and not answer.hidden_tokens):
        return Parted("", before, closed=False)
    return Parted(text.lstrip(), None, closed=True)


def first_of_answer(positions: Sequence[Position], answer: str, thinking: ThinkingConfig | None) -> Mapping[str, float]:
    """The likeliest tokens where the answer begins.

    Of a model that thinks, that is the first token after the thought's end that is not blank; or the first of all, if
    the server's log-probabilities leave the thought out.

    Raises
    ------
    Malformed
        If the log-probabilities and the answer do not belong together.
    """
    start = 0
    if thinking is not None:
        passed = ""
        for number, position in enumerate(positions):
            passed += position.token
            if thinking.close in passed:
                start = number + 1
                break
        while start < len(positions) and not positions[start].token.strip():
            start += 1
    if start >= len(positions):
        return {}
    answer, token = answer.strip(), positions[start].token.strip()
    if thinking is not None and answer and not answer.startswith(token) and not token.startswith(answer):
        raise Malformed("log-probabilities that do not belong to the answer")
    return positions[start].top
