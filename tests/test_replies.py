"""Bodies of any shape: an answer or `Malformed`, and never anything else."""

from __future__ import annotations

import math

import pytest
from fault_server import chat, likeliest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion

from prefs.config import ThinkingConfig
from prefs.models.openai.refusals import ending, words
from prefs.models.openai.replies import Answer, Malformed, part, read_answer, read_listing, read_usage
from prefs.models.thoughts import Parted, opens_thought, without_thought

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
    ("reason", "native", "kind"),
    [
        ("stop", None, "stop"),
        ("STOP", "STOP", "stop"),
        ("FINISH_REASON_STOP", None, "stop"),
        ("end_turn", None, "stop"),
        ("length", "MAX_TOKENS", "length"),
        ("FinishReason.MAX_TOKENS", None, "length"),
        ("model_length", None, "length"),
        ("content_filter", None, "blocked"),
        ("ContentFiltered", None, "blocked"),
        ("SAFETY", None, "blocked"),
        ("finish_reason_safety", None, "blocked"),
        ("Recitation", None, "blocked"),
        ("content_filter: PROHIBITED_CONTENT", None, "blocked"),
        ("guardrail_intervened", None, "blocked"),
        ("ERROR_TOXIC", None, "blocked"),
        ("stop", "SAFETY", "blocked"),
        ("stop", "refusal", "blocked"),
        (None, "stop", "stop"),
        ("error", None, "error"),
        ("abort", None, "error"),
        ("tool_calls", None, "tool_calls"),
        ("MALFORMED_FUNCTION_CALL", None, "malformed_function_call"),
        ("OTHER", None, "other"),
        (" ", None, None),
        (None, None, None),
    ],
)
def test_how_an_answer_ended_whatever_a_provider_calls_it(reason, native, kind):
    assert ending(reason, native) == kind


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


@pytest.mark.parametrize(
    ("text", "answer", "thought"),
    [
        ("<think>\nHm.\n</think>\n\nHere it is.", "Here it is.", "\nHm.\n"),
        ("\n <thinking>Hm.</thinking>4", "4", "Hm."),
        ("[THINK]Hm.[/THINK]4", "4", "Hm."),
        ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>4", "4", "Hm."),
        ("<|channel|>analysis<|message|>Hm.assistant<|channel|>final<|message|>4", "4", "Hm."),
        ("analysisHm.assistantfinal4", "4", "Hm."),
        ("<|channel>thought\nHm.\n<channel|>4", "4", "\nHm.\n"),
        ("◁think▷Hm.◁/think▷4", "4", "Hm."),
        ("<think></think>4", "4", ""),
        # The chat template has opened it.
        ("Hm. Let me see.\n</think>\n\n4", "4", "Hm. Let me see.\n"),
        ("Hm.</think>\n4", "4", "Hm."),
        # Not ended.
        ("<think>\nHm. 4", None, "\nHm. 4"),
        ("<|channel|>analysis<|message|>Hm. 4", None, "Hm. 4"),
        ("analysisWe need 4", None, "We need 4"),
        # No thoughts: these stay as they are.
        (" 4 ", " 4 ", None),
        ("", "", None),
        ("It writes `<think>` and `</think>`.", "It writes `<think>` and `</think>`.", None),
        ("analysis: four", "analysis: four", None),
        ("<b>4</b>", "<b>4</b>", None),
        ("I think </b> 4", "I think </b> 4", None),
    ],
)
def test_a_thought_in_the_text_is_told_by_its_marks(text, answer, thought):
    parted = without_thought(text)
    assert (parted.text if parted.closed else None, parted.thought) == (answer, thought)


def test_an_answer_that_did_not_begin_before_the_text_was_cut_off_is_none():
    text = "<think>Hm.</think>\n\n"
    assert without_thought(text, finished=False) == Parted("", "Hm.", closed=False)
    assert without_thought(text, finished=True) == Parted("", "Hm.", closed=True)


def test_a_turn_that_is_left_in_a_thought():
    assert opens_thought("<|im_start|>assistant\n<think>\n")
    assert opens_thought("<|Assistant|><think>")
    assert not opens_thought("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not opens_thought("<|im_start|>assistant\n")
