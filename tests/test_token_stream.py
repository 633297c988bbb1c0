"""The residual stream token by token: the vectors of plain transformers, and tokens that join to the text."""

from __future__ import annotations

import pytest
import torch
from engine_calls import observe
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import gemma2, llama, plain_model, tiny_model

from prefs.config import POSITIONS
from prefs.errors import UserError
from prefs.models.loading import Models
from prefs.models.local.token_stream import token_texts
from prefs.models.prompts import encode_prompt
from prefs.models.types import Capture, Message, Question

QUESTION = Question("Did you like it?", ("yes", "no"), "Well: ")
TURNS = (Message("user", "Say <|im_end|> 🦄, please. " * 3), Message("assistant", "Here: <|im_end|>\n\n🦄"))


@pytest.fixture(scope="module", params=[llama, gemma2], ids=["llama", "gemma2"])
def both(request, tmp_path_factory):
    spec = tiny_model(tmp_path_factory.mktemp("model"), request.param())
    return Models().get(spec), plain_model(spec)


@torch.inference_mode()
def test_vectors_are_those_of_plain_transformers(both):
    backend, plain = both
    prompt = encode_prompt(backend.encoder, TURNS, QUESTION)
    hidden = plain(torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states
    for layer in (0, 3):
        stream = backend.residual_stream(TURNS, layer, QUESTION)
        torch.testing.assert_close(stream.vectors, hidden[layer + 1][0], atol=1e-4, rtol=1e-4)


def test_the_vector_of_each_position_is_the_one_that_is_captured(both):
    backend, _ = both
    ((reply,),) = observe(backend, [TURNS], [QUESTION], scores=(), capture=Capture((2,), POSITIONS))
    stream = backend.residual_stream(TURNS, 2, QUESTION)
    assert stream.ranges.keys() == set(POSITIONS)
    for position, (start, end) in stream.ranges.items():
        mean = stream.vectors[start:end].mean(dim=0)
        torch.testing.assert_close(mean, reply.residuals[position][0], atol=1e-5, rtol=1e-4, msg=position)


def test_without_a_question_it_ends_with_the_completion_and_says_whose_each_token_is(both):
    backend, _ = both
    stream = backend.residual_stream(TURNS, 2)
    whole = backend.residual_stream(TURNS, 2, QUESTION)
    assert whole.tokens[: len(stream.tokens)] == stream.tokens
    torch.testing.assert_close(whole.vectors[: len(stream.tokens)], stream.vectors, atol=1e-5, rtol=1e-4)
    assert "rating" not in stream.ranges
    assert stream.ranges["last_completion"][1] == len(stream.tokens)
    for message in TURNS:
        own = [at for at, role in enumerate(stream.roles) if role == message.role]
        assert "".join(stream.tokens[at] for at in own) == message.content.strip()
        assert not any(stream.control[at] for at in own)  # <|im_end|> in a text is text
    assert {stream.tokens[at] for at, control in enumerate(stream.control) if control} == {"<|im_start|>", "<|im_end|>"}


@pytest.mark.parametrize("layer", [5, -1])
def test_a_layer_that_is_not_there(both, layer):
    backend, _ = both
    with pytest.raises(UserError, match=f"has layers 0 to 4, and no layer {layer}"):
        backend.residual_stream(TURNS, layer)


@given(text=st.text(max_size=15))
def test_tokens_join_to_the_text(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids)
