"""A model that thinks before it answers: the embedded one, its first sentence taken for a thought."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from conftest import template
from engine_calls import complete, masses_of, observe, question, replies

from prefs.config import ThinkingConfig
from prefs.data.task import Task
from prefs.data.template import Invalid
from prefs.models.loading import Models
from prefs.models.prompts import encode_prompt
from prefs.models.types import Capture, Message, Request, Sampling
from prefs.stages.complete import complete as completed
from prefs.stages.rate import rate
from prefs.store.table import Store

SENTENCE = ThinkingConfig(open="", close=".", gap=" ", max_tokens=12, force_close=True)
SAMPLING = Sampling(1.0, 1.0, 4)
ROWS = [
    (Message("user", "Name a colour."), Message("assistant", "Blue")),
    (Message("user", "Write two lines about rain, please."), Message("assistant", "Rain falls.\nIt is wet.")),
]
TASKS = [Task(f"t{n}", f"Count to {n}.") for n in range(2)]


QUESTION = question("anchored")
IMPATIENT = dataclasses.replace(SENTENCE, max_tokens=1, force_close=False)


@pytest.fixture(scope="module")
def thinkers() -> Models:
    return Models()


@pytest.fixture(scope="module")
def thinker_spec(smollm2_fp32):
    return dataclasses.replace(smollm2_fp32, thinking=SENTENCE, batch_tokens=600)


@pytest.fixture(scope="module")
def thinker(thinkers, thinker_spec):
    return thinkers.get(thinker_spec)


@pytest.mark.slow
def test_padded_rows_think_and_answer_as_single_ones(thinker):
    wanted = {"seeds": (3, 1), "scores": (1, 2), "capture": Capture((0, 29), ("last_prompt", "rating"))}
    together = observe(thinker, ROWS, [QUESTION], SAMPLING, **wanted)
    for row, (many,) in zip(ROWS, together, strict=True):
        ((one,),) = observe(thinker, [row], [QUESTION], SAMPLING, **wanted)
        assert one.samples == many.samples
        assert set(one.samples) == {1, 3}
        assert set(one.scores) == {1, 2}
        for seed, score in one.scores.items():
            assert score.thought == many.scores[seed].thought
            np.testing.assert_allclose(score.mass, many.scores[seed].mass, rtol=1e-3, atol=1e-7)
        for position in ("last_prompt", "rating"):
            torch.testing.assert_close(one.residuals[position], many.residuals[position], rtol=1e-3, atol=1e-3)
    reply = together[0][0]
    assert reply.samples[1].thought == reply.scores[1].thought  # one thought a seed
    assert len({reply.samples[3].thought, reply.scores[1].thought, reply.scores[2].thought}) == 3


def test_scores_are_those_of_the_whole_text_with_the_thought_in_it(thinker):
    """Against one plain forward pass of transformers over question, thought, mark and opened answer."""
    ((reply,),) = observe(thinker, ROWS[:1], [QUESTION], SAMPLING, scores=(5,))
    score, turns = reply.scores[5], (*ROWS[0], Message("user", QUESTION.text))
    ids = thinker.encoder.encode(turns, answer="Answer: ", thought=score.thought).ids
    assert thinker.encoder.tokenizer.decode(ids).endswith(f"<|im_start|>assistant\n{score.thought}. Answer: ")
    prompt = encode_prompt(thinker.encoder, ROWS[0], QUESTION, score.thought)
    assert prompt.ids == ids[: len(prompt.ids)]
    plain = thinker.bridge.original_model
    with torch.inference_mode():
        expected = masses_of(prompt, lambda ids: plain(torch.tensor([ids])).logits[0, -1].float().softmax(-1))
    assert score.mass == pytest.approx(expected, rel=1e-3)


def test_completions_leave_the_thought_aside(thinker):
    first, second = complete(thinker, [row[:1] for row in ROWS], 0, SAMPLING)
    assert (first.invalid, second.invalid) == (None, None)
    assert first.thought
    assert first.thought != second.thought
    assert 0 < first.tokens <= SAMPLING.max_new_tokens
    (both,) = replies(thinker, [Request(ROWS[0][:1], sampling=SAMPLING, seeds=(1, 0))])
    assert both.samples[0] == first
    assert both.samples[1].thought != first.thought


def rated(completions, spec, store, models, **options):
    capture = Capture((0, 29), ("rating",))
    options = {"exact": True, "capture": capture, "dtype": "float32", "system_prompt": None} | options
    return rate(completions, spec, {"a": template("anchored")}, SAMPLING, store=store, models=models, **options)


@pytest.mark.slow
def test_thoughts_go_through_the_store(tmp_path, thinkers, thinker_spec):
    store = Store.open(str(tmp_path))
    completions, _ = completed(TASKS, thinker_spec, SAMPLING, seed=0, system_prompt=None, store=store, models=thinkers)
    ratings = rated(completions, thinker_spec, store, thinkers, seeds=(7, 1), thoughts=1).ratings["a"]
    assert ratings.thoughts.seeds == (7,)
    assert [row[0].thought for row in ratings.answers] == [row[0] for row in ratings.thoughts.texts]
    np.testing.assert_array_equal(ratings.mass, ratings.thoughts.mass[:, 0])
    assert ratings.measured([None] * len(TASKS)).kind == "after one thought"
    more = rated(completions, thinker_spec, store, thinkers, seeds=(7, 1), thoughts=3)
    assert [work.computed for work in more.work] == [0, 2 * len(TASKS), 0]  # the scores after two more thoughts
    ratings = more.ratings["a"]
    assert ratings.thoughts.seeds == (7, 1, 0)
    np.testing.assert_allclose(ratings.mass, ratings.thoughts.mass.mean(axis=1))
    measured = ratings.measured([None] * len(TASKS))
    assert measured.kind == "mixture of 3 thoughts"
    assert (measured.exact.between > 0).all()
    again = rated(completions, thinker_spec, store, Models(), seeds=(7, 1), thoughts=3)
    assert [work.computed for work in again.work] == [0] * 3
    np.testing.assert_array_equal(again.ratings["a"].thoughts.mass, ratings.thoughts.mass)
    # The same weights asked to answer at once are another rater.
    direct = rated(completions, dataclasses.replace(thinker_spec, thinking=None), store, thinkers, seeds=(7, 1))
    assert direct.work[0].reused == 0
    assert direct.ratings["a"].thoughts is None
    assert all(answer.thought is None for row in direct.ratings["a"].answers for answer in row)


def test_thoughts_that_are_cut_off_are_counted_and_not_drawn_again(tmp_path, thinkers, thinker_spec):
    impatient = dataclasses.replace(thinker_spec, thinking=IMPATIENT)
    store = Store.open(str(tmp_path))
    completions, _ = completed(TASKS, thinker_spec, SAMPLING, seed=0, system_prompt=None, store=store, models=thinkers)
    for reused in (False, True):
        found = rated(completions, impatient, store, Models() if reused else thinkers, seeds=(0,))
        ratings = found.ratings["a"]
        assert ratings.invalid_counts() == {"thought_cut_off": len(TASKS)}
        assert [list(row) for row in ratings.thoughts.invalid] == [[Invalid.thought_cut_off]] * len(TASKS)
        assert np.isnan(ratings.mass).all()
        assert not found.rating_residuals["a"].present().any()
        assert [work.computed for work in found.work] == [0 if reused else len(TASKS)] * 3
