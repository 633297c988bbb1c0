"""The stage: from vectors in a store to tables, and plain words where there is nothing to probe."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from simulated_vectors import probe_config, residuals, signal_and_noise

from prefs.config import ProbeConfig, ProbeControlsConfig
from prefs.job import StageCounts
from prefs.models.types import Sampling
from prefs.probes import tested
from prefs.probes.card import load_probe
from prefs.probes.outcome import NoProbe
from prefs.stages.probe import ProbeReport, Subject, probe, probe_result
from prefs.stages.records import Residuals
from prefs.statistics.measured import Measured
from prefs.store.files import write_table
from prefs.store.table import Store, Vectors

N, LAYERS, POSITIONS = 48, (1, 4, 8), ("mean_completion", "rating")
ORIGINS = ("MATH", "ALPACA", "WILDCHAT", "BAILBENCH")


def reopened(vectors: Vectors) -> Vectors:
    """The same collection as another process sees it."""
    return Vectors(vectors.folder.parent.parent, vectors.kind, vectors.spec)


def config(kind: str = "ridge", **changes: object) -> ProbeConfig:
    controls = ProbeControlsConfig(permutations=9, random_directions=20, embedding_model=None)
    common = {"targets": ["exact", "sampled", "single"], "penalties": [0.1, 10.0], "folds": 4, "controls": controls}
    return probe_config(kind, **{**common, **changes})


def subject(
    folder: Path, x: torch.Tensor, *, name: str = "anchored", absent: tuple[int, ...] = (), seed: int = 0
) -> Subject:
    """Ratings that layer 4 at `rating` knows, with vectors [N, positions * layers, d] in a store."""
    residuals = []
    for at, position in enumerate(POSITIONS):
        shards = Store.open(str(folder)).vectors("residuals", {"position": position, "of": name})
        keys = [shards.key(task=task) for task in range(N)]
        there = [task for task in range(N) if task not in absent]
        mine = x[there, at * len(LAYERS) : (at + 1) * len(LAYERS)]
        shards.append([keys[task] for task in there], list(LAYERS), mine, [keys[task] for task in absent])
        shards.refresh()
        residuals.append(Residuals(position, LAYERS, keys, shards))
    rng = np.random.default_rng(seed)
    p = 1 / (1 + np.exp(-signal_and_noise(x, 4, 0.2)))
    sampled = np.where(rng.random((N, 3)) < p[:, None], 5.0, 1.0)
    sampled[:5, 0] = np.nan
    measured = Measured(
        tasks=tuple(f"task-{at}" for at in range(N)),
        origins=tuple(ORIGINS[at % 4] for at in range(N)),
        says=("1", "5"),
        values=(1.0, 5.0),
        sampled=sampled,
        mass=0.9 * np.stack([1 - p, p], axis=1),
        refused=(p < 0.2).astype(float),
    )
    texts = [f"words of task {at}" for at in range(N)]
    return Subject(name, measured, Sampling(1.0, 1.0, 8), texts, texts, residuals)


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return residuals(N, len(POSITIONS) * len(LAYERS), 8, dtype=torch.float32)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """Where outcomes are kept; each test probes something else."""
    return Store.open(str(tmp_path_factory.mktemp("outcomes")))


@pytest.fixture(scope="module")
def cell(tmp_path_factory, x) -> Subject:
    return subject(tmp_path_factory.mktemp("store"), x, absent=(7,))


@pytest.fixture(scope="module")
def report(cell, store) -> ProbeReport:
    found = probe(cell, config(), 50, [], store)
    assert isinstance(found, ProbeReport)
    return found


def test_every_table_is_there(report):
    targets = ["exact", "mean of 3 seeds", "one seed"]
    assert report.metric == "R²"
    assert report.scores.groupby(["target", "position", "layer"]).size().tolist() == [1] * 18
    chosen = report.chosen.set_index("target")
    assert chosen.index.tolist() == targets
    assert chosen.loc["exact", ["position", "layer"]].tolist() == ["rating", 4]
    assert chosen.loc["exact", "score"] > 0.8
    assert chosen.loc["exact", "p"] == pytest.approx(0.1)
    assert chosen["n"].tolist() == [47, 47, 42]
    assert chosen.loc["exact", "sites"] == "rating, layer 4 (4)"
    assert (chosen["ceiling"] <= 1).all()
    controls = set(report.controls["control"])
    assert {"origin mean", "length", "words (TF-IDF)", "random direction", "probe, shuffled targets"} <= controls
    assert "probe, origin means removed" in controls
    assert len(report.origins) == 3 * 4
    assert report.origins.query("target == 'exact'")["n"].sum() == 47
    assert report.transfer[["trained_on", "tested_on"]].drop_duplicates().shape == (9, 2)
    same = report.transfer.query("trained_on == 'exact' and tested_on == 'exact'").iloc[0]
    assert same["r"] == pytest.approx(chosen.loc["exact", "pearson"], abs=1e-4)
    assert "task-7" not in set(report.predictions["task"])


def test_saved_probes_predict_what_the_tables_say(report, tmp_path, x):
    written = report.save(tmp_path, {"model": {"id": "m"}})
    assert set(written) == {"exact", "sampled", "single"}
    saved = load_probe(tmp_path / "exact")
    assert saved.card["metrics"]["score"] == pytest.approx(report.chosen["score"][0])
    assert len(saved.sites) == 6
    column = report.features.sites.index(saved.probe.site)
    used = [at for at in range(N) if at != 7]
    y = report.subject.measured.exact.mean[used]
    assert np.corrcoef(saved.probe.predict(x[used, column]), y)[0, 1] > 0.9


def test_transfer_between_two_templates_of_a_job(report, x, tmp_path, store):
    other = probe(subject(tmp_path, x, name="likert", seed=1), config(targets=["exact"]), 0, [report], store)
    assert isinstance(other, ProbeReport)
    table = other.transfer.set_index(["trained_on", "tested_on"])
    assert len(table) == 16
    # The same ratings and the same vectors under another name, and one task more.
    there = table.loc[("anchored: exact", "likert: exact")]
    assert there["n"] == 47
    assert there["r"] > 0.9


def test_a_yes_and_no(cell, store):
    settings = {"threshold": "median", "max_epochs": 80, "patience": 40, "learning_rate": 0.03}
    logistic = config("logistic", targets=["good", "refused"], **settings)
    found = probe(cell, logistic, 20, [], store)
    assert isinstance(found, ProbeReport)
    assert found.metric == "AUC"
    assert found.chosen["score"].min() > 0.8
    assert set(found.predictions["measured"]) == {0.0, 1.0}


@pytest.mark.parametrize("kind", ["linear", "ordinal", "mlp", "mean_difference"])
def test_every_kind_goes_through(cell, kind, tmp_path, store):
    few = ProbeControlsConfig(permutations=2, random_directions=0, texts=False, embedding_model=None)
    settings = config(kind, targets=["exact"], max_epochs=30, learning_rate=0.03, controls=few)
    found = probe(cell, settings, 0, [], store)
    assert isinstance(found, ProbeReport)
    assert found.chosen["pearson"][0] > 0.5
    found.save(tmp_path, {})
    assert load_probe(tmp_path / "exact").probe.kind == {"mean_difference": "linear"}.get(kind, kind)


def test_a_task_whose_vector_is_not_finite_is_left_out_and_counted(tmp_path, x, store):
    broken = x.clone()
    broken[9, 3, 3] = torch.nan
    found = probe(subject(tmp_path, broken), config(), 0, [], store)
    assert isinstance(found, ProbeReport)
    assert 9 not in found.rows
    assert len(found.rows) == N - 1


def test_fewer_tasks_than_folds(tmp_path, x, store):
    found = probe(subject(tmp_path, x, absent=tuple(range(3, N))), config(), 0, [], store)
    assert isinstance(found, NoProbe)
    assert "3 tasks have a vector at mean_completion, rating; 4 folds need 4" in found.reason
    found = probe(subject(tmp_path, x), config(folds=49), 0, [], store)
    assert isinstance(found, NoProbe)
    assert found.reason == "48 tasks cannot fill 49 folds: give more tasks or fewer folds (probe.folds)"


def test_a_constant_target_is_left_out_with_its_reason(cell, store):
    flat = replace(cell, measured=replace(cell.measured, sampled=np.full((N, 3), 5.0)))
    found = probe(flat, config(), 0, [], store)
    assert isinstance(found, ProbeReport)
    assert [each.target.key for each in found.nothing] == ["sampled", "single"]
    assert found.chosen["target"].tolist() == ["exact"]
    found = probe(flat, config(targets=["sampled"]), 0, [], store)
    assert isinstance(found, NoProbe)
    assert found.reason == "mean of 3 seeds: all 47 tasks have the same value, 5: there is nothing to predict"


def files(report: ProbeReport, folder: Path) -> dict[str, bytes]:
    """All that a job writes of probes, by name."""
    for table in probe_result(report, "cell").tables:
        write_table(table.frame, folder / table.name)
    report.save(folder / "probe", {"model": {"id": "m"}})
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def untrained(*_: object) -> NoReturn:
    raise AssertionError("probes are trained")


def test_what_was_trained_once_is_found_and_is_the_same(cell, store, report, tmp_path, monkeypatch):
    # A store and vectors that are opened anew, as in another process.
    again = replace(cell, residuals=[replace(each, vectors=reopened(each.vectors)) for each in cell.residuals])
    monkeypatch.setattr(tested, "train_and_test", untrained)
    found = probe(again, config(), 50, [], Store.open(str(store.root)), untrained)
    assert isinstance(found, ProbeReport)
    assert (report.work, found.work) == (StageCounts("probes, anchored", 0, 3), StageCounts("probes, anchored", 3, 0))
    assert files(found, tmp_path / "found") == files(report, tmp_path / "made")
    # Names are for people: a probe by another name is the same probe.
    other = config(name="mine")
    assert isinstance(probe(replace(again, name="other"), other, 50, [], store), ProbeReport)


@pytest.mark.parametrize(
    "changed",
    [
        {"penalties": [0.1, 100.0]},
        {"targets": ["exact", "sampled"]},
        {"folds": 3},
        {"seed": 1},
        {"kind": "mean_difference"},
        {"trainer": {"accelerator": "cpu", "precision": "32-true"}},
        {"controls": ProbeControlsConfig(permutations=10, random_directions=20, embedding_model=None)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_another_config_is_trained_anew(cell, report, store, monkeypatch, changed):
    monkeypatch.setattr(tested, "train_and_test", untrained)
    with pytest.raises(AssertionError, match="probes are trained"):
        probe(cell, config(**changed), 50, [], store)


def test_other_data_is_trained_on_anew(cell, report, store, monkeypatch):
    monkeypatch.setattr(tested, "train_and_test", untrained)
    measured = cell.measured
    others = {
        "layers": replace(cell, residuals=[replace(each, layers=LAYERS[:2]) for each in cell.residuals]),
        "positions": replace(cell, residuals=cell.residuals[:1]),
        "one rating": replace(cell, measured=replace(measured, sampled=np.where(measured.sampled == 5, 4, 1))),
        "masses": replace(cell, measured=replace(measured, mass=measured.mass * 0.99)),
        "origins": replace(cell, measured=replace(measured, origins=measured.origins[::-1])),
        "texts": replace(cell, completions=["other words", *cell.completions[1:]]),
        "temperature": replace(cell, sampling=Sampling(0.5, 1.0, 8)),
    }
    for other in others.values():
        with pytest.raises(AssertionError, match="probes are trained"):
            probe(other, config(), 50, [], store)
    with pytest.raises(AssertionError, match="probes are trained"):
        probe(cell, config(), 51, [], store)


def test_jobs_that_want_the_same_probes_train_them_once(cell, tmp_path, monkeypatch):
    train, trained = tested.train_and_test, []

    def counted(*arguments):
        trained.append(arguments)
        return train(*arguments)

    monkeypatch.setattr(tested, "train_and_test", counted)

    def job(number: int) -> ProbeReport | NoProbe:
        own = replace(cell, residuals=[replace(each, vectors=reopened(each.vectors)) for each in cell.residuals])
        return probe(own, config(targets=["exact"]), 20, [], Store.open(str(tmp_path)))

    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(job, range(2)))
    assert len(trained) == 1
    first, second = (files(each, tmp_path / f"{at}") for at, each in enumerate(reports))
    assert first == second
