"""Options as whole strings: what is shared with the prefill, and disjoint masses."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from conftest import TEMPLATES, template
from tokenizers import normalizers

from prefs.errors import UserError
from prefs.models.prompts import branchings, encode_prompt, option_masses
from prefs.models.tokens import ChatEncoder
from prefs.models.types import Message, Question

CONVERSATION = (Message("user", "Hello"), Message("assistant", "Hi there."))


@pytest.mark.parametrize("prefill", ["", "Answer: ", "Answer:", "I would say"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_tails_join_to_the_encoding_of_the_whole_answer(encoder, name, prefill):
    shipped = template(name)
    prompt = encode_prompt(encoder, CONVERSATION, Question(shipped.question, shipped.says, prefill))
    for say, tail in zip(shipped.says, prompt.tails, strict=True):
        whole = encoder.encode((*CONVERSATION, Message("user", shipped.question)), answer=prefill + say)
        assert prompt.ids + tail == whole.ids
        assert tail
    following = {(*beginning, token) for beginning, tokens in branchings(prompt.tails).items() for token in tokens}
    assert following == {tail[:end] for tail in prompt.tails for end in range(1, len(tail) + 1)}
    assert encoder.tokenizer.decode(list(prompt.ids[prompt.spans.question[0] :])).startswith(shipped.question)


def test_options_the_tokenizer_cannot_tell_apart_are_named(tokenizer):
    import copy

    lower = copy.deepcopy(tokenizer)
    lower.backend_tokenizer.normalizer = normalizers.Replace("Ａ", "A")
    with pytest.raises(UserError, match="cannot tell the options 'A' and 'Ａ' apart"):
        encode_prompt(ChatEncoder(lower), CONVERSATION, Question("?", ("A", "Ａ", "B")))


def test_masses_add_up_to_the_probability_of_beginning_with_an_option():
    rng = np.random.default_rng(0)
    # A language over three tokens: all sequences of length 3 and their probabilities.
    sequences = list(itertools.product(range(3), repeat=3))
    p = dict(zip(sequences, rng.dirichlet(np.ones(27)), strict=True))
    tails = [(0,), (0, 1), (0, 1, 2), (2, 2), (1, 0, 0)]

    def begins(tail):
        return sum(value for sequence, value in p.items() if sequence[: len(tail)] == tail)

    mass = option_masses(np.log([[begins(tail) for tail in tails]]), tails)[0]
    valid = sum(value for sequence, value in p.items() if any(sequence[: len(t)] == t for t in tails))
    assert mass.sum() == pytest.approx(valid)
    longest = dict.fromkeys(tails, 0.0)
    for sequence, value in p.items():
        openers = [t for t in tails if sequence[: len(t)] == t]
        if openers:
            longest[max(openers, key=len)] += value
    np.testing.assert_allclose(mass, list(longest.values()))
