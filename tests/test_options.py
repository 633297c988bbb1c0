"""Options as tokens: what is shared with the prefill, how they can be spelled, and disjoint masses."""

from __future__ import annotations

import copy
import itertools
import json

import numpy as np
import pytest
from conftest import TEMPLATES, template
from tokenizers import Tokenizer, normalizers

from prefs.errors import UserError
from prefs.models.options import NO_OPTION, branchings, option_masses, runs, spellings
from prefs.models.prompts import encode_prompt
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
    following = {(*beginning, token) for beginning, tokens in branchings(prompt.beginnings).items() for token in tokens}
    assert following == {path[:end] for path in prompt.beginnings for end in range(1, len(path) + 1)}
    assert encoder.tokenizer.decode(list(prompt.ids[prompt.spans.question[0] :])).startswith(shipped.question)


def test_options_the_tokenizer_cannot_tell_apart_are_named(tokenizer):
    lower = copy.deepcopy(tokenizer)
    lower.backend_tokenizer.normalizer = normalizers.Replace("Ａ", "A")
    with pytest.raises(UserError, match="cannot tell the options 'A' and 'Ａ' apart"):
        encode_prompt(ChatEncoder(lower), CONVERSATION, Question("?", ("A", "Ａ", "B")))


@pytest.mark.parametrize("prefill", ["", "Answer: ", "Answer:", "I would say "])
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_beginning_is_a_spelling_or_a_number_with_a_further_digit(encoder, name, prefill):
    shipped = template(name)
    question = Question(shipped.question, shipped.says, prefill, shipped.also)
    prompt = encode_prompt(encoder, CONVERSATION, question)
    opened = encoder.tokenizer.decode(list(prompt.ids))
    spelled = {text.strip().casefold(): number for text, number in spellings(question.words)}
    owners = dict.fromkeys(range(len(shipped.says)), 0)
    for path, owner in prompt.beginnings.items():
        written = (opened + encoder.tokenizer.decode(list(path)))[len(opened.rstrip()) :].strip().casefold()
        if owner == NO_OPTION:
            assert written[:-1] in spelled
            assert written[-1].isdecimal()
        else:
            assert spelled[written] == owner
            owners[owner] += 1
            # This tokenizer writes each digit by itself, so a further one can follow any number.
            longer = [other for other in prompt.beginnings if other[:-1] == path and other not in prompt.tails]
            assert len(longer) == (10 if written.isdecimal() else 0)
    assert [prompt.beginnings[tail] for tail in prompt.tails] == list(range(len(shipped.says)))
    assert prompt.as_said.beginnings == {tail: number for number, tail in enumerate(prompt.tails)}
    if not shipped.says[0].isdecimal():
        assert min(owners.values()) >= 3  # as it stands, in lower case, without the blank


def test_no_digit_is_looked_for_where_the_tokenizer_writes_numbers_in_one_token(tokenizer):
    """As Llama 3's and GPT's: "41" is a token, and "4" and "1" never stand together."""
    whole = copy.deepcopy(tokenizer)
    state = json.loads(whole.backend_tokenizer.to_str())
    digits = state["pre_tokenizer"]["pretokenizers"]
    state["pre_tokenizer"]["pretokenizers"] = [part for part in digits if part["type"] != "Digits"]
    size = len(state["model"]["vocab"])
    for number in range(10, 100):
        state["model"]["vocab"][f"{number}"] = size + number
        state["model"]["merges"].append([*f"{number}"])
    whole._tokenizer = Tokenizer.from_str(json.dumps(state))
    question = Question("From 1 to 5?", ("1", "2", "3", "4", "5"), "Answer: ")
    prompt = encode_prompt(ChatEncoder(whole), CONVERSATION, question)
    assert NO_OPTION not in prompt.beginnings.values()
    assert runs(branchings(prompt.beginnings)) == []


def test_prompts_whose_ends_are_alike_have_the_same_options(encoder):
    """They are worked out once; another system prompt, another completion, and a text without an end change nothing."""
    question = Question("Did you like it?", ("Yes", "No", "Not at all"), "Answer: ")
    first = encode_prompt(ChatEncoder(encoder.tokenizer), CONVERSATION, question)
    for conversation in [(Message("system", "Be brief."), *CONVERSATION), (Message("user", "Answer"),), ()]:
        alone = encode_prompt(ChatEncoder(encoder.tokenizer), conversation, question)
        known = encode_prompt(encoder, conversation, question)
        assert (known.ids, known.tails, known.beginnings) == (alone.ids, alone.tails, alone.beginnings)
        assert alone.beginnings == first.beginnings


def test_spellings_are_those_that_are_read_as_the_option():
    for name in TEMPLATES:
        shipped = template(name)
        for text, number in spellings(Question("?", shipped.says, "", shipped.also).words):
            assert shipped.read(text) == shipped.values[number]
    assert dict(spellings([("A",), ("B", "Be")])) == {
        "A": 0,
        " A": 0,
        "B": 1,
        " B": 1,
        "Be": 1,
        " Be": 1,
        "be": 1,
        " be": 1,
    }


def test_masses_add_up_to_the_probability_of_beginning_with_an_option():
    rng = np.random.default_rng(0)
    # A language over three tokens: all sequences of length 3 and their probabilities.
    sequences = list(itertools.product(range(3), repeat=3))
    p = dict(zip(sequences, rng.dirichlet(np.ones(27)), strict=True))
    beginnings = {(0,): 0, (0, 1): 1, (0, 1, 2): 0, (2, 2): 2, (1, 0, 0): 1, (0, 2): NO_OPTION, (1, 0): 2, (2, 2, 1): 2}

    def begins(path):
        return sum(value for sequence, value in p.items() if sequence[: len(path)] == path)

    log_probs = {
        (*path, token): np.log(begins((*path, token)) / begins(path))
        for path, tokens in branchings(beginnings).items()
        for token in tokens
    }
    assert {path[:n] for path in runs(branchings(beginnings)) for n in range(1, 4) if path[:n]} == {
        p for p in branchings(beginnings) if p
    }
    expected = np.zeros(3)
    for sequence, value in p.items():
        openers = [path for path in beginnings if sequence[: len(path)] == path]
        if openers and (owner := beginnings[max(openers, key=len)]) != NO_OPTION:
            expected[owner] += value
    np.testing.assert_allclose(option_masses(log_probs, beginnings, 3), expected)
