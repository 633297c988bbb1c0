"""Steering with cached keys and values, in padded batches, against one uncached pass of plain transformers a row.

And one question under many doses: the same as one run a dose, with what they share run once.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from contextlib import ExitStack
from functools import partial
from itertools import chain

import pytest
import torch
from engine_calls import complete, dose_replies, masses_of, observe
from tiny_models import SIZES, gemma2, gemma3, llama, plain_model, tiny_model
from transformers import GPTNeoXConfig, Qwen3Config

from prefs.config import ThinkingConfig
from prefs.errors import UserError
from prefs.models.loading import Models
from prefs.models.prompts import encode_prompt
from prefs.models.types import Capture, Message, Question, Sampling, Steering

CONVERSATIONS = [
    (Message("user", "Count to three, slowly, and then say why." * 3), Message("assistant", "1")),
    (Message("user", "Hi"), Message("assistant", "Hello! " * 12)),
]
WITH_EMPTY = [*CONVERSATIONS, (Message("user", "Say nothing at all, please."), Message("assistant", ""))]
WORDS = Question("Did you like it?", ("Strongly agree", "Strongly disagree", "no"), "Answer: ")
ONE_TOKEN = Question("Did you like it? Answer yes or no.", ("yes", "no"), "Answer: ")
DIGITS = Question("How much did you like doing that task, from 1 to 10?", ("1", "10", "7 or so"), "I say ")
QUESTIONS = [ONE_TOKEN, DIGITS]
# Of few tokens: of 49,152 about as likely, rounding chooses another one now and then.
DRAWN = Sampling(0.3, 0.3, 3)
SEEDS = (0, 3)
AT = ("all", "last", "completion", "question")
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


Ranges = list[tuple[Steering, tuple[int, int]]]


def token_ranges(steering, prompt: int, spans) -> Ranges:
    """What each steering steers in a row whose prompt has so many tokens."""
    named = {"all": (0, 10**9), "last": (prompt - 1, 10**9), "completion": spans[-2], "question": spans[-1]}
    return [(change, named[change.at]) for change in steering]


@torch.inference_mode()
def run_plain(plain, ids, ranges: Ranges):
    """Logits [width, vocabulary] and residual streams [layers, width, d_model] of a whole row, hooked by hand."""
    streams: dict[int, torch.Tensor] = {}

    def hook(layer):
        def steer(module, inputs, output):
            x = (output[0] if isinstance(output, tuple) else output).clone()
            for change, (start, end) in ranges:
                if change.layer == layer:
                    part = x[:, start:end]
                    u = change.vector / change.vector.norm()
                    along = (part * u).sum(-1, keepdim=True) * u
                    x[:, start:end] = part + change.coefficient * (change.vector if change.kind == "add" else -along)
            streams[layer] = x[0]
            return (x, *output[1:]) if isinstance(output, tuple) else x

        return steer

    with ExitStack() as stack:
        for layer, block in enumerate(plain.model.layers):
            stack.callback(block.register_forward_hook(hook(layer)).remove)
        logits = plain(torch.tensor([ids]), use_cache=False).logits[0]
    return logits, torch.stack([streams[layer] for layer in sorted(streams)])


def p_after(plain, ranges: Ranges, ids) -> torch.Tensor:
    return run_plain(plain, ids, ranges)[0][-1].softmax(dim=-1)


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
    engine, plain = both
    capture = Capture(tuple(range(5)), POSITIONS)
    observed = observe(engine, CONVERSATIONS, QUESTIONS, GREEDY, seeds=(0,), capture=capture, steering=steering)
    for conversation, replies in zip(CONVERSATIONS, observed, strict=True):
        for question, reply in zip(QUESTIONS, replies, strict=True):
            prompt = encode_prompt(engine.encoder, conversation, question)
            ranges = token_ranges(steering, len(prompt.ids), prompt.spans.turns)
            streams = run_plain(plain, prompt.ids, ranges)[1]
            drawn = greedy(plain, prompt.ids, ranges, engine.decoder.stops.tokens, GREEDY.max_new_tokens)
            assert reply.samples[0].text == engine.encoder.tokenizer.decode(drawn, skip_special_tokens=True)
            if conversation is CONVERSATIONS[1]:  # a pass for each beginning takes its time
                expected = masses_of(prompt, partial(p_after, plain, ranges))
                assert reply.scores[0].mass == pytest.approx(expected, rel=1e-3, abs=1e-9)
            start, end = prompt.spans.completion
            expected = {
                "last_prompt": streams[:, start - 1],
                "last_completion": streams[:, end - 1],
                "mean_completion": streams[:, start:end].mean(dim=1),
                "rating": streams[:, -1],
            }
            for position, vectors in expected.items():
                torch.testing.assert_close(reply.residuals[position], vectors, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["all", "last", "completion", "several"])
def test_completions_equal_uncached_ones(both, name):
    engine, plain = both
    prompts = [row[:1] for row in CONVERSATIONS]
    samples = complete(engine, prompts, 0, GREEDY, STEERINGS[name])
    texts = []
    for prompt in prompts:
        ids = engine.encoder.encode(prompt, answer="").ids
        ranges = token_ranges(STEERINGS[name], len(ids), [(len(ids), 10**9), ()])
        drawn = greedy(plain, ids, ranges, engine.decoder.stops.tokens, GREEDY.max_new_tokens)
        texts.append(engine.encoder.tokenizer.decode(drawn, skip_special_tokens=True))
    assert [sample.text for sample in samples] == texts
    if name != "completion":  # which begins to act with the second token
        assert texts != [sample.text for sample in complete(engine, prompts, 0, GREEDY)]


@steered
def test_a_coefficient_of_zero_is_no_steering_to_the_bit_and_none_is_left_behind(both, steering):
    engine, _ = both

    def observed(*changes: Steering):
        wanted = {"seeds": (0, 1), "capture": Capture((0, 4), POSITIONS), "steering": changes}
        return [reply for (reply,) in observe(engine, CONVERSATIONS, QUESTIONS[:1], Sampling(1.0, 1.0, 4), **wanted)]

    plain = observed()
    assert [reply.scores for reply in observed(*steering)] != [reply.scores for reply in plain]
    for zero in (observed(*(dataclasses.replace(change, coefficient=0.0) for change in steering)), observed()):
        for one, other in zip(zero, plain, strict=True):
            assert (one.scores, one.samples) == (other.scores, other.samples)
            assert all(one.residuals[name].equal(vectors) for name, vectors in other.residuals.items())


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
        complete(both[0], [CONVERSATIONS[0][:1]], 0, GREEDY, (wrong,))


def test_a_thought_is_steered_the_same_when_it_is_drawn_and_when_it_is_answered_after(tmp_path):
    """The answer's pass runs the thought anew: both must count the newest tokens from the prompt before it."""
    spec = dataclasses.replace(
        tiny_model(tmp_path, llama()),
        thinking=ThinkingConfig(open="", close=".", gap="", max_tokens=5, force_close=True),
    )
    engine, plain = Models().get(spec), plain_model(spec)
    steering = (Steering(2, vector(1), -3.0, "last"), Steering(0, vector(2), 2.0, "question"))
    capture = Capture((4,), ("rating",))
    observed = observe(engine, CONVERSATIONS, QUESTIONS[:1], GREEDY, capture=capture, steering=steering)
    for conversation, (reply,) in zip(CONVERSATIONS, observed, strict=True):
        prompt = encode_prompt(engine.encoder, conversation, QUESTIONS[0], reply.scores[0].thought)
        opened = engine.encoder.open_thought((*conversation, Message("user", QUESTIONS[0].text)))
        assert prompt.ids[: len(opened)] == opened
        assert len(prompt.ids) > len(opened) + 2
        _, streams = run_plain(plain, prompt.ids, token_ranges(steering, len(opened), prompt.spans.turns))
        torch.testing.assert_close(reply.residuals["rating"][0], streams[4, -1], atol=1e-4, rtol=1e-4)
        ranges = token_ranges(steering, len(opened), prompt.spans.turns)
        expected = masses_of(prompt, partial(p_after, plain, ranges))
        assert reply.scores[0].mass == pytest.approx(expected, rel=1e-3)


# Doses


def qwen3():
    return Qwen3Config(**SIZES)


def neox():
    """Its blocks give tuples."""
    sizes = {name: value for name, value in SIZES.items() if name not in ("num_key_value_heads", "head_dim")}
    return GPTNeoXConfig(**sizes)


@pytest.fixture(
    scope="module", params=[llama, gemma2, gemma3, qwen3, neox], ids=["llama", "gemma2", "gemma3", "qwen3", "neox"]
)
def engine(request, tmp_path_factory):
    return Models().get(tiny_model(tmp_path_factory.mktemp("model"), request.param()))


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("llama"), llama())


@pytest.fixture
def llama_engine(tiny_llama):
    engine = Models().get(tiny_llama)
    assert engine.passes.shares_blocks  # which is tried out here, so that no test counts its passes
    return engine


def same_as_observed(engine, doses, question=WORDS, batch=WITH_EMPTY, *, scores=(0,), seeds=SEEDS):
    """Compare with one run a dose that captures, and so shares nothing with the others; give what was found."""
    found = dose_replies(engine, batch, question, DRAWN, doses, scores=scores, seeds=seeds)
    alone = {"scores": scores, "seeds": seeds, "capture": Capture((0,), ("rating",))}
    for dose, replies in zip(doses, found, strict=True):
        observed = observe(engine, batch, [question], DRAWN, steering=dose, **alone)
        for reply, (expected,) in zip(replies, observed, strict=True):
            assert reply.samples == expected.samples
            assert list(reply.scores) == list(expected.scores)
            for seed, score in expected.scores.items():
                assert reply.scores[seed].mass == pytest.approx(score.mass, rel=1e-3, abs=1e-9)
    return found


def every_kind(at: str) -> list[tuple[Steering, ...]]:
    """Doses at the first, a middle and the last layer, of both kinds; one at two layers; and none."""
    two = (Steering(3, vector(5), 2.0, at), Steering(1, vector(6), 1.0, at, "project_out"))
    doses = [
        (Steering(0, vector(0), 2.0, at),),
        (Steering(0, vector(0), 1.0, at, "project_out"),),
        (Steering(2, vector(2), -1.0, at),),
        (Steering(4, vector(4), 2.0, at),),
        (Steering(4, vector(4), 0.5, at, "project_out"),),
    ]
    return [*doses, two, ()]


@pytest.mark.parametrize("at", AT)
def test_the_same_as_one_pass_a_dose(both, at):
    same_as_observed(both[0], every_kind(at), seeds=(0,))


@pytest.mark.parametrize(
    ("question", "wanted"), [(DIGITS, {"seeds": ()}), (WORDS, {"scores": ()}), (WORDS, {"seeds": ()})]
)
def test_options_that_open_one_another_samples_alone_and_scores_alone(llama_engine, question, wanted):
    same_as_observed(llama_engine, [dose for at in AT for dose in every_kind(at)[1:3]], question, **wanted)


def test_doses_that_begin_to_steer_at_different_tokens(engine):
    assert engine.passes.shares_blocks
    doses = [dose for at in AT for dose in every_kind(at)[1:3]]
    mixed = (Steering(2, vector(8), 2.0, "last"), Steering(3, vector(9), 1.5, "completion"))
    same_as_observed(engine, [*doses, mixed, ()], seeds=(0,))


@pytest.mark.parametrize("at", AT)
def test_the_likelihood_of_completions(both, monkeypatch, at):
    monkeypatch.setattr("prefs.models.local.doses.TOKENS_AT_ONCE", 7)
    engine, plain = both
    doses = [(), (Steering(0, vector(0), 1.0, at),), (Steering(4, vector(1), 2.0, at), Steering(2, vector(2), 2.0, at))]
    shapes: Counter[int] = Counter()
    head = engine.bridge.original_model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, inputs, output: shapes.update([output.shape[:-1].numel()]))
    found = dose_replies(engine, WITH_EMPTY, ONE_TOKEN, DRAWN, doses)
    handle.remove()
    assert max(shapes) <= 7  # no logits are kept but those that are read
    for dose, replies in zip(doses, found, strict=True):
        for row in (0, 1):
            prompt = encode_prompt(engine.encoder, WITH_EMPTY[row], ONE_TOKEN)
            ranges = token_ranges(dose, len(prompt.ids), prompt.spans.turns)
            log_probs = run_plain(plain, prompt.ids, ranges)[0].log_softmax(dim=-1)
            start, end = prompt.spans.completion
            expected = -sum(float(log_probs[place - 1, prompt.ids[place]]) for place in range(start, end))
            assert replies[row].nll == pytest.approx(expected / (end - start), rel=1e-4)
        assert replies[2].nll is None  # an empty completion
    assert (found[1][1].nll == found[0][1].nll) == (at in ("question", "last"))
    bare = dose_replies(engine, WITH_EMPTY, ONE_TOKEN, DRAWN, doses[1:], likelihood=False)
    assert [reply.nll for replies in bare for reply in replies] == [None] * 6


def test_lower_blocks_and_the_prefix_are_run_once(llama_engine):
    prompt = encode_prompt(llama_engine.encoder, CONVERSATIONS[1], ONE_TOKEN)
    assert {len(tail) for tail in prompt.tails} == {1}
    first = prompt.spans.question[0]
    rest = len(prompt.ids) - first
    doses = [(Steering(2, vector(n), 1.0 + n, "question"),) for n in range(5)]
    columns: dict[int, list[int]] = {layer: [] for layer in range(5)}
    with ExitStack() as stack:
        for layer, block in enumerate(llama_engine.bridge.blocks):

            def count(module, args, kwargs, layer=layer):
                hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                columns[layer].append(hidden.shape[1])

            attention = block.original_component.self_attn
            stack.callback(attention.register_forward_pre_hook(count, with_kwargs=True).remove)
        dose_replies(llama_engine, CONVERSATIONS[1:], ONE_TOKEN, DRAWN, doses)
    assert columns == {layer: [first, rest] for layer in (0, 1, 2)} | {layer: [first, *[rest] * 5] for layer in (3, 4)}


def test_logits_that_are_not_finite_are_named_and_spare_other_rows(engine):
    huge = (Steering(2, vector(0), 1e39, "completion"),)
    found, other = dose_replies(engine, WITH_EMPTY, WORDS, DRAWN, [huge, ()], seeds=SEEDS)
    for row in (0, 1):
        assert [(score.mass, score.invalid) for score in found[row].scores.values()] == [(None, "not_finite")]
        assert list(found[row].samples) == list(SEEDS)
        for sample in found[row].samples.values():
            assert (sample.text, sample.tokens, sample.finished, sample.invalid) == (None, 0, True, "not_finite")
        assert found[row].nll is None
    expected = [reply for (reply,) in observe(engine, WITH_EMPTY, [WORDS], DRAWN, seeds=SEEDS)]
    # Of an empty completion nothing is steered.
    for reply, observed in ((found[2], expected[2]), *zip(other, expected, strict=True)):
        assert reply.samples == observed.samples
        assert reply.scores[0].mass == pytest.approx(observed.scores[0].mass, rel=1e-3, abs=1e-9)


def test_a_model_that_thinks_runs_each_dose_by_itself(tiny_llama):
    thinking = ThinkingConfig(open="", close=".", gap="", max_tokens=5, force_close=True)
    thinker, engine = Models().get(dataclasses.replace(tiny_llama, thinking=thinking)), Models().get(tiny_llama)
    doses = [(Steering(2, vector(1), -3.0, "last"),), (Steering(0, vector(2), 2.0),)]
    found = same_as_observed(thinker, doses, ONE_TOKEN, scores=SEEDS)
    assert found[0][0].scores[0].thought is not None
    direct = dose_replies(engine, WITH_EMPTY, ONE_TOKEN, DRAWN, doses)
    for one, other in zip(chain(*found), chain(*direct), strict=True):
        assert one.nll == (None if other.nll is None else pytest.approx(other.nll, rel=1e-4))


def test_a_family_whose_blocks_share_more_than_the_residual_stream(tiny_llama, monkeypatch):
    """It is found out by trying: here, the last block reads what the first one saw."""
    engine = Models().get(tiny_llama)
    first, last = (engine.bridge.blocks[layer].original_component for layer in (0, 4))
    seen: list[torch.Tensor] = []
    run_first, run_last = first.mlp.forward, last.mlp.forward

    def see(hidden):
        seen[:] = [hidden]
        return run_first(hidden)

    def read(hidden):
        return run_last(hidden + (seen[0] if seen and seen[0].shape == hidden.shape else 0))

    monkeypatch.setattr(first.mlp, "forward", see)
    monkeypatch.setattr(last.mlp, "forward", read)
    found = same_as_observed(engine, [(Steering(2, vector(0), 2.0),), (Steering(2, vector(0), 2.0, "question"),), ()])
    assert not engine.passes.shares_blocks
    assert all(math.isfinite(reply.nll) for replies in found for reply in replies[:2])
