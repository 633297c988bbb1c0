"""Completing and rating through the store: only what is missing is done, and the result is the same."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import template

from prefs.data.task import Task
from prefs.data.template import Invalid
from prefs.models.loading import Models
from prefs.models.types import Sampling
from prefs.stages.complete import complete
from prefs.stages.rate import CapturePlan, rate
from prefs.stages.records import Completion
from prefs.store.table import Store

# Some of the same length, so that they could change places at the edge of a batch.
TASKS = [Task(f"t{n}", f"Count to {n}{n % 2 * ', slowly'}.", origin="ABC"[n % 3]) for n in range(5)]
SHORT = Sampling(1.0, 1.0, 3)
PLAN = CapturePlan(layers=(0, 15, 29), positions=("last_prompt", "last_completion", "rating"), dtype="bfloat16")


@pytest.fixture
def store(tmp_path) -> Store:
    return Store.open(str(tmp_path))


class Meter:
    """Counts the rows that a back-end is asked to run."""

    def __init__(self, monkeypatch, backend):
        self.completed = self.observed = 0
        complete, observe = backend.complete, backend.observe

        def count_complete(batch, *args):
            self.completed += len(batch)
            return complete(batch, *args)

        def count_observe(batch, *args):
            self.observed += len(batch)
            return observe(batch, *args)

        monkeypatch.setattr(backend, "complete", count_complete)
        monkeypatch.setattr(backend, "observe", count_observe)


@pytest.fixture
def spec(smollm2):
    # Small batches, so that a store can hold some and lack others.
    return dataclasses.replace(smollm2, batch_tokens=300)


@pytest.fixture
def meter(monkeypatch, models, spec) -> Meter:
    return Meter(monkeypatch, models.get(spec))


@pytest.fixture
def spec_fp32(smollm2_fp32):
    """For what is the same in other company too: in bfloat16 a row depends a little on the rows beside it."""
    return dataclasses.replace(smollm2_fp32, batch_tokens=300)


def run(store, spec, models, names=("anchored",), tasks=TASKS, seeds=(0, 1), capture=PLAN, **changes):
    completions, _ = complete(tasks, spec, SHORT, seed=0, system_prompt=None, store=store, models=models)
    options = {"seeds": seeds, "exact": True, "capture": capture, "system_prompt": None} | changes
    templates = {name: template(name) for name in names}
    return completions, rate(completions, spec, templates, SHORT, store=store, models=models, **options)


def same(first, second):
    assert first.ratings.keys() == second.ratings.keys()
    for name, ratings in first.ratings.items():
        assert ratings.answers == second.ratings[name].answers
        np.testing.assert_array_equal(ratings.mass, second.ratings[name].mass)
    for position, residuals in first.residuals.items():
        other = second.residuals[position]
        assert residuals.keys == other.keys
        one, two = (each.vectors.gather(each.keys, each.layers) for each in (residuals, other))
        assert one.equal(two)


def test_the_second_run_computes_nothing_and_loads_nothing(store, spec, models, meter):
    first = run(store, spec, models)
    assert meter.completed == len(TASKS)
    assert meter.observed == len(TASKS)
    fresh = Models()
    second = run(store, spec, fresh)
    assert not fresh._loaded
    assert meter.completed == meter.observed == len(TASKS)
    same(first[1], second[1])
    assert [work.computed for work in second[1].work] == [0] * 3


def test_what_is_lost_is_computed_again_and_equal(store, spec, models, meter):
    _, first = run(store, spec, models)
    parts = sorted(store.root.rglob("*.parquet")) + sorted(store.root.rglob("*.safetensors"))
    assert len(parts) > 6
    for part in parts[::5]:
        part.unlink()
    meter.completed = meter.observed = 0
    _, second = run(store, spec, models)
    assert 0 < meter.completed + meter.observed < 2 * len(TASKS)
    same(first, second)


@pytest.mark.slow
def test_more_seeds_templates_and_layers_add_to_what_is_there(store, spec_fp32, models):
    _, first = run(store, spec_fp32, models)
    wider = dataclasses.replace(PLAN, layers=(0, 7, 15, 29))
    _, second = run(store, spec_fp32, models, names=("anchored", "likert"), seeds=(0, 1, 2), capture=wider)
    sampled, exact = second.work[:2]
    assert (sampled.reused, sampled.computed) == (2 * len(TASKS), len(TASKS))
    assert (exact.reused, exact.computed) == (len(TASKS), 0)
    old, new = first.ratings["anchored"], second.ratings["anchored"]
    assert [row[:2] for row in new.answers] == list(old.answers)
    np.testing.assert_array_equal(old.mass, new.mass)
    before, after = first.residuals["last_completion"], second.residuals["last_completion"]
    assert before.vectors.gather(before.keys, (0, 15, 29)).equal(after.vectors.gather(after.keys, (0, 15, 29)))


@pytest.mark.slow
def test_templates_together_equal_templates_apart(store, tmp_path, spec_fp32, models):
    options = {"tasks": TASKS[:3], "capture": None}
    together = run(store, spec_fp32, models, names=("anchored", "likert"), **options)[1]
    for name in ("anchored", "likert"):
        apart = run(Store.open(str(tmp_path / name)), spec_fp32, models, names=(name,), **options)[1]
        np.testing.assert_allclose(together.ratings[name].mass, apart.ratings[name].mass, rtol=1e-3, atol=1e-7)
        assert together.ratings[name].answers == apart.ratings[name].answers


@pytest.mark.slow
def test_the_order_of_the_tasks_does_not_matter(store, tmp_path, spec, models):
    _, first = run(store, spec, models)
    _, second = run(Store.open(str(tmp_path / "other")), spec, models, tasks=TASKS[::-1])
    np.testing.assert_array_equal(first.ratings["anchored"].mass, second.ratings["anchored"].mass[::-1])
    assert list(first.ratings["anchored"].answers) == list(second.ratings["anchored"].answers)[::-1]


@pytest.mark.slow
def test_exact_ratings_in_bfloat16_are_near_those_in_float32(store, spec_fp32, models):
    means = []
    values = np.array(template("anchored").values)
    completions, _ = complete(TASKS[:2], spec_fp32, SHORT, seed=0, system_prompt=None, store=store, models=models)
    for each in (dataclasses.replace(spec_fp32, dtype="bfloat16"), spec_fp32):
        rated = rate(
            completions,
            each,
            {"anchored": template("anchored")},
            SHORT,
            seeds=(),
            exact=True,
            capture=None,
            system_prompt=None,
            store=store,
            models=models,
        )
        mass = rated.ratings["anchored"].mass
        means.append(mass @ values / mass.sum(axis=1))
    np.testing.assert_allclose(*means, atol=0.1)


def test_what_does_not_fit_is_too_long_and_the_rest_is_done(store, spec, tmp_path):
    tight = dataclasses.replace(spec, max_context=130)
    loaded = Models()
    tasks = [Task("short", "Hi."), Task("long", "word " * 200), Task("short2", "Hello.")]

    def both(models: Models, store: Store = store):
        completions, _ = complete(tasks, tight, SHORT, seed=0, system_prompt=None, store=store, models=models)
        rated = rate(
            completions,
            tight,
            {name: template(name) for name in ("stated", "anchored_precise")},
            SHORT,
            seeds=(0, 1),
            exact=True,
            capture=dataclasses.replace(PLAN, positions=("last_prompt", "rating")),
            system_prompt=None,
            store=store,
            models=models,
        )
        return completions, rated

    completions, rated = both(loaded)
    assert [each.invalid for each in completions] == [None, Invalid.too_long, None]
    # The long question fits behind none of them, the short one behind the short tasks.
    assert rated.ratings["anchored_precise"].invalid_counts() == {"too_long": 6}
    assert np.isnan(rated.ratings["anchored_precise"].mass).all()
    stated = rated.ratings["stated"]
    assert [{answer.invalid for answer in row} == {Invalid.too_long} for row in stated.answers] == [False, True, False]
    assert np.isnan(stated.mass).all(axis=1).tolist() == [False, True, False]
    assert rated.residuals["last_prompt"].present().tolist() == [True, False, True]
    assert rated.rating_residuals["stated"].present().tolist() == [True, False, True]
    assert not rated.rating_residuals["anchored_precise"].present().any()
    # All of this is known the next time, without the model.
    fresh = Models()
    again, same = both(fresh)
    assert not fresh._loaded
    assert again == completions
    assert [work.computed for work in same.work] == [0] * 5


def test_no_room_for_an_answer_leaves_the_exact_rating(store, spec):
    """A question that just fits is scored, though nothing can be sampled after it; later settings do not inherit it."""
    loaded = Models()
    completions = [Completion(TASKS[0], "One.")]
    long = dataclasses.replace(SHORT, max_new_tokens=10_000)
    for sampling, invalid in ((long, {"too_long": 1}), (SHORT, None)):
        rated = rate(
            completions,
            spec,
            {"stated": template("stated")},
            sampling,
            seeds=(0,),
            exact=True,
            capture=None,
            system_prompt=None,
            store=store,
            models=loaded,
        )
        assert np.isfinite(rated.ratings["stated"].mass).all()
        counts = rated.ratings["stated"].invalid_counts()
        assert counts == invalid if invalid else "too_long" not in counts


def test_an_empty_completion_is_rated_but_has_no_vector(store, spec, models):
    completions = [Completion(TASKS[0], ""), Completion(TASKS[1], "One.")]
    for _ in range(2):
        rated = rate(
            completions,
            spec,
            {"anchored": template("anchored")},
            SHORT,
            seeds=(0,),
            exact=True,
            capture=PLAN,
            system_prompt=None,
            store=store,
            models=models,
        )
        assert rated.residuals["last_completion"].present().tolist() == [False, True]
        assert rated.residuals["last_prompt"].present().all()
        assert np.isfinite(rated.ratings["anchored"].mass).all()
    assert [work.computed for work in rated.work] == [0] * 3


@pytest.mark.slow
def test_no_system_prompt_differs_from_one(store, spec, models, meter):
    run(store, spec, models)
    run(store, spec, models, system_prompt="You love counting.")
    assert meter.observed == 2 * len(TASKS)
