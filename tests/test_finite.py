"""Numbers that are not finite are a reason: for logits of a model that has NaNs where one word is, and for vectors."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import template
from engine_calls import complete, dose_replies, observe, replies
from simulated import completed, some_tasks
from tiny_models import llama, tiny_model

from prefs.concepts.export import SavedVectors, load_vectors, save_vectors
from prefs.config import JudgeConfig, ThinkingConfig
from prefs.data.task import Task
from prefs.data.template import Invalid
from prefs.errors import UserError
from prefs.models.loading import Models
from prefs.models.openai.refusals import refusal_of_row
from prefs.models.sampling import NOT_FINITE, draw
from prefs.models.types import Capture, Message, Question, Request, Sampling, Steering
from prefs.models.vllm.engine import VllmEngine
from prefs.models.vllm.workers import Output
from prefs.probes.probe import Site
from prefs.results.answers import REPEATED
from prefs.stages.complete import complete as completed_by
from prefs.stages.judge import judged_by_llm
from prefs.stages.rate import rate
from prefs.stages.records import Completion, not_finite
from prefs.stages.steer import SteeringVector, steer
from prefs.stages.steered_tokens import steered_tokens, tokens_view
from prefs.store.table import Store

WORD = " Zurich"  # one token, where the tiny model's embedding is NaN
GOOD = (Message("user", "Name a river."), Message("assistant", "The Po."))
BAD = (Message("user", "Name a town."), Message("assistant", f"It is{WORD}, I think."))
QUESTION = Question("Did you like it?", ("yes", "not at all"), "Answer: ")
SAMPLING = Sampling(1.0, 1.0, 3)
THINKING = ThinkingConfig(open="", close=".", gap="", max_tokens=4, force_close=True)


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("llama"), llama())


def broken(spec):
    """Models that have this one with a NaN in it."""
    models = Models()
    engine = models.get(spec)
    (token,) = engine.encoder.tokenizer.encode(WORD, add_special_tokens=False)
    engine.bridge.original_model.get_input_embeddings().weight.data[token] = torch.nan
    return models


@pytest.fixture(scope="module")
def models(spec):
    return broken(spec)


@pytest.fixture(scope="module")
def engine(models, spec):
    return models.get(spec)


@pytest.mark.parametrize("sampling", [Sampling(0.0, 1.0, 1), Sampling(1.0, 1.0, 1), Sampling(0.7, 0.5, 1)])
def test_no_token_is_drawn_from_what_is_no_distribution(sampling):
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    logits[1, 7], logits[2, 3], logits[3], logits[4, :49] = torch.nan, torch.inf, -torch.inf, -torch.inf
    uniforms = torch.rand(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens = draw(logits, uniforms, sampling)
    assert tokens[1:4].tolist() == [[NOT_FINITE] * 3] * 3
    assert tokens[4].tolist() == [49] * 3
    assert (tokens[0] >= 0).all()
    assert tokens[:1].equal(draw(logits[:1], uniforms[:1], sampling))


def test_scores_samples_and_choices_say_so_and_spare_other_rows(engine):
    ((good,), (bad,)) = observe(engine, [GOOD, BAD], [QUESTION], SAMPLING, seeds=(0, 1))
    ((alone,),) = observe(engine, [GOOD], [QUESTION], SAMPLING, seeds=(0, 1))
    assert good.samples == alone.samples
    assert good.scores[0].mass == pytest.approx(alone.scores[0].mass, rel=1e-4)
    assert (bad.scores[0].mass, bad.scores[0].invalid) == (None, "not_finite")
    assert [(sample.text, sample.invalid) for sample in bad.samples.values()] == [(None, "not_finite")] * 2
    one, other = replies(engine, [Request(turns, QUESTION, choose=True) for turns in (GOOD, BAD)])
    assert (one.choice, one.invalid) == (QUESTION.options[int(np.argmax(good.scores[0].mass))], None)
    assert (other.choice, other.invalid) == (None, "not_finite")
    fine, town = complete(engine, [GOOD[:1], (Message("user", f"Is{WORD} large?"),)], 0, SAMPLING)
    assert fine.invalid is None
    assert (town.text, town.invalid) == (None, "not_finite")


def test_logits_that_break_while_an_answer_is_drawn(engine, monkeypatch):
    greedy = Sampling(0.0, 1.0, 6)
    (whole,) = complete(engine, [GOOD[:1]], 0, greedy)
    ids = engine.encoder.tokenizer.encode(whole.text, add_special_tokens=False)
    weight = engine.bridge.original_model.get_input_embeddings().weight.data
    kept = weight[ids[1]].clone()
    weight[ids[1]] = torch.nan
    try:
        (cut,) = complete(engine, [GOOD[:1]], 0, greedy)
    finally:
        weight[ids[1]] = kept
    assert (cut.text, cut.invalid) == (None, "not_finite")
    assert cut.tokens == 2  # the second was drawn, and what follows it is none


def test_thoughts_and_likelihoods(spec):
    thinker = broken(dataclasses.replace(spec, thinking=THINKING)).get(dataclasses.replace(spec, thinking=THINKING))
    capture = Capture((4,), ("rating",))
    ((good,), (bad,)) = observe(thinker, [GOOD, BAD], [QUESTION], SAMPLING, seeds=(0,), scores=(0, 1), capture=capture)
    assert {score.invalid for score in good.scores.values()} == {None}
    assert {score.invalid for score in bad.scores.values()} == {"not_finite"}
    assert (bad.samples[0].text, bad.samples[0].invalid) == (None, "not_finite")
    assert "rating" not in bad.residuals
    steering = (Steering(2, torch.ones(64), 1.0, "question"),)
    for dose in dose_replies(thinker, [GOOD, BAD], QUESTION, SAMPLING, [steering, ()], seeds=(0,)):
        assert dose[0].nll > 0
        assert (dose[1].nll, dose[1].scores[0].invalid) == (None, "not_finite")


class PlainNaN:
    """In place of vLLM's workers: what vLLM gives of NaN logits."""

    max_context, running = 2048, True

    def run(self, calls, rows, outputs):
        for number, call in enumerate(calls):
            nothing = dict.fromkeys(call.looked, float("nan"))
            outputs[number] = Output((0,) * call.sampling.max_new_tokens, False, nothing, 0, False)


def test_the_engine_of_vllm_and_what_servers_send(spec, engine):
    vllm = VllmEngine(PlainNaN, engine.encoder, engine.decoder.stops, spec)
    ((reply,),) = observe(vllm, [GOOD], [QUESTION], SAMPLING, seeds=(0,))
    assert (reply.samples[0].invalid, reply.scores[0].invalid) == ("not_finite", "not_finite")
    (choice,) = replies(vllm, [Request(GOOD, QUESTION, choose=True)])
    assert (choice.choice, choice.invalid) == (None, "not_finite")
    assert refusal_of_row(500, "", "Out of range float values are not JSON compliant: nan") == "not_finite"
    assert [bool(REPEATED.fullmatch(text)) for text in ("!" * 64, "the" * 30, "!!!", "No! " * 3 + "Yes")] == [
        True, True, False, False,
    ]  # fmt: skip


def test_it_is_counted_through_the_store_and_found_there_again(tmp_path, spec, models):
    store = Store.open(str(tmp_path))
    tasks = [Task("good", "Name a river."), Task("bad", f"Is{WORD} large?")]
    completions = [Completion(task, "Yes.") for task in tasks]
    capture = Capture((1, 4), ("last_prompt", "rating"))
    for again in (False, True):
        asked = Models() if again else models
        made, _ = completed_by(tasks, spec, SAMPLING, seed=0, system_prompt=None, store=store, models=asked)
        assert [completion.invalid for completion in made] == [None, Invalid.not_finite]
        rated = rate(
            completions, spec, {"a": template("stated")}, SAMPLING, seeds=(0, 1), exact=True, capture=capture,
            dtype="float32", system_prompt=None, store=store, models=asked,
        )  # fmt: skip
        ratings = rated.ratings["a"]
        assert ratings.invalid_counts()["not_finite"] == 2
        assert ratings.without_mass == {1: Invalid.not_finite}
        assert np.isfinite(ratings.mass[0]).all()
        for residuals in (*rated.residuals.values(), *rated.rating_residuals.values()):
            assert residuals.present().tolist() == [True, False]
        assert not_finite([*rated.residuals.values(), *rated.rating_residuals.values()]) == (
            "vectors of 1 of 2 tasks are not finite in float32 (last_prompt, rating; layers 1, 4), and are not used:"
            " model.dtype must be bfloat16 or float32 for this model"
        )
        assert [work.computed for work in rated.work] == ([0] * 3 if again else [4, 2, 4])


def test_a_judge_and_steering_leave_such_tasks_out_and_count_them(tmp_path, spec, models):
    store = Store.open(str(tmp_path))
    completions = [
        Completion(Task("good", "Name a river."), "Po."),
        Completion(Task("bad", "A town?"), f"It is{WORD}."),
    ]
    judge = JudgeConfig(name="j", question="{request} {reply} refuse or comply?", refusal="refuse", compliance="comply")
    judged = judged_by_llm(judge, completions, model=spec, store=store, models=models)
    assert judged.refused[1] is None
    assert judged.refused[0] is not None
    assert judged.without == {"not_finite": 1}
    vector = SteeringVector("v", "concept", 2, torch.ones(64), 0.1)
    responses, _ = steer(
        completions, spec, template("stated"), [vector], (1.0,), SAMPLING,
        tokens="completion", seeds=(0,), system_prompt=None, store=store, models=models,
    )  # fmt: skip
    assert responses.asked.tolist() == [True, True]
    assert responses.rated.tolist() == [True, False]


def test_vectors_beyond_the_stored_dtype_are_not_kept_at_these_layers(tmp_path):
    spec = {"model": {"dtype": "float32"}, "dtype": "float16"}
    vectors = Store.open(str(tmp_path)).vectors("v", spec)
    known = torch.ones(4, 3, 8)
    known[1, 2, 0], known[2, 0, 5], known[2, 2, 5], known[3] = 7e4, -7e4, torch.nan, 6e4
    known = known.half()
    vectors.append(list("abcd"), [0, 5, 9], known, absent=["e"])
    for held in (vectors, Store.open(str(tmp_path)).vectors("v", spec)):
        assert held.gather(list("dcab"), [5]).equal(known[[3, 2, 0, 1]][:, [1]])
        assert held.gather(["d", "a"], [9, 0]).equal(known[[3, 0]][:, [2, 0]])
        assert held.not_finite == {"b": frozenset({9}), "c": frozenset({0, 9})}
        assert all(held.has(key, [0, 5, 9]) for key in "abcde")
        assert not held.has("b", [9, 10])
        with pytest.raises(KeyError, match=r"b is not there at layers \(9,\)"):
            held.gather(["b"], [9])
        assert held.absent == {"e"}
    assert vectors.bytes_made == 9 * 8 * 2
    # The same rows are the same parts.
    count = len(list(vectors.folder.glob("*.safetensors")))
    Store.open(str(tmp_path)).vectors("v", spec).append(list("abcd"), [0, 5, 9], known, absent=["e"])
    assert len(list(vectors.folder.glob("*.safetensors"))) == count == 3


@pytest.mark.parametrize(
    ("model", "stored", "key"), [("float32", "float16", "capture"), ("float16", "float16", "model")]
)
def test_what_mends_it_is_named(tmp_path, model, stored, key):
    from prefs.stages.records import Residuals

    vectors = Store.open(str(tmp_path)).vectors("v", {"model": {"dtype": model}, "dtype": stored})
    vectors.append(["a", "b"], [3, 4], torch.tensor([[[1.0], [torch.inf]], [[1.0], [1.0]]]), absent=[])
    residuals = Residuals("rating", (3, 4), ["a", "b", None], vectors)
    assert residuals.present().tolist() == [False, True, False]
    assert f"{key}.dtype must be bfloat16 or float32" in str(not_finite([residuals]))
    below = dataclasses.replace(residuals, layers=(3,))
    assert below.present().tolist() == [True, True, False]
    assert not_finite([below]) is None


def test_saved_vectors_that_are_not_finite_are_one_line(tmp_path):
    saved = SavedVectors("liking", (Site(1, "rating"),), torch.tensor([[1.0, torch.nan]]), torch.ones(1), {})
    save_vectors(tmp_path, saved)
    with pytest.raises(UserError, match=r"holds a NaN or an infinity \(vectors\): extract the vectors again"):
        load_vectors(tmp_path)


@pytest.mark.parametrize("at", ["all", "last", "completion", "question"])
def test_the_report_shows_which_tokens_are_steered_and_read(tmp_path, spec, at):
    store, stated = Store.open(str(tmp_path)), template("stated")
    completions = [*completed(some_tasks(2, 10)), Completion(Task("none", "?"), None)]
    question = Question(stated.question, stated.says, "Answer: ")
    given = {"at": at, "position": "mean_completion", "system_prompt": "Be\n[brief]."}
    tokens = steered_tokens(completions, spec, question, store=store, **given)
    text = "".join(tokens["text"])
    assert text.endswith("<|im_start|>assistant\nAnswer: ")
    steered = "".join(tokens.loc[tokens["steered"], "text"])
    expected = {"all": text, "completion": completions[0].text, "question": stated.question}
    assert steered == expected.get(at, tokens["text"].iloc[-1])
    assert "".join(tokens.loc[tokens["read"] == "mean_completion", "text"]) == completions[0].text
    assert tokens.loc[tokens["read"] == "rating", "token"].tolist() == [len(tokens) - 1]
    assert set(tokens.loc[tokens["steered"], "role"]) == (
        {"user"} if at == "question" else set(tokens.loc[tokens["steered"], "role"])
    )
    view = tokens_view(tokens, at)
    assert [row[1] for row in view.rows] == [
        str(int(tokens["steered"].sum())),
        str((tokens["read"] == "mean_completion").sum()),
        "1",
    ]
    elsewhere = dataclasses.replace(spec)
    pd.testing.assert_frame_equal(steered_tokens(completions, elsewhere, question, store=store, **given), tokens)
