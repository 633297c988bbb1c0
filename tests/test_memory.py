"""Out of memory: halves give what the whole would have given."""

from __future__ import annotations

import pytest
import torch
from engine_calls import complete, observe
from tiny_models import llama, tiny_model

from prefs.errors import UserError
from prefs.models.loading import Models
from prefs.models.local.memory import out_of_memory
from prefs.models.types import Capture, Message, Question, Request, Sampling

CONVERSATIONS = [
    (Message("user", "Count to " + "ten " * n), Message("assistant", "One, two." * (5 - n))) for n in range(1, 6)
]
QUESTION = Question("Did you like it?", ("yes", "no"))
SAMPLING = Sampling(1.0, 1.0, 3)
CAPTURE = Capture((0, 3), ("last_prompt", "mean_completion", "rating"))


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    return Models().get(tiny_model(tmp_path_factory.mktemp("model"), llama()))


@pytest.fixture
def small_device(monkeypatch, backend):
    """An allocator with room for so many tokens a pass, padding included."""
    passes = []

    def limit(tokens, error):
        forward = backend.bridge.forward

        def bounded(ids, *args, **kwargs):
            if ids.numel() > tokens:
                raise error
            passes.append(len(ids))
            return forward(ids, *args, **kwargs)

        monkeypatch.setattr(backend.bridge, "forward", bounded)
        return passes

    return limit


def observed(engine):
    found = observe(engine, CONVERSATIONS, [QUESTION], SAMPLING, seeds=(0, 1), capture=CAPTURE)
    return [reply for (reply,) in found]


def test_halves_give_the_same(backend, small_device, prefs_log):
    prompts = [row[:1] for row in CONVERSATIONS]
    expected, completed = observed(backend), complete(backend, prompts, 0, SAMPLING)
    passes = small_device(100, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    for one, other in zip(observed(backend), expected, strict=True):
        assert one.samples == other.samples
        assert one.scores[0].mass == pytest.approx(other.scores[0].mass, rel=1e-4)
        for position, vectors in other.residuals.items():
            torch.testing.assert_close(one.residuals[position], vectors, atol=1e-4, rtol=1e-4)
    assert complete(backend, prompts, 0, SAMPLING) == completed
    assert max(passes) < 5
    assert prefs_log.text.count("memory ran out with 5 conversations at a time") == 1
    assert "model.batch_tokens" in prefs_log.text


def test_a_row_that_does_not_fit_alone_is_named_with_its_tokens_after_the_others(backend, small_device):
    requests = [Request(row, capture=CAPTURE) for row in CONVERSATIONS]
    lengths = [backend.tokens(request) for request in requests]
    longest = max(lengths)
    small_device(longest - 1, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    done = []
    with pytest.raises(UserError, match=rf"single conversation of {longest} tokens; set model\.max_context lower"):
        done.extend(number for number, _ in backend.run(requests))
    assert done == list(range(lengths.index(longest)))


def test_other_errors_are_not_taken_for_it(backend, small_device):
    small_device(1, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        observed(backend)


def test_the_cpu_says_it_so():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(caught.value)
