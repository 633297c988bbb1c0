"""What an OpenAI-compatible server sends back, read with suspicion: answers, usage, lists of models.

Servers differ in what they leave out, so nothing is taken for granted but what is needed. Pure functions of parsed
JSON; whatever it is, they give a value or raise `Malformed`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefs.models.openai.refusals import words
from prefs.models.tokens import Thinking


@dataclass(frozen=True)
class Position:
    """One token of an answer, and the likeliest tokens in its place with their probabilities.

    Tokens are known by their text. Some that differ read the same (one with and one without a leading blank that a
    tokenizer drops), so the probabilities of a text are added up.
    """

    token: str
    top: Mapping[str, float]


@dataclass(frozen=True)
class Reply:
    """One answer. ``positions`` is None where the server sent no log-probabilities.

    ``thought`` is what came apart from the answer; a thought inside ``text`` is still there. ``hidden_tokens`` were
    spent on a thought that may not be shown.
    """

    text: str
    thought: str | None = None
    finish: str | None = None
    positions: tuple[Position, ...] | None = None
    prompt_tokens: int = 0
    tokens: int = 0
    hidden_tokens: int = 0


@dataclass(frozen=True)
class Spent:
    """What one body says it cost: tokens, and US dollars where the server names them (OpenRouter does)."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    dollars: float | None = None


@dataclass(frozen=True)
class Listing:
    """The models that a server lists, who it says owns them, and the context of each where it says that."""

    owners: Mapping[str, str]
    contexts: Mapping[str, int]


class Malformed(Exception):
    """A body that is no answer. ``fallback`` is what to make of it if the server sends nothing better."""

    def __init__(self, message: str, fallback: Reply | None = None):
        super().__init__(message)
        self.fallback = fallback


def read_reply(body: object) -> Reply:
    """A chat completion's first choice. Further and repeated choices are left aside.

    Raises
    ------
    Malformed
        If there is no such choice, or it has not the types of one.
    """
    if not isinstance(body, dict):
        raise Malformed(f"a body that is {_kind(body)}, not an object")
    if body.get("error"):
        raise Malformed(f"an error in place of an answer: {words(body)}")
    choices = body.get("choices")
    choices = choices if isinstance(choices, list) else []
    choice = next((each for each in choices if isinstance(each, dict) and each.get("index", 0) in (0, None)), None)
    if choice is None:
        raise Malformed("a body without a choice")
    message, finish = choice.get("message"), choice.get("finish_reason")
    if not isinstance(message, dict) or not (finish is None or isinstance(finish, str)):
        raise Malformed("a choice without a message")
    if choice.get("error") or finish == "error":
        raise Malformed(f"an error in place of an answer: {words(choice)}")
    content, refusal = message.get("content"), message.get("refusal")
    thought = message.get("reasoning_content") or message.get("reasoning")
    if not isinstance(thought, str):
        thought = None
    if content is None and isinstance(refusal, str):
        content = refusal
    spent, hidden = read_spent(body), _hidden_tokens(body)
    text = content if isinstance(content, str) else ""
    reply = Reply(text, thought, finish, _positions(choice), spent.prompt_tokens, spent.completion_tokens, hidden)
    if content is None and finish is not None and (finish == "content_filter" or thought or hidden):
        return reply
    if content is None:
        raise Malformed("a message without content", reply if finish is not None else None)
    if not isinstance(content, str):
        raise Malformed(f"content that is {_kind(content)}, not text")
    return reply


def _positions(choice: Mapping[str, Any]) -> tuple[Position, ...] | None:
    logprobs = choice.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if content is None:
        return None
    if not isinstance(content, list):
        raise Malformed("log-probabilities that are no list")
    return tuple(_position(each) for each in content)


def _position(entry: object) -> Position:
    if not isinstance(entry, dict) or not isinstance(entry.get("token"), str):
        raise Malformed("log-probabilities without their tokens")
    tops = entry.get("top_logprobs")
    top: dict[str, float] = {}
    for each in tops if isinstance(tops, list) else []:
        token, log_prob = (each.get("token"), each.get("logprob")) if isinstance(each, dict) else (None, None)
        if not isinstance(token, str) or isinstance(log_prob, bool) or not isinstance(log_prob, int | float):
            raise Malformed("log-probabilities that are no numbers")
        if math.isnan(log_prob):
            raise Malformed("log-probabilities that are no numbers")
        top[token] = top.get(token, 0.0) + math.exp(min(log_prob, 0.0))
    return Position(entry["token"], top)


def _hidden_tokens(body: Mapping[str, Any]) -> int:
    usage = body.get("usage")
    details = usage.get("completion_tokens_details") if isinstance(usage, dict) else None
    return _count(details.get("reasoning_tokens")) if isinstance(details, dict) else 0


def read_spent(body: object) -> Spent:
    """The usage in a body; zeros where it says nothing."""
    usage = body.get("usage") if isinstance(body, dict) else None
    if not isinstance(usage, dict):
        return Spent()
    cost = usage.get("cost")
    known = isinstance(cost, int | float) and not isinstance(cost, bool) and math.isfinite(cost) and cost >= 0
    return Spent(_count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")), cost if known else None)


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def read_listing(body: object) -> Listing:
    """The models in the answer to ``GET /models``; none where it cannot be read."""
    entries = body.get("data") if isinstance(body, dict) else body
    entries = [each for each in entries if isinstance(each, dict)] if isinstance(entries, list) else []
    named = [each for each in entries if isinstance(each.get("id"), str)]
    return Listing(
        {each["id"]: str(each.get("owned_by")) for each in named},
        {each["id"]: context for each in named if (context := _count(each.get("max_model_len")))},
    )


@dataclass(frozen=True)
class Parted:
    """A reply with its thought taken apart; ``closed`` is False where the thought was cut off before an answer."""

    text: str
    thought: str | None
    closed: bool


def part(reply: Reply, thinking: Thinking | None) -> Parted:
    """The answer and the thought of a reply.

    A server may send the thought in a field of its own, leave it in the text between its marks (without the opening
    one, where the chat template writes that), or keep it to itself.
    """
    if reply.finish == "length" and not reply.text.strip() and (reply.thought or reply.hidden_tokens):
        return Parted("", reply.thought, closed=False)
    if thinking is None or reply.thought is not None:
        return Parted(reply.text.lstrip() if reply.thought is not None else reply.text, reply.thought, closed=True)
    before, close, after = reply.text.partition(thinking.close)
    if close:
        return Parted(after.lstrip(), _without_mark(before, thinking.open), closed=True)
    shown = reply.text.lstrip().startswith(thinking.open)
    if shown or (reply.finish == "length" and not reply.hidden_tokens):
        return Parted("", _without_mark(reply.text, thinking.open), closed=False)
    return Parted(reply.text.lstrip(), None, closed=True)


def _without_mark(text: str, opening: str) -> str:
    return text.lstrip().removeprefix(opening) if text.lstrip().startswith(opening) else text


def first_of_answer(positions: Sequence[Position], answer: str, thinking: Thinking | None) -> Mapping[str, float]:
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
        seen = ""
        for at, position in enumerate(positions):
            seen += position.token
            if thinking.close in seen:
                start = at + 1
                break
        while start < len(positions) and not positions[start].token.strip():
            start += 1
    if start >= len(positions):
        return {}
    said, token = answer.strip(), positions[start].token.strip()
    if thinking is not None and said and not said.startswith(token) and not token.startswith(said):
        raise Malformed("log-probabilities that do not belong to the answer")
    return positions[start].top


def _kind(value: object) -> str:
    names = {"dict": "an object", "list": "a list", "str": "text", "NoneType": "null", "bool": "true or false"}
    return names.get(type(value).__name__, "a number")
