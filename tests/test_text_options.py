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
    whole_string_masses,
)

ALPHABET = "ab1"
TOKENS = [*ALPHABET, *(x + y for x in ALPHABET for y in ALPHABET), "<end>"]
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


def last_spelt(model: Model, options: list[str], text: str = "", last: str | None = None, p: float = 1.0) -> dict:
    """P(the last option that a token sequence spells is v), credited where no option can be spelt any more."""
    credited = dict.fromkeys(options, 0.0)
    for token, share in model.after(text).items():
        longer = text + token
        now = longer if longer in options else last
        if any(option.startswith(longer) and option != longer for option in options):
            for option, mass in last_spelt(model, options, longer, now, p * share).items():
                credited[option] += mass
        elif (spelt := longer if longer in options else last) is not None:
            credited[spelt] += p * share
    return credited


@given(OPTIONS, st.integers(0, 1000))
def test_walking_gives_the_masses_of_all_token_sequences(options, seed):
    model = Model(seed)
    masses = asyncio.run(whole_string_masses(options, model.ask, least=0.0))
    expected = last_spelt(model, options)
    assert masses == pytest.approx([expected[option] for option in options], abs=1e-12)
    assert sum(masses) <= 1 + 1e-12
    # No beginning is asked for twice, and none that no option goes on from.
    assert len(model.asked) == len(set(model.asked))
    assert all(any(option.startswith(text) and option != text for option in options) for text in model.asked)


@given(OPTIONS, st.integers(0, 1000), st.floats(1e-4, 0.2))
def test_what_is_not_followed_takes_little_away(options, seed, least):
    whole, pruned = Model(seed), Model(seed)
    full = asyncio.run(whole_string_masses(options, whole.ask, least=0.0))
    part = asyncio.run(whole_string_masses(options, pruned.ask, least=least))
    assert len(pruned.asked) <= len(whole.asked)
    # A way that is not followed is worth less than `least`, whether an option gains or loses by it.
    ways = 2 ** max(len(option) for option in options) * len(options)
    assert all(abs(one - other) <= ways * least for one, other in zip(full, part, strict=True))


@given(st.lists(st.sampled_from(TOKENS[:-1]), min_size=2, max_size=6, unique=True), st.integers(0, 1000))
def test_options_that_are_tokens_have_their_tokens_probabilities(options, seed):
    """With all tokens seen, each is its own beginning: "a" does not begin "ab"."""
    top = Model(seed).after("")
    masses = first_token_masses(options, top, seen_beginnings(options, [top]))
    assert masses == pytest.approx([top[option] for option in options])
