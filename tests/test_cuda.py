"""On a GPU: the numbers of the CPU, batches that equal single rows, real lack of memory, and the whole job.

``pytest -m gpu`` runs these; they need no model hub.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from engine_calls import CONVERSATIONS, PROMPTS, complete, dose_replies, observe, question, replies
from tiny_models import llama, tiny_model

from prefs.config import POSITIONS
from prefs.models.loading import Models, ModelSpec
from prefs.models.local.engine import LocalEngine
from prefs.models.types import Capture, Message, Question, Reply, Request, Sampling, Steering

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

SAMPLING = Sampling(1.0, 0.95, 8)
QUESTIONS = [question("anchored"), question("likert")]  # options of one token and of several


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> ModelSpec:
    return tiny_model(tmp_path_factory.mktemp("model"), llama())


def load(spec: ModelSpec, **changes: str) -> LocalEngine:
    engine = Models().get(dataclasses.replace(spec, **changes))
    assert isinstance(engine, LocalEngine)
    return engine


@pytest.fixture(scope="module")
def cpu(spec) -> LocalEngine:
    return load(spec)


@pytest.fixture(scope="module")
def cuda(spec) -> LocalEngine:
    return load(spec, device="cuda")


def observed(engine: LocalEngine, conversations=CONVERSATIONS, seeds=(0, 1, 2, 3, 4)) -> list[Reply]:
    """Everything there is, of all conversations and questions."""
    capture = Capture(tuple(range(5)), POSITIONS)
    found = observe(engine, conversations, QUESTIONS, SAMPLING, seeds=seeds, capture=capture)
    return [reply for row in found for reply in row]


def residuals(found: list[Reply]) -> torch.Tensor:
    """[vectors, layers, d_model] of all replies and positions."""
    return torch.stack([vectors for reply in found for vectors in reply.residuals.values()])


def masses(found: list[Reply]) -> np.ndarray:
    """Of all replies and options."""
    return np.concatenate([reply.scores[0].mass for reply in found])


def assert_same(found: list[Reply], expected: list[Reply]) -> None:
    """To the rounding of float32 in two orders of summing up, and every token of the samples."""
    np.testing.assert_allclose(masses(found), masses(expected), rtol=1e-3, atol=1e-12)
    torch.testing.assert_close(residuals(found), residuals(expected), rtol=1e-3, atol=1e-3)
    assert [reply.samples for reply in found] == [reply.samples for reply in expected]


def test_float32_gives_the_numbers_of_the_cpu(cpu, cuda):
    assert cuda.device.type == "cuda"
    assert_same(observed(cuda), observed(cpu))
    assert complete(cuda, PROMPTS, 3, SAMPLING) == complete(cpu, PROMPTS, 3, SAMPLING)
    choice = [Request(PROMPTS[0], Question("Yes or no?", ("Yes", "No")), choose=True)]
    assert replies(cuda, choice)[0].choice == replies(cpu, choice)[0].choice
    streams = [engine.residual_stream(CONVERSATIONS[1], 3).vectors for engine in (cuda, cpu)]
    torch.testing.assert_close(*streams, rtol=1e-3, atol=1e-3)


def test_doses_of_steering_give_the_numbers_of_the_cpu(cpu, cuda):
    vector = torch.randn(64, generator=torch.Generator().manual_seed(0))
    doses = [
        (),
        (Steering(2, vector, 2.0),),
        (Steering(2, vector, -3.0, "question"),),
        (Steering(1, vector, 1.0, "completion", "project_out"), Steering(3, vector, 1.5, "last")),
    ]
    found, expected = (
        dose_replies(engine, CONVERSATIONS, QUESTIONS[1], SAMPLING, doses, seeds=(0, 1)) for engine in (cuda, cpu)
    )
    for one, other in zip(chain(*found), chain(*expected), strict=True):
        np.testing.assert_allclose(one.scores[0].mass, other.scores[0].mass, rtol=1e-3, atol=1e-12)
        assert one.samples == other.samples
        assert one.nll == pytest.approx(other.nll, rel=1e-4)


def test_bfloat16_is_near_float32(spec, cpu):
    found, expected = (observed(e, seeds=()) for e in (load(spec, device="cuda", dtype="bfloat16"), cpu))
    apart = (residuals(found) - residuals(expected)).norm(dim=-1) / residuals(expected).norm(dim=-1)
    # The lower bound: not float32 after all.
    assert 0.001 < float(apart.max()) < 0.08
    logs = np.log(masses(found)), np.log(masses(expected))
    assert np.abs(logs[0] - logs[1]).max() < 0.3
    assert np.corrcoef(*logs)[0, 1] > 0.99


LONG = [(Message("user", "Count to " + "ten " * (1200 - 5 * n)), Message("assistant", "One. " * 40)) for n in range(64)]


def most_used(run: Callable[[], object]) -> int:
    """Bytes that a call holds at its height, beyond what is held before it."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


@contextmanager
def only(room: float) -> Iterator[None]:
    """So many bytes more than are held on the GPU now, for this process: a call that holds more cannot succeed."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + room) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_halves_where_memory_runs_out(cuda, prefs_log):
    expected: list[Reply] = []
    used = most_used(lambda: expected.extend(observed(cuda, LONG, seeds=(0,))))
    cuda._halving._logged = False
    with only(used * 0.6):
        assert_same(observed(cuda, LONG, seeds=(0,)), expected)
    assert "memory ran out with 64 conversations at a time" in prefs_log.text


JOB = (
    *("+experiment=steering", "model=hf", "model.name=tiny", "model.dtype=float32", "wandb.mode=disabled"),
    *("dataset.limit=24", "dataset.origins=[MATH,ALPACA]", "completer.max_new_tokens=12", "rating.seeds=[0,1]"),
    *("probe.folds=2", "steering.layers=[2]", "steering.coefficients=[-1,0,1]"),
)


def run_job(folder: Path, spec: ModelSpec, *arguments: str, **environment: str) -> str:
    """Run the main job in a folder of its own; what it printed."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "prefs.run", *JOB, f"model.path={spec.path}", *arguments],
        cwd=folder,
        env=os.environ | {"PREFS_STORE": str(folder / "store"), **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def table(folder: Path, name: str) -> pd.DataFrame:
    *_, newest = sorted(folder.glob(f"outputs/*/*/**/{name}.parquet"))
    return pd.read_parquet(newest)


def test_the_whole_job_finds_what_it_finds_on_the_cpu(spec, tmp_path):
    """Concept vectors, probes and steering; the second run on the GPU finds everything in the store."""
    gpu, cpu = tmp_path / "gpu", tmp_path / "cpu"
    first, again = run_job(gpu, spec, "model.device=cuda"), run_job(gpu, spec, "model.device=cuda")
    assert re.search(r"residual vectors: 0 in the store, [1-9]\d* computed", first)
    assert re.search(r"[1-9]\d* in the store, 0 computed", again)
    assert not re.search(r"[1-9]\d* computed", again)
    run_job(cpu, spec, "model.device=cpu", CUDA_VISIBLE_DEVICES="")
    for name in ("completions", "exact", "ratings", "probe", "steering_ratings"):
        pd.testing.assert_frame_equal(table(gpu, name), table(cpu, name), rtol=1e-2, atol=1e-3, obj=name)
