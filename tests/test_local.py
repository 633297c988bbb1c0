"""Where a model goes, the attention that it runs with, and that halves give what the whole would where memory ends."""

from __future__ import annotations

import dataclasses
import subprocess

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from engine_calls import complete, observe
from tiny_models import gemma2, gemma3, llama, plain_model, tiny_model
from transformers import AutoTokenizer

from prefs.errors import UserError
from prefs.models.loading import Models
from prefs.models.local.bridge import wrap
from prefs.models.local.engine import LocalEngine
from prefs.models.local.grouping import spans_of_completion
from prefs.models.local.memory import out_of_memory
from prefs.models.local.residuals import Recorder
from prefs.models.local.steering import BatchSteering
from prefs.models.types import Capture, Message, Question, Request, Sampling, Steering

CONVERSATIONS = [
    (Message("user", "Hi"), Message("assistant", "Hello. " * 9)),
    (Message("user", "Name a river. " * 6), Message("assistant", "Po.")),
]
QUESTION = Question("Did you like it?", ("yes", "not at all"))


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("llama"), llama())


@pytest.fixture(scope="module")
def tiny_gemma2(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("gemma2"), gemma2())


def answers(engine, conversations=CONVERSATIONS):
    capture = Capture((0, 4), ("mean_completion", "rating"))
    found = observe(engine, conversations, [QUESTION], Sampling(1.0, 1.0, 3), seeds=(0, 1), capture=capture)
    return [reply for (reply,) in found]


def same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.samples == other.samples
        assert one.scores[0].mass == pytest.approx(other.scores[0].mass, rel=1e-4)
        assert one.residuals.keys() == other.residuals.keys()
        for position, vectors in other.residuals.items():
            torch.testing.assert_close(one.residuals[position], vectors, atol=1e-4, rtol=1e-4)


def test_eager_attention_when_asked_for_or_where_sdpa_leaves_something_out(tiny_llama, tiny_gemma2):
    llama, eager, gemma = (
        Models().get(spec)
        for spec in (tiny_llama, dataclasses.replace(tiny_llama, attn_implementation="eager"), tiny_gemma2)
    )
    kinds = [engine.bridge.original_model.config._attn_implementation for engine in (llama, eager, gemma)]
    assert kinds == ["sdpa", "eager", "eager"]
    same(answers(eager), answers(llama))


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
    mapped = Models().get(dataclasses.replace(tiny_llama, device="auto", device_map=device_map))
    if not torch.cuda.is_available():
        assert mapped.device.type == "cpu"
    same(answers(mapped), answers(Models().get(tiny_llama)))


@torch.inference_mode()
def test_a_model_on_two_devices(tiny_llama):
    """Any machine has a second device, on which tensors have shapes and no numbers: what mixes the two fails."""
    model = plain_model(tiny_llama)
    here, there = torch.device("cpu"), torch.device("meta")
    places = {"model.embed_tokens": here, "model.rotary_emb": here, "model.norm": there, "lm_head": there}
    places |= {f"model.layers.{layer}": here if layer < 2 else there for layer in range(5)}
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # no longer the embedding's
    for name, device in places.items():
        module = model.get_submodule(name).to(device)
        add_hook_to_module(module, AlignDevicesHook(device, skip_keys="past_key_values"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama.path)
    engine = LocalEngine(wrap(model, tokenizer, tiny_llama, tiny_llama.path), tokenizer, tiny_llama)
    assert engine.device == here
    rows = [engine.encoder.encode(row).ids for row in CONVERSATIONS]
    steering = [Steering(1, torch.ones(64)), Steering(3, torch.ones(64), at="last", kind="project_out")]
    steered = BatchSteering.build(steering, [spans_of_completion(row) for row in rows], engine.device)
    last = [{"rating": (len(row) - 1, len(row))} for row in rows]
    recorder = Recorder(range(5), last, [len(row) for row in rows], stops=False)
    state, logits = engine.passes.start(rows, steered, [recorder])
    assert logits.device == there
    assert [kept.device for kept in recorder._kept] == [here, here, there, there, there]
    _, logits = engine.passes.extend(state.fork().select(torch.tensor([1, 0, 1])), [(5,), (6, 7), (8,)])
    assert logits.shape == (3, 1, 49152)


def test_a_model_that_also_sees_is_read_as_text_and_installs_nothing(tmp_path, monkeypatch):
    """TransformerLens would install torchvision with pip where the image processor does not load."""
    called: list[object] = []
    monkeypatch.setattr(subprocess, "check_call", lambda *args, **kwargs: called.append(args))
    engine = Models().get(tiny_model(tmp_path, gemma3()))
    assert not called
    same(answers(engine), [reply for row in CONVERSATIONS for reply in answers(engine, [row])])


# Memory


COUNTING = [
    (Message("user", "Count to " + "ten " * n), Message("assistant", "One, two." * (5 - n))) for n in range(1, 6)
]


@pytest.fixture(scope="module")
def engine(tiny_llama):
    engine = Models().get(tiny_llama)
    engine.proof = None  # tests count passes
    return engine


@pytest.fixture
def small_device(monkeypatch, engine):
    """An allocator with room for so many tokens a pass, padding included."""
    passes = []

    def limit(tokens, error):
        forward = engine.bridge.forward

        def bounded(ids, *args, **kwargs):
            if ids.numel() > tokens:
                raise error
            if ids.shape[1] > 8:  # over conversations, and not over the ends of options, of which a row has several
                passes.append(len(ids))
            return forward(ids, *args, **kwargs)

        monkeypatch.setattr(engine.bridge, "forward", bounded)
        return passes

    return limit


def test_halves_give_the_same(engine, small_device, prefs_log):
    prompts, sampling = [row[:1] for row in COUNTING], Sampling(1.0, 1.0, 3)
    expected, completed = answers(engine, COUNTING), complete(engine, prompts, 0, sampling)
    passes = small_device(100, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    same(answers(engine, COUNTING), expected)
    assert complete(engine, prompts, 0, sampling) == completed
    assert max(passes) < 5
    assert prefs_log.text.count("memory ran out with 5 conversations at a time") == 1
    assert "model.batch_tokens" in prefs_log.text


def test_a_row_that_does_not_fit_alone_is_named_with_its_tokens_after_the_others(engine, small_device):
    requests = [Request(row, capture=Capture((0, 3), ("last_prompt", "mean_completion"))) for row in COUNTING]
    lengths = [engine.tokens(request) for request in requests]
    longest = max(lengths)
    small_device(longest - 1, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    done = []
    with pytest.raises(UserError, match=rf"single conversation of {longest} tokens; set model\.max_context lower"):
        done.extend(number for number, _ in engine.run(requests))
    assert done == list(range(lengths.index(longest)))


def test_other_errors_are_not_taken_for_it(engine, small_device):
    small_device(1, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        answers(engine)


def test_the_cpu_says_it_so():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(caught.value)
