"""Steering with cached keys and values, in padded batches, against one uncached pass of plain transformers a row."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack

import pytest
import torch
from tiny_models import gemma2, llama, plain_model, tiny_model

from prefs.errors import UserError
from prefs.models.loading import Models
from prefs.models.options import ask
from prefs.models.tokens import Message, Thinking
from prefs.models.types import Ask, CaptureRequest, Question, Sampling, Steering

CONVERSATIONS = [
    (Message("user", "Count to three, slowly, and then say why." * 3), Message("assistant", "1")),
    (Message("user", "Hi"), Message("assistant", "Hello! " * 12)),
]
QUESTIONS = [
    Question("Did you like it? Answer yes or no.", ("yes", "no"), "Answer: "),
    Question("How much did you like doing that task, from 1 to 10?", ("1", "10", "7 or so"), "I say "),
]
GREEDY = Sampling(0.0, 1.0, 4)
POSITIONS = ("last_prompt", "last_completion", "mean_completion", "rating")
D = 64


def vector(seed: int) -> torch.Tensor:
    return torch.randn(D, generator=torch.Generator().manual_seed(seed))


STEERINGS = {
    "all": (Steering(1, vector(0), 2.0),),
    "last": (Steering(2, vector(1), -3.0, "last"),),
    "completion": (Steering(0, vector(2), 2.5, "completion"),),
    "question": (Steering(3, vector(3), 2.0, "question"),),
    "project out": (Steering(1, vector(4), 1.0, "all", "project_out"),),
    "half out of the last": (Steering(4, vector(5), 0.5, "last", "project_out"),),
    "several": (
        Steering(1, vector(6), 1.5, "completion"),
        Steering(3, vector(7), -2.0, "last"),
        Steering(3, vector(8), 1.0, "all", "project_out"),
    ),
}
steered = pytest.mark.parametrize("steering", STEERINGS.values(), ids=STEERINGS)


@pytest.fixture(scope="module", params=[llama, gemma2], ids=["llama", "gemma2"])
def both(request, tmp_path_factory):
    spec = tiny_model(tmp_path_factory.mktemp("model"), request.param())
    return Models().get(spec), plain_model(spec)


def token_range(each: Steering, prompt: int, spans) -> tuple[int, int]:
    return {"all": (0, 10**9), "last": (prompt - 1, 10**9), "completion": spans[-2], "question": spans[-1]}[each.at]


@torch.inference_mode()
def run_plain(plain, ids, ranges: list[tuple[Steering, tuple[int, int]]]):
    """Logits [width, vocabulary] and residual streams [layers, width, d_model] of a whole row, hooked by hand."""
    streams: dict[int, torch.Tensor] = {}

    def hook(layer):
        def steer(module, inputs, output):
            x = (output[0] if isinstance(output, tuple) else output).clone()
            for each, (start, end) in ranges:
                if each.layer == layer:
                    part = x[:, start:end]
                    u = each.vector / each.vector.norm()
                    along = (part * u).sum(-1, keepdim=True) * u
                    change = each.vector if each.kind == "add" else -along
                    x[:, start:end] = part + each.coefficient * change
            streams[layer] = x[0]
            return (x, *output[1:]) if isinstance(output, tuple) else x

        return steer

    with ExitStack() as stack:
        for layer, block in enumerate(plain.model.layers):
            stack.callback(block.register_forward_hook(hook(layer)).remove)
        logits = plain(torch.tensor([ids]), use_cache=False).logits[0]
    return logits, torch.stack([streams[layer] for layer in sorted(streams)])


def greedy(plain, ids, ranges, stops, count) -> list[int]:
    """Tokens by running the whole row anew for each."""
    drawn: list[int] = []
    for _ in range(count):
        token = int(run_plain(plain, [*ids, *drawn], ranges)[0][-1].argmax())
        if token in stops:
            break
        drawn.append(token)
    return drawn


@steered
def test_scores_samples_and_vectors_equal_an_uncached_pass(both, steering):
    backend, plain = both
    layers = tuple(range(5))
    asks = [Ask(question, seeds=(0,)) for question in QUESTIONS]
    observed = backend.observe(CONVERSATIONS, asks, GREEDY, CaptureRequest(layers, POSITIONS), steering)
    for conversation, observation in zip(CONVERSATIONS, observed, strict=True):
        for at, question in enumerate(QUESTIONS):
            asked = ask(backend.encoder, conversation, question)
            ranges = [(each, token_range(each, len(asked.ids), asked.spans)) for each in steering]
            streams = run_plain(plain, asked.ids, ranges)[1]
            answer = observation.answers[at]
            torch.testing.assert_close(answer.residual, streams[:, -1], atol=1e-4, rtol=1e-4)
            drawn = greedy(plain, asked.ids, ranges, backend._stops, GREEDY.max_new_tokens)
            assert answer.samples[0].text == backend.encoder.tokenizer.decode(drawn, skip_special_tokens=True)
            masses = dict(zip(question.says, answer.scores[0].mass, strict=True))
            for say, tail in zip(question.says, asked.tails, strict=True):
                if say == "1":  # its mass is what "10" leaves of it
                    continue
                log_probs = run_plain(plain, asked.ids + tail, ranges)[0].log_softmax(dim=-1)
                places = range(len(asked.ids) - 1, len(asked.ids) + len(tail) - 1)
                expected = sum(float(log_probs[place, token]) for place, token in zip(places, tail, strict=True))
                assert float(torch.tensor(masses[say]).log()) == pytest.approx(expected, abs=1e-3)
            start, end = asked.spans[-2]
            expected = {
                "last_prompt": streams[:, start - 1],
                "last_completion": streams[:, end - 1],
                "mean_completion": streams[:, start:end].mean(dim=1),
            }
            for position, vectors in expected.items():
                torch.testing.assert_close(observation.residuals[position], vectors, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["all", "last", "completion", "several"])
def test_completions_equal_uncached_ones(both, name):
    backend, plain = both
    prompts = [row[:1] for row in CONVERSATIONS]
    samples = backend.complete(prompts, 0, GREEDY, STEERINGS[name])
    texts = []
    for prompt in prompts:
        ids = backend.encoder.encode(prompt, answer="").ids
        generated = [(len(ids), 10**9), ()]
        ranges = [(each, token_range(each, len(ids), generated)) for each in STEERINGS[name]]
        drawn = greedy(plain, ids, ranges, backend._stops, GREEDY.max_new_tokens)
        texts.append(backend.encoder.tokenizer.decode(drawn, skip_special_tokens=True))
    assert [sample.text for sample in samples] == texts
    if name != "completion":  # which begins to act with the second token
        assert texts != [sample.text for sample in backend.complete(prompts, 0, GREEDY)]


@steered
def test_a_coefficient_of_zero_is_no_steering_to_the_bit(both, steering):
    backend, _ = both
    nothing = [dataclasses.replace(each, coefficient=0.0) for each in steering]
    asks, capture = [Ask(QUESTIONS[0], seeds=(0, 1))], CaptureRequest((0, 4), POSITIONS)
    zero = backend.observe(CONVERSATIONS, asks, Sampling(1.0, 1.0, 4), capture, nothing)
    plain = backend.observe(CONVERSATIONS, asks, Sampling(1.0, 1.0, 4), capture)
    for one, other in zip(zero, plain, strict=True):
        assert one.answers[0].scores == other.answers[0].scores
        assert one.answers[0].samples == other.answers[0].samples
        assert one.answers[0].residual.equal(other.answers[0].residual)
        assert all(one.residuals[name].equal(vectors) for name, vectors in other.residuals.items())


def test_nothing_is_left_of_a_direction_that_is_taken_out(both):
    backend, _ = both
    direction = vector(9)
    steering = [Steering(2, direction, kind="project_out")]
    (found,) = backend.observe(CONVERSATIONS[:1], [], GREEDY, CaptureRequest((1, 2), ("last_prompt",)), steering)
    before, after = found.residuals["last_prompt"] @ (direction / direction.norm())
    assert abs(float(before)) > 0.1
    assert abs(float(after)) < 1e-4


def test_steering_leaves_the_model_as_it_was(both):
    backend, _ = both
    first = backend.observe(CONVERSATIONS, [Ask(QUESTIONS[0])], GREEDY)
    backend.observe(CONVERSATIONS, [Ask(QUESTIONS[0])], GREEDY, steering=STEERINGS["several"])
    assert backend.observe(CONVERSATIONS, [Ask(QUESTIONS[0])], GREEDY) == first


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Steering(5, vector(0)), "no layer 5; the model has 0 to 4"),
        (Steering(-1, vector(0)), "no layer -1"),
        (Steering(0, torch.ones(63)), r"shape \[63\]; this model's have \[64\]"),
        (Steering(0, torch.full((D,), torch.nan)), "NaN or infinity"),
        (Steering(0, torch.zeros(D), kind="project_out"), "zero, which is no direction"),
        (Steering(0, vector(0), at="question"), "no 'question' to steer at here; there are all, last, completion"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(both, wrong, message):
    with pytest.raises(UserError, match=message):
        both[0].complete([CONVERSATIONS[0][:1]], 0, GREEDY, [wrong])


def test_a_thought_is_steered_the_same_when_it_is_drawn_and_when_it_is_answered_after(tmp_path):
    """The answer's pass runs the thought anew: both must count the newest tokens from the prompt before it."""
    spec = dataclasses.replace(
        tiny_model(tmp_path, llama()), thinking=Thinking(open="", close=".", gap="", max_tokens=5, force_close=True)
    )
    backend, plain = Models().get(spec), plain_model(spec)
    steering = (Steering(2, vector(1), -3.0, "last"), Steering(0, vector(2), 2.0, "question"))
    observed = backend.observe(CONVERSATIONS, [Ask(QUESTIONS[0])], GREEDY, CaptureRequest((4,), ("rating",)), steering)
    for conversation, observation in zip(CONVERSATIONS, observed, strict=True):
        score = observation.answers[0].scores[0]
        asked = ask(backend.encoder, conversation, QUESTIONS[0], score.thought)
        opened = backend.encoder.open_thought((*conversation, Message("user", QUESTIONS[0].text)))
        ranges = [(each, token_range(each, len(opened), asked.spans)) for each in steering]
        assert asked.ids[: len(opened)] == opened
        assert len(asked.ids) > len(opened) + 2
        logits, streams = run_plain(plain, asked.ids, ranges)
        torch.testing.assert_close(observation.answers[0].residual[0], streams[4, -1], atol=1e-4, rtol=1e-4)
        p = logits[-1].softmax(dim=-1)
        assert score.mass == pytest.approx([float(p[tail[0]]) for tail in asked.tails], rel=1e-3)
