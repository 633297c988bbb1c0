"""Bodies of any shape: an answer or `Malformed`, and never anything else."""

from __future__ import annotations

import math

import pytest
from fault_server import chat, likeliest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion

from prefs.config import ThinkingConfig
from prefs.models.openai.refusals import words
from prefs.models.openai.replies import (
    Answer,
    Malformed,
    Parted,
    part,
    read_answer,
    read_listing,
    read_usage,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
TREE = chat("4", logprobs=likeliest(("4", {"4": 0.5, "5": 0.25})), usage={"prompt_tokens": 3, "completion_tokens": 1})


def paths(tree: object) -> list[tuple]:
    """The path to every value in a body."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [(), *((key, *rest) for key, value in inner for rest in paths(value))]


def replaced(tree, path: tuple, value: object):
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = replaced(copy[path[0]], path[1:], value)
    return copy


def received(body) -> ChatCompletion:
    """As the SDK gives a body: its type where that is an object, and otherwise the body itself."""
    return ChatCompletion.construct(**body) if isinstance(body, dict) else body


@given(st.sampled_from(paths(TREE)), JSON)
def test_an_answer_with_anything_in_any_place_is_read_or_malformed(path, value):
    body = replaced(TREE, path, value)
    read_listing(body), words(body)
    assert read_usage(received(body)).prompt_tokens >= 0
    try:
        answer = read_answer(received(body))
    except Malformed:
        return
    assert isinstance(answer.text, str)
    assert answer.tokens >= 0
    for thinking in (None, ThinkingConfig()):
        assert isinstance(part(answer, thinking), Parted)
    for position in answer.positions or ():
        assert all(0 <= p < math.inf or math.isnan(p) for p in position.top.values())


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ({"error": {"message": "The model `x` does not exist."}}, "The model `x` does not exist."),
        ({"object": "error", "message": "no", "code": 404}, "no"),
        ({"detail": [{"loc": ["body", "seed"], "msg": "extra fields"}]}, "extra fields"),
        ({"error": "plain"}, "plain"),
        ("<html><head><title>502 Bad\n Gateway</title></head></html>", "502 Bad Gateway"),
        ([{"error": {"code": 400, "message": "Gemini says it in a list"}}], "Gemini says it in a list"),
        (None, ""),
        ("x" * 1000, "x" * 299 + "…"),
    ],
)
def test_a_servers_words_on_one_line(body, line):
    assert words(body) == line


@pytest.mark.parametrize(
    ("answer", "thinking", "parted"),
    [
        (Answer("<think>a</think>\n\n4"), ThinkingConfig(), Parted("4", "a", True)),
        (Answer("a</think>4</think>"), ThinkingConfig(), Parted("4</think>", "a", True)),
        (Answer("\n<think>\na\n</think>\n4 "), ThinkingConfig(), Parted("4 ", "\na\n", True)),
        (Answer("4"), ThinkingConfig(), Parted("4", None, True)),
        (Answer("<think>a"), ThinkingConfig(), Parted("", "a", False)),
        (Answer("a", finish="length"), ThinkingConfig(), Parted("", "a", False)),
        (Answer("4 and", finish="length", hidden_tokens=3), ThinkingConfig(), Parted("4 and", None, True)),
        (Answer("\n4", thought="a"), ThinkingConfig(), Parted("4", "a", True)),
        (Answer("4 and", thought="a", finish="length"), ThinkingConfig(), Parted("4 and", "a", True)),
        (Answer("", thought="a", finish="length"), ThinkingConfig(), Parted("", "a", False)),
        (Answer("", thought="a", finish="stop"), ThinkingConfig(), Parted("", "a", True)),
        # Nobody thinks without being said to.
        (Answer("<think>a</think>4"), None, Parted("<think>a</think>4", None, True)),
        (Answer(" 4", finish="length"), None, Parted(" 4", None, True)),
    ],
)
def test_thought_and_answer_are_told_apart(answer, thinking, parted):
    assert part(answer, thinking) == parted
