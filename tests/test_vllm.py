"""The vLLM engine for real, on a CPU, against the TransformerLens one in float32."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import TEMPLATES, template
from engine_calls import CONVERSATIONS, PROMPTS, complete, observe, question, replies
from scipy.stats import chisquare

from prefs.config import VllmConfig
from prefs.data.task import Task
from prefs.errors import ConfigError, UserError
from prefs.models.loading import Models
from prefs.models.prompts import encode_prompt
from prefs.models.types import Message, Question, Request, Sampling
from prefs.stages.complete import complete as completed
from prefs.stages.rate import rate
from prefs.store.table import Store

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

SAMPLING = Sampling(1.0, 1.0, 8)
TASKS = [Task(f"t{n}", f"Count to {n}{n % 2 * ', slowly'}.", origin="ABC"[n % 3]) for n in range(4)]
# Small enough that the prompts of a batch do not fit into one step, and that some are too long.
CONTEXT = 1024
ENGINE = {"kv_cache_memory_bytes": 2**29, "max_num_batched_tokens": CONTEXT}


@pytest.fixture(scope="module")
def spec(smollm2_fp32):
    vllm = VllmConfig(enforce_eager=True, engine=ENGINE)
    return dataclasses.replace(smollm2_fp32, backend="vllm", max_context=CONTEXT, batch_tokens=262_144, vllm=vllm)


@pytest.fixture(scope="module")
def served(spec):
    loaded = Models()
    yield loaded
    loaded.keep_only([])


@pytest.fixture(scope="module")
def engine(served, spec):
    return served.get(spec)


def masses(engine, questions, conversations=CONVERSATIONS) -> list[np.ndarray]:
    """By question, [conversations, options]."""
    found = observe(engine, conversations, questions)
    return [np.array([replies[number].scores[0].mass for replies in found]) for number in range(len(questions))]


def test_exact_masses_equal_transformer_lens_on_all_templates(engine, backend):
    ours, theirs = (masses(one, [question(name) for name in TEMPLATES]) for one in (engine, backend))
    for name, mass, expected in zip(TEMPLATES, ours, theirs, strict=True):
        np.testing.assert_allclose(mass, expected, rtol=1e-3, atol=1e-7, err_msg=name)


def test_options_that_open_others_and_many_options_equal_transformer_lens(engine, backend):
    """The second has more first tokens than vLLM gives log-probabilities for at once."""
    one_to_ten = Question("How likely is it, from 1 to 10?", tuple(str(n) for n in range(1, 11)))
    vocabulary = [backend.encoder.tokenizer.decode([token]) for token in range(1000, 2000)]
    words = tuple(dict.fromkeys(word[1:] for word in vocabulary if word[:1] == " " and word[1:].isalpha()))[:200]
    many = Question("Which word comes to mind?", words, "Answer: ")
    assert len({tail[0] for tail in encode_prompt(engine.encoder, CONVERSATIONS[0], many).tails}) > 128
    ours, theirs = (masses(one, [one_to_ten, many], CONVERSATIONS[:2]) for one in (engine, backend))
    for mass, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mass, expected, rtol=1e-3, atol=1e-9)
    assert ours[0][0, 0] > 0


def test_samples_follow_the_exact_distribution(engine):
    """First tokens of 160 seeds against the exact masses of the same question."""
    asked, one_token = question("anchored"), dataclasses.replace(SAMPLING, max_new_tokens=1)
    ((reply,),) = observe(engine, CONVERSATIONS[:1], [asked], one_token, seeds=tuple(range(160)))
    texts = [sample.text.strip() for sample in reply.samples.values()]
    counts = [texts.count(say) for say in asked.options]
    mass = np.array(reply.scores[0].mass)
    expected = 160 * np.array([*mass, 1 - mass.sum()])
    assert chisquare([*counts, 160 - sum(counts)], expected).pvalue > 1e-3


def test_the_likeliest_answers_and_choices_equal_those_of_transformer_lens(engine, backend):
    """With the token that ends them left out, and counted alike."""
    prompts, greedy = [*PROMPTS, (Message("user", "Say yes and nothing else."),)], Sampling(0.0, 1.0, 12)
    ours = complete(engine, prompts, 0, greedy)
    assert ours == complete(backend, prompts, 0, greedy)
    assert {sample.finished for sample in ours} == {True, False}
    good = Question("Was that a good answer? Say yes or no.", ("yes", "no"))
    asked = [Request(row, good, choose=True) for row in CONVERSATIONS]
    choices = [[reply.choice for reply in replies(one, asked)] for one in (engine, backend)]
    assert choices[0] == choices[1]


def rated(completions, spec, models, store, seeds=(0, 1), names=("anchored", "likert"), sampling=SAMPLING):
    wanted = {"exact": True, "capture": None, "system_prompt": None, "store": store, "models": models}
    return rate(completions, spec, {name: template(name) for name in names}, sampling, seeds=seeds, **wanted)


def measured(spec, models: Models, store: Store, tasks=TASKS, **options):
    sampling = Sampling(1.0, 1.0, 6)
    completions, work = completed(tasks, spec, sampling, seed=0, system_prompt=None, store=store, models=models)
    ratings = rated(completions, spec, models, store, **options)
    return completions, ratings, [work, *ratings.work]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"engine": {"nonsense": 1}}, "model.vllm.engine.nonsense"),
        ({"engine": {"dtype": "float16"}}, "model.vllm.engine.dtype"),
        ({"quantization": "nonsense"}, "model.vllm.quantization"),
        ({"engine": {"kv_cache_memory_bytes": 2**23}}, "model.max_context= smaller"),
    ],
)
def test_what_vllm_refuses_is_one_line_with_advice(spec, change, says, capfd):
    """The last is found by the engine's own process, which has loaded the model by then."""
    vllm = VllmConfig(enforce_eager=True, **change)
    with pytest.raises(UserError) as caught:
        Models().get(dataclasses.replace(spec, vllm=vllm))
    line = str(caught.value)
    assert "\n" not in line
    assert says in line
    assert capfd.readouterr() == ("", "")
    if not isinstance(caught.value, ConfigError):
        log = Path(line.rpartition("log: ")[2].rstrip(")"))
        assert "Traceback" in log.read_text()
        log.unlink()


def test_jobs_of_a_sweep_share_two_copies_and_leave_nothing_behind(tmp_path, models, smollm2_fp32):
    """As users run it: processes are spawned from the real main module, and what vLLM prints is kept from view."""
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps({"prompt": task.prompt}) + "\n" for task in TASKS))
    scratch = tempfile.mkdtemp(prefix="p", dir="/tmp")  # short: vLLM's sockets are in it
    changes = {"PREFS_STORE": str(tmp_path / "store"), "WANDB_MODE": "disabled", "TMPDIR": scratch}
    overrides = ["dataset=file", "dataset.path=tasks.jsonl", "completer.max_new_tokens=6", "rating.seeds=[0]"]
    overrides += ["template=anchored,likert", "capture=none", "probe=none", "wandb.mode=disabled"]
    overrides += ["model.backend=vllm", "model.dtype=float32", f"model.max_context={CONTEXT}"]
    overrides += ["model.vllm.enforce_eager=true", "model.vllm.data_parallel_size=2"]
    overrides += ["+model.vllm.engine.kv_cache_memory_bytes=536870912"]
    done = subprocess.run(
        [sys.executable, "-m", "prefs.run", "-m", *overrides],
        cwd=tmp_path,
        env={**os.environ, **changes},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    printed = done.stdout + done.stderr
    assert printed.count("Loading smollm2 (float32) with vllm") == 1
    assert "completions: 4 in the store, 0 computed" in printed
    for kind in ("sampled", "exact"):
        assert f"{kind} ratings, likert_qualitative: 0 in the store, 4 computed" in printed
    assert not [line for line in printed.splitlines() if "pid=" in line or "WARNING" in line or "vllm/" in line]
    assert not list(Path(scratch).glob("prefs-vllm-*"))
    # What the two found is what TransformerLens finds on the same completions.
    spec = dataclasses.replace(smollm2_fp32, max_context=CONTEXT)
    completions, theirs, work = measured(spec, models, Store.open(changes["PREFS_STORE"]), seeds=(0,))
    assert sum(stage.computed for stage in work) == 0
    ours = rated(completions, spec, models, Store.open(str(tmp_path / "other")), seeds=())
    for name in ("anchored", "likert"):
        np.testing.assert_allclose(theirs.ratings[name].mass, ours.ratings[name].mass, rtol=1e-3, atol=1e-7)


def test_an_engine_that_is_killed_ends_in_one_line_and_the_next_run_goes_on(tmp_path, engine, spec, served):
    """Most requests are answered by then, some will go on for long; what they brought is not asked for again."""
    store = Store.open(str(tmp_path))
    tasks = [Task(f"t{n}", f"Count to {n}.") for n in range(10)]
    completed(tasks, spec, Sampling(1.0, 1.0, 6), seed=0, system_prompt=None, store=store, models=served)
    llms = list(engine._workers._llms)
    core = engine._workers._processes[0].pid

    def kill_when_halfway():
        while sum(llm.llm_engine.get_num_unfinished_requests() for llm in llms) < 60:
            time.sleep(0.001)
        while sum(llm.llm_engine.get_num_unfinished_requests() for llm in llms) > 25:
            time.sleep(0.001)
        os.kill(core, signal.SIGKILL)

    killer = threading.Thread(target=kill_when_halfway)
    killer.start()
    asking = {"seeds": tuple(range(10)), "names": ("stated",), "sampling": Sampling(1.0, 1.0, 64)}
    with pytest.raises(UserError, match=r"vLLM's engine with smollm2 died \(killed, or out of memory") as caught:
        measured(spec, served, store, tasks, **asking)
    killer.join()
    Path(str(caught.value).rpartition("its log: ")[2].partition(")")[0]).unlink()
    _, found, (_, sampled, exact) = measured(spec, served, store, tasks, **asking)
    assert 0 < exact.reused < 10
    assert (sampled.reused, sampled.computed) == (10 * exact.reused, 100 - 10 * exact.reused)
    assert exact.computed == 10 - exact.reused
    assert np.isfinite(found.ratings["stated"].mass).all()
