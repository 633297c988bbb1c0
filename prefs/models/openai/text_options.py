"""Options as text: their probabilities, for servers that tell tokens only by their text and only the likeliest of them
(what is not among those counts as 0, and valid mass shows what is missing); and a choice among them."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any

from prefs.models.options import spellings
from prefs.models.types import Question

# A way to spell an option that is less likely than this is not followed. It bounds what one path can take away.
NEGLIGIBLE = 1e-4

Top = Mapping[str, float]


class SharedToken(Exception):
    """One token that begins several options, so that it does not tell which of them follows."""

    def __init__(self, token: str, options: Sequence[str]):
        self.token, self.options = token, tuple(options)


def opened(question: Question) -> tuple[str, tuple[str, ...]]:
    """The opening to give a server, and the options as text after it.

    A tokenizer joins a word to the blank before it (" Agree" is one token), so where an option begins with a letter
    the prefill's last blank goes to the options: "Answer: " is sent as "Answer:". Digits stay apart from the blank.
    `prefs.models.prompts.encode_prompt` sees this from the tokens.
    """
    prefill = question.prefill
    if prefill.endswith(" ") and any(option[:1].isalpha() for option in question.options):
        return prefill[:-1], tuple(" " + option for option in question.options)
    return prefill, question.options


def spelled(question: Question) -> dict[str, int]:
    """What an answer may begin with after the opening given to a server → the number of the option that it then is."""
    opening, options = opened(question)
    written = {option: number for number, option in enumerate(options)}
    return written | {
        text: number
        for text, number in spellings(question.words, ("",) if opening.endswith(" ") else ("", " "))
        if text not in written
    }


def seen_beginnings(options: Sequence[str], tops: Sequence[Top]) -> set[str]:
    """The tokens among these that some option begins with."""
    return {token for top in tops for token in top if token and any(option.startswith(token) for option in options)}


def first_token_masses(
    options: Sequence[str], top: Top, seen: Collection[str], spelled: Mapping[str, int]
) -> tuple[float, ...]:
    """Probabilities of options by their first tokens alone. What follows these is not known, a further digit either.

    A token belongs to the option that begins with it. Where several do, it belongs to none that is known to begin with
    a longer token: if "10" has been seen as a token, "1" is not how "10" begins. Of other spellings only those count
    that are one token ("a" may begin "agree" or "a good one").

    Parameters
    ----------
    options
        The options.
    top
        The likeliest first tokens and their probabilities.
    seen
        Beginnings of options that this model's tokenizer has shown to be tokens.
    spelled
        Their spellings, with the options' numbers.

    Raises
    ------
    SharedToken
        If a token of some probability is left to several options.
    """
    longest = [max((len(token) for token in seen if option.startswith(token)), default=0) for option in options]
    masses = [0.0] * len(options)
    for token, probability in top.items():
        owners = [
            number
            for number, option in enumerate(options)
            if token and option.startswith(token) and longest[number] <= len(token)
        ]
        if len(owners) == 1:
            masses[owners[0]] += probability
        elif owners and probability >= NEGLIGIBLE:
            raise SharedToken(token, [options[number] for number in owners])
        elif not owners and token in spelled:
            masses[spelled[token]] += probability
    return tuple(masses)


async def whole_string_masses(
    spelled: Mapping[str, int], ask: Callable[[str], Awaitable[Top]], least: float = NEGLIGIBLE
) -> tuple[float, ...]:
    """Disjoint probabilities of options, going on from each beginning token by token: see `prefs.models.options`.

    All ways to tokenize a spelling count that are likely enough to be followed.

    Parameters
    ----------
    spelled
        What an answer may begin with, and the number of the option that it then is.
    ask
        Gives the likeliest tokens after a beginning of the answer ("": its first tokens).
    least
        Beginnings less likely than this are not followed.
    """
    masses = [0.0] * (1 + max(spelled.values()))
    after: dict[str, Top] = {}
    # A beginning, its probability, and the option of the longest spelling that it has passed.
    pending: list[tuple[str, float, int | None]] = [("", 1.0, None)]
    while pending:
        text, probability, passed = pending.pop()
        if text not in after:
            after[text] = await ask(text)
        for token, share in after[text].items():
            longer, reached = text + token, probability * share
            on_the_way = token and any(spelling.startswith(longer) for spelling in spelled)
            further_digit = text in spelled and text[-1].isdecimal() and token[:1].isdecimal()
            if passed is not None and (longer in spelled or (further_digit and not on_the_way)):
                masses[passed] -= reached
            if not on_the_way:
                continue
            if longer in spelled:
                masses[spelled[longer]] += reached
            goes_on = any(spelling.startswith(longer) and spelling != longer for spelling in spelled)
            if reached >= least and (goes_on or _digits_follow(longer, after[""])):
                pending.append((longer, reached, spelled.get(longer, passed)))
    return tuple(max(mass, 0.0) for mass in masses)


def _digits_follow(text: str, top: Top) -> bool:
    """Whether another digit would be another token: not where a longer number has been seen as one."""
    digits = len(text) - len(text.rstrip("0123456789"))
    return digits > 0 and not any(token.strip().isdecimal() and len(token.strip()) > digits for token in top)


def one_of(options: Sequence[str]) -> dict[str, Any]:
    """The response format that lets a model give one of these and nothing else."""
    schema = {
        "type": "object",
        "properties": {"answer": {"type": "string", "enum": list(options)}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": "choice", "strict": True, "schema": schema}}


def chosen(text: str, options: Sequence[str]) -> str | None:
    """The option that an answer is: the one in its JSON, or the one it says and nothing else."""
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        answer = text
    if isinstance(answer, dict):
        answer = answer.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return None
    plain = str(answer).casefold().strip(" \t\r\n.\"'*`")
    return next((option for option in options if option.casefold().strip() == plain), None)
