"""Options as text: the walk through their beginnings against a sum over all token sequences."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefs.models.openai.text_options import (
    first_token_masses,
    seen_beginnings,
    spelled,
    whole_string_masses,
)
from prefs.models.types import Question

ALPHABET = "ab1"
# Digits stand apart.
TOKENS = [*ALPHABET, *(x + y for x in ALPHABET for y in ALPHABET if x + y != "11"), "<end>"]
OPTIONS = st.lists(st.text(ALPHABET, min_size=1, max_size=4), min_size=2, max_size=5, unique=True)


class Model:
    """A next-token distribution that depends on the text so far, over tokens that spell a text in several ways."""

    def __init__(self, seed: int):
        self.seed = seed
        self.asked: list[str] = []

    def after(self, text: str) -> dict[str, float]:
        drawn = random.Random(f"{self.seed} {text}")
        weights = [drawn.random() ** 3 for _ in TOKENS]
        return {token: weight / sum(weights) for token, weight in zip(TOKENS, weights, strict=True)}

    async def ask(self, text: str) -> dict[str, float]:
        self.asked.append(text)
        return self.after(text)


def last_spelt(
    model: Model, spelled: dict, text: str = "", last: int | None = None, p: float = 1.0
) -> dict[int, float]:
    """P(the last spelling that a token sequence has is of v, and no number goes on), credited where none can be spelt
    any more."""
    credited = dict.fromkeys(spelled.values(), 0.0)
    for token, share in model.after(text).items():
        longer = text + token
        now = spelled.get(longer, last)
        goes_on = any(spelling.startswith(longer) for spelling in spelled)
        if goes_on and (longer[-1].isdecimal() or any(s != longer and s.startswith(longer) for s in spelled)):
            for option, mass in last_spelt(model, spelled, longer, now, p * share).items():
                credited[option] += mass
        elif goes_on and now is not None:
            credited[now] += p * share
        elif last is not None and not (text in spelled and text[-1].isdecimal() and token[0].isdecimal()):
            credited[last] += p * share
    return credited


def numbered(texts: list[str]) -> dict[str, int]:
    """Two spellings an option."""
    return {text: number // 2 for number, text in enumerate(texts)}


@given(OPTIONS, st.integers(0, 1000))
def test_walking_gives_the_masses_of_all_token_sequences(options, seed):
    model, spelled = Model(seed), numbered(options)
    masses = asyncio.run(whole_string_masses(spelled, model.ask, least=0.0))
    expected = last_spelt(model, spelled)
    assert masses == pytest.approx([expected[option] for option in range(len(masses))], abs=1e-12)
    assert sum(masses) <= 1 + 1e-12
    # No beginning is asked for twice, and none that no option goes on from.
    assert len(model.asked) == len(set(model.asked))
    assert all(any(option.startswith(text) for option in options) for text in model.asked)


@given(OPTIONS, st.integers(0, 1000), st.floats(1e-4, 0.2))
def test_what_is_not_followed_takes_little_away(options, seed, least):
    whole, pruned = Model(seed), Model(seed)
    full = asyncio.run(whole_string_masses(numbered(options), whole.ask, least=0.0))
    part = asyncio.run(whole_string_masses(numbered(options), pruned.ask, least=least))
    assert len(pruned.asked) <= len(whole.asked)
    # A way that is not followed is worth less than `least`, whether an option gains or loses by it.
    ways = 2 ** (1 + max(len(option) for option in options)) * len(options)
    assert all(abs(one - other) <= ways * least for one, other in zip(full, part, strict=True))


@given(st.lists(st.sampled_from(TOKENS[:-1]), min_size=2, max_size=6, unique=True), st.integers(0, 1000))
def test_options_that_are_tokens_have_their_tokens_probabilities(options, seed):
    """With all tokens seen, each is its own beginning: "a" does not begin "ab"."""
    top = Model(seed).after("")
    masses = first_token_masses(options, top, seen_beginnings(options, [top]), {})
    assert masses == pytest.approx([top[option] for option in options])


def test_other_spellings_count_where_they_are_one_token():
    top = {"Agree": 0.3, " agree": 0.2, "a": 0.1, "dis": 0.1, "Disagree": 0.1}
    question = Question("?", ("Disagree", "Agree"))
    masses = first_token_masses(question.options, top, {"Agree", "Disagree"}, spelled(question))
    assert masses == pytest.approx((0.1, 0.5))


def test_a_server_is_asked_for_a_further_digit_only_where_digits_stand_apart():
    apart, together = {"4": 0.6, "5": 0.2, " ": 0.1}, {"4": 0.6, "5": 0.2, "10": 0.1}
    for top, expected, behind in ((apart, (0.6 * 0.75, 0.2 * 0.75), {"4", "5"}), (together, (0.6, 0.2), set())):
        asked = []

        async def ask(text: str, top=top, asked=asked) -> dict[str, float]:
            asked.append(text)
            return top if not text else {"1": 0.25, ".": 0.5} if text.strip() else {}

        masses = asyncio.run(whole_string_masses(spelled(Question("?", ("4", "5"))), ask))
        assert masses == pytest.approx(expected)
        assert {text for text in asked if text.strip()} == behind
