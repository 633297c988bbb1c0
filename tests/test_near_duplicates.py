"""Prompts that differ in case, blanks or forms of a character are one task: told, and never trained on and held out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from simulated_vectors import probe_config, tensors
from tiny_models import llama, tiny_model

from prefs.concepts.extract import Concept, extract
from prefs.concepts.reading import Reader
from prefs.config import ConceptConfig, DatasetConfig, ProbeControlsConfig
from prefs.data.task import Task, load_tasks, same_tasks
from prefs.models.loading import Models
from prefs.models.types import Capture, Sampling
from prefs.probes.crossval import held_out_origins
from prefs.probes.folds import Splits, assign_folds, resampled, shuffled, tasks_of
from prefs.probes.outcome import Outcome
from prefs.probes.targets import Target
from prefs.probes.tested import train_and_test
from prefs.statistics.estimates import Estimate, Resamples
from prefs.statistics.measured import Measured
from prefs.store.table import Store

N = 40
ORIGINS = ("MATH", "NEWS")


def test_what_is_the_same_task():
    # A form of K, a ligature, a capital sharp s, a no-break space; an accent of its own; other words are other tasks.
    prompts = ["K fit ß", "\u212a ﬁt ẞ\n", "k  FIT SS", "k fit", "é", "e\u0301"]
    assert same_tasks(["b", "c", "a", "d", "e", "f"], prompts) == ["a", "a", "a", "d", "e", "e"]
    assert same_tasks(["z", "y"], ["a b", "ab"]) == ["z", "y"]


def test_near_duplicates_are_told_when_tasks_are_read(tmp_path, caplog):
    path = tmp_path / "tasks.csv"
    path.write_text("id,prompt\n1,Write a poem.\n2,What is 2+2?\n3,write a  poem. \n4,WRITE A POEM.\n")
    assert len(load_tasks(DatasetConfig(name="own", kind="file", path=str(path)))) == 4
    (record,) = caplog.records
    assert record.getMessage() == (
        "2 of 4 tasks have the prompt of another, but for case or blanks (1 and 3: 'write a poem.'): all are kept, and"
        " held out together"
    )
    caplog.clear()
    load_tasks(DatasetConfig(name="mini", kind="mini"))
    assert not caplog.records


def probed(same: list[str], kind: str = "ridge") -> Outcome:
    """A probe of noise, on N tasks each of which occurs twice, with nearly the same vector and rating."""
    rng = np.random.default_rng(0)
    once = rng.normal(size=(N, 1, 128))
    x = torch.tensor(np.repeat(once, 2, axis=0) + 0.01 * rng.normal(size=(2 * N, 1, 128))).float()
    p = np.repeat(rng.uniform(0.1, 0.9, size=N), 2)
    measured = Measured(
        tasks=tuple(f"t{task:02}{again}" for task in range(N) for again in "ab"),
        origins=tuple(ORIGINS[task % 2] for task in range(N) for _ in "ab"),
        says=("1", "5"),
        values=(1.0, 5.0),
        sampled=np.empty((2 * N, 0)),
        mass=np.stack([1 - p, p], axis=1),
        refused=np.zeros(2 * N),
    )
    controls = ProbeControlsConfig(permutations=0, random_directions=0, embedding_model=None, held_out_origins=False)
    config = probe_config(kind, targets=["exact"], penalties=[0.1], controls=controls)
    target = Target("exact", "exact", 1 + 4 * p, Estimate(1.0, None, None, 2 * N))
    texts = [f"words of {task} {task * 7 % 11}" for task in range(N) for _ in "ab"]
    made = train_and_test(
        measured, same, np.arange(2 * N), [target], tensors(x), texts, [""] * (2 * N), config, bootstrap=0
    )
    assert isinstance(made, Outcome)
    return made


def test_a_probe_of_noise_finds_nothing_in_tasks_that_occur_twice():
    ids = [f"t{task:02}{again}" for task in range(N) for again in "ab"]
    together = [f"{task[:-1]}a" for task in ids]
    apart, grouped = probed(ids), probed(together)
    assert apart.chosen["score"].iloc[0] > 0.4  # each held-out task is known from its twin
    assert grouped.chosen["score"].iloc[0] < 0.1
    words = [made.controls.set_index("control")["score"]["words (TF-IDF)"] for made in (apart, grouped)]
    assert words[0] > 0.4
    assert words[1] < 0.1
    fold = grouped.predictions.set_index("task")["fold"]
    assert all(fold[f"t{task:02}a"] == fold[f"t{task:02}b"] for task in range(N))


def test_folds_are_those_of_the_tasks_where_all_differ_and_one_of_several_origins_is_taken():
    ids, origins = [f"t{task}" for task in range(20)], [ORIGINS[task % 2] for task in range(20)]
    same = same_tasks(ids, [f"Task {task}" for task in range(20)])
    assert same == ids
    twice = assign_folds([*ids, "t3"], [*origins, "MATH"], 4, seed=0)
    assert twice[3] == twice[20]
    others = assign_folds(["t3", *ids], ["MATH", *origins], 4, seed=0)
    assert others[1:].tolist() == twice[:20].tolist()


def test_twins_validate_together():
    same = np.repeat(np.arange(30), 2)
    splits = Splits.draw(np.repeat(np.arange(3), 20), 0, same)
    assert (splits.validation[::2] == splits.validation[1::2]).all()
    assert 0 < splits.validation.sum() < 30


def test_twins_are_shuffled_and_resampled_together():
    task = tasks_of(np.array(list("baacdbee")))
    assert task.tolist() == [0, 1, 1, 2, 3, 0, 4, 4]
    orders = [shuffled(task, np.random.default_rng(seed)) for seed in range(50)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(8))
        moved = task[order]
        assert (moved[[0, 1, 6]] == moved[[5, 2, 7]]).all()
    assert len({tuple(order) for order in orders}) == 12  # 3! of those that occur twice, 2! of the others
    times = resampled(task, 100, 0).times
    assert (times[:, [0, 1, 6]] == times[:, [5, 2, 7]]).all()
    # Where all differ, as if there were none.
    alone = tasks_of(np.array([f"t{row}" for row in range(20)]))
    assert shuffled(alone, np.random.default_rng(1)).tolist() == np.random.default_rng(1).permutation(20).tolist()
    assert (resampled(alone, 30, 2).times == Resamples.draw(20, 30, 2).times).all()


def test_a_task_of_two_origins_is_in_no_test_on_an_origin_held_out():
    rng = np.random.default_rng(0)
    x, y = torch.tensor(rng.normal(size=(24, 1, 4))).float(), rng.normal(size=24)
    same = np.array([*range(20), 0, 21, 22, 23]).astype(str)
    target = Target("exact", "exact", y, Estimate(1.0, None, None, 24))
    origins = [ORIGINS[row // 12] for row in range(24)]
    config = probe_config("ridge", penalties=[1.0])
    predictions = held_out_origins(tensors(x), target, origins, config, same=same)
    assert predictions is not None
    assert np.flatnonzero(np.isnan(predictions)).tolist() == [0, 20]
    kept = np.setdiff1d(np.arange(24), [0, 20])
    without = held_out_origins(
        tensors(x[kept]), Target("exact", "exact", y[kept], target.ceiling), [origins[row] for row in kept], config
    )
    np.testing.assert_allclose(predictions[kept], without)


def test_a_concept_s_vectors_are_tested_on_no_twin_of_their_own_tasks(tmp_path):
    tasks = [Task(f"t{n}", f"What is {n}?", "MATH") for n in range(9)]
    tasks += [Task(f"u{n}", f"what is  {n}? ", "NEWS") for n in range(3)]
    tasks += [Task(f"w{n}", f"Say {n}.", "NEWS") for n in range(3)]
    tasks += [Task("t9", "WHAT IS 8?", "MATH")]
    spec = tiny_model(tmp_path / "model", llama())
    store = Store.open(str(tmp_path / "store"))
    reader = Reader(
        spec, spec, Sampling(1.0, 1.0, 2), 0, Capture((0,), ("last_prompt",)), store, Models(), dtype="float32"
    )
    conditions = {"positive": "Love sums.", "negative": "Hate sums."}
    config = ConceptConfig(name="sums", conditions=conditions, origins=["MATH"], folds=3, splits=10)
    concept = extract({"sums": config}, tasks, reader, bootstrap=0)["sums"]
    assert isinstance(concept, Concept)
    assert "origin NEWS" in set(concept.tests["test"])
    own = concept.fits([f"t{n}" for n in range(9)])
    assert (own < 3).all()
    assert concept.fits(["t9"]) == own[8]
    assert concept.fits(["u0", "u1", "u2"]).tolist() == own[:3].tolist()
    assert concept.fits(["w0", "w1", "w2"]).tolist() == [3, 3, 3]


@pytest.mark.parametrize("kind", ["linear", "mean_difference"])
def test_the_kinds_that_validate_too(kind):
    ids = [f"t{task:02}{again}" for task in range(N) for again in "ab"]
    assert probed([f"{task[:-1]}a" for task in ids], kind).chosen["score"].iloc[0] < 0.1
