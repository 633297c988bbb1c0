"""A model that thinks before it answers: the embedded one, its first sentence taken for a thought."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from conftest import template

from prefs.data.task import Task
from prefs.data.template import Invalid
from prefs.models.loading import Models
from prefs.models.tokens import Message, Thinking
from prefs.models.types import Ask, CaptureRequest, Question, Sampling, Steering
from prefs.stages.complete import complete
from prefs.stages.rate import CapturePlan, rate, thought_seeds
from prefs.store.table import Store

SENTENCE = Thinking(open="", close=".", gap=" ", max_tokens=12, force_close=True)
SAMPLING = Sampling(1.0, 1.0, 4)
ROWS = [
    (Message("user", "Name a colour."), Message("assistant", "Blue")),
    (Message("user", "Write two lines about rain, please."), Message("assistant", "Rain falls.\nIt is wet.")),
]
TASKS = [Task(f"t{n}", f"Count to {n}.") for n in range(2)]


@pytest.fixture(scope="module")
def thinker_spec(smollm2_fp32):
    return dataclasses.replace(smollm2_fp32, thinking=SENTENCE, batch_tokens=600)


@pytest.fixture(scope="module")
def thinkers() -> Models:
    return Models()


@pytest.fixture(scope="module")
def thinker(thinkers, thinker_spec):
    return thinkers.get(thinker_spec)


@pytest.fixture(scope="module")
def question() -> Question:
    asked = template("anchored")
    return Question(asked.question, asked.says, "Answer: ")


@pytest.mark.slow
def test_padded_rows_think_and_answer_as_single_ones(thinker, question):
    capture = CaptureRequest((0, 29), ("last_prompt", "rating"))
    asks = [Ask(question, seeds=(3, 1), scores=(1, 2))]
    together = thinker.observe(ROWS, asks, SAMPLING, capture)
    for row, many in zip(ROWS, together, strict=True):
        (one,) = thinker.observe([row], asks, SAMPLING, capture)
        assert one.answers[0].samples == many.answers[0].samples
        assert set(one.answers[0].samples) == {1, 3}
        assert set(one.answers[0].scores) == {1, 2}
        for seed, score in one.answers[0].scores.items():
            assert score.thought == many.answers[0].scores[seed].thought
            np.testing.assert_allclose(score.mass, many.answers[0].scores[seed].mass, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(one.answers[0].residual, many.answers[0].residual, rtol=1e-3, atol=1e-3)
    answer = together[0].answers[0]
    assert answer.samples[1].thought == answer.scores[1].thought  # one thought a seed
    assert len({answer.samples[3].thought, answer.scores[1].thought, answer.scores[2].thought}) == 3


def test_scores_are_those_of_the_whole_text_with_the_thought_in_it(thinker, question):
    """Against one plain forward pass of transformers over question, thought, mark and opened answer."""
    (observed,) = thinker.observe(ROWS[:1], [Ask(question, (), (5,))], SAMPLING, None)
    score = observed.answers[0].scores[5]
    messages = (*ROWS[0], Message("user", question.text))
    ids = thinker.encoder.encode(messages, answer="Answer: ", thought=score.thought).ids
    text = thinker.encoder.tokenizer.decode(ids)
    assert text.endswith(f"<|im_start|>assistant\n{score.thought}. Answer: ")
    with torch.inference_mode():
        logits = thinker.bridge.original_model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
    for say, mass in zip(question.says, score.mass, strict=True):
        token = thinker.encoder.encode(messages, answer=f"Answer: {say}", thought=score.thought).ids[-1]
        assert mass == pytest.approx(float(logits[token].exp()), rel=1e-3)


def test_a_steered_model_thinks_steered(thinker, question):
    asks = [Ask(question, (), (5,))]
    vector = torch.randn(thinker.d_model, generator=torch.Generator().manual_seed(0))

    def scored(coefficient: float):
        steering = [Steering(10, vector, coefficient)]
        (observed,) = thinker.observe(ROWS[:1], asks, SAMPLING, None, steering)
        return observed.answers[0].scores[5]

    (plain,) = thinker.observe(ROWS[:1], asks, SAMPLING, None)
    assert scored(0.0) == plain.answers[0].scores[5]
    assert scored(3.0).thought != scored(0.0).thought


def test_a_thought_that_does_not_end_gives_no_answer(thinkers, thinker_spec, question):
    impatient = dataclasses.replace(
        thinker_spec, thinking=dataclasses.replace(SENTENCE, max_tokens=1, force_close=False)
    )
    backend = thinkers.get(impatient)
    (observed,) = backend.observe(ROWS[:1], [Ask(question, (0,), (0,))], SAMPLING, CaptureRequest((3,), ("rating",)))
    answer = observed.answers[0]
    assert answer.scores[0].mass is None
    assert answer.residual is None
    assert (answer.scores[0].invalid, answer.samples[0].invalid) == ("thought_cut_off",) * 2
    assert answer.samples[0].text is None
    assert answer.samples[0].thought
    (sample,) = backend.complete([ROWS[0][:1]], 0, SAMPLING)
    assert (sample.text, sample.invalid) == (None, "thought_cut_off")


def test_completions_leave_the_thought_aside(thinker):
    first, second = thinker.complete([row[:1] for row in ROWS], 0, SAMPLING)
    assert (first.invalid, second.invalid) == (None, None)
    assert first.thought
    assert first.thought != second.thought
    assert 0 < first.tokens <= SAMPLING.max_new_tokens
    (alone,) = thinker.complete([ROWS[0][:1]], 0, SAMPLING)
    assert alone == first


@pytest.mark.slow
def test_thoughts_go_through_the_store(tmp_path, thinkers, thinker_spec):
    store = Store.open(str(tmp_path))
    completions, _ = complete(TASKS, thinker_spec, SAMPLING, seed=0, system_prompt=None, store=store, models=thinkers)
    options = {
        "seeds": (7, 1),
        "exact": True,
        "capture": CapturePlan((0, 29), ("rating",), "float32"),
        "system_prompt": None,
        "store": store,
    }
    templates = {"anchored": template("anchored")}
    one = rate(completions, thinker_spec, templates, SAMPLING, thoughts=1, models=thinkers, **options)
    ratings = one.ratings["anchored"]
    assert ratings.thoughts.seeds == (7,)
    assert [row[0].thought for row in ratings.answers] == [row[0] for row in ratings.thoughts.texts]
    np.testing.assert_array_equal(ratings.mass, ratings.thoughts.mass[:, 0])
    assert ratings.measured([None] * len(TASKS)).kind == "after one thought"
    more = rate(completions, thinker_spec, templates, SAMPLING, thoughts=3, models=thinkers, **options)
    assert [work.computed for work in more.work] == [0, 2 * len(TASKS), 0]  # the scores after two more thoughts
    ratings = more.ratings["anchored"]
    assert ratings.thoughts.seeds == (7, 1, 0)
    np.testing.assert_allclose(ratings.mass, ratings.thoughts.mass.mean(axis=1))
    measured = ratings.measured([None] * len(TASKS))
    assert measured.kind == "mixture of 3 thoughts"
    assert (measured.exact.between > 0).all()
    again = rate(completions, thinker_spec, templates, SAMPLING, thoughts=3, models=Models(), **options)
    assert [work.computed for work in again.work] == [0] * 3
    np.testing.assert_array_equal(again.ratings["anchored"].thoughts.mass, ratings.thoughts.mass)
    # The same weights asked to answer at once are another rater.
    at_once = dataclasses.replace(thinker_spec, thinking=None)
    direct = rate(completions, at_once, templates, SAMPLING, models=thinkers, **options)
    assert direct.work[0].reused == 0
    assert direct.ratings["anchored"].thoughts is None
    assert all(answer.thought is None for row in direct.ratings["anchored"].answers for answer in row)


def test_thoughts_that_are_cut_off_are_counted_and_not_drawn_again(tmp_path, thinkers, thinker_spec):
    store = Store.open(str(tmp_path))
    completions, _ = complete(TASKS, thinker_spec, SAMPLING, seed=0, system_prompt=None, store=store, models=thinkers)
    impatient = dataclasses.replace(
        thinker_spec, thinking=dataclasses.replace(SENTENCE, max_tokens=1, force_close=False)
    )
    options = {"seeds": (0,), "exact": True, "capture": CapturePlan((3,), ("rating",), "float32")}
    for reused in (False, True):
        models = Models() if reused else thinkers
        rated = rate(
            completions, impatient, {"a": template("anchored")}, SAMPLING,
            system_prompt=None, store=store, models=models, **options,
        )  # fmt: skip
        ratings = rated.ratings["a"]
        assert ratings.invalid_counts() == {"thought_cut_off": len(TASKS)}
        assert ratings.thoughts.invalid == [(Invalid.thought_cut_off,)] * len(TASKS)
        assert np.isnan(ratings.mass).all()
        assert not rated.rating_residuals["a"].present().any()
        assert [work.computed for work in rated.work] == [0 if reused else len(TASKS)] * 3


def test_thoughts_share_the_seeds_of_sampled_ratings():
    assert thought_seeds((4, 0), 1) == (4,)
    assert thought_seeds((4, 0), 4) == (4, 0, 1, 2)
    assert thought_seeds((), 2) == (0, 1)
