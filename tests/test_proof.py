"""What the engine proves of itself holds for real models, and fails where something is broken on purpose."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from engine_calls import dose_replies, observe
from tiny_models import SIZES, gemma2, llama, plain_model, tiny_model
from transformers import CohereConfig, GraniteConfig

from prefs.errors import UserError
from prefs.models.loading import Models
from prefs.models.local import steering as local_steering
from prefs.models.local.proof import Proof
from prefs.models.local.residuals import Recorder
from prefs.models.local.steering import BatchSteering
from prefs.models.prompts import encode_prompt
from prefs.models.types import Capture, Message, Question, Sampling, Steering

ROWS = [
    (Message("user", "Count to three, slowly, and then say why." * 3), Message("assistant", "1")),
    (Message("user", "Name a river."), Message("assistant", "Hello! " * 12)),
]
QUESTION = Question("Did you like it?", ("yes", "not at all"), "Answer: ")
SAMPLING = Sampling(1.0, 1.0, 2)
LAST = Capture((1, 4), ("last_prompt", "rating"))
AT = ("all", "last", "completion", "question")


def granite():
    """Its embeddings are tied, and its logits divided."""
    return GraniteConfig(**SIZES, tie_word_embeddings=True, logits_scaling=7.0, residual_multiplier=0.4)


def cohere():
    """Its blocks run attention and MLP side by side, its logits are multiplied, its norm has a mean."""
    return CohereConfig(**SIZES, logit_scale=0.3)


FAMILIES = {"llama": llama, "gemma2": gemma2, "granite": granite, "cohere": cohere}


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES)
def spec(request, tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"), request.param())


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return Models().get(tiny_model(tmp_path_factory.mktemp("llama"), llama()))


@pytest.fixture
def engine(loaded, monkeypatch):
    """One that has proven nothing yet."""
    monkeypatch.setattr(loaded, "proof", Proof(loaded))
    monkeypatch.setattr(loaded, "recorder", Recorder)
    return loaded


def captured(engine, capture=LAST, scores=(0,)):
    return observe(engine, ROWS, [QUESTION], SAMPLING, scores=scores, capture=capture)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_log_probabilities_are_rebuilt_as_plain_transformers_has_them(spec, dtype):
    """By any family's own norm, output layer, soft cap and scale; in bfloat16 within what the proof allows."""
    engine, plain = Models().get(dataclasses.replace(spec, dtype=dtype)), plain_model(spec)
    for row, (reply,) in zip(ROWS, captured(engine), strict=True):  # which would raise
        vector = reply.residuals["rating"][-1:]
        rebuilt = engine.passes.logits(vector.to(getattr(torch, dtype))).log_softmax(dim=-1)[0]
        prompt = encode_prompt(engine.encoder, row, QUESTION)
        expected = plain(torch.tensor([prompt.ids])).logits[0, -1].log_softmax(dim=-1)
        bound = 1e-4 if dtype == "float32" else 0.3
        torch.testing.assert_close(rebuilt, expected, rtol=bound / 10, atol=bound)
        p = sum(float(rebuilt[path[0]].exp()) for path, option in prompt.beginnings.items() if option == 0)
        assert reply.scores[0].mass[0] == pytest.approx(p, rel=1e-4)
    spent = engine.usage()
    for at in AT:
        steering = (Steering(1, torch.ones(64), 1.0, at), Steering(4, torch.ones(64), 1.0, at, "project_out"))
        observe(engine, ROWS[:1], [QUESTION], SAMPLING, steering=steering)
    assert len(engine.proof._steered) == 8
    assert engine.usage().since(spent).prompt_tokens < 5 * len(prompt.ids) * 2, "proofs are no part of what is spent"


class OneTokenLate(Recorder):
    def __init__(self, layers, ranges, lengths, *, stops):
        late = [{name: (start - 1, end - 1) for name, (start, end) in own.items()} for own in ranges]
        super().__init__(layers, late, lengths, stops=stops)


class AnotherLayer(Recorder):
    def hooks(self):
        (first, keep), *rest = super().hooks()
        return [(max(first - 1, 0), keep) if first == 3 else (first, keep), *[(n - (n == 3), k) for n, k in rest]]


class Scaled(Recorder):
    """A thousandth more, in the last layer alone."""

    def vectors(self):
        by_row = super().vectors()
        for own in by_row:
            for vectors in own.values():
                vectors[-1] *= 1.001
        return by_row


@pytest.mark.parametrize(
    ("broken", "layer"), [(OneTokenLate, 0), (AnotherLayer, 3), (Scaled, 4)], ids=["token", "layer", "scale"]
)
def test_vectors_that_are_not_what_the_blocks_gave_stop_the_run(engine, broken, layer):
    engine.recorder = broken
    with pytest.raises(UserError, match=rf"captured vectors at layer {layer} cannot be trusted.*'Hi'") as stopped:
        captured(engine)
    assert "\n" not in str(stopped.value)
    assert "capture=none" in str(stopped.value)
    with pytest.raises(UserError):  # nor is it taken for proven afterwards
        observe(engine, ROWS, [None], capture=Capture((0,), ("last_prompt",)))


def test_the_run_s_own_rows_are_rebuilt_in_batches_one_two_four(engine, monkeypatch):
    compared = []
    compare = engine.proof._compare
    monkeypatch.setattr(engine.proof, "_compare", lambda *given: (compared.append(len(given[0])), compare(*given)))
    for _ in range(9):
        captured(engine)
    assert compared == [2] * 5  # at load, and in batches 1, 2, 4 and 8
    captured(engine, Capture((1,), ("rating",)))
    captured(engine, scores=())
    assert len(compared) == 5  # neither has what it takes
    engine.proof._batches, engine.recorder = 0, OneTokenLate
    with pytest.raises(UserError, match=r"layer 4 cannot be trusted.*'Count to three, slowly.*', 'Name a river\.'"):
        captured(engine)


def twice(run):
    return lambda change, where, tensor, hook: run(
        dataclasses.replace(change, coefficient=2 * change.coefficient), where, tensor, hook
    )


def everywhere(run):
    return lambda change, where, tensor, hook: run(change, torch.ones_like(where), tensor, hook)


def nowhere(run):
    return lambda change, where, tensor, hook: tensor


def one_late(run):
    return lambda change, where, tensor, hook: run(change, where.roll(1, dims=1), tensor, hook)


def a_little(run):
    return lambda change, where, tensor, hook: run(change, where, tensor, hook) * (1 + 1e-4)


@pytest.mark.parametrize("at", ["last", "completion", "question"])
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (twice, r"token \d+ of \d+ should be moved by steering at"),
        (everywhere, r"token \d+ of \d+ should stay as it is"),
        (nowhere, r"token \d+ of \d+ should be moved"),
        (one_late, r"token \d+ of \d+ should (be moved|stay as it is)"),
        (a_little, "coefficient 0 changes the residual stream after layer 2"),
    ],
    ids=["twice", "everywhere", "nowhere", "one late", "a little"],
)
def test_steering_that_does_something_else_stops_the_run(engine, monkeypatch, broken, message, at):
    if (broken, at) == (one_late, "last"):
        pytest.skip("of one column, as the last token's, none is late")
    monkeypatch.setattr(local_steering, "_steer", broken(local_steering._steer))
    doses = [(Steering(2, torch.ones(64), 1.0, at),), ()]
    with pytest.raises(UserError, match=f"tiny-llama: steering does not do what it should: .*{message}") as stopped:
        dose_replies(engine, ROWS, QUESTION, SAMPLING, doses)
    assert "\n" not in str(stopped.value)


def test_a_generated_token_that_is_not_steered_and_a_lost_layer_are_noticed(engine, monkeypatch):
    hooks = BatchSteering.hooks
    with monkeypatch.context() as patched:
        patched.setattr(BatchSteering, "hooks", lambda self, t, real: [] if t.shape[1] == 1 else hooks(self, t, real))
        with pytest.raises(UserError, match="should be moved by steering at last"):
            observe(engine, ROWS, [QUESTION], SAMPLING, steering=(Steering(2, torch.ones(64), 1.0, "last"),))
    with monkeypatch.context() as patched:
        patched.setattr(
            BatchSteering, "hooks", lambda self, *given: [hook for hook in hooks(self, *given) if hook[0] != 3]
        )
        two = (Steering(1, torch.ones(64)), Steering(3, torch.ones(64)))
        with pytest.raises(UserError, match="after layer 3, token 0 of"):
            observe(engine, ROWS, [QUESTION], SAMPLING, steering=two)
    observe(engine, ROWS, [QUESTION], SAMPLING, steering=two)


def test_a_family_whose_log_probabilities_cannot_be_rebuilt_runs_and_says_so(engine, monkeypatch, prefs_log):
    def refuse(hidden):
        raise ValueError("hidden states of another kind")

    monkeypatch.setattr(engine.passes, "logits", refuse)
    captured(engine)
    assert "no log-probabilities can be rebuilt from its vectors (hidden states of another kind)" in prefs_log.text
