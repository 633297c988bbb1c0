"""The concept stage on a tiny real model: what is read, paired, tested and left out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tiny_models import llama, tiny_model

from prefs.concepts.extract import HELD_OUT, OTHER_ORIGINS, READ_UNDER, WRITTEN_UNDER, Concept, extract
from prefs.concepts.reading import Reader
from prefs.config import ConceptConfig
from prefs.data.task import Task
from prefs.models.loading import Models
from prefs.models.types import Capture, Sampling
from prefs.probes.probe import Site
from prefs.stages.concept import concept_remarks, rating_correlations, split_halves
from prefs.statistics.measured import Measured
from prefs.store.table import Store

TASKS = [Task(f"t{n}", f"What is {n} and {n * 3 % 7}?", ("MATH", "POEMS", "NEWS")[n // 8]) for n in range(24)]
CAPTURE = Capture(layers=(0, 3), positions=("last_prompt", "mean_completion"))
LIKING = ConceptConfig(
    name="liking",
    conditions={"positive": "You love sums, every one of them.", "neutral": None, "negative": "You hate sums."},
    wordings={"second": {"positive": "Sums are fun.", "negative": "Sums are awful."}},
    origins=["MATH"],
    folds=3,
    splits=10,
)
OTHER = ConceptConfig(
    name="other", conditions={"on": "Be loud.", "off": "Be quiet."}, contrast=["on", "off"], folds=3, splits=10
)


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Reader:
    spec = tiny_model(tmp_path_factory.mktemp("model"), llama())
    store = Store.open(str(tmp_path_factory.mktemp("store")))
    return Reader(spec, spec, Sampling(1.0, 1.0, 4), 0, CAPTURE, store, Models(), dtype="float32")


def only(concepts, tasks, reader, **settings) -> Concept | str:
    """The one concept that there is, or the reason why not."""
    (extracted,) = extract(concepts, tasks, reader, **settings).values()
    return extracted


def test_vectors_and_tests_of_two_concepts(reader, tmp_path):
    liking, other = extract({"liking": LIKING, "other": OTHER}, TASKS, reader, bootstrap=20).values()
    assert isinstance(liking, Concept)
    assert isinstance(other, Concept)
    assert (liking.n, other.n) == (8, 24)
    assert liking.difference.sites == tuple(Site(layer, name) for name in CAPTURE.positions for layer in CAPTURE.layers)
    tests = liking.tests.groupby("test", sort=False)["n"].first().to_dict()
    assert tests == {
        HELD_OUT: 8,
        OTHER_ORIGINS: 16,
        "origin POEMS": 8,
        "origin NEWS": 8,
        "wording second": 8,
        READ_UNDER: 8,
        WRITTEN_UNDER: 8,
        "positive against neutral": 8,
        "neutral against negative": 8,
        "concept other": 24,
    }
    assert list(other.tests["test"].unique()) == [HELD_OUT, READ_UNDER, WRITTEN_UNDER, "concept liking"]
    # What differs at the end of the prompt is the prompt alone, so the same text and no text tell as much ...
    at_prompt = liking.tests[liking.tests["position"] == "last_prompt"].set_index(["test", "layer"])
    for layer in CAPTURE.layers:
        assert at_prompt.loc[(HELD_OUT, layer), "auc"] == at_prompt.loc[(READ_UNDER, layer), "auc"] == 1
        # ... and without a prompt there is nothing to tell apart, but for rows that rounding makes differ.
        assert at_prompt.loc[(WRITTEN_UNDER, layer), "auc"] == pytest.approx(0.5, abs=0.1)
    assert (liking.vectors.query("position == 'last_prompt'")["split_half"] > 0.9).all()
    assert next(iter(split_halves(liking))) == "last_prompt"
    # A second time everything is in the store.
    again = dataclasses.replace(reader, work=[])
    extract({"liking": LIKING, "other": OTHER}, TASKS, again, bootstrap=20)
    assert [work.computed for work in again.done()] == [0, 0]
    paths = liking.save(tmp_path, {"model": {"id": "x"}}, "llama")
    assert [path.name for path in paths] == [
        "vectors.safetensors", "vectors.json", "last_prompt.gguf", "mean_completion.gguf",
    ]  # fmt: skip


def test_tasks_without_a_completion_under_one_condition_are_left_out_of_both_and_counted(reader):
    # The long system prompt leaves the longest tasks no room.
    tasks = [*TASKS[:8], *(Task(f"long{n}", f"Sum {n} " * (90 + n), "MATH") for n in range(2))]
    room = dataclasses.replace(reader.subject, max_context=330)
    config = dataclasses.replace(LIKING, conditions={**LIKING.conditions, "positive": "You love sums. " * 20})
    short = dataclasses.replace(reader, subject=room, completer=room, work=[])
    concept = only({"liking": config}, tasks, short, bootstrap=5)
    assert isinstance(concept, Concept)
    assert concept.n == 8
    assert concept.remarks == [
        "Concept liking: paired on the 8 of 10 tasks that have a completion and a vector under both conditions"
        " (2 lack positive, 0 lack negative)."
    ]
    assert set(concept.tests.loc[concept.tests["test"] == HELD_OUT, "left_out"]) == {2}
    # And a condition in which nothing fits has no vector at all.
    nothing = dataclasses.replace(config, conditions={**config.conditions, "positive": "You love sums. " * 80})
    reason = only({"liking": nothing}, tasks, dataclasses.replace(short, work=[]), bootstrap=5)
    assert "0 tasks have a vector at every position under both conditions (positive has 0 of 10" in reason
    assert concept_remarks("liking", reason) == [f"No vectors of concept liking: {reason}."]


def test_too_few_tasks_or_none_of_the_origin_say_so(reader):
    reason = only({"liking": LIKING}, TASKS[8:], reader, bootstrap=5)
    assert reason == "no task is of MATH (concept.liking.origins); there are POEMS, NEWS"
    few = only({"liking": LIKING}, TASKS[:1], reader, bootstrap=5)
    assert "1 tasks have a vector" in few


def test_projections_are_correlated_with_ratings_without_the_task_s_own_fold(reader):
    concept = only({"liking": LIKING}, TASKS, reader, bootstrap=20)
    assert isinstance(concept, Concept)
    read = reader.read(TASKS, written_under=None, read_under=None)
    site = concept.difference.sites[1]
    vectors = read.features([task.id for task in TASKS]).read(range(24), slice(1, 2))[:, 0].double()
    fits = concept.fits([task.id for task in TASKS])
    assert sorted(set(fits[:8])) == [0, 1, 2]
    assert set(fits[8:]) == {3}
    along = (vectors * concept.difference.direction[fits, 1].double()).sum(-1).numpy()
    along -= concept.difference.threshold[fits, 1].numpy()
    # Options worth 1 and 2, so that the mean rating is the projection, on some scale.
    p = 0.5 + 0.4 * along / np.abs(along).max()
    measured = Measured(
        tasks=tuple(task.id for task in TASKS),
        origins=tuple(task.origin for task in TASKS),
        says=("1", "2"),
        values=(1.0, 2.0),
        sampled=np.empty((24, 0)),
        mass=np.stack([1 - p, p], axis=1),
        refused=np.full(24, np.nan),
    )
    table = rating_correlations([concept], measured, read.residuals, 20, 0).set_index(["position", "layer"])
    assert table.loc[(site.position, site.layer), "r"] == pytest.approx(1, abs=1e-4)
    assert (table["n"] == 24).all()
