"""Completing and rating through the store: only what is missing is done, and the result is the same."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import template

from prefs.data.task import Task
from prefs.models.loading import Models
from prefs.models.types import Capture, Sampling
from prefs.stages.complete import complete
from prefs.stages.rate import rate
from prefs.stages.records import Completion
from prefs.store.table import Store

# Some of the same length, so that they could change places at the edge of a batch.
TASKS = [Task(f"t{n}", f"Count to {n}{n % 2 * ', slowly'}.", origin="ABC"[n % 3]) for n in range(5)]
SHORT = Sampling(1.0, 1.0, 3)
CAPTURE = Capture(layers=(0, 15, 29), positions=("last_prompt", "last_completion", "rating"))


@pytest.fixture
def store(tmp_path) -> Store:
    return Store.open(str(tmp_path))


@pytest.fixture
def spec(smollm2):
    # Small batches, so that a store can hold some and lack others.
    return dataclasses.replace(smollm2, batch_tokens=300)


@pytest.fixture
def spec_fp32(smollm2_fp32):
    """For what is the same in other company too: in bfloat16 a row depends a little on the rows beside it."""
    return dataclasses.replace(smollm2_fp32, batch_tokens=300)


@pytest.fixture
def asked(monkeypatch, models, spec) -> list:
    """The conversations that are run: completed, or rated."""
    backend = models.get(spec)
    run, conversations = backend.run, []

    def noting(requests):
        conversations.extend({request.messages for request in requests})
        return run(requests)

    monkeypatch.setattr(backend, "run", noting)
    return conversations


def rated(store, spec, models, completions, names=("anchored",), seeds=(0, 1), sampling=SHORT, **changes):
    options = {"seeds": seeds, "exact": True, "capture": CAPTURE, "system_prompt": None} | changes
    templates = {name: template(name) for name in names}
    return rate(completions, spec, templates, sampling, store=store, models=models, **options)


def run(store, spec, models, tasks=TASKS, **changes):
    completions, _ = complete(tasks, spec, SHORT, seed=0, system_prompt=None, store=store, models=models)
    return rated(store, spec, models, completions, **changes)


def same(first, second):
    assert first.ratings.keys() == second.ratings.keys()
    for name, ratings in first.ratings.items():
        assert ratings.answers == second.ratings[name].answers
        np.testing.assert_array_equal(ratings.mass, second.ratings[name].mass)
    for position, residuals in first.residuals.items():
        other = second.residuals[position]
        assert residuals.keys == other.keys
        one, two = (captured.vectors.gather(captured.keys, captured.layers) for captured in (residuals, other))
        assert one.equal(two)


def test_the_second_run_computes_nothing_and_what_is_lost_is_computed_again_and_equal(store, spec, models, asked):
    first = run(store, spec, models)
    assert len(asked) == 2 * len(TASKS)
    fresh = Models()
    second = run(store, spec, fresh)
    assert not fresh._loaded, "no model is loaded"
    assert [work.computed for work in second.work] == [0] * 3
    same(first, second)
    parts = sorted(store.root.rglob("*.parquet")) + sorted(store.root.rglob("*.safetensors"))
    assert len(parts) > 6
    for part in parts[::5]:
        part.unlink()
    asked.clear()
    third = run(store, spec, models)
    assert 0 < len(asked) < 2 * len(TASKS)
    same(first, third)


@pytest.mark.slow
def test_more_seeds_templates_and_layers_add_to_what_is_there(store, spec_fp32, models):
    first = run(store, spec_fp32, models)
    wider = dataclasses.replace(CAPTURE, layers=(0, 7, 15, 29))
    second = run(store, spec_fp32, models, names=("anchored", "likert"), seeds=(0, 1, 2), capture=wider)
    sampled, exact = second.work[:2]
    assert (sampled.reused, sampled.computed) == (2 * len(TASKS), len(TASKS))
    assert (exact.reused, exact.computed) == (len(TASKS), 0)
    old, new = first.ratings["anchored"], second.ratings["anchored"]
    assert [answers[:2] for answers in new.answers] == list(old.answers)
    np.testing.assert_array_equal(old.mass, new.mass)
    before, after = first.residuals["last_completion"], second.residuals["last_completion"]
    assert before.vectors.gather(before.keys, (0, 15, 29)).equal(after.vectors.gather(after.keys, (0, 15, 29)))


def test_no_room_for_an_answer_leaves_the_exact_rating(store, spec, models):
    """A question that just fits is scored, though nothing can be sampled after it; later settings do not inherit it."""
    long = dataclasses.replace(SHORT, max_new_tokens=10_000)
    for sampling, too_long in ((long, True), (SHORT, False)):
        ratings = rated(
            store, spec, models, [Completion(TASKS[0], "One.")], ("stated",), (0,), sampling, capture=None
        ).ratings["stated"]
        assert np.isfinite(ratings.mass).all()
        assert ("too_long" in ratings.invalid_counts()) == too_long


def test_an_empty_completion_is_rated_but_has_no_vector(store, spec, models):
    completions = [Completion(TASKS[0], ""), Completion(TASKS[1], "One.")]
    for _ in range(2):
        both = rated(store, spec, models, completions, seeds=(0,))
        assert both.residuals["last_completion"].present().tolist() == [False, True]
        assert both.residuals["last_prompt"].present().all()
        assert np.isfinite(both.ratings["anchored"].mass).all()
    assert [work.computed for work in both.work] == [0] * 3


def test_other_words_for_an_option_change_exact_ratings_alone(store, spec, models):
    first = run(store, spec, models)
    more = template("anchored")
    more.options[4].also = ["6"]
    completions = first.ratings["anchored"].completions
    options = {"seeds": (0, 1), "exact": True, "capture": CAPTURE, "system_prompt": None}
    again = rate(completions, spec, {"anchored": more}, SHORT, store=store, models=models, **options)
    assert {work.stage: work.computed for work in again.work} == {
        "residual vectors": 0,
        "sampled ratings, anchored_1_5": 0,
        "exact ratings, anchored_1_5": len(TASKS),
    }
    assert (again.ratings["anchored"].mass[:, 4] > first.ratings["anchored"].mass[:, 4]).all()
