"""Rating under steering through the store, on a tiny real model; and what is made of it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from conftest import template
from prefs.concepts.card import SavedVectors
from tiny_models import llama, tiny_model

from prefs.config import CoherenceConfig, SteeringConfig, SteeringControlsConfig
from prefs.data.task import Task
from prefs.errors import UserError
from prefs.models.loading import Models
from prefs.models.types import Message, Question, Request, Sampling, Steering
from prefs.probes.probe import Site
from prefs.stages.dose_response import arrows, dose_response
from prefs.stages.records import Completion
from prefs.stages.steer import Arrow, Dose, Responses, steer
from prefs.store.table import Store

COMPLETIONS = [Completion(Task(f"t{n}", "Count. " * (n + 1), "ABC"[n % 3]), f"One{n}" * (n % 4)) for n in range(6)]
COMPLETIONS.append(Completion(Task("none", "What?", "A"), None))
SAMPLING = Sampling(1.0, 1.0, 3)
COEFFICIENTS = (-2.0, 0.0, 1.0, 4.0)


def vector(seed: int) -> torch.Tensor:
    return torch.randn(64, generator=torch.Generator().manual_seed(seed))


ARROWS = [
    Arrow("liking", "concept", 2, vector(0), 0.5),
    Arrow("random 0", "random", 2, vector(1), 0.5),
    Arrow("liking", "concept", 3, vector(2), 0.5),
    Arrow("ablation", "ablation", 2, vector(0), 0.5),
]


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return dataclasses.replace(tiny_model(tmp_path_factory.mktemp("model"), llama()), batch_tokens=700)


@pytest.fixture(scope="module")
def models() -> Models:
    return Models()


@pytest.fixture
def store(tmp_path) -> Store:
    return Store.open(str(tmp_path))


def run(spec, models, store, completions=COMPLETIONS, found=ARROWS, coefficients=COEFFICIENTS, seeds=(0,), at="all"):
    return steer(
        completions, spec, template("stated"), found, coefficients, SAMPLING,
        at=at, seeds=seeds, system_prompt=None, store=store, models=models,
    )  # fmt: skip


def test_the_numbers_are_those_of_the_engine_and_nothing_is_computed_twice(spec, models, store, monkeypatch):
    responses, work = run(spec, models, store)
    assert [dose.coefficient for dose in responses.doses] == [0, -2, 1, 4, -2, 1, 4, -2, 1, 4, 1]
    assert (work.reused, work.computed) == (0, 66)
    assert responses.asked.tolist() == [True] * 6 + [False]
    each = COMPLETIONS[3]
    stated = template("stated")
    question = Question(stated.question, stated.says, spec.prefill)
    turns = (Message("user", each.task.prompt), Message("assistant", each.text))
    for dose, steering in (
        (2, (Steering(2, vector(0), 1.0),)),
        (10, (Steering(2, vector(0), 1.0, "all", "project_out"),)),
    ):
        ((_, reply),) = models.get(spec).run([Request(turns, question, SAMPLING, scores=(0,), steering=steering)])
        np.testing.assert_allclose(responses.mass[dose, 3], reply.scores[0].mass, rtol=1e-3, atol=1e-6)
    assert np.isnan(responses.nll[0, 0])  # an empty completion
    assert np.isfinite(responses.nll[:, 1]).all()
    monkeypatch.setattr(models, "get", lambda spec: pytest.fail("a model was asked for"))
    again, work = run(spec, models, store)
    assert (work.reused, work.computed) == (66, 0)
    np.testing.assert_array_equal(again.mass, responses.mass)
    np.testing.assert_array_equal(again.sampled, responses.sampled)


def test_what_a_killed_run_wrote_is_kept_and_the_result_the_same(spec, models, store, tmp_path, monkeypatch):
    whole, _ = run(spec, models, store)
    other = Store.open(str(tmp_path / "other"))
    engine = models.get(spec)
    run_batch, calls = engine.run, []

    def second_call_fails(requests):
        calls.append(requests)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run_batch(requests)

    monkeypatch.setattr(engine, "run", second_call_fails)
    with pytest.raises(KeyboardInterrupt):
        run(spec, models, other)
    monkeypatch.undo()
    resumed, work = run(spec, models, other)
    assert 0 < work.reused < 66
    np.testing.assert_allclose(resumed.mass, whole.mass, rtol=1e-5)


def test_coefficients_that_overflow_are_named_and_excluded(spec, models, store):
    responses, _ = run(spec, models, store, found=ARROWS[:1], coefficients=(-1.0, 1.0, 3e38))
    found = report(responses, ARROWS[:1])
    assert not responses.finite[3, :6].any()
    last = found.doses.iloc[-1]
    assert not last["coherent"]
    assert last["reason"] == "logits are not finite for 6 of 6 tasks"
    assert np.isnan(last["mean"])
    assert found.slopes["doses"].tolist() == [3]
    assert np.isfinite(found.slopes["slope"]).all()
    said = " ".join(found.remarks)
    assert "Steering by liking at layer 2: coefficients 3e+38 leave no coherent model (logits are not finite" in said
    assert "1 left out" in said


def test_a_question_that_does_not_fit_is_left_out(spec, models, store):
    stated, engine = template("stated"), models.get(spec)
    question = Question(stated.question, stated.says, spec.prefill)
    turns = [(Message("user", each.task.prompt), Message("assistant", each.text)) for each in COMPLETIONS[:6]]
    lengths = sorted(engine.tokens(Request(messages, question, SAMPLING, scores=(0,))) for messages in turns)
    short = dataclasses.replace(spec, max_context=lengths[3] + SAMPLING.max_new_tokens)
    responses, _ = run(short, models, store, found=ARROWS[:1], coefficients=(1.0, 2.0))
    assert 0 < responses.asked.sum() < 6
    assert len(report(responses, ARROWS[:1]).ratings) == 3 * responses.asked.sum()


def test_steering_that_does_not_fit_the_model(spec, models, store):
    with pytest.raises(UserError, match="no layer 9"):
        run(spec, models, store, found=[Arrow("x", "concept", 9, vector(0), 1.0)])
    with pytest.raises(UserError, match="a vector of shape"):
        run(spec, models, store, found=[Arrow("x", "concept", 1, torch.ones(5), 1.0)])


def report(responses, found, **allowed):
    return dose_response(
        COMPLETIONS, responses, (1, 2, 3, 4, 5), found,
        at="all", coherence=CoherenceConfig(**allowed), bootstrap=100, seed=0,
    )  # fmt: skip


def simulated(slopes, *, seed=0, n=40, coefficients=(-1.0, 1.0, 2.0)):
    """Responses of a rater whose mean moves by so much a unit of each arrow's coefficient; all mass on options."""
    found = [Arrow(f"v{at}", "concept" if at == 0 else "random", 1, torch.ones(4), 0.1) for at in range(len(slopes))]
    doses = [Dose(None), *(Dose(arrow, x) for arrow in found for x in coefficients)]
    base = np.random.default_rng(seed).uniform(2.6, 3.4, size=n)
    mass = np.zeros((len(doses), n, 5))
    for at, dose in enumerate(doses):
        slope = 0 if dose.arrow is None else slopes[found.index(dose.arrow)]
        mean = base + slope * dose.coefficient
        mass[at, :, 0], mass[at, :, 4] = 0.8 * (5 - mean) / 4, 0.8 * (mean - 1) / 4
    shape = (len(doses), n)
    responses = Responses(
        tuple(doses),
        mass,
        np.ones(shape, dtype=bool),
        np.ones(shape),
        np.full((*shape, 2), 3.0),
        np.ones(n, dtype=bool),
    )
    completions = [Completion(Task(f"t{at}", "?", "A"), "!") for at in range(n)]
    return completions, responses, found


def test_slopes_and_deltas_are_those_that_were_put_in():
    completions, responses, found = simulated([0.3, -0.4, 0.01])
    each = dose_response(
        completions, responses, (1, 2, 3, 4, 5), found, at="all", coherence=CoherenceConfig(), bootstrap=100, seed=0
    )
    assert each.slopes["slope"].tolist() == pytest.approx([0.3, -0.4, 0.01])
    assert each.slopes["delta_plus"].tolist() == pytest.approx([0.3, -0.4, 0.01])
    assert each.slopes["delta_minus"].tolist() == pytest.approx([-0.3, 0.4, -0.01])
    assert each.doses["norm_multiple"].tolist()[:4] == pytest.approx([0, -0.1, 0.1, 0.2])
    assert each.remarks == [
        "Layer 1: 1 of 2 random and shuffled vectors of the same norm move the rating at least as much as v0, so its"
        " slope says nothing about the concept."
    ]


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (lambda r: r.mass.__setitem__(3, r.mass[3] / 4), "valid mass 0.20, unsteered 0.80"),
        (lambda r: r.nll.__setitem__(3, 2.0), "perplexity × 2.72"),
        (lambda r: r.sampled.__setitem__((3, slice(0, 20)), np.nan), "50% more of the sampled answers invalid"),
    ],
)
def test_a_model_that_no_longer_answers_is_not_a_steered_one(broken, reason):
    completions, responses, found = simulated([0.3])
    broken(responses)
    each = dose_response(
        completions, responses, (1, 2, 3, 4, 5), found, at="all", coherence=CoherenceConfig(), bootstrap=100, seed=0
    )
    assert each.doses["coherent"].tolist() == [True, True, True, False]
    assert each.doses["reason"].iloc[3] == reason
    assert each.slopes["doses"].tolist() == [3]
    assert any(f"coefficients 2 leave no coherent model ({reason})" in said for said in each.remarks)


def test_a_few_invalid_answers_of_few_are_chance():
    completions, responses, found = simulated([0.3], n=4)
    responses.sampled[3, 0] = np.nan
    each = dose_response(
        completions,
        responses,
        (1, 2, 3, 4, 5),
        found,
        at="question",
        coherence=CoherenceConfig(),
        bootstrap=100,
        seed=0,
    )
    assert each.doses["coherent"].all()
    assert "cannot change" in each.remarks[-1]


def test_arrows_have_the_vector_s_norm_in_its_unit():
    sites = (Site(1, "last_prompt"), Site(2, "last_prompt"))
    saved = SavedVectors("liking", sites, torch.stack([3 * torch.ones(16), torch.zeros(16)]), torch.tensor([48.0, 7.0]))
    controls = SteeringControlsConfig(random=2, shuffled=1, probes=True, ablation=True)
    config = SteeringConfig(name="x", vector="folder", position="last_prompt", controls=controls)
    found, without = arrows(config, [1], saved, None, None)
    assert [(arrow.name, arrow.control) for arrow in found] == [
        ("liking", "concept"), ("random 0", "random"), ("random 1", "random"), ("ablation", "ablation"),
    ]  # fmt: skip
    assert [float(arrow.vector.norm()) for arrow in found] == pytest.approx([12.0] * 4)
    assert found[0].relative == pytest.approx(0.25)
    assert len(without) == 2
    in_norms, _ = arrows(dataclasses.replace(config, unit="norm"), [1], saved, None, None)
    assert float(in_norms[0].vector.norm()) == pytest.approx(48)
    assert in_norms[0].relative == pytest.approx(1)
    torch.testing.assert_close(arrows(config, [1], saved, None, None)[0][1].vector, found[1].vector)
    with pytest.raises(UserError, match="the vector of liking at last_prompt, layer 2 is zero"):
        arrows(config, [2], saved, None, None)
    with pytest.raises(UserError, match="no vector at last_prompt, layer 5"):
        arrows(config, [5], saved, None, None)
