"""Probes side by side: what a comparison says of them, from run folders with probes of simulated vectors.

Expected numbers are recomputed from the files by safetensors, numpy and scipy.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import offline_wandb
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from simulated import Compared, around, compared, completed, row_of, signal, simulate, some_tasks

from prefs.comparison.probes import probe_remarks

TASKS, LAYERS, D = 80, 3, 24
RIDGE = (
    "probe=ridge",
    "probe.positions=[rating]",
    "probe.penalties=[0.1,10]",
    "probe.controls.permutations=39",
    "probe.controls.random_directions=5",
    "probe.controls.held_out_origins=false",
)


def activations(means: np.ndarray, noise: float, d: int = D, seed: int = 0) -> np.ndarray:
    """[T, L, d] vectors: noise, and at layer 1 the ratings along one direction, the same for all of a width."""
    along = np.random.default_rng(7).normal(size=d)
    vectors = np.random.default_rng([1, seed]).normal(size=(len(means), LAYERS, d))
    vectors[:, 1] = noise * vectors[:, 1] + (means - means.mean())[:, None] * along
    return vectors


def job(
    folder: Path,
    name: str,
    means: Mapping[str, np.ndarray],
    *overrides: str,
    d: int = D,
    noise: float = 0.3,
    tasks: int = TASKS,
    first: int = 0,
    draw: int = 0,
) -> Path:
    vectors = {key: activations(each, noise, d, at) for at, (key, each) in enumerate(means.items())}
    mass = {key: around(each) for key, each in means.items()}
    texts = completed(some_tasks(tasks, first))
    simulate(folder, [f"model.name={name}", *overrides], texts, mass, draw=draw, vectors=vectors)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two names of one model, a wider model, and a rater without probes."""
    folder = tmp_path_factory.mktemp("multirun") / "05-00-00"
    clear, other = signal(TASKS), signal(TASKS, 1)
    both = {"anchored": clear, "stated": np.clip(0.7 * clear + 0.3 * other, 1, 5)}
    job(folder / "0", "keen", both, *RIDGE)
    job(folder / "1", "usual", {"anchored": clear}, *RIDGE, draw=1)
    job(folder / "2", "wide", both, "model.path=/models/wide", *RIDGE, d=2 * D, draw=2)
    simulate(folder / "3", ["model.name=plain"], completed(some_tasks(TASKS)), {"anchored": around(other)}, draw=3)
    return folder


@pytest.fixture(scope="module")
def sweep(folder) -> Compared:
    return compared(folder, wandb_mode="offline", drawn=True)


def test_the_table_of_probes_is_that_of_the_jobs(sweep, folder):
    table = sweep.table("probes")
    assert list(dict.fromkeys(table["cell"])) == [
        *("keen-anchored", "keen-stated", "usual-anchored", "wide-anchored", "wide-stated")
    ]
    assert list(table["target"]) == ["exact", "mean of 4 seeds", "one seed"] * 5
    for row in table.to_dict("records"):
        number = {"keen": "0", "usual": "1", "wide": "2"}[row["rater"]]
        chosen = row_of(pd.read_csv(folder / number / row["template"] / "probe_chosen.csv"), target=row["target"])
        for name in ("n", "score", "score_low", "score_high", "p", "ceiling", "position", "layer", "penalty"):
            assert row[name] == pytest.approx(chosen[name]), name
        controls = pd.read_csv(folder / number / row["template"] / "probe_controls.csv")
        controls = controls.loc[controls["target"] == row["target"], :].set_index("control")["score"]
        blind = controls[["origin mean", "length", "words (TF-IDF)"]]
        assert (row["best_control"], row["best_control_score"]) == (blind.idxmax(), pytest.approx(blind.max()))
        assert row["random direction"] == pytest.approx(controls["random direction"])
    exact = row_of(table, cell="keen-anchored", target="exact")
    assert (exact["metric"], exact["layer"], exact["probe"]) == ("R²", 1, "ridge")
    assert exact["score"] > 0.9
    line = next(line for line in sweep.printed.split("keen-anchored")[-1].splitlines() if "exact" in line)
    assert "1, rating" in line


def test_cosines_are_of_the_saved_directions_at_each_site_of_one_model(sweep, folder):
    table = sweep.table("probe_cosines")
    # Nine probes of the model with two names, six of the wider one, at three layers each.
    assert len(table) == LAYERS * (9 * 8 // 2 + 6 * 5 // 2)
    assert dict(table.groupby("model")["d"].first()) == {"keen, usual": D, "wide": 2 * D}
    for model, raters in (("keen, usual", ("keen", "usual")), ("wide", ("wide",))):
        rows = table.loc[table["model"] == model, :]
        assert {name.split("-")[0] for name in rows["a"]} <= set(raters)
        assert rows["random_sd"].to_list() == pytest.approx([rows["d"].iloc[0] ** -0.5] * len(rows))
        assert set(zip(rows["layer"], rows["shown"], strict=True)) == {(0, False), (1, True), (2, False)}

    def directions(number: str, key: str, target: str) -> torch.Tensor:
        return load_file(folder / number / key / "probe" / target / "probe.safetensors")["directions"].double()

    for layer, (a, b) in itertools.product(
        range(LAYERS),
        [
            (("keen-anchored: exact", "0", "anchored", "exact"), ("keen-stated: exact", "0", "stated", "exact")),
            (("keen-stated: one seed", "0", "stated", "single"), ("usual-anchored: exact", "1", "anchored", "exact")),
        ],
    ):
        x, y = directions(*a[1:])[layer], directions(*b[1:])[layer]
        expected = torch.nn.functional.cosine_similarity(x, y, dim=0).item()
        row = row_of(table, a=a[0], b=b[0], layer=layer)
        assert row["cosine"] == pytest.approx(expected, abs=1e-6)
        assert row["position"] == "rating"
    # The ratings lie along one direction at layer 1 and nowhere else.
    exact = table.loc[(table["a"] == "keen-anchored: exact") & (table["b"] == "keen-stated: exact"), :]
    assert exact.set_index("layer")["cosine"].abs().idxmax() == 1


def test_transfer_is_of_held_out_predictions_with_the_others_ratings(sweep, folder):
    table = sweep.table("probe_transfer")
    cells = {"keen-anchored": "0/anchored", "keen-stated": "0/stated", "usual-anchored": "1/anchored"}
    cells |= {"wide-anchored": "2/anchored", "wide-stated": "2/stated", "plain-anchored": "3/anchored"}
    assert list(zip(table["trained_on"], table["tested_on"], strict=True)) == [
        pair for pair in itertools.product(cells, cells) if pair[0] != "plain-anchored"
    ]
    means = {name: pd.read_csv(folder / path / "exact.csv").set_index("task")["mean"] for name, path in cells.items()}
    for row in table.to_dict("records"):
        home, away = row["trained_on"], row["tested_on"]
        predicted = pd.read_csv(folder / cells[home] / "probe_predictions.csv").query("target == 'exact'")
        predicted = predicted.set_index("task")["predicted"]
        assert row["r"] == pytest.approx(stats.pearsonr(predicted, means[away][predicted.index]).statistic)
        assert row["ratings_r"] == pytest.approx(stats.pearsonr(means[home], means[away]).statistic)
        assert (row["n"], row["target"], row["ratings"]) == (TASKS, "exact", "exact")
        assert row["r_low"] <= row["r"] <= row["r_high"]
    for name in set(cells) - {"plain-anchored"}:
        chosen = row_of(pd.read_csv(folder / cells[name] / "probe_chosen.csv"), target="exact")
        assert row_of(table, trained_on=name, tested_on=name)["r"] == pytest.approx(chosen["pearson"])


def test_the_page_the_figures_and_wandb_have_them(sweep):
    assert '<a href="#section-6">Probes</a>' in sweep.page
    assert "reads the row&#39;s model" in sweep.page
    assert {"probe_cosines", "probe_transfer"} <= {path.stem for path in (sweep.out / "figures").glob("*.png")}
    (folder,) = (sweep.out / "wandb").glob("offline-run-*")
    logs = offline_wandb.read(folder)
    logged = {key for row in logs.history for key in row}
    names = ("probes", "probe_cosines", "probe_transfer")
    assert {f"tables/{name}" for name in names} | {f"figures/{name}" for name in names[1:]} <= logged
    score = row_of(sweep.table("probes"), cell="wide-stated", target="exact")["score"]
    assert logs.summary["compare/probe/wide-stated/exact"] == pytest.approx(score)


@pytest.mark.parametrize("damage", ["no card", "no tensors", "of no model", "of fewer sites"])
def test_a_damaged_probe_is_one_line_and_left_out(damage, folder, tmp_path):
    shutil.copytree(folder / "0", tmp_path / "0")
    files = tmp_path / "0" / "anchored" / "probe" / "exact"
    card, tensors = json.loads((files / "probe.json").read_text()), files / "probe.safetensors"
    if damage == "no card":
        (files / "probe.json").write_text("{")
    elif damage == "no tensors":
        tensors.write_bytes(tensors.read_bytes()[:-4])
    else:
        changed = {"model": None} if damage == "of no model" else {"sites": card["sites"][:-1]}
        (files / "probe.json").write_text(json.dumps(card | changed))
    result = compared(tmp_path)
    (remark,) = [line for line in result.remarks if "left out" in line]
    assert remark.startswith("keen-anchored: a probe is left out (")
    assert "exact" in remark
    assert remark.endswith(").")
    names = {*result.table("probe_cosines")["a"], *result.table("probe_cosines")["b"]}
    assert "keen-anchored: exact" not in names
    assert {"keen-anchored: one seed", "keen-stated: exact"} <= names
    assert row_of(result.table("probes"), cell="keen-anchored", target="exact")["score"] > 0.9  # its tables are sound


@pytest.mark.parametrize("name", ["probe_chosen", "probe_controls", "probe_predictions"])
@pytest.mark.parametrize("content", [b"no table", None])
def test_a_damaged_table_leaves_its_cell_out(name, content, folder, tmp_path):
    shutil.copytree(folder / "0", tmp_path / "0")
    path = tmp_path / "0" / "stated" / f"{name}.parquet"
    path.unlink() if content is None else path.write_bytes(content)
    result = compared(tmp_path)
    assert set(result.table("probes")["cell"]) == {"keen-anchored"}
    remarks = [line for line in result.remarks if "left out" in line]
    # Without the table of its scores a cell has no probes.
    assert len(remarks) == (name != "probe_chosen" or content is not None)
    assert all(line.startswith("keen-stated: its probes are left out (cannot read ") for line in remarks)


def test_two_kinds_of_probe_on_the_same_ratings_are_compared(tmp_path):
    means = {"anchored": signal(TASKS)}
    job(tmp_path / "0", "keen", means, *RIDGE)
    job(tmp_path / "1", "keen", means, "probe=mean_difference", *RIDGE[1:2], *RIDGE[3:])
    job(tmp_path / "2", "keen", means, "probe=mean_difference", *RIDGE[1:2], *RIDGE[3:])
    result = compared(tmp_path)
    assert list(result.table("cells")["cell"].unique()) == ["keen-anchored"]
    names = ["keen-anchored probe.name=ridge", "keen-anchored probe.name=mean_difference"]
    table = result.table("probes")
    assert set(table["cell"]) == set(names)
    assert len(table) == 6
    row = row_of(result.table("probe_cosines"), a=f"{names[1]}: exact", b=f"{names[0]}: exact", layer=1)
    assert row["cosine"] > 0.8
    assert set(result.table("probe_transfer")["tested_on"]) == {"keen-anchored"}
    measured = next(line for line in result.remarks if line.startswith("Measured again"))
    assert measured.count("(but for its probes)") == 1
    assert f"{tmp_path}/0/anchored (but for its probes), {tmp_path}/1/anchored." in measured


def test_a_probe_without_a_direction_is_left_out_of_the_cosines(tmp_path):
    means = {"anchored": signal(TASKS)}
    job(tmp_path / "0", "keen", means, *RIDGE, "probe.targets=[exact,sampled]")
    mlp = (
        "probe=mlp",
        "probe.hidden=2",
        "probe.max_epochs=2",
        "probe.controls.permutations=0",
        *RIDGE[1:2],
        *RIDGE[4:],
    )
    job(tmp_path / "1", "other", means, *mlp, "probe.penalties=[1.0]")
    result = compared(tmp_path)
    assert "A probe of kind mlp has no direction, and so no cosine: other-anchored: exact." in result.remarks
    assert set(result.table("probe_cosines")["b"]) == {"keen-anchored: mean of 4 seeds"}
    assert "other-anchored" in set(result.table("probe_transfer")["trained_on"])


# Cautions


def said(**row: object) -> list[str]:
    sound = {"cell": "c", "target": "exact", "metric": "R²", "score": 0.5, "p": 0.01, "ceiling": 0.9}
    sound |= {"best_control": "length", "best_control_score": 0.1}
    return probe_remarks(pd.DataFrame([sound | row]))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"ceiling": 0.04, "score": 0.5},
            "mostly noise (the best R² that any probe can reach is under .10): c: exact (.04).",
        ),
        ({"score": -0.02}, "no better than chance does: c: exact (−.02)."),
        ({"p": 0.2}, "no better than chance does: c: exact (.50)."),
        ({"score": np.nan}, "no better than chance does: c: exact (–)."),
        (
            {"metric": "AUC", "score": 0.5, "p": np.nan, "ceiling": np.nan},
            "no better than chance does: c: exact (.50).",
        ),
        ({"best_control_score": 0.5}, "never looks into the model: c: exact (length .50)."),
        ({"score": 0.97}, "above the noise ceiling, which is an estimate too: c: exact (.97 of .90)."),
    ],
)
def test_what_is_not_to_be_believed_is_said_once(row, words):
    (line,) = said(**row)
    assert words in line


def test_a_sound_probe_is_not_doubted():
    assert said() == []
    assert said(p=np.nan, ceiling=np.nan, best_control=None, best_control_score=np.nan) == []
    assert said(score=0.94) == []  # by so little the ceiling may be off
    assert said(metric="AUC", score=0.7, ceiling=np.nan) == []
