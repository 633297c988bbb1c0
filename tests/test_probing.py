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


def reopened(cell: Subject) -> Subject:
    """The same with its vectors as another process sees them."""
    anew = [Vectors(old.vectors.folder.parent.parent, old.vectors.kind, old.vectors.spec) for old in cell.residuals]
    return replace(cell, residuals=[replace(old, vectors=own) for old, own in zip(cell.residuals, anew, strict=True)])


def config(kind: str = "ridge", **changes: object) -> ProbeConfig:
    controls = ProbeControlsConfig(permutations=9, random_directions=20, embedding_model=None)
    common = {"targets": ["exact", "sampled", "single"], "penalties": [0.1, 10.0], "folds": 4, "controls": controls}
    return probe_config(kind, **{**common, **changes})


def subject(
    folder: Path, x: torch.Tensor, *, name: str = "anchored", absent: tuple[int, ...] = (), seed: int = 0
) -> Subject:
    """Ratings that layer 4 at `rating` knows, with vectors [N, positions * layers, d] in a store."""
    residuals = []
    for number, position in enumerate(POSITIONS):
        shards = Store.open(str(folder)).vectors("residuals", {"position": position, "of": name})
        keys = [shards.key(task=task) for task in range(N)]
        present = [task for task in range(N) if task not in absent]
        mine = x[present, number * len(LAYERS) : (number + 1) * len(LAYERS)]
        shards.append([keys[task] for task in present], list(LAYERS), mine, [keys[task] for task in absent])
        shards.refresh()
        residuals.append(Residuals(position, LAYERS, keys, shards))
    rng = np.random.default_rng(seed)
    p = 1 / (1 + np.exp(-signal_and_noise(x, 4, 0.2)))
    sampled = np.where(rng.random((N, 3)) < p[:, None], 5.0, 1.0)
    sampled[:5, 0] = np.nan
    measured = Measured(
        tasks=tuple(f"task-{number}" for number in range(N)),
        origins=tuple(ORIGINS[number % 4] for number in range(N)),
        says=("1", "5"),
        values=(1.0, 5.0),
        sampled=sampled,
        mass=0.9 * np.stack([1 - p, p], axis=1),
        refused=(p < 0.2).astype(float),
    )
    texts = [f"words of task {number}" for number in range(N)]
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
    outcome = probe(cell, config(), 50, [], store)
    assert isinstance(outcome, ProbeReport)
    return outcome


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
    used = [number for number in range(N) if number != 7]
    y = report.subject.measured.exact.mean[used]
    assert np.corrcoef(saved.probe.predict(x[used, column]), y)[0, 1] > 0.9


def test_transfer_between_two_templates_of_a_job(report, x, tmp_path, store):
    other = probe(subject(tmp_path, x, name="likert", seed=1), config(targets=["exact"]), 0, [report], store)
    assert isinstance(other, ProbeReport)
    table = other.transfer.set_index(["trained_on", "tested_on"])
    assert len(table) == 16
    # The same ratings and the same vectors under another name, and one task more.
    pair = table.loc[("anchored: exact", "likert: exact")]
    assert pair["n"] == 47
    assert pair["r"] > 0.9


@pytest.mark.parametrize("kind", ["linear", "logistic", "ordinal", "mlp", "mean_difference"])
def test_every_kind_goes_through(cell, kind, tmp_path, store):
    few = ProbeControlsConfig(permutations=2, random_directions=0, texts=False, embedding_model=None)
    target = "good" if kind == "logistic" else "exact"
    settings = config(kind, targets=[target], threshold="median", max_epochs=30, learning_rate=0.03, controls=few)
    outcome = probe(cell, settings, 0, [], store)
    assert isinstance(outcome, ProbeReport)
    assert outcome.metric == ("AUC" if kind == "logistic" else "R²")
    assert outcome.chosen["score" if kind == "logistic" else "pearson"][0] > 0.5
    outcome.save(tmp_path, {})
    assert load_probe(tmp_path / target).probe.kind == {"mean_difference": "linear"}.get(kind, kind)


def test_what_cannot_be_probed_says_why(tmp_path, x, store):
    broken = x.clone()
    broken[9, 3, 3] = torch.nan
    outcome = probe(subject(tmp_path / "0", broken), config(), 0, [], store)
    assert isinstance(outcome, NoProbe)
    assert outcome.reason.startswith("the vector of task task-9 at rating, layer 1 holds a NaN")
    outcome = probe(subject(tmp_path / "1", x, absent=tuple(range(3, N))), config(), 0, [], store)
    assert isinstance(outcome, NoProbe)
    assert "3 tasks have a vector at mean_completion, rating; 4 folds need 4" in outcome.reason


def test_a_constant_target_is_left_out_with_its_reason(cell, store):
    flat = replace(cell, measured=replace(cell.measured, sampled=np.full((N, 3), 5.0)))
    outcome = probe(flat, config(), 0, [], store)
    assert isinstance(outcome, ProbeReport)
    assert [missing.target.key for missing in outcome.nothing] == ["sampled", "single"]
    assert outcome.chosen["target"].tolist() == ["exact"]
    outcome = probe(flat, config(targets=["sampled"]), 0, [], store)
    assert isinstance(outcome, NoProbe)
    assert outcome.reason == "mean of 3 seeds: all 47 tasks have the same value, 5: there is nothing to predict"


def files(report: ProbeReport, folder: Path) -> dict[str, bytes]:
    """All that a job writes of probes, by name."""
    for table in probe_result(report, "cell").tables:
        write_table(table.frame, folder / table.name)
    report.save(folder / "probe", {"model": {"id": "m"}})
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def untrained(*_: object) -> NoReturn:
    raise AssertionError("probes are trained")


def test_what_was_trained_once_is_found_and_is_the_same(cell, store, report, tmp_path, monkeypatch):
    again = reopened(cell)
    monkeypatch.setattr(tested, "train_and_test", untrained)
    outcome = probe(again, config(), 50, [], Store.open(str(store.root)), untrained)
    assert isinstance(outcome, ProbeReport)
    assert (report.work, outcome.work) == (StageCounts("probes, anchored", 0, 3), StageCounts("probes, anchored", 3, 0))
    assert files(outcome, tmp_path / "found") == files(report, tmp_path / "made")
    # Names are for people: a probe by another name is the same probe.
    other = config(name="mine", _target_="elsewhere.RidgeBank")
    assert isinstance(probe(replace(again, name="other"), other, 50, [], store), ProbeReport)


@pytest.mark.parametrize(
    "changed",
    [
        {"penalties": [0.1, 100.0]},
        {"seed": 1},
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
    for other in (
        replace(cell, residuals=[replace(captured, layers=LAYERS[:2]) for captured in cell.residuals]),
        replace(cell, measured=replace(measured, sampled=np.where(measured.sampled == 5, 4, 1))),
        replace(cell, measured=replace(measured, mass=measured.mass * 0.99)),
        replace(cell, completions=["other words", *cell.completions[1:]]),
        replace(cell, sampling=Sampling(0.5, 1.0, 8)),
    ):
        with pytest.raises(AssertionError, match="probes are trained"):
            probe(other, config(), 50, [], store)


def test_jobs_that_want_the_same_probes_train_them_once(cell, tmp_path, monkeypatch):
    train, trained = tested.train_and_test, []

    def counted(*arguments):
        trained.append(arguments)
        return train(*arguments)

    monkeypatch.setattr(tested, "train_and_test", counted)

    def job(number: int) -> ProbeReport | NoProbe:
        return probe(reopened(cell), config(targets=["exact"]), 20, [], Store.open(str(tmp_path)))

    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(job, range(2)))
    assert len(trained) == 1
    first, second = (files(trained, tmp_path / f"{number}") for number, trained in enumerate(reports))
    assert first == second
