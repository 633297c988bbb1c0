"""The vLLM engine over workers that are transformers' own model; and what starts and ends vLLM's, without vLLM."""

from __future__ import annotations

import dataclasses
import importlib.util
import signal
import subprocess
import time
from itertools import chain

import pytest
import torch
from engine_calls import complete, observe, replies
from tiny_models import llama, plain_model, tiny_model

from prefs.config import VllmConfig
from prefs.errors import UserError
from prefs.models.loading import Models, identity
from prefs.models.types import Capture, Message, Question, Request, Sampling
from prefs.models.vllm.engine import VllmEngine
from prefs.models.vllm.workers import (
    Call,
    Output,
    WorkersDied,
    _guard,
)

CONVERSATIONS = [
    (Message("user", "Hi"), Message("assistant", "Hello. " * 9)),
    (Message("user", "Name a river. " * 6), Message("assistant", "Po.")),
]
QUESTIONS = [
    Question("Did you like it?", ("yes", "not at all"), "Answer: "),
    Question("From 1 to 10?", tuple(str(n) for n in range(1, 11))),
]


class PlainWorkers:
    """In place of vLLM's: they draw the likeliest token, and die after so many calls."""

    max_context, running, calls = 2048, True, 0

    def __init__(self, model, lifetime: int = 10**9):
        self._model, self._lifetime = model, lifetime

    @torch.inference_mode()
    def run(self, calls: list[Call], rows: list[int], outputs: list[Output | None]) -> None:
        assert rows == sorted(rows)  # those of one conversation follow each other
        for number, call in enumerate(calls):
            self.calls += 1
            if self.calls > self._lifetime:
                raise WorkersDied("gone")
            ids: list[int] = []
            while len(ids) < call.sampling.max_new_tokens and not (ids and ids[-1] in call.stops.tokens):
                log_probs = self._model(torch.tensor([[*call.ids, *ids]])).logits[0, -1].log_softmax(dim=-1)
                ids.append(int(log_probs.argmax()))
            looked = {token: float(log_probs[token]) for token in call.looked}
            outputs[number] = Output(tuple(ids), ids[-1] in call.stops.tokens, looked)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """An engine of its own for each lifetime of the workers, and the same model in the TransformerLens engine."""
    spec = tiny_model(tmp_path_factory.mktemp("llama"), llama())
    model, local = plain_model(spec), Models().get(spec)
    return lambda *life: VllmEngine(lambda: PlainWorkers(model, *life), local.encoder, local.decoder.stops, spec), local


def test_scores_samples_and_choices_equal_those_of_transformer_lens(tiny):
    make, local = tiny
    engine, greedy = make(), Sampling(0.0, 1.0, 3)
    ours, theirs = (observe(one, CONVERSATIONS, QUESTIONS, greedy, seeds=(0, 1)) for one in (engine, local))
    for one, other in zip(chain(*ours), chain(*theirs), strict=True):
        assert one.samples == other.samples
        assert one.scores[0].mass == pytest.approx(other.scores[0].mass, rel=1e-3, abs=1e-9)
    prompts = [row[:1] for row in CONVERSATIONS]
    assert complete(engine, prompts, 3, greedy) == complete(local, prompts, 3, greedy)
    asked = [Request((), question, choose=True) for question in QUESTIONS]
    assert [r.choice for r in replies(engine, asked)] == [r.choice for r in replies(local, asked)]
    assert engine.usage().requests > 8
    with pytest.raises(UserError, match="backend=transformer_lens"):
        observe(engine, CONVERSATIONS, [None], capture=Capture((0,), ("last_prompt",)))


def test_requests_that_were_answered_before_the_workers_died_are_given(tiny):
    make, _ = tiny
    requests = [Request(row, QUESTIONS[0], Sampling(0.0, 1.0, 1), seeds=(0,)) for row in CONVERSATIONS]
    engine, done = make(1), []
    with pytest.raises(WorkersDied):
        done.extend(number for number, _ in engine.run(requests))
    assert done == [0]


def test_vllm_that_is_not_installed_is_one_line(smollm2_fp32):
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed")
    with pytest.raises(UserError, match=r"pip install 'prefs\[vllm\]'") as caught:
        Models().get(dataclasses.replace(smollm2_fp32, backend="vllm"))
    assert "\n" not in str(caught.value)


def test_engine_arguments_that_change_results_are_part_of_the_model(smollm2_fp32):
    def known(**arguments):
        return identity(dataclasses.replace(smollm2_fp32, backend="vllm", vllm=VllmConfig(engine=arguments)))

    assert known(max_num_seqs=8) == identity(smollm2_fp32)
    assert known(kv_cache_dtype="fp8") != identity(smollm2_fp32)
    assert known(an_argument_of_tomorrow=1) != identity(smollm2_fp32)
    assert known(hf_overrides={"rope_theta": 1.0}) != known(hf_overrides={"rope_theta": 2.0})


@pytest.mark.parametrize("closed", [True, False])
def test_engines_outlive_their_guard_only_if_it_is_told(closed):
    engine = subprocess.Popen(["sleep", "60"])
    guard = _guard([engine.pid])
    guard.communicate(b"closed\n" if closed else b"")
    time.sleep(0.1)
    assert (engine.poll() is None) is closed
    engine.kill()
    assert engine.wait() == -signal.SIGKILL
