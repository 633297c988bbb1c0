"""The probability of options as text, for servers that tell tokens only by their text and only the likeliest of them.

What is not among those is less likely than the last that is; it counts as 0, and valid mass shows what is missing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

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
    `prefs.models.options.ask` sees this from the tokens.
    """
    prefill = question.prefill
    if prefill.endswith(" ") and any(say[:1].isalpha() for say in question.says):
        return prefill[:-1], tuple(" " + say for say in question.says)
    return prefill, question.says


def seen_beginnings(says: Sequence[str], tops: Sequence[Top]) -> set[str]:
    """The tokens among these that some option begins with."""
    return {token for top in tops for token in top if token and any(say.startswith(token) for say in says)}


def first_token_masses(says: Sequence[str], top: Top, seen: Collection[str]) -> tuple[float, ...]:
    """Probabilities of options by their first tokens alone.

    A token belongs to the option that begins with it. Where several do, it belongs to none that is known to begin with
    a longer token: if "10" has been seen as a token, "1" is not how "10" begins.

    Parameters
    ----------
    says
        The options.
    top
        The likeliest first tokens and their probabilities.
    seen
        Beginnings of options that this model's tokenizer has shown to be tokens.

    Raises
    ------
    SharedToken
        If a token of some probability is left to several options.
    """
    longest = [max((len(token) for token in seen if say.startswith(token)), default=0) for say in says]
    masses = [0.0] * len(says)
    for token, probability in top.items():
        owners = [at for at, say in enumerate(says) if token and say.startswith(token) and longest[at] <= len(token)]
        if len(owners) == 1:
            masses[owners[0]] += probability
        elif owners and probability >= NEGLIGIBLE:
            raise SharedToken(token, [says[at] for at in owners])
    return tuple(masses)


async def whole_string_masses(
    says: Sequence[str], ask: Callable[[str], Awaitable[Top]], least: float = NEGLIGIBLE
) -> tuple[float, ...]:
    """Disjoint probabilities of options as whole strings, going on from each beginning token by token.

    The masses are those of `prefs.models.options.option_masses`: an option that opens another keeps what the other does
    not take. All ways to spell an option count that are likely enough to be followed.

    Parameters
    ----------
    says
        The options.
    ask
        Gives the likeliest tokens after a beginning of the answer ("": its first tokens).
    least
        Beginnings less likely than this are not followed.
    """
    masses = dict.fromkeys(says, 0.0)
    after: dict[str, Top] = {}
    # A beginning, its probability, and the longest option that it has passed.
    pending: list[tuple[str, float, str | None]] = [("", 1.0, None)]
    while pending:
        text, probability, passed = pending.pop()
        if text not in after:
            after[text] = await ask(text)
        for token, share in after[text].items():
            longer, reached = text + token, probability * share
            if not token or not any(say.startswith(longer) for say in says):
                continue
            if longer in masses:
                masses[longer] += reached
                if passed is not None:
                    masses[passed] -= reached
            if reached >= least and any(say.startswith(longer) and say != longer for say in says):
                pending.append((longer, reached, longer if longer in masses else passed))
    return tuple(max(masses[say], 0.0) for say in says)
