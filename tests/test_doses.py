"""One question under many doses: the same as one `observe` a dose, and what they share is run once."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from contextlib import ExitStack, contextmanager
from itertools import chain

import pytest
import torch
from engine_calls import dose_replies, observe
from tiny_models import SIZES, gemma2, gemma3, llama, plain_model, tiny_model
from transformers import GPTNeoXConfig, Qwen3Config

from prefs.config import ThinkingConfig
from prefs.models.loading import Models
from prefs.models.prompts import encode_prompt
from prefs.models.types import Capture, Message, Question, Sampling, Steering

CONVERSATIONS = [
    (Message("user", "Count to three, slowly, and then say why." * 3), Message("assistant", "1")),
    (Message("user", "Hi"), Message("assistant", "Hello! " * 12)),
    (Message("user", "Say nothing at all, please."), Message("assistant", "")),
]
WORDS = Question("Did you like it?", ("Strongly agree", "Strongly disagree", "no"), "Answer: ")
ONE_TOKEN = Question("Did you like it? Answer yes or no.", ("yes", "no"), "Answer: ")
DIGITS = Question("How much did you like doing that task, from 1 to 10?", ("1", "10", "7 or so"), "I say ")
# Of few tokens: of 49,152 about as likely, rounding chooses another one now and then.
DRAWN = Sampling(0.3, 0.3, 3)
SEEDS = (0, 3)
D = 64
AT = ("all", "last", "completion", "question")


def qwen3():
    return Qwen3Config(**SIZES)


def neox():
    """Its blocks give tuples."""
    sizes = {name: value for name, value in SIZES.items() if name not in ("num_key_value_heads", "head_dim")}
    return GPTNeoXConfig(**sizes)


def vector(seed: int, width: int = D) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(
    scope="module", params=[llama, gemma2, gemma3, qwen3, neox], ids=["llama", "gemma2", "gemma3", "qwen3", "neox"]
)
def engine(request, tmp_path_factory):
    return Models().get(tiny_model(tmp_path_factory.mktemp("model"), request.param()))


@pytest.fixture(scope="module", params=[llama, gemma2], ids=["llama", "gemma2"])
def both(request, tmp_path_factory):
    spec = tiny_model(tmp_path_factory.mktemp("model"), request.param())
    return Models().get(spec), plain_model(spec)


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("llama"), llama())


@pytest.fixture
def llama_engine(tiny_llama):
    engine = Models().get(tiny_llama)
    assert engine.passes.shares_blocks  # which is tried out here, so that no test counts its passes
    return engine


def same_as_observed(engine, doses, question=WORDS, batch=CONVERSATIONS, *, scores=(0,), seeds=SEEDS):
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


@torch.inference_mode()
def plain_nll(plain, prompt, dose) -> float:
    """By one uncached pass of transformers over one row."""
    (start, end), hooks = prompt.spans.completion, []
    ranges = {"all": (0, 10**9), "completion": (start, end), "question": prompt.spans.question, "last": (10**9, 10**9)}
    for change in dose:

        def steer(module, inputs, output, change=change):
            first, last = ranges[change.at]
            output = output.clone()
            output[:, first:last] += change.coefficient * change.vector
            return output

        hooks.append(plain.model.layers[change.layer].register_forward_hook(steer))
    log_probs = plain(torch.tensor([prompt.ids]), use_cache=False).logits[0].log_softmax(dim=-1)
    for hook in hooks:
        hook.remove()
    return -sum(float(log_probs[place - 1, prompt.ids[place]]) for place in range(start, end)) / (end - start)


@pytest.mark.parametrize("at", AT)
def test_the_likelihood_of_completions(both, monkeypatch, at):
    monkeypatch.setattr("prefs.models.local.doses.TOKENS_AT_ONCE", 7)
    engine, plain = both
    doses = [(), (Steering(0, vector(0), 1.0, at),), (Steering(4, vector(1), 2.0, at), Steering(2, vector(2), 2.0, at))]
    shapes: Counter[int] = Counter()
    head = engine.bridge.original_model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, inputs, output: shapes.update([output.shape[:-1].numel()]))
    found = dose_replies(engine, CONVERSATIONS, ONE_TOKEN, DRAWN, doses)
    handle.remove()
    assert max(shapes) <= 7  # no logits are kept but those that are read
    for dose, replies in zip(doses, found, strict=True):
        for row in (0, 1):
            prompt = encode_prompt(engine.encoder, CONVERSATIONS[row], ONE_TOKEN)
            assert replies[row].nll == pytest.approx(plain_nll(plain, prompt, dose), rel=1e-4)
        assert replies[2].nll is None  # an empty completion
    assert (found[1][1].nll == found[0][1].nll) == (at in ("question", "last"))
    bare = dose_replies(engine, CONVERSATIONS, ONE_TOKEN, DRAWN, doses[1:], likelihood=False)
    assert [reply.nll for replies in bare for reply in replies] == [None] * 6


@contextmanager
def columns_run(engine):
    """For every block that is run, the columns of its passes."""
    columns: dict[int, list[int]] = {}

    def counting(layer):
        def count(module, args, kwargs):
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            columns.setdefault(layer, []).append(hidden.shape[1])

        return count

    with ExitStack() as stack:
        for layer, block in enumerate(engine.bridge.blocks):
            attention = block.original_component.self_attn
            stack.callback(attention.register_forward_pre_hook(counting(layer), with_kwargs=True).remove)
        yield columns


def test_lower_blocks_and_the_prefix_are_run_once(llama_engine):
    row = CONVERSATIONS[1]
    prompt = encode_prompt(llama_engine.encoder, row, ONE_TOKEN)
    assert {len(tail) for tail in prompt.tails} == {1}
    first = prompt.spans.question[0]
    rest = len(prompt.ids) - first
    doses = [(Steering(2, vector(n), 1.0 + n, "question"),) for n in range(5)]
    with columns_run(llama_engine) as columns:
        dose_replies(llama_engine, [row], ONE_TOKEN, DRAWN, doses)
    assert columns == {layer: [first, rest] for layer in (0, 1, 2)} | {layer: [first, *[rest] * 5] for layer in (3, 4)}


def test_logits_that_are_not_finite_are_named_and_spare_other_rows(engine):
    huge = (Steering(2, vector(0), 1e39, "completion"),)
    found, other = dose_replies(engine, CONVERSATIONS, WORDS, DRAWN, [huge, ()], seeds=SEEDS)
    for row in (0, 1):
        assert [(score.mass, score.invalid) for score in found[row].scores.values()] == [(None, "not_finite")]
        assert list(found[row].samples) == list(SEEDS)
        for sample in found[row].samples.values():
            assert (sample.text, sample.tokens, sample.finished, sample.invalid) == (None, 0, True, "not_finite")
        assert found[row].nll is None
    expected = [reply for (reply,) in observe(engine, CONVERSATIONS, [WORDS], DRAWN, seeds=SEEDS)]
    # Of an empty completion nothing is steered.
    for reply, observed in ((found[2], expected[2]), *zip(other, expected, strict=True)):
        assert reply.samples == observed.samples
        assert reply.scores[0].mass == pytest.approx(observed.scores[0].mass, rel=1e-3, abs=1e-9)


def nearly_same(found, expected, samples=True):
    for one, other in zip(chain(*found), chain(*expected), strict=True):
        assert one.nll == (None if other.nll is None else pytest.approx(other.nll, rel=1e-4))
        if samples:
            assert one.samples == other.samples
            assert one.scores[0].mass == pytest.approx(other.scores[0].mass, rel=1e-3, abs=1e-9)


def test_halves_where_memory_runs_out(llama_engine, monkeypatch):
    doses = [(Steering(1, vector(0), 1.0),), (Steering(3, vector(1), 1.0, "question"),)]
    expected = dose_replies(llama_engine, CONVERSATIONS, WORDS, DRAWN, doses, seeds=SEEDS)
    own = llama_engine.passes.logits

    def logits(hidden):
        if len(hidden) > 20 and not failed:
            failed.append(len(hidden))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(hidden)

    failed: list[int] = []
    monkeypatch.setattr(llama_engine.passes, "logits", logits)
    found = dose_replies(llama_engine, CONVERSATIONS, WORDS, DRAWN, doses, seeds=SEEDS)
    assert failed
    nearly_same(found, expected)


def test_a_model_that_thinks_runs_each_dose_by_itself(tiny_llama):
    thinking = ThinkingConfig(open="", close=".", gap="", max_tokens=5, force_close=True)
    thinker, engine = Models().get(dataclasses.replace(tiny_llama, thinking=thinking)), Models().get(tiny_llama)
    doses = [(Steering(2, vector(1), -3.0, "last"),), (Steering(0, vector(2), 2.0),)]
    found = same_as_observed(thinker, doses, ONE_TOKEN, scores=SEEDS)
    assert found[0][0].scores[0].thought is not None
    nearly_same(found, dose_replies(engine, CONVERSATIONS, ONE_TOKEN, DRAWN, doses), samples=False)
    huge = [(Steering(2, vector(1), 1e39),)]
    (replies,) = dose_replies(thinker, CONVERSATIONS, ONE_TOKEN, DRAWN, huge, seeds=SEEDS, scores=SEEDS)
    assert [score.invalid for reply in replies for score in reply.scores.values()] == ["not_finite"] * 6
    assert [reply.nll for reply in replies] == [None] * 3


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
