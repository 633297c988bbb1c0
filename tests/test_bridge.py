"""Loading: where a model goes, and the attention that it runs with."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_models import gemma2, llama, plain_model, tiny_model

from prefs.chat import Message
from prefs.errors import UserError
from prefs.models.backend import Ask, CaptureRequest, Question, Sampling
from prefs.models.loading import Models

CONVERSATIONS = [
    (Message("user", "Hi"), Message("assistant", "Hello. " * 9)),
    (Message("user", "Name a river. " * 6), Message("assistant", "Po.")),
]
ASKS = [Ask(Question("Did you like it?", ("yes", "not at all")), seeds=(0, 1))]
CAPTURE = CaptureRequest((0, 4), ("mean_completion", "rating"))


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("llama"), llama())


@pytest.fixture(scope="module")
def tiny_gemma2(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("gemma2"), gemma2())


def observe(spec):
    backend = Models().get(spec)
    return backend, backend.observe(CONVERSATIONS, ASKS, Sampling(1.0, 1.0, 3), CAPTURE)


def same(one, other):
    for first, second in zip(one, other, strict=True):
        assert first.answers[0].samples == second.answers[0].samples
        assert first.answers[0].scores[0].mass == pytest.approx(second.answers[0].scores[0].mass, rel=1e-4)
        torch.testing.assert_close(first.answers[0].residual, second.answers[0].residual, atol=1e-4, rtol=1e-4)


def attention(backend) -> str:
    return backend.bridge.original_model.config._attn_implementation


def test_blocks_are_the_models_own(tiny_llama):
    backend = Models().get(tiny_llama)
    plain = plain_model(tiny_llama)
    for block, own in zip(backend.bridge.blocks, plain.model.layers, strict=True):
        kinds = {name: type(module) for name, module in block.original_component.named_modules()}
        assert kinds == {name: type(module) for name, module in own.named_modules()}


def test_sdpa_where_it_computes_what_the_model_means(tiny_llama, tiny_gemma2):
    assert attention(Models().get(tiny_llama)) == "sdpa"
    assert attention(Models().get(tiny_gemma2)) == "eager"


def test_eager_attention_when_asked_for(tiny_llama):
    backend, eager = observe(dataclasses.replace(tiny_llama, attn_implementation="eager"))
    assert attention(backend) == "eager"
    same(eager, observe(tiny_llama)[1])


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("tiny_gemma2", {"attn_implementation": "sdpa"}, "leaves out the soft cap"),
        ("tiny_llama", {"attn_implementation": "flash_attention_2"}, "bfloat16 or float16 only, and model.dtype is"),
        ("tiny_llama", {"attn_implementation": "flash_attention_3", "dtype": "bfloat16"}, "seem to be installed"),
    ],
)
def test_an_attention_that_is_not_there_is_one_line(request, model, changes, message):
    if torch.cuda.is_available() and "seem" in message:
        pytest.skip("this machine may have it")
    spec = dataclasses.replace(request.getfixturevalue(model), **changes)
    with pytest.raises(UserError, match=rf"model\.attn_implementation: .*{message}.*use auto or eager") as caught:
        Models().get(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device_map", ["auto", "balanced"])
def test_a_device_map_computes_the_same(tiny_llama, device_map):
    backend, mapped = observe(dataclasses.replace(tiny_llama, device="auto", device_map=device_map))
    if not torch.cuda.is_available():
        assert backend.device.type == "cpu"
    same(mapped, observe(tiny_llama)[1])
