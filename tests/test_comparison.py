"""Comparisons of sweeps by simulated raters: the numbers and sentences that a user gets, from files as jobs write them.

Every expected number comes from the simulated arrays, by scipy, numpy or a formula that stands in the test.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import offline_wandb
import pandas as pd
import pytest
from scipy import stats
from simulated import (
    Compared,
    Simulated,
    around,
    compared,
    completed,
    hydra_sweep,
    row_of,
    signal,
    simulate,
    some_tasks,
)

from prefs.compare import main
from prefs.comparison.agreement import agreement, agreement_matrices
from prefs.comparison.cells import read_sweep
from prefs.comparison.stability import stability_by
from prefs.comparison.variance import variance
from prefs.data.task import Task
from prefs.errors import UserError
from prefs.stages.records import Completion

RATERS, TEMPLATES, TASKS = ("keen", "usual"), ("anchored", "stated"), 100
GROUP = "simulated 2026-11-24/04-27-26"


def rated(
    folder: Path,
    *overrides: str,
    means: np.ndarray | None = None,
    texts: Sequence[Completion] | None = None,
    draw: int = 0,
    error: BaseException | None = None,
) -> Simulated:
    """A job of one template."""
    means = signal(12 if texts is None else len(texts), draw) if means is None else means
    texts = completed(some_tasks(len(means))) if texts is None else texts
    return simulate(folder, overrides, texts, {"anchored": around(means)}, draw=draw, error=error)


def mean_of_pairs(x: np.ndarray) -> float:
    """Mean Pearson r of every pair of columns."""
    return float(np.mean(r_of_pairs(x)))


def r_of_pairs(x: np.ndarray) -> list[float]:
    return list(pd.DataFrame(x).corr().to_numpy()[np.triu_indices(x.shape[1], k=1)])


def shown(value: float) -> str:
    """A number as the remarks have it: .87, −.05, 1.00."""
    return re.sub(r"^(−?)0\.", r"\1.", f"{value:.2f}".replace("-", "−"))


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
    texts[:10] = [Completion(done.task, "I'm sorry, but no.") for done in texts[:10]]
    return {
        name: simulate(folder / f"{number}", [f"model.name={name}"], texts, mass, group=GROUP, draw=number)
        for number, (name, mass) in enumerate(means.items())
    }


@pytest.fixture(scope="module")
def four(jobs) -> Compared:
    return compared(jobs["keen"].folder.parent, wandb_mode="offline", drawn=True)


@pytest.mark.parametrize("name", RATERS)
@pytest.mark.parametrize("key", TEMPLATES)
def test_the_table_of_cells_is_what_scipy_says(four, jobs, name, key):
    x, mass, row = jobs[name].sampled[key], jobs[name].mass[key], four.cell(f"{name}-{key}")
    assert (row["rater"], row["template"], row["completer"]) == (name, key, "smollm2")
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
    assert four.cells() == ["keen-anchored", "keen-stated", "usual-anchored", "usual-stated"]
    assert set(read["origin"]) == {"ALL", "ALPACA", "MATH"}
    row = four.cell("usual-anchored")
    assert "Comparison · 4 cells of 2 jobs" in four.printed
    (line,) = [line for line in four.printed.splitlines() if line.strip().startswith("usual-anchored  ")]
    assert f"{shown(row['cross_seed_r'])} ± {shown(row['cross_seed_r_sd'])}" in line
    assert "4 (.91)" in line
    assert "completions: 0 in the store, 200 computed" in four.printed  # summed over jobs
    assert "ratings, anchored_1_5: 2 in the store, 998 computed" in four.printed


def test_stability_by_pools_pairs_over_cells(four, jobs):
    by = four.table("stability_by").set_index(["by", "group"])
    r = {(name, key): r_of_pairs(jobs[name].sampled[key]) for name in RATERS for key in TEMPLATES}
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
    odd = [mean_of_pairs(x[1::2]) for job in jobs.values() for x in job.sampled.values()]
    assert (by.loc[("origin", "MATH"), "cells"], by.loc[("origin", "MATH"), "cross_seed_r_pairs"]) == (4, 24)
    assert by.loc[("origin", "MATH"), "cross_seed_r"] == pytest.approx(np.mean(odd))
    assert set(by.loc["origin"].index) == {"ALPACA", "MATH"}


def test_agreement_is_the_correlation_of_exact_means(four, jobs):
    table = four.table("agreement").fillna({"condition": ""})
    assert set(table["means"]) == {"exact"}
    assert len(table) == 4
    between, of_raters = (agreement_matrices(table, which) for which in ("templates", "raters"))
    assert (list(between), list(of_raters)) == (list(RATERS), list(TEMPLATES))
    for name in RATERS:
        assert list(between[name].columns) == list(TEMPLATES)
        np.testing.assert_allclose(between[name], np.corrcoef([jobs[name].means(key) for key in TEMPLATES]))
    for key in TEMPLATES:
        np.testing.assert_allclose(of_raters[key], np.corrcoef([jobs[name].means(key) for name in RATERS]))


def test_distribution_and_refusals_are_those_of_the_answers(four, jobs):
    table = four.table("distribution").query("cell == 'keen-anchored' and origin == 'ALL'").set_index("option")
    x, mass = jobs["keen"].sampled["anchored"], jobs["keen"].mass["anchored"]
    for option in range(1, 6):
        assert table.loc[option, "sampled_share"] == pytest.approx((x == option).sum() / np.isfinite(x).sum())
        assert table.loc[option, "exact_share"] == pytest.approx((mass / 0.9)[:, option - 1].mean())
    row, m = row_of(four.table("refusals"), cell="keen-stated", origin="ALL"), jobs["keen"].means("stated")
    assert row["refused"] == 10
    assert row["r"] == pytest.approx(stats.pointbiserialr(np.arange(TASKS) < 10, m).statistic)
    assert row["mean_refused"] == pytest.approx(m[:10].mean())


def test_the_only_remarks_are_on_the_rater_that_says_4(four):
    rows = {key: four.cell(f"usual-{key}") for key in TEMPLATES}
    for row in rows.values():
        assert row["modal_share"] == pytest.approx(0.91)
        assert row["d"] == pytest.approx(0.09)  # the 9 tasks that are never rated 4
    assert four.remarks == [
        f"usual-{key}: 91% of the ratings are 4, which flatters r; informative r is {shown(row['informative_r'])}"
        " on the .09 of tasks that are told apart."
        for key, row in rows.items()
    ]


def test_the_page_and_the_figures_are_there(four):
    assert GROUP in four.page
    assert "python -m prefs.run -m model.name=keen,usual" in four.page
    assert "usual-anchored: 91% of the ratings are 4" in four.page
    drawn = {path.stem for path in (four.out / "figures").glob("*.png")}
    assert drawn == {
        *(f"stability_by_{way}" for way in ("template", "rater", "origin", "cell")),
        *("ratings_anchored", "ratings_stated", "agreement_templates", "agreement_raters", "variance"),
        *(f"refused_{name}-{key}" for name in RATERS for key in TEMPLATES),
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (four.out / "figures").iterdir())
    assert four.page.count("data:image/png;base64,") == len(drawn)


def test_wandb_has_one_run_of_the_comparison(four):
    (folder,) = (four.out / "wandb").glob("offline-run-*")
    logs = offline_wandb.read(folder)
    assert (logs.name, logs.group, logs.exit_code) == ("comparison", GROUP, 0)
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
    texts = completed(some_tasks(len(next(iter(means.values())))))
    simulate(folder, overrides, texts, {key: around(mean) for key, mean in means.items()})
    return [line for line in agreement(read_sweep([folder])).remarks if "measures something else" in line]


@pytest.mark.parametrize(
    ("alike", "overrides"),
    [
        (["anchored", "anchored_precise", "likert"], []),
        (["anchored", "anchored_precise"], []),
        (["anchored", "likert"], ["rating.seeds=[0]"]),
        (["anchored", "likert"], ["rating.seeds=[]"]),
        (["anchored", "likert"], ["rating.exact=false"]),
    ],
)
def test_a_stable_template_that_measures_something_else_is_named_alone(alike, overrides, tmp_path):
    count, like, length = 60, signal(60), signal(60, 1)
    means = {key: np.clip(like + 0.3 * (signal(count, 10 + at) - 3), 1, 5) for at, key in enumerate(alike)}
    (remark,) = of_templates(tmp_path, {"stated": length, **means}, *overrides)
    row = row_of(stability_by(read_sweep([tmp_path])), by="template", group="stated")
    r = np.nanmax([row["cross_seed_r"], row["predicted_r"]])
    assert remark.startswith(f"stated is stable (r {shown(r)}) but orders tasks unlike every other template (agreement")
    if not overrides:
        most = max(np.corrcoef(length, mean)[0, 1] for mean in means.values())
        assert remark.endswith(f"at most {shown(most)}): it measures something else.")


# Where the noise comes from


def test_variance_is_where_the_simulation_put_it(tmp_path):
    sizes = {"task": 0.12, "template": 0.06, "rater": 0.04, "task × template": 0.08, "completion": 0.1}
    # Every combination of five signs, eight times: effects of these signs have no correlation in the sample either.
    signs = np.array([*itertools.product([-1, 1], repeat=5)] * 8)
    task, completion, by_template = (
        signs[:, 0] * sizes["task"],
        signs[:, 1:3] * sizes["completion"],
        signs[:, 3:] * sizes["task × template"],
    )
    # Scales of different lengths, which count alike.
    scales = {"anchored": (1, 5), "binary": (0, 1)}
    sampling = []
    for number, (rater, seed) in enumerate(itertools.product(range(2), range(2))):
        mass = {}
        for template, (key, (low, high)) in enumerate(scales.items()):
            y = 0.5 + task + completion[:, seed] + by_template[:, template]
            y = y + sizes["template"] * (2 * template - 1) + sizes["rater"] * (2 * rater - 1)
            mass[key] = around(low + (high - low) * y, low, high)
            options = np.linspace(0, 1, high - low + 1)
            sampling.append((mass[key] * (options - (mass[key] @ options)[:, None]) ** 2).sum(axis=1).mean())
        overrides = [f"model.name={'ab'[rater]}", f"completer.seed={seed}"]
        texts = completed(some_tasks(len(signs)), by=f"Done with {seed}")
        simulate(tmp_path / f"{number}", overrides, texts, mass, draw=number, config_only=["rating.seeds=[0,1]"])
    sweep = read_sweep([tmp_path])
    assert len(sweep.blocks) == 1
    names = ["a-anchored completer.seed=0", "a-binary completer.seed=0", "a-anchored completer.seed=1"]
    assert [cell.name for cell in sweep.cells][:3] == names
    result = variance(sweep)
    table = result.frame("variance").set_index("source")
    assert result.remarks == ()
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


# Tasks


def test_cells_with_different_tasks_are_compared_on_the_common_ones(tmp_path):
    tasks, means = some_tasks(25), {name: signal(25, at) for at, name in enumerate("ab")}
    rows = {"a": np.arange(20), "b": np.random.default_rng(5).permutation(np.arange(5, 25))}
    changed = {"a": tasks, "b": [*tasks[:7], dataclasses.replace(tasks[7], prompt="Another task."), *tasks[8:]]}
    made = {}
    for number, name in enumerate("ab"):
        texts = completed([changed[name][row] for row in rows[name]])
        made[name] = rated(
            tmp_path / name, f"model.name={name}", means=means[name][rows[name]], texts=texts, draw=number
        )
    result = compared(tmp_path)
    assert "Compared on the 14 tasks that all cells have: a-anchored has 20; b-anchored has 20." in result.remarks
    common = [row for row in range(5, 20) if row != 7]
    row, own = result.cell("b-anchored"), [list(rows["b"]).index(task) for task in common]
    assert row["n"] == 14
    assert row["cross_seed_r"] == pytest.approx(mean_of_pairs(made["b"].sampled["anchored"][own]))
    agreed = result.table("agreement")
    assert list(agreed["between"]) == ["raters"]
    assert agreed["r"].iloc[0] == pytest.approx(np.corrcoef(means["a"][common], means["b"][common])[0, 1])
    # The task that only has its id in common was completed by both, but it is not one task.
    assert not [line for line in result.remarks if "different completions" in line]


def test_cells_without_common_tasks_are_compared_in_groups(tmp_path):
    made, sizes = {}, {"first": 12, "second": 10}
    for number, (name, data) in enumerate(itertools.product("ab", sizes)):
        texts = completed(some_tasks(sizes[data], first={"first": 0, "second": 50}[data]))
        overrides = [f"model.name={name}", f"dataset.name={data}"]
        made[name, data] = rated(tmp_path / f"{number}", *overrides, texts=texts, draw=number)
    result = compared(tmp_path)
    remark = (
        "All cells have only 0 tasks in common, so they are compared in groups: cells 2 on 12 tasks, 2 on 10 tasks."
    )
    assert remark in result.remarks
    for (name, data), job in made.items():
        row = result.cell(f"{name}-anchored dataset.name={data}")
        assert row["n"] == sizes[data]
        assert row["cross_seed_r"] == pytest.approx(mean_of_pairs(job.sampled["anchored"]))
    for data in sizes:
        expected = np.corrcoef(*(made[name, data].means("anchored") for name in "ab"))[0, 1]
        row = row_of(result.table("agreement"), condition=f"dataset.name={data}")
        assert row["r"] == pytest.approx(expected)
    assert set(result.table("variance")["condition"]) == {"dataset.name=first", "dataset.name=second"}


def test_a_task_without_a_completion_and_an_empty_one(tmp_path):
    texts, means = completed(some_tasks(12)), signal(12)
    texts[3], texts[4] = Completion(texts[3].task, None), Completion(texts[4].task, "")
    job = rated(tmp_path, texts=texts, means=means)
    result = compared(tmp_path)
    row, asked = result.cell("smollm2-anchored"), np.arange(12) != 3
    assert (row["n"], row["answers"], row["valid"]) == (12, 48, 44)
    assert row["cross_seed_r"] == pytest.approx(mean_of_pairs(job.sampled["anchored"][asked]))
    assert row["exact_mean"] == pytest.approx(means[asked].mean())
    refusals = row_of(result.table("refusals"), origin="ALL")
    assert (refusals["unrated"], refusals["unjudged"]) == (1, 0)  # each task is counted once
    assert "Variance decomposition: without 1 tasks that lack a rating in some cell." in result.remarks


def test_raters_of_different_completions_are_not_compared_unsaid(tmp_path):
    for name in "ab":
        rated(tmp_path / name, f"model.name={name}", texts=completed(some_tasks(12), by=f"Done by {name}"))
    remark = "Raters rated different completions; set one completer for all to compare raters (completer=...)."
    assert remark in compared(tmp_path).remarks


# Settings


@pytest.mark.parametrize(("seeds", "reason"), [("[0]", "one rating seed"), ("[]", "no rating seeds")])
def test_without_pairs_of_seeds_there_are_the_exact_ratings(seeds, reason, tmp_path):
    means = signal(20)
    rated(tmp_path, f"rating.seeds={seeds}", means=means)
    result = compared(tmp_path, drawn=True)
    row = result.cell("smollm2-anchored")
    assert pd.isna(row["cross_seed_r"])
    assert row["cross_seed_r_reason"] == reason
    assert f"smollm2-anchored: no cross-seed r ({reason})." in result.remarks
    w = (means % 1) * (1 - means % 1)
    assert row["predicted_r"] == pytest.approx(np.var(means, ddof=1) / (np.var(means, ddof=1) + w.mean()))
    share = row_of(result.table("variance"), source="rating seed")["share"]
    assert share == pytest.approx(1 - row["predicted_r"])


def thinkers(count: int, thoughts: int) -> np.ndarray:
    """[T, K, 5]: the tasks' signal, moved by each thought."""
    moved = signal(count)[:, None] + np.random.default_rng(5).uniform(-0.5, 0.5, size=(count, thoughts))
    return np.stack([around(np.clip(means, 1, 5)) for means in moved.T], axis=1)


def test_a_rater_that_thinks_is_called_one_and_its_thoughts_count_as_noise(tmp_path):
    p, texts = thinkers(40, 3), completed(some_tasks(40))
    simulate(tmp_path / "0", ["model.name=thinker", "model.thinking.enabled=true"], texts, {"anchored": p})
    rated(tmp_path / "1", "model.name=plain", texts=texts)
    result = compared(tmp_path)
    row = result.cell("thinker-anchored")
    assert row["kind"] == "mixture of 3 thoughts"
    assert result.cell("plain-anchored")["kind"] == "direct"
    assert "thinker-anchored (mixture of 3 thoughts)" in result.printed
    m = p @ np.arange(1, 6)
    within, between = (p @ np.arange(1, 6) ** 2 - m**2).mean(axis=1), m.var(axis=1, ddof=1)
    assert row["between_thoughts"] == pytest.approx(between.mean())
    assert row["sampling_variance"] == pytest.approx((within + between).mean())
    level = m.mean(axis=1).var(ddof=1) - between.mean() / 3
    assert row["predicted_r"] == pytest.approx(level / (level + (within + between).mean()))
    assert set(result.table("variance")["ratings"]) == {"exact"}


def test_what_names_do_not_say_is_said(tmp_path):
    for name, temperature in {"a": 1.0, "b": 0.7}.items():
        rated(tmp_path / name, f"model.name={name}", f"rating.temperature={temperature}")
    result = compared(tmp_path)
    assert result.cells() == ["a-anchored", "b-anchored"]
    assert "Cells differ in more than their names say: rating.temperature." in result.remarks


# Jobs that did not finish, and files that cannot be read


def sweep_of(folder: Path, raters: str, errors: Mapping[str, BaseException] | None = None, begun: str = "") -> None:
    """A multirun over raters of one letter, of which some begin (all) and some end by an error."""
    hydra_sweep(folder, f"model.name={','.join(raters)}")
    for number, name in enumerate(begun or raters):
        with contextlib.suppress(Exception, KeyboardInterrupt):
            rated(folder / f"{number}", f"model.name={name}", draw=number, error=(errors or {}).get(name))


def test_a_sweep_of_which_not_all_finished(tmp_path):
    errors = {"X": RuntimeError("CUDA out of memory\nat /Data/X"), "K": KeyboardInterrupt()}
    sweep_of(tmp_path, "ABXKN", errors, begun="ABXK")
    result = compared(tmp_path)
    assert result.cells() == ["A-anchored", "B-anchored"]
    assert result.remarks[0] == (
        "Of 5 jobs 2 finished. Failed: model.name=X (RuntimeError: CUDA out of memory at /Data/X)."
        " Begun but not finished: model.name=K. Not begun: 1."
    )
    assert "RuntimeError: CUDA out of memory at /Data/X" in result.page


def test_of_a_cell_measured_twice_the_later_counts(tmp_path):
    # What is only where and how fast does not make another cell.
    made = [
        rated(tmp_path / f"{number}", f"model.batch_tokens={1000 + number}", f"stats.seed={number}", draw=number)
        for number in range(2)
    ]
    result = compared(tmp_path)
    assert result.remarks[0] == f"Measured again by a later job, and left out: {tmp_path}/0/anchored."
    assert result.cells() == ["smollm2-anchored"]
    expected = mean_of_pairs(made[1].sampled["anchored"])
    assert result.cell("smollm2-anchored")["cross_seed_r"] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["completions.parquet", "anchored/ratings.parquet", "anchored/exact.parquet"])
@pytest.mark.parametrize("damage", ["gone", "cut", "empty", "other"])
def test_a_damaged_table_is_named(name, damage, tmp_path):
    rated(tmp_path, means=signal(5))
    path = tmp_path / name
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
    (tmp_path / "job.json").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/job.json: not the record of a job")):
        read_sweep([tmp_path])


# Folders


def test_several_folders_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [tmp_path / "multirun" / name for name in ("one", "two")]
    sweep_of(folders[0], "ab")
    sweep_of(folders[1], "cd", begun="c")
    result = compared(*folders)
    assert re.fullmatch(r"comparisons/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d", str(result.out))
    assert list(result.table("cells")["rater"].unique()) == ["a", "b", "c"]
    assert result.remarks[0] == "Of 4 jobs 3 finished. Not begun: 1."
    assert not (folders[0] / "comparison").exists()
    assert {"model.name=a,b", "model.name=c,d"} <= set(re.findall(r"model\.name=\w,\w", result.page))


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


def test_hostile_names_and_texts_stay_as_they_are_and_all_files_where_they_belong(tmp_path):
    folder, raters, origins = (
        tmp_path / "sweep",
        ["../up/<i>$a_b$</i>", "[bold]x[/bold]", "名前"],
        ["<b>$one$</b>", "[red]two", "None"],
    )
    tasks = [
        Task(f"{text[:50]} {n}", f"{text} {n}", origins[n % 3])
        for n, text in enumerate(text for text in HOSTILE for _ in range(3))
    ]
    texts = [Completion(task, f"I can't help with that. {task.prompt}") for task in tasks]
    texts[1] = Completion(tasks[1], "")
    for number, name in enumerate(raters):
        rated(folder / f"{number}", f"model.name='{name}'", texts=texts, draw=number)
    result = compared(folder, wandb_mode="offline", drawn=True)
    assert list(result.table("cells")["rater"].unique()) == raters
    assert list(result.table("cells")["origin"].unique()) == ["ALL", *origins]
    assert "[bold]x[/bold]-anchored" in result.printed
    for text in ("<script>alert(1)", "<b>$one$</b>", "\x00"):
        assert text not in result.page
    assert "&lt;script&gt;alert(1)" in result.page
    figures = list((result.out / "figures").rglob("*.png"))
    assert {path.parent for path in figures} == {result.out / "figures"}
    assert len([path for path in figures if path.stem.startswith("refused_")]) == 3
    (wandb,) = (result.out / "wandb").glob("offline-run-*")
    logs = offline_wandb.read(wandb)
    assert logs.exit_code == 0
    assert logs.summary[f"compare/valid_mass/{logs.config['cells'][0]}/ALL"] == pytest.approx(1)
    # Beside what the jobs and the comparison write, nothing came to be anywhere.
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]
    assert {path.name for path in folder.iterdir()} == {"0", "1", "2", "comparison"}


# The command line


def test_a_missing_folder_is_one_line_and_exit_code_2(capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "none")])
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        f"prefs: {tmp_path}/none: no jobs here (no job.json); give the folder of a run or a multirun\n"
    )


def test_disabled_wandb_writes_no_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rated(tmp_path / "run", "wandb.mode=offline", means=signal(5))
    main(["run", "--wandb", "disabled", "--out", "found/here"])
    assert (tmp_path / "found" / "here" / "cells.csv").is_file()
    assert not list(tmp_path.rglob("*wandb*"))
    assert "smollm2" in capsys.readouterr().out
