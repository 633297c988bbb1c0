"""The engine for OpenAI-compatible servers against a real one: vLLM's own, with the embedded model, on this machine."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from engine_calls import replies

from prefs.config import ApiConfig
from prefs.data.task import Task
from prefs.errors import UserError
from prefs.models.embedded import smollm2_folder
from prefs.models.loading import Models, ModelSpec
from prefs.models.openai.engine import OpenAIEngine
from prefs.models.types import Message, Question, Request, Sample, Sampling
from prefs.stages.complete import complete
from prefs.stages.records import Completion
from prefs.store.table import Store

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM in the environment"),
]

CONTEXT = 1024
SCALE = Question(
    "How much did you like that task, from 1 to 5? Answer with the number only.", tuple("12345"), "Answer: "
)
TEN = replace(
    SCALE, text="From 0 to 10, how much did you like that task?", options=tuple(str(value) for value in range(11))
)
WORDS = Question("Repeat after me: Strongly agree", ("Strongly disagree", "Disagree", "Agree", "Strongly agree"))
ROWS = [
    (Message("user", "Count to 3."), Message("assistant", "1, 2, 3.")),
    (Message("user", "Tell me a joke about cats."), Message("assistant", "Why did the cat cross the road? To nap.")),
    (Message("user", "Write a poem."), Message("assistant", "Roses are red.")),
]


@dataclass
class VllmServer:
    """vLLM's server in a process group of its own; its log says what it was asked."""

    folder: Path
    port: int
    process: subprocess.Popen | None = None
    logs: list[Path] = field(default_factory=list)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        self.logs.append(self.folder / f"{len(self.logs)}.log")
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(smollm2_folder())),
            *("--served-model-name", "smollm2", "--dtype", "float32", "--enforce-eager"),
            *("--block-size", "32", "--max-model-len", str(CONTEXT), "--host", "127.0.0.1", "--port", str(self.port)),
        ]
        with self.logs[-1].open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                # The model in the engine's own process: one process less to start, and none waits busily for another.
                env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
                start_new_session=True,
            )
        while not self.answers():
            assert self.process.poll() is None, self.logs[-1].read_text()[-3000:]
            time.sleep(0.5)

    def answers(self) -> bool:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).status == 200
        except OSError:
            return False

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def answered(self) -> int:
        """Completions that this server has given since it was started."""
        return self.logs[-1].read_text().count('POST /v1/chat/completions HTTP/1.1" 200')


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[VllmServer]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = VllmServer(tmp_path_factory.mktemp("vllm"), port)
    running.start()
    yield running
    running.kill()


def spec_of(server: VllmServer, path: str = "smollm2", **api) -> ModelSpec:
    settings = ApiConfig(base_url=server.base_url, key_env=None, prefill=True, **{"concurrency": 8, **api})
    return ModelSpec(name="served", path=path, backend="openai", dtype="served", api=settings)


@pytest.fixture
def served(server) -> Iterator[OpenAIEngine]:
    engine = OpenAIEngine.load(spec_of(server))
    yield engine
    engine.close()


def to_rate(rows, question: Question, **wanted) -> list[Request]:
    return [Request(row, question, sampling=Sampling(1.0, 1.0, 1), **wanted) for row in rows]


def masses(engine, question: Question) -> np.ndarray:
    """[rows, options]."""
    return np.array([reply.scores[0].mass for reply in replies(engine, to_rate(ROWS, question, scores=(0,)))])


def test_exact_masses_are_those_of_the_model_run_here(served, backend):
    """Digits after an opening, options that open others ("1" and "10"), and options of several tokens."""
    given = {}
    for name, question, tolerance in (("scale", SCALE, 2e-5), ("ten", TEN, 2e-5), ("words", WORDS, 5e-4)):
        given[name], expected = masses(served, question), masses(backend, question)
        # What is not among the 20 likeliest tokens counts as 0: options, and further digits behind one (of this model,
        # up to .006 of an option's probability).
        listed = (given[name] > 0) | (expected > 0.02)
        beyond = (given[name] - expected)[listed]
        assert beyond.min() > -tolerance
        assert beyond.max() < (5e-3 if question.options[0].isdecimal() else tolerance)
    assert (given["words"][:, [0, 3]] > 0.002).sum() >= 3  # those of several tokens have been walked to
    assert given["ten"][:, 10].min() > 0.05


def test_answers_are_drawn_from_the_distribution_that_is_scored(served):
    seeds = tuple(range(80))
    (first,) = replies(served, to_rate(ROWS[:1], SCALE, seeds=seeds, scores=(0,)))
    mass = np.array(first.scores[0].mass)
    texts = [first.samples[seed].text for seed in seeds]
    shares = np.array([texts.count(option) for option in SCALE.options]) / len(seeds)
    assert np.all(np.abs(shares - mass) <= 5 * np.sqrt(mass * (1 - mass) / len(seeds)))
    (again,) = replies(served, to_rate(ROWS[:1], SCALE, seeds=seeds[:5]))
    assert again.samples == {seed: first.samples[seed] for seed in seeds[:5]}


def test_the_server_says_what_is_too_long(served):
    long, brim, short = (((Message("user", "word " * count)),) for count in (CONTEXT + 100, CONTEXT - 45, 3))
    rows = [Request(row, sampling=Sampling(1.0, 1.0, 64), seeds=(0,)) for row in (long, brim, short)]
    samples = [reply.samples[0] for reply in replies(served, rows)]
    assert samples[0] == Sample(None, 0, True, invalid="too_long")
    # It shortens an answer to what its context has left; one that does not end by itself was not as long as asked for.
    assert samples[1].invalid == "too_long" or samples[1].finished
    assert samples[2].invalid is None
    (reply,) = replies(served, to_rate([(*long, Message("assistant", "Done."))], SCALE, seeds=(0,), scores=(0,)))
    assert reply.scores[0].invalid == reply.samples[0].invalid == "too_long"


def test_a_model_that_is_not_on_the_server(server):
    engine = OpenAIEngine.load(spec_of(server, path="smollm3"))
    with pytest.raises(UserError, match=r"model.path: 'smollm3' is not on .*; there is smollm2"):
        replies(engine, to_rate(ROWS, SCALE, seeds=(0,)))
    engine.close()


def test_a_server_that_is_killed_in_the_middle_costs_nothing_that_was_answered(server, tmp_path):
    tasks = [Task(f"t{n}", f"Write a long story about {n} cats.", origin="A") for n in range(12)]
    store, long = Store.open(str(tmp_path)), Sampling(1.0, 1.0, 24)
    spec = spec_of(server, concurrency=1, max_retries=1)

    def run() -> tuple[list[Completion], object]:
        models = Models()
        try:
            return complete(tasks, spec, long, seed=0, system_prompt=None, store=store, models=models)
        finally:
            models.keep_only([])

    before = server.answered()

    def kill_in_the_middle() -> None:
        while server.answered() < before + 3:
            time.sleep(0.02)
        server.kill()

    killer = threading.Thread(target=kill_in_the_middle, daemon=True)
    killer.start()
    with pytest.raises(UserError, match=r"did not answer after 2 tries .*batch were answered and are kept") as stopped:
        run()
    killer.join()
    kept = int(re.search(r"\((\d+) of 12 rows", str(stopped.value))[1])
    assert 3 <= kept < len(tasks)
    server.start()
    completions, work = run()
    assert server.answered() == len(tasks) - kept
    assert work.reused == kept
    assert all(completion.text for completion in completions)
