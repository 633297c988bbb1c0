"""Comparisons of sweeps by simulated raters: the numbers and sentences that a user gets, from files as jobs write them.

Every expected number comes from the simulated arrays, by scipy, numpy or a formula that stands in the test.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import offline_wandb
import pandas as pd
import pytest
from scipy import stats
from simulated import Simulated, around, completed, config, hydra_sweep, simulate, some_tasks
from wandb.proto import wandb_internal_pb2

import prefs.compare
import prefs.results.figures
from prefs.compare import compare, main
from prefs.comparison.cautions import cautions, unfinished
from prefs.comparison.cells import Cell, align, read_sweep
from prefs.comparison.tables import Block, agreement, agreement_matrices, cell_table, stability_by, variance
from prefs.data.task import Task
from prefs.errors import UserError
from prefs.stages.records import Completion

RATERS, TEMPLATES, TASKS = ("keen", "usual"), ("anchored", "stated"), 100
GROUP = "simulated 2026-11-24/04-27-26"


@dataclass(frozen=True)
class Compared:
    """What a comparison wrote and printed."""

    out: Path
    printed: str

    def table(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.out / f"{name}.csv", keep_default_na=False, na_values=[""])

    @property
    def remarks(self) -> list[str]:
        return [line.removeprefix("• ") for line in self.printed.splitlines() if line.startswith("• ")]

    def cell(self, name: str, origin: str = "ALL") -> pd.Series:
        cells = self.table("cells")
        (row,) = [row for _, row in cells.iterrows() if (row["cell"], row["origin"]) == (name, origin)]
        return row


def compared(*folders: Path, out: Path | None = None, wandb_mode: str | None = None) -> Compared:
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("COLUMNS", "1000")  # each remark on one line
        patch.setattr(prefs.results.figures, "DPI", 40)  # drawn in less time
        for name in ("WANDB_MODE", "WANDB_API_KEY"):
            patch.delenv(name, raising=False)
        written = compare(list(folders), out, wandb_mode)
    return Compared(written, printed.getvalue())


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """No figures, which take most of the time, where they are not what is tested."""
    monkeypatch.setattr(prefs.compare, "draw", lambda *_: {})


def blocks_of(*folders: Path) -> list[Block]:
    aligned, _ = align(read_sweep(folders).cells)
    return [Block.of(cells, resamples=20, seed=0, target_r=0.9) for cells in aligned]


def cautions_of(*folders: Path) -> list[str]:
    cells, blocks = read_sweep(folders).cells, blocks_of(*folders)
    tables = {"cells": cell_table(blocks), "agreement": agreement(blocks), "stability_by": stability_by(blocks)}
    return cautions(cells, blocks, tables)


def pearson_of_pairs(x: np.ndarray) -> list[float]:
    """Pearson r of every pair of columns."""
    return [stats.pearsonr(x[:, i], x[:, j]).statistic for i, j in itertools.combinations(range(x.shape[1]), 2)]


def shown(value: float) -> str:
    """A number as the remarks have it: .87, −.05, 1.00."""
    return re.sub(r"^(−?)0\.", r"\1.", f"{value:.2f}".replace("-", "−"))


def signal(count: int, seed: int = 0) -> np.ndarray:
    """Means of ratings that tell tasks apart."""
    return np.random.default_rng(seed).permutation(np.linspace(1.1, 4.9, count))


# Two raters and two templates


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> Mapping[str, Simulated]:
    """Two raters that rate the same completions by two templates; `usual` says 4 for 91 of 100 tasks."""
    folder = tmp_path_factory.mktemp("multirun") / "04-27-26"
    hydra_sweep(folder, f"model.name={','.join(RATERS)}", "completer=smollm2", f"template=[{','.join(TEMPLATES)}]")
    clear = signal(TASKS)
    seldom = np.full(TASKS, 4.0)
    seldom[5:95:10] = [1.5, 1.5, 1.5, 2, 2, 2, 5, 5, 5]
    means = {
        "keen": {"anchored": around(clear, mass=0.9), "stated": around(np.clip(clear + signal(TASKS, 1) / 4, 1, 5))},
        "usual": {"anchored": around(seldom), "stated": around(seldom)},
    }
    texts = completed(some_tasks(TASKS))
    texts[:10] = [Completion(each.task, "I'm sorry, but no.") for each in texts[:10]]
    made = {}
    for number, (name, mass) in enumerate(means.items()):
        overrides = [f"model.name={name}"]
        made[name] = simulate(folder / f"{number}", overrides, texts, mass, group=GROUP, draw=number)
    return made


@pytest.fixture(scope="module")
def four(jobs) -> Compared:
    return compared(jobs["keen"].folder.parent, wandb_mode="offline")


def test_names_are_rater_and_template(four):
    whole = four.table("cells").query("origin == 'ALL'")
    assert list(whole["cell"]) == ["keen-anchored", "keen-stated", "usual-anchored", "usual-stated"]
    assert list(whole["rater"]) == ["keen", "keen", "usual", "usual"]
    assert list(whole["template"]) == ["anchored", "stated", "anchored", "stated"]
    assert set(whole["completer"]) == {"smollm2"}
    assert set(four.table("cells")["origin"]) == {"ALL", "ALPACA", "MATH"}


@pytest.mark.parametrize("name", RATERS)
@pytest.mark.parametrize("key", TEMPLATES)
def test_the_table_of_cells_is_what_scipy_says(four, jobs, name, key):
    x, mass, row = jobs[name].sampled[key], jobs[name].mass[key], four.cell(f"{name}-{key}")
    options = np.arange(1, 6)
    assert row["n"] == TASKS
    assert (row["answers"], row["valid"]) == (400, np.isfinite(x).sum())
    assert row["mean_rating"] == pytest.approx(np.nanmean(x))
    q = mass / mass.sum(axis=1, keepdims=True)
    m = q @ options
    w = (q * (options - m[:, None]) ** 2).sum(axis=1)
    assert row["exact_mean"] == pytest.approx(m.mean())
    assert row["exact_sd"] == pytest.approx(stats.tstd(m))
    assert row["sampling_variance"] == pytest.approx(w.mean())
    assert row["valid_mass"] == pytest.approx(mass.sum(axis=1).mean())
    assert row["predicted_r"] == pytest.approx(np.var(m, ddof=1) / (np.var(m, ddof=1) + w.mean()))
    pearson, spearman, informative, off, mode = [], [], [], [], stats.mode(x[np.isfinite(x)]).mode
    for i, j in itertools.combinations(range(4), 2):
        a, b = x[np.isfinite(x[:, i]) & np.isfinite(x[:, j])][:, [i, j]].T
        told = (a != mode) | (b != mode)
        pearson.append(stats.pearsonr(a, b).statistic)
        spearman.append(stats.spearmanr(a, b).statistic)
        informative.append(stats.pearsonr(a[told], b[told]).statistic)
        off.append(told.mean())
    assert row["cross_seed_r"] == pytest.approx(np.mean(pearson))
    assert row["cross_seed_r_sd"] == pytest.approx(np.std(pearson, ddof=1))
    assert row["cross_seed_rho"] == pytest.approx(np.mean(spearman))
    assert row["informative_r"] == pytest.approx(np.mean(informative))
    assert row["d"] == pytest.approx(np.mean(off))
    assert row["modal_rating"] == mode
    assert row["modal_share"] == pytest.approx((x[np.isfinite(x)] == mode).mean())
    if np.isfinite(x).all():
        f = stats.f_oneway(*x).statistic
        assert row["icc1"] == pytest.approx((f - 1) / (f + 3))
        assert row["icc1k"] == pytest.approx(1 - 1 / f)
    assert row["cross_seed_r_low"] < row["cross_seed_r_high"]


def test_the_same_numbers_are_in_both_files_and_on_the_screen(four):
    read = pd.read_parquet(four.out / "cells.parquet").replace("", None).fillna(np.nan)
    pd.testing.assert_frame_equal(read, four.table("cells"), check_dtype=False)
    row = four.cell("usual-anchored")
    assert "Comparison · 4 cells of 2 jobs" in four.printed
    (line,) = [line for line in four.printed.splitlines() if line.strip().startswith("usual-anchored  ")]
    assert f"{shown(row['cross_seed_r'])} ± {shown(row['cross_seed_r_sd'])}" in line
    assert "4 (.91)" in line


def test_stability_by_pools_pairs_over_cells(four, jobs):
    by = four.table("stability_by").set_index(["by", "group"])
    r = {(name, key): pearson_of_pairs(jobs[name].sampled[key]) for name in ("usual",) for key in TEMPLATES}
    for key in TEMPLATES:
        x = jobs["keen"].sampled[key]
        r["keen", key] = list(pd.DataFrame(x).corr().to_numpy()[np.triu_indices(4, k=1)])
    for key in TEMPLATES:
        pooled = [*r["keen", key], *r["usual", key]]
        row = by.loc[("template", key)]
        assert (row["cells"], row["cross_seed_r_pairs"]) == (2, 12)
        assert row["cross_seed_r"] == pytest.approx(np.mean(pooled))
        assert row["cross_seed_r_sd"] == pytest.approx(np.std(pooled, ddof=1))
        assert row["d"] == pytest.approx(np.mean([four.cell(f"{name}-{key}")["d"] for name in RATERS]))
    for name in RATERS:
        pooled = [*r[name, "anchored"], *r[name, "stated"]]
        assert by.loc[("rater", name), "cross_seed_r"] == pytest.approx(np.mean(pooled))
        assert by.loc[("cell", f"{name}-stated"), "cross_seed_r"] == pytest.approx(np.mean(r[name, "stated"]))
    odd = [
        each
        for job in jobs.values()
        for x in job.sampled.values()
        for each in pd.DataFrame(x[1::2]).corr().to_numpy()[np.triu_indices(4, k=1)]
    ]
    assert by.loc[("origin", "MATH"), "cells"] == 4
    assert by.loc[("origin", "MATH"), "cross_seed_r_pairs"] == 24
    assert by.loc[("origin", "MATH"), "cross_seed_r"] == pytest.approx(np.mean(odd))
    assert set(by.loc["origin"].index) == {"ALPACA", "MATH"}


def test_agreement_is_the_correlation_of_exact_means(four, jobs):
    table = four.table("agreement").fillna({"condition": ""})
    assert set(table["means"]) == {"exact"}
    assert len(table) == 4
    between = agreement_matrices(table, "templates")
    assert list(between) == list(RATERS)
    for name in RATERS:
        means = [jobs[name].means(key) for key in TEMPLATES]
        assert list(between[name].columns) == list(TEMPLATES)
        np.testing.assert_allclose(between[name], np.corrcoef(means))
    of_raters = agreement_matrices(table, "raters")
    assert list(of_raters) == list(TEMPLATES)
    for key in TEMPLATES:
        np.testing.assert_allclose(of_raters[key], np.corrcoef([jobs[name].means(key) for name in RATERS]))


def test_the_distribution_counts_the_answers(four, jobs):
    table = four.table("distribution").query("cell == 'keen-anchored' and origin == 'ALL'").set_index("option")
    x, mass = jobs["keen"].sampled["anchored"], jobs["keen"].mass["anchored"]
    for option in range(1, 6):
        assert table.loc[option, "sampled_share"] == pytest.approx((x == option).sum() / np.isfinite(x).sum())
        assert table.loc[option, "exact_share"] == pytest.approx((mass / 0.9)[:, option - 1].mean())


def test_refusals_are_point_biserial(four, jobs):
    row = four.table("refusals").query("cell == 'keen-stated' and origin == 'ALL'").iloc[0]
    refused = np.arange(TASKS) < 10
    m = jobs["keen"].means("stated")
    assert row["refused"] == 10
    assert row["r"] == pytest.approx(stats.pointbiserialr(refused, m).statistic)
    assert row["mean_refused"] == pytest.approx(m[:10].mean())


def test_the_only_remarks_are_on_the_rater_that_says_4(four):
    expected = []
    for key in TEMPLATES:
        row = four.cell(f"usual-{key}")
        assert row["modal_share"] == pytest.approx(0.91)
        assert row["d"] == pytest.approx(0.09)  # the 9 tasks that are never rated 4
        expected.append(
            f"usual-{key}: 91% of the ratings are 4, which flatters r; informative r is {shown(row['informative_r'])}"
            " on the .09 of tasks that are told apart."
        )
    assert four.remarks == expected


def test_the_page_and_the_figures_are_there(four):
    page = (four.out / "report.html").read_text()
    assert GROUP in page
    assert "python -m prefs.run -m model.name=keen,usual" in page
    assert "usual-anchored: 91% of the ratings are 4" in page
    drawn = {path.stem for path in (four.out / "figures").glob("*.png")}
    assert drawn == {
        *(f"stability_by_{way}" for way in ("template", "rater", "origin", "cell")),
        *("ratings_anchored", "ratings_stated", "agreement_templates", "agreement_raters", "variance"),
        *(f"refused_{name}-{key}" for name in RATERS for key in TEMPLATES),
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (four.out / "figures").iterdir())
    assert page.count("data:image/png;base64,") == len(drawn)


def test_work_is_summed_over_jobs(four):
    assert "completions: 0 in the store, 200 computed" in four.printed
    assert "ratings, anchored_1_5: 2 in the store, 998 computed" in four.printed


# W&B


def job_type(folder: Path) -> str:
    """What `offline_wandb` leaves out."""
    (path,) = folder.glob("*.wandb")
    for raw in offline_wandb._records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(raw)
        if record.WhichOneof("record_type") == "run":
            return record.run.job_type
    return ""


def test_wandb_has_one_run_of_the_comparison(four):
    (folder,) = (four.out / "wandb").glob("offline-run-*")
    logs = offline_wandb.read(folder)
    assert (logs.name, logs.group, logs.exit_code) == ("comparison", GROUP, 0)
    assert job_type(folder) == "compare"
    assert logs.config["cells"] == ["keen-anchored", "keen-stated", "usual-anchored", "usual-stated"]
    assert logs.config["folders"] == [str(four.out.parent)]
    for name in ("cross_seed_r", "informative_r", "d", "icc1", "predicted_r", "valid_mass"):
        for cell, origin in (("keen-anchored", "ALL"), ("usual-stated", "MATH")):
            assert logs.summary[f"compare/{name}/{cell}/{origin}"] == pytest.approx(four.cell(cell, origin)[name])
    logged = {key for row in logs.history for key in row}
    tables = ("cells", "stability_by", "distribution", "agreement", "variance", "refusals")
    assert {f"tables/{name}" for name in tables} <= logged
    assert {f"figures/{path.stem}" for path in (four.out / "figures").iterdir()} <= logged
    assert "report" in logged
    assert f"wandb sync {folder}    (comparison)" in four.printed


# Templates that measure something else


def of_templates(folder: Path, means: Mapping[str, np.ndarray], *overrides: str) -> list[str]:
    count = len(next(iter(means.values())))
    simulate(folder, overrides, completed(some_tasks(count)), {key: around(each) for key, each in means.items()})
    return [line for line in cautions_of(folder) if "measures something else" in line]


@pytest.mark.parametrize("alike", [["anchored", "anchored_precise", "likert"], ["anchored", "anchored_precise"]])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_stable_template_that_measures_something_else_is_named_alone(alike, seed, tmp_path):
    count, like = 60, signal(60)
    length = signal(count, seed)
    means = {key: np.clip(like + 0.3 * (signal(count, 10 + at) - 3), 1, 5) for at, key in enumerate(alike)}
    said = of_templates(tmp_path, {"stated": length, **means})
    blocks = blocks_of(tmp_path)
    row = stability_by(blocks).query("by == 'template' and group == 'stated'").iloc[0]
    r = max(row["cross_seed_r"], row["predicted_r"])
    most = max(np.corrcoef(length, each)[0, 1] for each in means.values())
    assert abs(most) < 0.3
    assert said == [
        f"stated is stable (r {shown(r)}) but orders tasks unlike every other template (agreement at most"
        f" {shown(most)}): it measures something else."
    ]


@pytest.mark.parametrize("overrides", [["rating.seeds=[0]"], ["rating.seeds=[]"], ["rating.exact=false"]])
def test_a_template_that_measures_something_else_is_named_by_whatever_r_there_is(overrides, tmp_path):
    like, length = signal(60), signal(60, 1)
    means = {"stated": length, "anchored": like, "anchored_precise": like, "likert": like}
    (said,) = of_templates(tmp_path, means, *overrides)
    assert said.startswith("stated is stable (r .")


def test_templates_that_agree_are_not_named(tmp_path):
    like = signal(60)
    assert of_templates(tmp_path, {"anchored": like, "stated": like, "likert": like}) == []


# Where the noise comes from


def test_variance_is_where_the_simulation_put_it(tmp_path):
    sizes = {"task": 0.12, "template": 0.06, "rater": 0.04, "task × template": 0.08, "completion": 0.1}
    # Every combination of five signs, eight times: effects of these signs have no correlation in the sample either.
    signs = np.array([*itertools.product([-1, 1], repeat=5)] * 8)
    count = len(signs)
    task, completion, by_template = (
        signs[:, 0] * sizes["task"],
        signs[:, 1:3] * sizes["completion"],
        signs[:, 3:] * sizes["task × template"],
    )
    # Scales of different lengths, which count alike.
    keys, pomp_of = ("anchored", "binary"), {"anchored": (1, 5), "binary": (0, 1)}
    sampling = []
    hydra_sweep(tmp_path, "model.name=a,b", "completer.seed=0,1", "template=[anchored,binary]")
    jobs = itertools.product(range(2), range(2))
    for number, (rater, seed) in enumerate(jobs):
        mass = {}
        for at, key in enumerate(keys):
            y = 0.5 + task + completion[:, seed] + by_template[:, at]
            y = y + sizes["template"] * (2 * at - 1) + sizes["rater"] * (2 * rater - 1)
            low, high = pomp_of[key]
            mass[key] = around(low + (high - low) * y, low, high)
            options = np.linspace(0, 1, high - low + 1)
            sampling.append((mass[key] * (options - (mass[key] @ options)[:, None]) ** 2).sum(axis=1).mean())
        overrides = [f"model.name={'ab'[rater]}", f"completer.seed={seed}"]
        texts = completed(some_tasks(count), by=f"Done with {seed}")
        simulate(tmp_path / f"{number}", overrides, texts, mass, draw=number, config_only=["rating.seeds=[0,1]"])
    blocks = blocks_of(tmp_path)
    assert len(blocks) == 1
    assert [cell.name for cell in blocks[0].cells][:3] == [
        "a-anchored completer.seed=0",
        "a-binary completer.seed=0",
        "a-anchored completer.seed=1",
    ]
    found = variance(blocks)
    table = found.table.set_index("source")
    assert found.remarks == ()
    assert set(table["condition"]) == {""}
    assert set(table["ratings"]) == {"exact"}
    assert {(row["completion_seeds"], row["templates"], row["raters"]) for _, row in table.iterrows()} == {(2, 2, 2)}
    # Two levels at ± size have a variance of 2 size²; many signs at ± size have one of size².
    true = {name: size**2 for name, size in sizes.items()}
    true |= {name: 2 * true[name] for name in ("template", "rater")}
    true["rating seed"] = np.mean(sampling)
    for source in table.index:
        assert table.loc[source, "variance"] == pytest.approx(true.get(source, 0.0), abs=3e-4), source
        assert table.loc[source, "share"] == pytest.approx(true.get(source, 0.0) / sum(true.values()), abs=2e-3)
    assert table["share"].sum() == pytest.approx(1)
    assert (table["holds"] == "").all()


def test_cells_that_lack_leave_their_level_out(tmp_path):
    like = signal(30)
    for number, (rater, keys) in enumerate(
        {"a": ("anchored", "stated"), "b": ("anchored", "stated"), "c": ("stated",)}.items()
    ):
        mass = {key: around(like) for key in keys}
        simulate(tmp_path / f"{number}", [f"model.name={rater}"], completed(some_tasks(30)), mass)
    found = variance(blocks_of(tmp_path))
    (remark,) = found.remarks
    assert re.fullmatch("Variance decomposition: without rater c, which lacks? cells.", remark)
    assert set(found.table["raters"]) == {2}
    assert set(found.table["templates"]) == {2}


# Tasks


def test_cells_with_different_tasks_are_compared_on_the_common_ones(undrawn, tmp_path):
    tasks, random = some_tasks(25), np.random.default_rng(5)
    means = {name: signal(25, at) for at, name in enumerate("ab")}
    rows = {"a": np.arange(20), "b": random.permutation(np.arange(5, 25))}
    changed = {"a": tasks, "b": [*tasks[:7], dataclasses.replace(tasks[7], prompt="Another task."), *tasks[8:]]}
    made = {}
    for number, name in enumerate("ab"):
        chosen = [changed[name][row] for row in rows[name]]
        mass = {"anchored": around(means[name][rows[name]])}
        made[name] = simulate(tmp_path / f"{number}", [f"model.name={name}"], completed(chosen), mass, draw=number)
    found = compared(tmp_path)
    assert "Compared on the 14 tasks that all cells have: a-anchored has 20; b-anchored has 20." in found.remarks
    common = [row for row in range(5, 20) if row != 7]
    row = found.cell("b-anchored")
    assert row["n"] == 14
    at = [list(rows["b"]).index(each) for each in common]
    assert row["cross_seed_r"] == pytest.approx(np.mean(pearson_of_pairs(made["b"].sampled["anchored"][at])))
    agreed = found.table("agreement")
    assert list(agreed["between"]) == ["raters"]
    assert agreed["r"].iloc[0] == pytest.approx(np.corrcoef(means["a"][common], means["b"][common])[0, 1])
    # The task that only has its id in common was completed by both, but it is not one task.
    assert not [line for line in found.remarks if "different completions" in line]


def test_cells_without_common_tasks_are_compared_in_groups(undrawn, tmp_path):
    made = {}
    for number, (name, data) in enumerate(itertools.product("ab", ("first", "second"))):
        count = {"first": 12, "second": 10}[data]
        texts = completed(some_tasks(count, first={"first": 0, "second": 50}[data]))
        mass = {"anchored": around(signal(count, number))}
        overrides = [f"model.name={name}", f"dataset.name={data}"]
        made[name, data] = simulate(tmp_path / f"{number}", overrides, texts, mass, draw=number)
    found = compared(tmp_path)
    said = "All cells have only 0 tasks in common, so they are compared in groups: cells 2 on 12 tasks, 2 on 10 tasks."
    assert said in found.remarks
    for (name, data), job in made.items():
        row = found.cell(f"{name}-anchored dataset.name={data}")
        assert row["n"] == {"first": 12, "second": 10}[data]
        assert row["cross_seed_r"] == pytest.approx(np.mean(pearson_of_pairs(job.sampled["anchored"])))
    agreed = found.table("agreement").set_index("condition")
    for data in ("first", "second"):
        expected = np.corrcoef(*(made[name, data].means("anchored") for name in "ab"))[0, 1]
        assert agreed.loc[f"dataset.name={data}", "r"] == pytest.approx(expected)
    assert set(found.table("variance")["condition"]) == {"dataset.name=first", "dataset.name=second"}


def test_cells_that_differ_in_their_tasks_alone_are_told_apart(undrawn, tmp_path):
    # As when a user's file of tasks was changed between two runs.
    for number, name in enumerate("ab"):
        texts = completed(some_tasks(10, first=50 * number))
        simulate(tmp_path / f"{number}", [f"model.name={name}"], texts, {"anchored": around(signal(10, number))})
    found = compared(tmp_path)
    said = "All cells have only 0 tasks in common, so they are compared in groups: cells 1 on 10 tasks, 1 on 10 tasks."
    assert said in found.remarks
    assert found.table("agreement").empty
    table = found.table("variance")
    assert not table.duplicated(["condition", "source"]).any()


def test_a_task_without_a_completion_and_an_empty_one(undrawn, tmp_path):
    texts = completed(some_tasks(12))
    texts[3], texts[4] = Completion(texts[3].task, None), Completion(texts[4].task, "")
    means = signal(12)
    job = simulate(tmp_path / "0", [], texts, {"anchored": around(means)})
    found = compared(tmp_path)
    row = found.cell("smollm2-anchored")
    rated = np.arange(12) != 3
    assert (row["n"], row["answers"], row["valid"]) == (12, 48, 44)
    assert row["cross_seed_r"] == pytest.approx(np.mean(pearson_of_pairs(job.sampled["anchored"][rated])))
    assert row["exact_mean"] == pytest.approx(means[rated].mean())
    refusals = found.table("refusals").query("origin == 'ALL'").iloc[0]
    assert (refusals["unrated"], refusals["unjudged"]) == (1, 0)  # each task is counted once
    said = [
        re.fullmatch("Variance decomposition: without 1 tasks? that lacks? a rating in some cell.", line)
        for line in found.remarks
    ]
    assert any(said)
    assert not [line for line in found.remarks if "different completions" in line]


def test_raters_of_different_completions_are_not_compared_unsaid(undrawn, tmp_path):
    for number, name in enumerate("ab"):
        texts = completed(some_tasks(12), by=f"Done by {name}")
        simulate(tmp_path / f"{number}", [f"model.name={name}"], texts, {"anchored": around(signal(12))})
    said = "Raters rated different completions; set one completer for all to compare raters (completer=...)."
    assert said in compared(tmp_path).remarks


def test_a_single_task(tmp_path):
    simulate(tmp_path / "0", [], completed(some_tasks(1)), {"anchored": around(np.array([3.5]))})
    found = compared(tmp_path)
    row = found.cell("smollm2-anchored")
    assert row["n"] == 1
    assert pd.isna(row["cross_seed_r"])
    assert row["cross_seed_r_reason"] == "fewer than 3 tasks with two valid ratings"
    assert row["exact_mean"] == pytest.approx(3.5)
    assert "smollm2-anchored: no cross-seed r (fewer than 3 tasks with two valid ratings)." in found.remarks
    assert found.table("variance")["share"].isna().all()


# Settings


def test_one_rating_seed_leaves_the_exact_ratings(tmp_path):
    means = signal(20)
    simulate(tmp_path / "0", ["rating.seeds=[0]"], completed(some_tasks(20)), {"anchored": around(means)})
    found = compared(tmp_path)
    row = found.cell("smollm2-anchored")
    assert pd.isna(row["cross_seed_r"])
    assert row["cross_seed_r_reason"] == "one rating seed"
    w = (means % 1) * (1 - means % 1)
    assert row["predicted_r"] == pytest.approx(np.var(means, ddof=1) / (np.var(means, ddof=1) + w.mean()))
    assert "smollm2-anchored: no cross-seed r (one rating seed)." in found.remarks
    share = found.table("variance").set_index("source")["share"]
    assert share["rating seed"] == pytest.approx(1 - row["predicted_r"])


def test_no_rating_seed_leaves_the_exact_ratings(tmp_path):
    means = signal(20)
    simulate(tmp_path / "0", ["rating.seeds=[]"], completed(some_tasks(20)), {"anchored": around(means)})
    found = compared(tmp_path)
    assert found.cell("smollm2-anchored")["exact_mean"] == pytest.approx(means.mean())
    assert "smollm2-anchored: no cross-seed r (no rating seeds)." in found.remarks


def thinkers(count: int, thoughts: int) -> np.ndarray:
    """[T, K, 5]: the tasks' signal, moved by each thought."""
    moved = signal(count)[:, None] + np.random.default_rng(5).uniform(-0.5, 0.5, size=(count, thoughts))
    return np.stack([around(np.clip(means, 1, 5)) for means in moved.T], axis=1)


def test_a_rater_that_thinks_is_called_one_and_its_thoughts_count_as_noise(tmp_path):
    p = thinkers(40, 3)
    simulate(
        tmp_path / "0",
        ["model.name=thinker", "model.thinking.enabled=true"],
        completed(some_tasks(40)),
        {"anchored": p},
    )
    simulate(tmp_path / "1", ["model.name=plain"], completed(some_tasks(40)), {"anchored": around(signal(40))})
    found = compared(tmp_path)
    row = found.cell("thinker-anchored")
    assert row["kind"] == "mixture of 3 thoughts"
    assert found.cell("plain-anchored")["kind"] == "direct"
    assert "thinker-anchored (mixture of 3 thoughts)" in found.printed
    m = p @ np.arange(1, 6)
    within, between = (p @ np.arange(1, 6) ** 2 - m**2).mean(axis=1), m.var(axis=1, ddof=1)
    assert row["between_thoughts"] == pytest.approx(between.mean())
    assert row["sampling_variance"] == pytest.approx((within + between).mean())
    level = m.mean(axis=1).var(ddof=1) - between.mean() / 3
    assert row["predicted_r"] == pytest.approx(level / (level + (within + between).mean()))
    assert set(found.table("variance")["ratings"]) == {"exact"}


def test_after_one_thought_no_r_is_predicted_and_sampled_ratings_tell_the_noise(tmp_path):
    overrides = ["model.name=thinker", "model.thinking.enabled=true"]
    simulate(tmp_path / "0", overrides, completed(some_tasks(40)), {"anchored": thinkers(40, 1)})
    found = compared(tmp_path)
    row = found.cell("thinker-anchored")
    assert row["kind"] == "after one thought"
    assert pd.isna(row["predicted_r"])
    assert row["predicted_r_reason"].startswith("one thought a task")
    assert np.isfinite(row["exact_mean"])
    assert set(found.table("variance")["ratings"]) == {"sampled"}


def test_sampled_ratings_alone(tmp_path):
    made = {}
    for number, name in enumerate("ab"):
        overrides = [f"model.name={name}", "rating.exact=false"]
        mass = {"anchored": around(signal(20), mass=0.8)}
        made[name] = simulate(tmp_path / f"{number}", overrides, completed(some_tasks(20)), mass, draw=number)
    assert not (tmp_path / "0" / "anchored" / "exact.csv").exists()
    found = compared(tmp_path)
    row = found.cell("a-anchored")
    assert pd.isna(row["predicted_r"])
    assert row["predicted_r_reason"] == "rating.exact=false"
    x = made["a"].sampled["anchored"]
    assert np.isnan(x).any()
    r = pd.DataFrame(x).corr().to_numpy()[np.triu_indices(4, k=1)]
    assert row["cross_seed_r"] == pytest.approx(np.mean(r))
    agreed = found.table("agreement").iloc[0]
    assert agreed["means"] == "over seeds"
    means = [np.nanmean(made[name].sampled["anchored"], axis=1) for name in "ab"]
    assert agreed["r"] == pytest.approx(np.corrcoef(means)[0, 1])
    assert set(found.table("variance")["ratings"]) == {"sampled"}


def test_little_probability_on_the_options_is_said(tmp_path):
    simulate(tmp_path / "0", [], completed(some_tasks(20)), {"anchored": around(signal(20), mass=0.31)})
    (said,) = cautions_of(tmp_path)
    assert said.startswith("smollm2-anchored: only 31% of the model's probability is on the options; ")
    # The 31 % are what is measured; the rest is what is not.
    assert "what is measured is the rest" not in said


def test_what_names_do_not_say_is_said(undrawn, tmp_path):
    for number, (name, temperature) in enumerate({"a": 1.0, "b": 0.7}.items()):
        overrides = [f"model.name={name}", f"rating.temperature={temperature}"]
        simulate(tmp_path / f"{number}", overrides, completed(some_tasks(12)), {"anchored": around(signal(12))})
    found = compared(tmp_path)
    assert list(found.table("cells").query("origin == 'ALL'")["cell"]) == ["a-anchored", "b-anchored"]
    assert "Cells differ in more than their names say: rating.temperature." in found.remarks


def test_long_settings_that_begin_alike_still_name_different_cells(undrawn, tmp_path):
    for number, word in enumerate(("loves", "hates")):
        prompt = f"You are a helpful assistant who always {word} all tasks"
        overrides = [f"rating.system_prompt='{prompt}'"]
        mass = {"anchored": around(signal(12, number))}
        simulate(tmp_path / f"{number}", overrides, completed(some_tasks(12)), mass, draw=number)
    found = compared(tmp_path)
    names = list(found.table("cells").query("origin == 'ALL'")["cell"])
    assert len(names) == 2
    assert len(set(names)) == 2
    assert list(found.table("stability_by").query("by == 'cell'")["cells"]) == [1, 1]
    assert found.table("variance")["condition"].nunique() == 2


# Jobs that did not finish, and files that cannot be read


def sweep_of(folder: Path, raters: Sequence[str], errors: Mapping[str, BaseException], begun: Sequence[str]) -> None:
    hydra_sweep(folder, f"model.name={','.join(raters)}")
    for number, name in enumerate(begun):
        mass = {"anchored": around(signal(12, number))}
        with contextlib.suppress(Exception, KeyboardInterrupt):
            simulate(
                folder / f"{number}",
                [f"model.name={name}"],
                completed(some_tasks(12)),
                mass,
                draw=number,
                error=errors.get(name),
            )


def test_a_sweep_of_which_not_all_finished(undrawn, tmp_path):
    raters = ["Anna", "Ben", "Broken", "Killed", "Never"]
    errors = {"Broken": RuntimeError("CUDA out of memory\nat /Data/X"), "Killed": KeyboardInterrupt()}
    sweep_of(tmp_path, raters, errors, raters[:4])
    assert (tmp_path / "multirun.yaml").is_file()
    found = compared(tmp_path)
    assert list(found.table("cells").query("origin == 'ALL'")["cell"]) == ["Anna-anchored", "Ben-anchored"]
    assert found.remarks[0] == (
        "Of 5 jobs 2 finished. Failed: model.name=Broken (RuntimeError: CUDA out of memory at /Data/X)."
        " Begun but not finished: model.name=Killed. Not begun: 1."
    )
    page = (found.out / "report.html").read_text()
    assert "RuntimeError: CUDA out of memory at /Data/X" in page


def test_a_failed_job_is_named_as_it_was_called(tmp_path):
    sweep_of(tmp_path, ["Anna", "Ben"], {"Ben": UserError("model.path: got 'LLaMA'")}, ["Anna", "Ben"])
    said = unfinished([tmp_path], read_sweep([tmp_path]))
    assert said == "Of 2 jobs 1 finished. Failed: model.name=Ben (model.path: got 'LLaMA')."


def test_jobs_not_begun_alone(tmp_path):
    sweep_of(tmp_path, ["a", "b", "c"], {}, ["a"])
    assert unfinished([tmp_path], read_sweep([tmp_path])) == "Of 3 jobs 1 finished. Not begun: 2."
    # The same folder twice, however it is written, is one sweep.
    assert unfinished([tmp_path] * 2, read_sweep([tmp_path] * 2)) == "Of 3 jobs 1 finished. Not begun: 2."


def test_all_finished_says_nothing(tmp_path):
    sweep_of(tmp_path, ["a", "b"], {}, ["a", "b"])
    assert unfinished([tmp_path], read_sweep([tmp_path])) is None


def test_no_job_finished(tmp_path):
    sweep_of(tmp_path, ["a", "b"], dict.fromkeys("ab", ValueError("no")), ["a", "b"])
    with pytest.raises(UserError) as caught:
        compared(tmp_path)
    line = str(caught.value)
    assert line.startswith("nothing to compare: Of 2 jobs 0 finished. Failed: model.name=a (ValueError: no)")
    assert "model.name=b (ValueError: no)" in line
    assert not (tmp_path / "comparison").exists()


def test_a_damaged_multirun_file_does_not_stop_a_comparison(undrawn, tmp_path):
    sweep_of(tmp_path, ["a", "b"], {}, ["a", "b"])
    (tmp_path / "multirun.yaml").write_text("hydra: [")
    assert len(compared(tmp_path).table("cells").query("origin == 'ALL'")) == 2


def test_of_a_cell_measured_twice_the_later_counts(undrawn, tmp_path):
    made = []
    for number in range(2):
        # What is only where and how fast does not make another cell.
        overrides = [f"model.batch_tokens={1000 + number}", f"stats.seed={number}"]
        mass = {"anchored": around(signal(12, number))}
        made.append(simulate(tmp_path / f"{number}", overrides, completed(some_tasks(12)), mass, draw=number))
    found = compared(tmp_path)
    assert found.remarks[0] == f"Measured again by a later job, and left out: {tmp_path}/0/anchored."
    assert len(found.table("cells").query("origin == 'ALL'")) == 1
    expected = np.mean(pearson_of_pairs(made[1].sampled["anchored"]))
    assert found.cell("smollm2-anchored")["cross_seed_r"] == pytest.approx(expected)


def test_jobs_are_in_the_order_of_their_numbers(tmp_path):
    for number in (0, 2, 10):
        texts = completed(some_tasks(3))
        simulate(tmp_path / f"{number}", [f"model.name=r{number}"], texts, {"anchored": around(signal(3))})
    assert [cell.rater for cell in read_sweep([tmp_path]).cells] == ["r0", "r2", "r10"]


@pytest.mark.parametrize("name", ["completions.parquet", "anchored/ratings.parquet", "anchored/exact.parquet"])
@pytest.mark.parametrize("damage", ["gone", "cut", "empty", "other"])
def test_a_damaged_table_is_named(name, damage, tmp_path):
    simulate(tmp_path / "0", [], completed(some_tasks(5)), {"anchored": around(signal(5))})
    path = tmp_path / "0" / name
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "other":
        pd.DataFrame({"x": [1]}).to_parquet(path)
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    with pytest.raises(UserError) as caught:
        read_sweep([tmp_path])
    line = str(caught.value)
    assert line.startswith(f"cannot read {path} (")
    assert line.endswith("run its job again")
    assert "\n" not in line


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"config": {}, "overrides": []}', b"\xff\xfe\x00"])
def test_a_damaged_record_is_named(content, tmp_path):
    simulate(tmp_path / "0", [], completed(some_tasks(5)), {"anchored": around(signal(5))})
    (tmp_path / "0" / "job.json").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/0/job.json: not the record of a job")):
        read_sweep([tmp_path])


def test_a_folder_without_jobs(tmp_path):
    with pytest.raises(UserError) as caught:
        compared(tmp_path)
    assert str(caught.value) == f"{tmp_path}: no jobs here (no job.json); give the folder of a run or a multirun"


def test_where_nothing_can_be_written_is_one_line(undrawn, tmp_path):
    simulate(tmp_path / "run", [], completed(some_tasks(5)), {"anchored": around(signal(5))})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        compared(tmp_path / "run", out=tmp_path / "file" / "below")
    assert str(caught.value).startswith(f"cannot write {tmp_path}/file/below/cells: ")
    assert "\n" not in str(caught.value)


# Folders


def test_a_single_run(undrawn, tmp_path):
    folder = tmp_path / "outputs" / "2026-11-24" / "04-27-26"
    simulate(folder, ["template=anchored"], completed(some_tasks(12)), {"anchored": around(signal(12))})
    found = compared(folder)
    assert found.out == folder / "comparison"
    assert list(found.table("cells")["cell"].unique()) == ["smollm2-anchored"]
    assert found.remarks == []


def test_one_cell_is_not_called_cells(undrawn, tmp_path):
    simulate(tmp_path, [], completed(some_tasks(5)), {"anchored": around(signal(5))})
    assert "Comparison · 1 cell of 1 job" in compared(tmp_path).printed


def test_a_second_comparison_finds_the_same_jobs(undrawn, tmp_path):
    sweep_of(tmp_path, ["a", "b"], {}, ["a", "b"])
    first = compared(tmp_path)
    content = (first.out / "cells.csv").read_bytes()
    again = compared(tmp_path)
    assert again.out == first.out
    assert (again.out / "cells.csv").read_bytes() == content


def test_several_folders_at_once(undrawn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [tmp_path / "multirun" / name for name in ("one", "two")]
    sweep_of(folders[0], ["a", "b"], {}, ["a", "b"])
    sweep_of(folders[1], ["c", "d"], {}, ["c"])
    found = compared(*folders)
    assert re.fullmatch(r"comparisons/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d", str(found.out))
    assert list(found.table("cells")["rater"].unique()) == ["a", "b", "c"]
    assert found.remarks[0] == "Of 4 jobs 3 finished. Not begun: 1."
    assert not (folders[0] / "comparison").exists()
    page = (found.out / "report.html").read_text()
    assert "model.name=a,b" in page
    assert "model.name=c,d" in page


# Hostile text


HOSTILE = [
    "<script>alert(1)</script>",
    "[bold]not markup[/bold] [/] :smile:",
    "$\\frac{$ and \\ and %s {0} {{x}}",
    '=1+1,"quoted"\nand two lines\r\n',
    "nul \x00 bell \x07 escape \x1b[31m",
    "右から左 \u202e عربى 🙂 e\u0301",
    "x" * 5000,
]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Compared:
    """Raters with names of all sorts; tasks, origins and completions too."""
    folder = tmp_path_factory.mktemp("hostile")
    origins = ["<b>$one$</b>", "[red]two", "None"]
    tasks = [
        Task(f"{text[:50]} {n}", f"{text} {n}", origins[n % 3])
        for n, text in enumerate(text for text in HOSTILE for _ in range(3))
    ]
    texts = [Completion(task, f"I'm sorry {task.prompt}") for task in tasks]
    texts[1] = Completion(tasks[1], "")
    for number, name in enumerate(("../up/<i>$a_b$</i>", "[bold]x[/bold]", "名前")):
        mass = {"anchored": around(signal(len(tasks), number))}
        simulate(folder / f"{number}", [f"model.name='{name}'"], texts, mass, draw=number)
    return compared(folder, wandb_mode="offline")


def test_hostile_names_stay_as_they_are(hostile):
    raters = ["../up/<i>$a_b$</i>", "[bold]x[/bold]", "名前"]
    assert list(hostile.table("cells")["rater"].unique()) == raters
    assert list(hostile.table("cells")["origin"].unique()) == ["ALL", "<b>$one$</b>", "[red]two", "None"]
    assert "[bold]x[/bold]-anchored" in hostile.printed
    page = (hostile.out / "report.html").read_text()
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<b>$one$</b>" not in page
    assert "\x00" not in page


def test_hostile_names_leave_all_files_where_they_belong(hostile):
    figures = list((hostile.out / "figures").rglob("*.png"))
    assert {path.parent for path in figures} == {hostile.out / "figures"}
    assert len([path for path in figures if path.stem.startswith("refused_")]) == 3
    (folder,) = (hostile.out / "wandb").glob("offline-run-*")
    logs = offline_wandb.read(folder)
    assert logs.exit_code == 0
    names = logs.config["cells"]
    assert logs.summary[f"compare/valid_mass/{names[0]}/ALL"] == pytest.approx(1)
    # Beside what the jobs and the comparison write, nothing came to be anywhere.
    assert {path.name for path in hostile.out.parent.parent.iterdir()} >= {hostile.out.parent.name}
    assert {path.name for path in hostile.out.parent.iterdir()} == {"0", "1", "2", "comparison"}


def test_names_too_long_for_a_file(tmp_path):
    # Nothing unusual: two system prompts, in characters of three bytes, and the main template.
    for number, chosen in enumerate(((0, 0), (0, 1), (1, 0))):
        prompt = "あなたは親切で正直なアシスタントです。いつも丁寧に答えてください。"
        overrides = [
            f"{role}.system_prompt='{at}{prompt}'" for role, at in zip(("rating", "completer"), chosen, strict=True)
        ]
        texts = [Completion(each.task, "I'm sorry.") for each in completed(some_tasks(6))]
        simulate(tmp_path / f"{number}", overrides, texts, {"anchored_precise": around(signal(6, number))}, draw=number)
    found = compared(tmp_path)
    assert len(list((found.out / "figures").glob("refused_*.png"))) == 3


# The command line


def test_a_missing_folder_is_one_line_and_exit_code_2(capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "none")])
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        f"prefs: {tmp_path}/none: no jobs here (no job.json); give the folder of a run or a multirun\n"
    )


def test_disabled_wandb_writes_no_folder(undrawn, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mass = {"anchored": around(signal(12))}
    simulate(tmp_path / "run", ["wandb.mode=offline"], completed(some_tasks(12)), mass)
    main(["run", "--wandb", "disabled", "--out", "found/here"])
    assert (tmp_path / "found" / "here" / "cells.csv").is_file()
    assert not list(tmp_path.rglob("*wandb*"))
    assert "smollm2" in capsys.readouterr().out


def test_the_simulated_config_is_the_shipped_one():
    assert config("template=[anchored]", "model.name=x")["template"]["anchored"]["name"] == "anchored_1_5"


def test_cells_know_where_they_are_from(tmp_path):
    simulate(tmp_path, ["model.name=x"], completed(some_tasks(3)), {"anchored": around(signal(3))})
    (cell,) = read_sweep([tmp_path]).cells
    assert isinstance(cell, Cell)
    assert (cell.rater, cell.key, cell.template, cell.dataset) == ("x", "anchored", "anchored_1_5", "mini")
