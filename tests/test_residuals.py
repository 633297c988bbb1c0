"""Residual streams, captured and token by token: what is run for them, and that no shortcut changes a vector."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack, contextmanager

import pytest
import torch
from engine_calls import observe
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import gemma2, llama, plain_model, tiny_model

from prefs.config import POSITIONS
from prefs.errors import UserError
from prefs.models.loading import Models
from prefs.models.local.residuals import Recorder
from prefs.models.local.token_stream import token_texts
from prefs.models.prompts import encode_prompt
from prefs.models.types import Capture, Message, Question, Request

SHARED = ("last_prompt", "first_completion", "last_completion", "mean_completion")
QUESTION = Question("Did you like it?", ("yes", "no"))
CONVERSATIONS = [
    (Message("user", "Hi"), Message("assistant", "Hello. " * 20)),
    (Message("user", "Name a river. " * 6), Message("assistant", "Po.")),
    (Message("user", "Say nothing."), Message("assistant", "")),
]


@pytest.fixture(scope="module", params=[llama, gemma2], ids=["llama", "gemma2"])
def both(request, tmp_path_factory):
    spec = tiny_model(tmp_path_factory.mktemp("model"), request.param())
    engine = Models().get(spec)
    engine.proof = None  # tests count passes
    return engine, plain_model(spec)


@contextmanager
def runs(backend):
    """How often each block, and the output layer, is run."""
    counts: Counter[int | str] = Counter()

    def count(name):
        return lambda module, inputs: counts.update([name])

    model = backend.bridge.original_model
    with ExitStack() as stack:
        for layer, block in enumerate(model.model.layers):
            stack.callback(block.register_forward_pre_hook(count(layer)).remove)
        stack.callback(model.get_output_embeddings().register_forward_pre_hook(count("logits")).remove)
        yield counts


def vectors_of(engine, question, layers, positions, scores=()):
    found = observe(engine, CONVERSATIONS, [question], scores=scores, capture=Capture(layers, positions))
    return [reply.residuals for (reply,) in found]


def same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(vectors.equal(other[position]) for position, vectors in one.items())


@torch.inference_mode()
def test_vectors_equal_those_of_plain_transformers(both):
    engine, plain = both
    for residuals, conversation in zip(vectors_of(engine, QUESTION, (0, 2, 3), POSITIONS), CONVERSATIONS, strict=True):
        prompt = encode_prompt(engine.encoder, conversation, QUESTION)
        hidden = torch.stack(plain(torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states)[:, 0]
        start, end = prompt.spans.completion
        states = hidden[[1, 3, 4]]
        expected = {"last_prompt": states[:, start - 1], "rating": states[:, -1]}
        if end > start:
            expected["first_completion"] = states[:, start]
            expected["last_completion"] = states[:, end - 1]
            expected["mean_completion"] = states[:, start:end].mean(dim=1)
        assert residuals.keys() == expected.keys()
        for position, vectors in expected.items():
            torch.testing.assert_close(residuals[position], vectors, atol=1e-4, rtol=1e-4)
        stream = engine.residual_stream(conversation, 3, QUESTION)
        torch.testing.assert_close(stream.vectors, hidden[4], atol=1e-4, rtol=1e-4)
        assert stream.ranges.keys() == expected.keys()
        for position, (start, end) in stream.ranges.items():
            torch.testing.assert_close(
                stream.vectors[start:end].mean(dim=0), expected[position][2], atol=1e-4, rtol=1e-4
            )


def test_a_stream_without_a_question_ends_with_the_completion_and_says_whose_each_token_is(both):
    turns = (Message("user", "Say <|im_end|> 🦄, please. " * 3), Message("assistant", "Here: <|im_end|>\n\n🦄"))
    stream, whole = both[0].residual_stream(turns, 2), both[0].residual_stream(turns, 2, QUESTION)
    assert whole.tokens[: len(stream.tokens)] == stream.tokens
    torch.testing.assert_close(whole.vectors[: len(stream.tokens)], stream.vectors, atol=1e-5, rtol=1e-4)
    assert "rating" not in stream.ranges
    assert stream.ranges["last_completion"][1] == len(stream.tokens)
    for message in turns:
        own = [place for place, role in enumerate(stream.roles) if role == message.role]
        assert "".join(stream.tokens[place] for place in own) == message.content.strip()
        assert not any(stream.control[place] for place in own)  # <|im_end|> in a text is text
    control = {token for token, is_control in zip(stream.tokens, stream.control, strict=True) if is_control}
    assert control == {"<|im_start|>", "<|im_end|>"}


@pytest.mark.parametrize("layer", [5, -1])
def test_a_layer_that_is_not_there(both, layer):
    with pytest.raises(UserError, match=f"has layers 0 to 4, and no layer {layer}"):
        both[0].residual_stream(CONVERSATIONS[0], layer)


@given(text=st.text(max_size=15))
def test_tokens_join_to_the_text(tokenizer, text):
    """Of a character of several tokens, all but the last are empty."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids)


@pytest.mark.parametrize("deepest", [0, 2, 4])
def test_a_pass_stops_at_the_deepest_layer_wanted(both, deepest):
    engine, _ = both
    layers = tuple(range(deepest + 1))[::-1]
    with runs(engine) as stopped:
        short = vectors_of(engine, QUESTION, layers, (*SHARED, "rating"))
    assert stopped == dict.fromkeys(range(deepest + 1), 2)  # the conversations, and the question
    with runs(engine) as whole:
        full = vectors_of(engine, QUESTION, layers, (*SHARED, "rating"), scores=(0,))
    assert whole == dict.fromkeys((*range(5), "logits"), 2)
    same(short, full)


def test_without_questions_conversations_run_once_and_keep_no_keys(both, monkeypatch):
    engine, _ = both
    whole = vectors_of(engine, QUESTION, (1,), SHARED, scores=(0,))
    monkeypatch.setattr("transformers.cache_utils.DynamicLayer.update", None)
    with runs(engine) as counts:
        found = vectors_of(engine, None, (1,), SHARED)
    assert counts == {0: 1, 1: 1}
    same(found, whole)
    with runs(engine) as counts:  # a question of which nothing is wanted costs nothing
        same(vectors_of(engine, QUESTION, (1,), SHARED), whole)
    assert counts == {0: 1, 1: 1}


def test_each_request_gets_the_layers_and_positions_that_it_asked_for(both):
    """Of one pass over the conversation, and of one over the question for those who want it."""
    engine, _ = both
    full = vectors_of(engine, QUESTION, tuple(range(5)), (*SHARED, "rating"))[1]
    requests = [
        Request(CONVERSATIONS[1], capture=Capture((3, 1), ("last_prompt", "mean_completion"))),
        Request(CONVERSATIONS[1], QUESTION, capture=Capture((2,), ("rating",))),
        Request(CONVERSATIONS[1]),
        Request(CONVERSATIONS[1], capture=Capture((0,), ("last_completion",))),
    ]
    with runs(engine) as counts:
        found = dict(engine.run(requests))
    assert max(counts.values()) == 2
    assert [set(found[number].residuals) for number in range(4)] == [
        {"last_prompt", "mean_completion"}, {"rating"}, set(), {"last_completion"},
    ]  # fmt: skip
    for number, request in enumerate(requests):
        for position, vectors in found[number].residuals.items():
            expected = full[position][list(request.capture.layers)]
            torch.testing.assert_close(vectors, expected, atol=1e-4, rtol=1e-4)


def test_a_nan_stays_in_its_row_and_outside_of_what_is_averaged():
    """Padding may hold anything, and in float16 a row may overflow."""
    stream = torch.randn(3, 6, 4)
    stream[0, :2] = torch.nan
    stream[2] = torch.inf
    spots = [{"mean": (0, 4), "last": (3, 4)}, {"mean": (2, 5)}, {"mean": (0, 6), "last": (5, 6)}]
    recorder = Recorder([7, 3], spots, [4, 6, 6], stops=False)
    for layer, hook in recorder.hooks():
        assert hook(stream + layer, None) is None
    first, second, third = recorder.vectors()
    for place, layer in enumerate((7, 3)):
        torch.testing.assert_close(first["mean"][place], stream[0, 2:].mean(dim=0) + layer)
        torch.testing.assert_close(first["last"][place], stream[0, 5] + layer)
        torch.testing.assert_close(second["mean"][place], stream[1, 2:5].mean(dim=0) + layer)
    assert "last" not in second
    assert not third["mean"].isfinite().any()
