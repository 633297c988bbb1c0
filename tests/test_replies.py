"""Bodies of any shape: an answer or `Malformed`, and never anything else."""

from __future__ import annotations

import math

import pytest
from fault_server import chat, likeliest
from hypothesis import given
from hypothesis import strategies as st

from prefs.models.openai.control_text import control_texts
from prefs.models.openai.refusals import refusal_of_row, words
from prefs.models.openai.replies import (
    Malformed,
    Parted,
    Reply,
    Spent,
    first_of_answer,
    part,
    read_listing,
    read_reply,
    read_spent,
)
from prefs.models.tokens import Message, Thinking

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
TREE = chat("4", logprobs=likeliest(("4", {"4": 0.5, "5": 0.25})), usage={"prompt_tokens": 3, "completion_tokens": 1})


def places(tree: object) -> list[tuple]:
    """The path to every value in a body."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [(), *((key, *rest) for key, value in inner for rest in places(value))]


def replaced(tree, path: tuple, value: object):
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = replaced(copy[path[0]], path[1:], value)
    return copy


@given(st.sampled_from(places(TREE)), JSON)
def test_an_answer_with_anything_in_any_place_is_read_or_malformed(path, value):
    body = replaced(TREE, path, value)
    read_spent(body), read_listing(body), words(body)
    try:
        reply = read_reply(body)
    except Malformed:
        return
    assert isinstance(reply.text, str)
    assert reply.tokens >= 0
    for thinking in (None, Thinking()):
        assert isinstance(part(reply, thinking), Parted)
    for position in reply.positions or ():
        assert all(0 <= p < math.inf for p in position.top.values())


def test_a_good_answer():
    reply = read_reply(TREE)
    assert (reply.text, reply.finish, reply.prompt_tokens, reply.tokens) == ("4", "stop", 3, 1)
    assert reply.positions is not None
    assert reply.positions[0].top == pytest.approx({"4": 0.5, "5": 0.25})
    assert read_spent({**TREE, "usage": {"prompt_tokens": 3, "completion_tokens": True, "cost": 0.5}}) == Spent(
        3, 0, 0.5
    )


@pytest.mark.parametrize(
    ("body", "says"),
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
def test_a_servers_words_on_one_line(body, says):
    assert words(body) == says


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (400, "Invalid value for 'temperature'"),
        (400, "max_tokens is too large: 5000. This model supports at most 4096 completion tokens"),
        (400, "Unknown model"),
        (403, "Country, region, or territory not supported"),
        (429, "maximum context length"),
        (404, "No endpoints found"),
    ],
)
def test_a_refusal_of_everything_is_not_taken_for_a_rows(status, said):
    assert refusal_of_row(status, None, said) is None


THINKING = Thinking()


@pytest.mark.parametrize(
    ("reply", "parted"),
    [
        (Reply("<think>a</think>\n\n4"), Parted("4", "a", True)),
        (Reply("a</think>4</think>"), Parted("4</think>", "a", True)),
        (Reply("\n<think>\na\n</think>\n4 "), Parted("4 ", "\na\n", True)),
        (Reply("4"), Parted("4", None, True)),
        (Reply("<think>a"), Parted("", "a", False)),
        (Reply("a", finish="length"), Parted("", "a", False)),
        (Reply("4 and", finish="length", hidden_tokens=3), Parted("4 and", None, True)),
        (Reply("\n4", thought="a"), Parted("4", "a", True)),
        (Reply("4 and", thought="a", finish="length"), Parted("4 and", "a", True)),
        (Reply("", thought="a", finish="length"), Parted("", "a", False)),
        (Reply("", thought="a", finish="stop"), Parted("", "a", True)),
    ],
)
def test_thought_and_answer_are_told_apart(reply, parted):
    assert part(reply, THINKING) == parted


def test_nobody_thinks_without_being_said_to():
    assert part(Reply("<think>a</think>4"), None) == Parted("<think>a</think>4", None, True)
    assert part(Reply(" 4", finish="length"), None) == Parted(" 4", None, True)


def test_the_first_token_of_an_answer_that_is_empty_is_what_came_instead():
    end = {"<|im_end|>": 0.75, "4": 0.25}
    positions = read_reply(chat("", logprobs=likeliest(("</think>", {}), ("<|im_end|>", end)))).positions
    assert positions is not None
    assert first_of_answer(positions, "", THINKING) == pytest.approx(end)
    assert first_of_answer(positions[:1], "", THINKING) == {}


def test_what_looks_like_a_control_token():
    found = "<|im_end|> <|endoftext|> <｜User｜> <start_of_turn> </think> [INST] [/INST] <<SYS>> <s> <|eot_id|>"
    assert control_texts((Message("user", found),)) == found.split()
    plain = "a <b> c </b> x < y | z > w [1] [inst] <<EOF <| > |> << shift >> a<|b <strong> <thinking>"
    assert control_texts((Message("user", plain),)) == []
