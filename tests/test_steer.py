"""Rating under steering through the store, on a tiny real model; and what is made of it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from conftest import template
from tiny_models import llama, tiny_model

from prefs.concepts.export import SavedVectors
from prefs.config import CoherenceConfig, SteeringConfig, SteeringControlsConfig
from prefs.data.task import Task
from prefs.errors import UserError
from prefs.models.loading import Models
from prefs.models.types import Message, Question, Request, Sampling, Steering
from prefs.probes.probe import Site
from prefs.stages.dose_response import dose_response, dose_result
from prefs.stages.records import Completion
from prefs.stages.steer import Dose, Responses, SteeringVector, steer
from prefs.stages.steering_vectors import steering_vectors
from prefs.store.table import Store

COMPLETIONS = [Completion(Task(f"t{n}", "Count. " * (n + 1), "ABC"[n % 3]), f"One{n}" * (n % 4)) for n in range(6)]
COMPLETIONS.append(Completion(Task("none", "What?", "A"), None))
SAMPLING = Sampling(1.0, 1.0, 3)
COEFFICIENTS = (-2.0, 0.0, 1.0, 4.0)


def vector(seed: int) -> torch.Tensor:
    return torch.randn(64, generator=torch.Generator().manual_seed(seed))


VECTORS = [
    SteeringVector("liking", "concept", 2, vector(0), 0.5),
    SteeringVector("random 0", "random", 2, vector(1), 0.5),
    SteeringVector("liking", "concept", 3, vector(2), 0.5),
    SteeringVector("ablation", "ablation", 2, vector(0), 0.5),
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


def run(
    spec, models, store, completions=COMPLETIONS, steered=VECTORS, coefficients=COEFFICIENTS, seeds=(0,), tokens="all"
):
    return steer(
        completions, spec, template("stated"), steered, coefficients, SAMPLING,
        tokens=tokens, seeds=seeds, system_prompt=None, store=store, models=models,
    )  # fmt: skip


def test_the_numbers_are_those_of_the_engine_and_nothing_is_computed_twice(spec, models, store, monkeypatch):
    responses, work = run(spec, models, store)
    assert [dose.coefficient for dose in responses.doses] == [0, -2, 1, 4, -2, 1, 4, -2, 1, 4, 1]
    assert (work.reused, work.computed) == (0, 66)
    assert responses.asked.tolist() == [True] * 6 + [False]
    completion = COMPLETIONS[3]
    stated = template("stated")
    question = Question(stated.question, stated.says, spec.prefill)
    turns = (Message("user", completion.task.prompt), Message("assistant", completion.text))
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


def test_coefficients_that_overflow_are_named_and_excluded(spec, models, store):
    responses, _ = run(spec, models, store, steered=VECTORS[:1], coefficients=(-1.0, 1.0, 3e38))
    reported = report(responses, VECTORS[:1])
    assert not responses.finite[3, :6].any()
    last = reported.doses.iloc[-1]
    assert not last["coherent"]
    assert last["reason"] == "logits are not finite for 6 of 6 tasks"
    assert np.isnan(last["mean"])
    assert reported.slopes["doses"].tolist() == [3]
    assert np.isfinite(reported.slopes["slope"]).all()
    remark = " ".join(reported.remarks)
    assert "Steering by liking at layer 2: coefficients 3e+38 leave no coherent model (logits are not finite" in remark
    assert "1 left out" in remark


def test_steering_that_does_not_fit_the_model(spec, models, store):
    with pytest.raises(UserError, match="no layer 9"):
        run(spec, models, store, steered=[SteeringVector("x", "concept", 9, vector(0), 1.0)])
    with pytest.raises(UserError, match="a vector of shape"):
        run(spec, models, store, steered=[SteeringVector("x", "concept", 1, torch.ones(5), 1.0)])


def report(responses, steered, completions=COMPLETIONS, tokens="all"):
    return dose_response(
        completions, responses, (1, 2, 3, 4, 5), steered,
        tokens=tokens, coherence=CoherenceConfig(), bootstrap=100, seed=0,
    )  # fmt: skip


def simulated(slopes, *, seed=0, n=40, coefficients=(-1.0, 1.0, 2.0)):
    """Responses of a rater whose mean moves by so much a unit of each vector's coefficient; all mass on options."""
    controls = ["concept", *["random"] * (len(slopes) - 1)]
    steered = [SteeringVector(f"v{number}", control, 1, torch.ones(4), 0.1) for number, control in enumerate(controls)]
    doses = [Dose(None), *(Dose(vector, x) for vector in steered for x in coefficients)]
    moved = np.array([0.0, *(slope * x for slope in slopes for x in coefficients)])
    mean = np.random.default_rng(seed).uniform(2.6, 3.4, size=n) + moved[:, None]
    mass = np.zeros((*mean.shape, 5))
    mass[..., 0], mass[..., 4] = 0.8 * (5 - mean) / 4, 0.8 * (mean - 1) / 4
    responses = Responses(
        tuple(doses),
        mass,
        np.ones(mean.shape, dtype=bool),
        np.ones(mean.shape),
        np.full((*mean.shape, 2), 3.0),
        np.ones(n, dtype=bool),
    )
    completions = [Completion(Task(f"t{number}", "?", "A"), "!") for number in range(n)]
    return completions, responses, steered


def test_slopes_and_deltas_are_those_that_were_put_in():
    completions, responses, steered = simulated([0.3, -0.4, 0.01])
    reported = report(responses, steered, completions)
    assert reported.slopes["slope"].tolist() == pytest.approx([0.3, -0.4, 0.01])
    assert reported.slopes["delta_plus"].tolist() == pytest.approx([0.3, -0.4, 0.01])
    assert reported.slopes["delta_minus"].tolist() == pytest.approx([-0.3, 0.4, -0.01])
    assert reported.doses["norm_multiple"].tolist()[:4] == pytest.approx([0, -0.1, 0.1, 0.2])
    assert reported.remarks == [
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
    completions, responses, steered = simulated([0.3])
    broken(responses)
    reported = report(responses, steered, completions)
    assert reported.doses["coherent"].tolist() == [True, True, True, False]
    assert reported.doses["reason"].iloc[3] == reason
    assert reported.slopes["doses"].tolist() == [3]
    assert any(f"coefficients 2 leave no coherent model ({reason})" in remark for remark in reported.remarks)


def test_a_slope_says_of_how_many_tasks_it_is():
    completions, responses, steered = simulated([0.3, -0.1])
    responses.mass[1, :7] = np.nan  # at coefficient -1 of the concept's vector
    responses.mass[3, 5:10] = 0.0  # at its last
    reported = report(responses, steered, completions)
    assert reported.slopes[["n", "left_out", "slope_n"]].to_numpy().tolist() == [[30, 10, 30], [40, 0, 40]]
    assert reported.slopes["slope"].iloc[0] == pytest.approx(0.3)
    assert reported.slopes["delta_minus_n"].tolist() == [33, 40]
    assert reported.doses["n"].tolist() == [40, 33, 40, 35, 40, 40, 40]
    assert reported.remarks[0] == (
        "Steering by v0 at layer 1: its slope is of 30 tasks; 10 of 40 have no rating at some of its doses and are left"
        " out."
    )
    shown = dose_result(reported, "title", "unit").views[0]
    assert [row[1] for row in shown.rows] == ["30/40", "40"]


def test_steering_vectors_have_the_vector_s_norm_in_its_unit():
    sites = (Site(1, "last_prompt"), Site(2, "last_prompt"))
    saved = SavedVectors("liking", sites, torch.stack([3 * torch.ones(16), torch.zeros(16)]), torch.tensor([48.0, 7.0]))
    controls = SteeringControlsConfig(random=2, shuffled=1, probes=True, ablation=True)
    config = SteeringConfig(name="x", vector="folder", position="last_prompt", controls=controls)
    steered, without = steering_vectors(config, [1], saved, None, None)
    assert [(vector.name, vector.control) for vector in steered] == [
        ("liking", "concept"), ("random 0", "random"), ("random 1", "random"), ("ablation", "ablation"),
    ]  # fmt: skip
    assert [float(vector.vector.norm()) for vector in steered] == pytest.approx([12.0] * 4)
    assert steered[0].relative == pytest.approx(0.25)
    assert len(without) == 2
    in_norms, _ = steering_vectors(dataclasses.replace(config, unit="norm"), [1], saved, None, None)
    assert float(in_norms[0].vector.norm()) == pytest.approx(48)
    assert in_norms[0].relative == pytest.approx(1)
    torch.testing.assert_close(steering_vectors(config, [1], saved, None, None)[0][1].vector, steered[1].vector)
    with pytest.raises(UserError, match="the vector of liking at last_prompt, layer 2 is zero"):
        steering_vectors(config, [2], saved, None, None)
    with pytest.raises(UserError, match="no vector at last_prompt, layer 5"):
        steering_vectors(config, [5], saved, None, None)
