"""One question under many doses: the same as one `observe` a dose, and what they share is run once."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import pytest
import torch
from tiny_models import SIZES, gemma2, gemma3, llama, plain_model, tiny_model
from transformers import GPTNeoXConfig, Qwen3Config

from prefs.errors import UserError
from prefs.models.loading import Models
from prefs.models.options import ask
from prefs.models.tokens import Message, Thinking
from prefs.models.types import Ask, Question, Sampling, Steering

CONVERSATIONS = [
    (Message("user", "Count to three, slowly, and then say why." * 3), Message("assistant", "1")),
    (Message("user", "Hi"), Message("assistant", "Hello! " * 12)),
    (Message("user", "Say nothing at all, please."), Message("assistant", "")),
]
WORDS = Question("Did you like it?", ("Strongly agree", "Strongly disagree", "no"), "Answer: ")
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
def backend(request, tmp_path_factory):
    return Models().get(tiny_model(tmp_path_factory.mktemp("model"), request.param()))


@pytest.fixture(scope="module", params=[llama, gemma2], ids=["llama", "gemma2"])
def both(request, tmp_path_factory):
    spec = tiny_model(tmp_path_factory.mktemp("model"), request.param())
    return Models().get(spec), plain_model(spec)


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("llama"), llama())


@pytest.fixture
def llama_backend(tiny_llama):
    backend = Models().get(tiny_llama)
    assert backend.passes.shares_blocks  # which is tried out here, so that no test counts its passes
    return backend


def same_as_observed(backend, doses, question=WORDS, batch=CONVERSATIONS, *, scores=(0,), seeds=SEEDS):
    """Compare with one `observe` a dose; give what was found."""
    asked = Ask(question, seeds, scores)
    found = backend.observe_doses(batch, asked, DRAWN, doses)
    assert len(found) == len(doses)
    for dose, of_dose in zip(doses, found, strict=True):
        expected = backend.observe(batch, [asked], DRAWN, steering=dose)
        for dosed, observation in zip(of_dose, expected, strict=True):
            (answer,) = observation.answers
            assert dosed.answer.samples == answer.samples
            assert list(dosed.answer.scores) == list(answer.scores)
            for seed, score in answer.scores.items():
                assert dosed.answer.scores[seed].mass == pytest.approx(score.mass, rel=1e-3, abs=1e-9)
    return found


def every_kind(at: str) -> list[list[Steering]]:
    """Doses at the first, a middle and the last layer, of both kinds; one at two layers; and none."""
    doses = [
        [Steering(0, vector(0), 2.0, at)],
        [Steering(0, vector(0), 1.0, at, "project_out")],
        [Steering(2, vector(2), -1.0, at)],
        [Steering(4, vector(4), 2.0, at)],
        [Steering(4, vector(4), 0.5, at, "project_out")],
    ]
    two = [Steering(3, vector(5), 2.0, at), Steering(1, vector(6), 1.0, at, "project_out")]
    return [*doses, two, []]


@pytest.mark.parametrize("at", AT)
def test_the_same_as_one_pass_a_dose(both, at):
    same_as_observed(both[0], every_kind(at), seeds=(0,))


@pytest.mark.parametrize("at", AT)
def test_options_that_open_one_another(llama_backend, at):
    same_as_observed(llama_backend, every_kind(at)[1:4], DIGITS, seeds=())


def test_doses_that_begin_to_steer_at_different_tokens(backend):
    assert backend.passes.shares_blocks
    doses = [dose for at in AT for dose in every_kind(at)[1:3]]
    mixed = [Steering(2, vector(8), 2.0, "last"), Steering(3, vector(9), 1.5, "completion")]
    same_as_observed(backend, [*doses, mixed, []], seeds=(0,))


def test_samples_alone_and_scores_alone(llama_backend):
    doses = every_kind("all")[:3]
    same_as_observed(llama_backend, doses, scores=())
    same_as_observed(llama_backend, doses, seeds=())


def test_the_embedded_model(backend_fp32):
    doses = [
        [Steering(layer, vector(layer, 576), coefficient, at)]
        for layer, coefficient, at in [(14, 1.0, "all"), (29, 3.0, "question"), (0, 0.2, "last")]
    ]
    same_as_observed(backend_fp32, doses, DIGITS, CONVERSATIONS[:2], seeds=(0,))


@pytest.fixture
def backend_fp32(models, smollm2_fp32):
    return models.get(smollm2_fp32)


@torch.inference_mode()
def plain_nll(plain, asked, dose) -> float:
    """By one uncached pass of transformers over one row."""
    (start, end), hooks = asked.spans[-2], []
    places = {"all": (0, 10**9), "completion": (start, end), "question": asked.spans[-1], "last": (10**9, 10**9)}
    for each in dose:

        def steer(module, inputs, output, each=each):
            first, last = places[each.at]
            output = output.clone()
            output[:, first:last] += each.coefficient * each.vector
            return output

        hooks.append(plain.model.layers[each.layer].register_forward_hook(steer))
    log_probs = plain(torch.tensor([asked.ids]), use_cache=False).logits[0].log_softmax(dim=-1)
    for hook in hooks:
        hook.remove()
    return -sum(float(log_probs[at - 1, asked.ids[at]]) for at in range(start, end)) / (end - start)


@pytest.mark.parametrize("at", AT)
def test_the_likelihood_of_completions(both, monkeypatch, at):
    monkeypatch.setattr("prefs.models.local.doses.TOKENS_AT_ONCE", 7)
    backend, plain = both
    doses = [[], [Steering(0, vector(0), 1.0, at)], [Steering(4, vector(1), 2.0, at), Steering(2, vector(2), 2.0, at)]]
    found = backend.observe_doses(CONVERSATIONS, Ask(WORDS), DRAWN, doses)
    for dose, of_dose in zip(doses, found, strict=True):
        for row in (0, 1):
            asked = ask(backend.encoder, CONVERSATIONS[row], WORDS)
            assert of_dose[row].nll == pytest.approx(plain_nll(plain, asked, dose), rel=1e-4)
        assert of_dose[2].nll is None  # an empty completion
    after_it = at in ("question", "last")
    assert (found[1][1].nll == found[0][1].nll) == after_it
    bare = backend.observe_doses(CONVERSATIONS, Ask(WORDS), DRAWN, doses, likelihood=False)
    assert [dosed.nll for of_dose in bare for dosed in of_dose] == [None] * 9


class Counting:
    """Counts, for every block that is run, the columns of its passes."""

    def __init__(self, backend):
        self.columns: dict[int, list[int]] = {}
        self.handles = [
            block.original_component.self_attn.register_forward_pre_hook(self._counting(layer), with_kwargs=True)
            for layer, block in enumerate(backend.bridge.blocks)
        ]

    def _counting(self, layer):
        def count(module, args, kwargs):
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            self.columns.setdefault(layer, []).append(hidden.shape[1])

        return count

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


ONE_TOKEN = Question("Did you like it? Answer yes or no.", ("yes", "no"), "Answer: ")


def test_lower_blocks_and_the_prefix_are_run_once(llama_backend):
    row = CONVERSATIONS[1]
    asked = ask(llama_backend.encoder, row, ONE_TOKEN)
    assert {len(tail) for tail in asked.tails} == {1}
    first = asked.spans[-1][0]
    rest = len(asked.ids) - first
    doses = [[Steering(2, vector(at), 1.0 + at, "question")] for at in range(5)]
    with Counting(llama_backend) as counting:
        llama_backend.observe_doses([row], Ask(ONE_TOKEN), DRAWN, doses)
    assert counting.columns == {layer: [first, rest] for layer in (0, 1, 2)} | {
        layer: [first, *[rest] * 5] for layer in (3, 4)
    }


def test_the_unsteered_model_is_run_once_and_with_the_shared_blocks(llama_backend):
    row = CONVERSATIONS[1]
    width = len(ask(llama_backend.encoder, row, ONE_TOKEN).ids)
    doses = [[], [Steering(1, vector(0), 0.0)], [Steering(1, vector(0), 1.0)], [Steering(3, vector(0), 1.0)], []]
    with Counting(llama_backend) as counting:
        found = llama_backend.observe_doses([row], Ask(ONE_TOKEN), DRAWN, doses, likelihood=False)
    # Unsteered, above layer 1 and above layer 3.
    assert {layer: len(widths) for layer, widths in counting.columns.items()} == {0: 1, 1: 1, 2: 2, 3: 2, 4: 3}
    assert {width for widths in counting.columns.values() for width in widths} == {width}
    assert found[0] == found[1] == found[4] != found[2]


def test_no_logits_are_kept_but_those_that_are_read(llama_backend, monkeypatch):
    monkeypatch.setattr("prefs.models.local.doses.TOKENS_AT_ONCE", 7)
    shapes: Counter[int] = Counter()
    head = llama_backend.bridge.original_model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, inputs, output: shapes.update([output.shape[:-1].numel()]))
    rows = CONVERSATIONS * 2
    llama_backend.observe_doses(rows, Ask(ONE_TOKEN), DRAWN, [[Steering(1, vector(0), 1.0)]])
    handle.remove()
    assert max(shapes) <= 7


def test_logits_that_are_not_finite_are_named_and_spare_other_rows(backend):
    huge = [Steering(2, vector(0), 1e39, "completion")]
    asked = Ask(WORDS, SEEDS)
    (found, other), expected = (
        backend.observe_doses(CONVERSATIONS, asked, DRAWN, [huge, []]),
        backend.observe(CONVERSATIONS, [asked], DRAWN),
    )
    for row in (0, 1):
        assert [(each.mass, each.invalid) for each in found[row].answer.scores.values()] == [(None, "not_finite")]
        assert list(found[row].answer.samples) == list(SEEDS)
        for sample in found[row].answer.samples.values():
            assert (sample.text, sample.tokens, sample.finished, sample.invalid) == (None, 0, True, "not_finite")
        assert found[row].nll is None
    # Of an empty completion nothing is steered.
    for one, dosed in ((2, found[2]), (0, other[0]), (1, other[1]), (2, other[2])):
        answer = expected[one].answers[0]
        assert dosed.answer.samples == answer.samples
        assert dosed.answer.scores[0].mass == pytest.approx(answer.scores[0].mass, rel=1e-3, abs=1e-9)


def test_no_row_that_is_finite(llama_backend):
    for layer in (0, 4):
        (found,) = llama_backend.observe_doses(CONVERSATIONS, Ask(WORDS), DRAWN, [[Steering(layer, vector(0), 1e39)]])
        assert [dosed.answer.scores[0].invalid for dosed in found] == ["not_finite"] * 3


def test_nothing_asked_of_nobody(llama_backend):
    dose = [Steering(1, vector(0), 1.0)]
    assert llama_backend.observe_doses([], Ask(WORDS), DRAWN, [dose, []]) == [[], []]
    assert llama_backend.observe_doses(CONVERSATIONS, Ask(WORDS), DRAWN, []) == []
    (found,) = llama_backend.observe_doses(CONVERSATIONS, Ask(WORDS, (), ()), DRAWN, [dose])
    assert all(not dosed.answer.scores and not dosed.answer.samples for dosed in found)
    assert [dosed.nll is None for dosed in found] == [False, False, True]


def test_what_does_not_fit_the_model_is_refused(llama_backend):
    with pytest.raises(UserError, match="no layer 5"):
        llama_backend.observe_doses(CONVERSATIONS, Ask(WORDS), DRAWN, [[], [Steering(5, vector(0), 0.0)]])


def test_the_model_is_as_it_was_before(llama_backend):
    before = llama_backend.observe(CONVERSATIONS, [Ask(WORDS, SEEDS)], DRAWN)
    llama_backend.observe_doses(CONVERSATIONS, Ask(WORDS, SEEDS), DRAWN, every_kind("all"))
    assert llama_backend.observe(CONVERSATIONS, [Ask(WORDS, SEEDS)], DRAWN) == before


def test_halves_where_memory_runs_out(llama_backend, monkeypatch):
    doses = [[Steering(1, vector(0), 1.0)], [Steering(3, vector(1), 1.0, "question")]]
    expected = llama_backend.observe_doses(CONVERSATIONS, Ask(WORDS, SEEDS), DRAWN, doses)
    own = llama_backend.passes.logits

    def logits(hidden):
        if len(hidden) > 20 and not failed:
            failed.append(len(hidden))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(hidden)

    failed: list[int] = []
    monkeypatch.setattr(llama_backend.passes, "logits", logits)
    found = llama_backend.observe_doses(CONVERSATIONS, Ask(WORDS, SEEDS), DRAWN, doses)
    assert failed
    for of_dose, others in zip(found, expected, strict=True):
        for one, other in zip(of_dose, others, strict=True):
            assert one.answer.samples == other.answer.samples
            assert one.answer.scores[0].mass == pytest.approx(other.answer.scores[0].mass, rel=1e-3, abs=1e-9)
            assert one.nll == (None if other.nll is None else pytest.approx(other.nll, rel=1e-4))


def test_a_model_that_thinks_runs_each_dose_by_itself(tiny_llama):
    spec = dataclasses.replace(
        tiny_llama, thinking=Thinking(open="", close=".", gap="", max_tokens=5, force_close=True)
    )
    backend = Models().get(spec)
    doses = [[Steering(2, vector(1), -3.0, "last")], [Steering(0, vector(2), 2.0)]]
    found = same_as_observed(backend, doses, ONE_TOKEN, scores=SEEDS)
    assert found[0][0].answer.scores[0].thought is not None
    shared = Models().get(tiny_llama).observe_doses(CONVERSATIONS, Ask(ONE_TOKEN), DRAWN, doses)
    for of_dose, others in zip(found, shared, strict=True):
        for one, other in zip(of_dose, others, strict=True):
            assert one.nll == (None if other.nll is None else pytest.approx(other.nll, rel=1e-4))
    (huge,) = backend.observe_doses(
        CONVERSATIONS, Ask(ONE_TOKEN, SEEDS, SEEDS), DRAWN, [[Steering(2, vector(1), 1e39)]]
    )
    assert [score.invalid for dosed in huge for score in dosed.answer.scores.values()] == ["not_finite"] * 6
    assert [dosed.nll for dosed in huge] == [None] * 3


def test_a_family_whose_blocks_share_more_than_the_residual_stream(tiny_llama, monkeypatch):
    """It is found out by trying: here, the last block reads what the first one saw."""
    backend = Models().get(tiny_llama)
    first, last = (backend.bridge.blocks[layer].original_component for layer in (0, 4))
    seen: list[torch.Tensor] = []
    run_first, run_last = first.mlp.forward, last.mlp.forward

    def see(hidden):
        seen[:] = [hidden]
        return run_first(hidden)

    def read(hidden):
        return run_last(hidden + (seen[0] if seen and seen[0].shape == hidden.shape else 0))

    monkeypatch.setattr(first.mlp, "forward", see)
    monkeypatch.setattr(last.mlp, "forward", read)
    doses = [[Steering(2, vector(0), 2.0)], [Steering(2, vector(0), 2.0, "question")], []]
    assert all(
        math.isfinite(dosed.nll) for dosed in backend.observe_doses(CONVERSATIONS[:1], Ask(WORDS), DRAWN, doses)[0]
    )
    same_as_observed(backend, doses)
