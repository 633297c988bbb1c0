"""Capture: what is run for it, and that no shortcut changes a vector."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack, contextmanager

import pytest
import torch
from tiny_models import gemma2, llama, plain_model, tiny_model

from prefs.models.loading import Models
from prefs.models.local.residuals import Recorder
from prefs.models.options import ask
from prefs.models.tokens import Message
from prefs.models.types import Ask, CaptureRequest, Question, Sampling

SHARED = ("last_prompt", "first_completion", "last_completion", "mean_completion")
SAMPLING = Sampling(1.0, 1.0, 2)
QUESTION = Question("Did you like it?", ("yes", "no"))
CONVERSATIONS = [
    (Message("user", "Hi"), Message("assistant", "Hello. " * 20)),
    (Message("user", "Name a river. " * 6), Message("assistant", "Po.")),
    (Message("user", "Say nothing."), Message("assistant", "")),
]


@pytest.fixture(scope="module", params=[llama, gemma2], ids=["llama", "gemma2"])
def both(request, tmp_path_factory):
    spec = tiny_model(tmp_path_factory.mktemp("model"), request.param())
    return Models().get(spec), plain_model(spec)


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


@torch.inference_mode()
def test_vectors_equal_those_of_plain_transformers(both):
    backend, plain = both
    for observation, conversation in zip(
        backend.observe(CONVERSATIONS, [], SAMPLING, CaptureRequest((0, 2, 3), SHARED)), CONVERSATIONS, strict=True
    ):
        asked = ask(backend.encoder, conversation, QUESTION)
        hidden = torch.stack(plain(torch.tensor([asked.ids]), output_hidden_states=True).hidden_states)[:, 0]
        start, end = asked.spans[-2]
        states = hidden[[1, 3, 4]]
        expected = {"last_prompt": states[:, start - 1]}
        if end > start:
            expected["first_completion"] = states[:, start]
            expected["last_completion"] = states[:, end - 1]
            expected["mean_completion"] = states[:, start:end].mean(dim=1)
        assert observation.residuals.keys() == expected.keys()
        for position, vectors in expected.items():
            torch.testing.assert_close(observation.residuals[position], vectors, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("deepest", [0, 2, 4])
def test_a_pass_stops_at_the_deepest_layer_wanted(both, deepest):
    backend, _ = both
    capture = CaptureRequest(tuple(range(deepest + 1))[::-1], (*SHARED, "rating"))
    with runs(backend) as stopped:
        short = backend.observe(CONVERSATIONS, [Ask(QUESTION, scores=())], SAMPLING, capture)
    assert stopped == dict.fromkeys(range(deepest + 1), 2)  # the conversations, and the question
    with runs(backend) as whole:
        full = backend.observe(CONVERSATIONS, [Ask(QUESTION)], SAMPLING, capture)
    assert whole == dict.fromkeys((*range(5), "logits"), 2)
    for one, other in zip(short, full, strict=True):
        assert one.answers[0].residual.equal(other.answers[0].residual)
        assert one.residuals.keys() == other.residuals.keys()
        assert all(vectors.equal(other.residuals[position]) for position, vectors in one.residuals.items())


def test_without_questions_conversations_run_once_and_keep_no_keys(both, monkeypatch):
    backend, _ = both
    whole = backend.observe(CONVERSATIONS, [Ask(QUESTION)], SAMPLING, CaptureRequest((1,), SHARED))
    monkeypatch.setattr("transformers.cache_utils.DynamicLayer.update", None)
    with runs(backend) as counts:
        found = backend.observe(CONVERSATIONS, [], SAMPLING, CaptureRequest((1,), SHARED))
    assert counts == {0: 1, 1: 1}
    for one, other in zip(found, whole, strict=True):
        assert all(vectors.equal(other.residuals[position]) for position, vectors in one.residuals.items())


def test_a_question_of_which_nothing_is_wanted_costs_nothing(both):
    backend, _ = both
    with runs(backend) as counts:
        found = backend.observe(CONVERSATIONS, [Ask(QUESTION, scores=())], SAMPLING, CaptureRequest((1,), SHARED))
    assert counts == {0: 1, 1: 1}
    assert [len(each.answers) for each in found] == [1, 1, 1]
    assert found[0].answers[0].residual is None


def test_an_empty_batch_and_nothing_wanted(both):
    backend, _ = both
    assert backend.observe([], [Ask(QUESTION)], SAMPLING, CaptureRequest((0,), SHARED)) == []
    assert backend.complete([], 0, SAMPLING) == []
    with runs(backend) as counts:
        assert [each.residuals for each in backend.observe(CONVERSATIONS, [], SAMPLING)] == [{}, {}, {}]
    assert not counts


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
    for at, layer in enumerate((7, 3)):
        torch.testing.assert_close(first["mean"][at], stream[0, 2:].mean(dim=0) + layer)
        torch.testing.assert_close(first["last"][at], stream[0, 5] + layer)
        torch.testing.assert_close(second["mean"][at], stream[1, 2:5].mean(dim=0) + layer)
    assert "last" not in second
    assert not third["mean"].isfinite().any()


def test_means_are_taken_in_float32():
    stream = (1 + torch.rand(1, 500, 8)).to(torch.bfloat16)
    recorder = Recorder([0], [{"mean": (0, 500)}], [500], stops=False)
    for _, hook in recorder.hooks():
        hook(stream, None)
    torch.testing.assert_close(recorder.vectors()[0]["mean"][0], stream[0].float().mean(dim=0))
