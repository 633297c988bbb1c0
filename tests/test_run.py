"""The program as a user runs it, in processes of its own, on the real embedded model."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import offline_wandb
import pandas as pd
import pytest
from sweeps import environment

from prefs.data.template import Invalid

SMALL = [
    "dataset.limit=12",
    "completer.max_new_tokens=8",
    "rating.seeds=[0,1,2]",
    "rating.max_new_tokens=4",
    "capture.layers=[0,14,29]",
    "probe.folds=3",
    "probe.penalties=[0.1,10]",
    "probe.controls.permutations=19",
    "model.batch_tokens=700",
]
PROBES = ("probe", "probe_chosen", "probe_controls", "probe_origins", "probe_transfer", "probe_predictions")
TABLES = ("ratings", "exact", "stability", "distribution", "refusals", *PROBES)


def start(folder: Path, store: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "prefs.run", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment(store), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(folder: Path, store: Path, *arguments: str) -> str:
    process = start(folder, store, *arguments)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def run_folder(folder: Path) -> Path:
    (only,) = folder.glob("outputs/*/*")
    return only


def tables(folder: Path, template: str = "anchored_precise") -> dict[str, bytes]:
    content = {name: (folder / template / f"{name}.csv").read_bytes() for name in TABLES}
    return content | {"completions": (folder / "completions.csv").read_bytes()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Path, Path, str]:
    """One whole run: its folder, its store and what it printed."""
    folder, store = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("store")
    printed = run(folder, store, *SMALL)
    return run_folder(folder), store, printed


def test_the_closing_table(uninterrupted):
    folder, store, printed = uninterrupted
    for part in ("Sampled ratings", "Exact ratings", "Refusal × rating", "Probes: R² on held-out tasks", "Controls"):
        assert part in printed
    for origin in ("BAILBENCH", "WILDCHAT", "ALPACA", "MATH", "ALL"):
        assert origin in printed
    assert str(folder) in printed
    assert str(store) in printed
    assert re.search(r"wandb sync \S+offline-run", printed)
    tables, _, _ = printed.partition("smollm2 ·")[2].partition("tables and figures")
    assert max(len(line) for line in tables.splitlines()) <= 80


def test_the_tables_are_right_for_what_the_store_holds(uninterrupted):
    folder, _, _ = uninterrupted
    read = {name: pd.read_parquet(folder / "anchored_precise" / f"{name}.parquet") for name in TABLES}
    exact, ratings, stability = read["exact"], read["ratings"], read["stability"].set_index("origin")
    masses = exact[[f"p({n})" for n in range(1, 6)]].to_numpy()
    mean = masses @ np.arange(1, 6) / masses.sum(axis=1)
    np.testing.assert_allclose(exact["mean"], mean)
    assert stability.loc["ALL", "valid_mass"] == pytest.approx(masses.sum(axis=1).mean())
    assert len(ratings) == 12 * 3
    assert ratings["value"].notna().sum() == stability.loc["ALL", "valid"]
    assert set(ratings.loc[ratings["value"].isna(), "invalid"]) <= {reason.value for reason in Invalid}
    wide = ratings.pivot(index="task", columns="seed", values="value")
    pairs = pd.Series(wide.corr(min_periods=3).to_numpy()[np.triu_indices(3, k=1)])
    # Of no r where the model says the same of all tasks.
    assert stability.loc["ALL", "cross_seed_r"] == pytest.approx(pairs.mean(), nan_ok=True)
    predictions = read["probe_predictions"].query("target == 'exact'")
    residual = ((predictions["measured"] - predictions["predicted"]) ** 2).sum()
    total = ((predictions["measured"] - predictions["measured"].mean()) ** 2).sum()
    row = read["probe_chosen"].query("target == 'exact'").iloc[0]
    assert row["score"] == row["r2"] == pytest.approx(1 - residual / total)
    assert row["ceiling"] == 1
    assert len(read["probe"]) == 3 * 2 * 3  # targets, positions, layers


def test_wandb_has_it_all_offline(uninterrupted):
    folder, _, _ = uninterrupted
    (logged,) = folder.glob("wandb/offline-run-*")
    logs = offline_wandb.read(logged)
    assert logs.name == "smollm2-anchored_precise"
    assert logs.config["model"]["name"] == "smollm2"
    assert logs.exit_code == 0
    stability = pd.read_csv(folder / "anchored_precise" / "stability.csv").set_index("origin")
    assert logs.summary["stability/valid_mass/MATH"] == pytest.approx(stability.loc["MATH", "valid_mass"])
    layers = [row for row in logs.history if "probe/layer" in row]
    assert [row["probe/layer"] for row in layers] == [0, 14, 29]
    assert all("probe/rating/exact" in row for row in layers)
    assert "probe/chosen/score/exact" in logs.summary
    logged_keys = {key for row in logs.history for key in row}
    assert {"tables/stability", "tables/ratings", "figures/probe_by_layer"} <= logged_keys
    assert ("probe", "probe-smollm2-anchored_precise-exact") in logs.artifacts


# The program, where no engine can be loaded and no tokenizer, and nothing can be trained.
MODEL_FREE = """
import sys

for package in ("transformers", "transformer_lens", "lightning"):
    sys.modules[package] = None  # importing it is an ImportError

from prefs.run import main

main()
"""


def test_a_job_that_finds_everything_needs_no_model(uninterrupted, tmp_path):
    folder, store, _ = uninterrupted

    def run_again(name: str, *changed: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", MODEL_FREE, *SMALL, "wandb.mode=disabled", f"hydra.run.dir={name}", *changed]
        return subprocess.run(
            command, cwd=tmp_path, env=environment(store), capture_output=True, text=True, check=False, timeout=120
        )

    whole = run_again("whole")
    assert whole.returncode == 0, whole.stderr
    assert re.findall(r"(\d+) computed", whole.stdout.partition("smollm2 ·")[0]) == ["0"] * 5
    assert tables(tmp_path / "whole") == tables(folder)
    written = {str(path.relative_to(folder)) for path in (folder / "anchored_precise").rglob("*")}
    assert {str(path.relative_to(tmp_path / "whole")) for path in (tmp_path / "whole").rglob("*")} >= written
    # The same program does have to train where something else is wanted, and to load where something is missing.
    for change, lacks in {"probe.layers=[14]": "lightning", "rating.seeds=[0,1,2,3]": "transformer"}.items():
        other = run_again("other", change)
        assert other.returncode == 1
        assert re.search(rf"(ModuleNotFoundError|ImportError).*{lacks}", other.stderr), other.stderr


@pytest.mark.slow
def test_kill_9_and_relaunch(uninterrupted, tmp_path):
    """The program itself, while it rates; at any moment: `test_jobs_that_are_killed_write_the_same_tables`."""
    folder, _, _ = uninterrupted
    killed, store = tmp_path / "killed", tmp_path / "store"
    killed.mkdir()
    process = start(killed, store, *SMALL)
    deadline = time.monotonic() + 240
    while not list(store.glob("scores/*/*.parquet")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    relaunched = tmp_path / "relaunched"
    relaunched.mkdir()
    printed = run(relaunched, store, *SMALL)
    done, left = (int(n) for n in re.search(r"completions: (\d+) in the store, (\d+) computed", printed).groups())
    assert done + left == 12
    assert done > 0
    assert tables(run_folder(relaunched)) == tables(folder)


@pytest.mark.slow
def test_jobs_that_are_killed_write_the_same_tables(tmp_path):
    """One trial of each kind, with seven kills in the mean; a full disk is a mount, which takes root."""
    kinds = ["kill", "torn part", "no locks", *(["full disk"] if os.geteuid() == 0 else [])]
    command = [sys.executable, "benchmarks/kills.py", "--trials", str(len(kinds)), "--kinds", *kinds]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=environment(tmp_path), capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr + done.stdout
    rows = re.findall(r"^\| ([\w ]+) \| 1 \| (\d+) \| \d+ \| 0 \|$", done.stdout, re.MULTILINE)
    assert [kind for kind, _ in rows] == kinds


@pytest.mark.slow
def test_a_sweep_runs_on_one_loaded_model_and_the_same_completions(uninterrupted, tmp_path):
    _, store, _ = uninterrupted
    printed = run(tmp_path, store, "-m", *SMALL, "template=anchored,likert")
    assert printed.count("Loading smollm2") == 1
    assert printed.count("completions: 12 in the store, 0 computed") == 4  # logged, and in the closing table
    jobs = sorted(tmp_path.glob("multirun/*/*/[0-9]"))
    assert len(jobs) == 2
    assert len({(job / "completions.csv").read_bytes() for job in jobs}) == 1
    runs = [offline_wandb.read(next(job.glob("wandb/offline-run-*"))) for job in jobs]
    assert {run.group for run in runs} == {"/".join(jobs[0].parts[-3:-1])}
    compared = jobs[0].parent / "comparison"
    assert "Comparison · 2 cells of 2 jobs" in printed
    cells = pd.read_csv(compared / "cells.csv").query("origin == 'ALL'").set_index("template")
    for job, key in zip(jobs, ("anchored", "likert"), strict=True):
        own = pd.read_csv(job / key / "stability.csv").query("origin == 'ALL'").iloc[0]
        for name in ("n", "cross_seed_r", "cross_seed_r_low", "d", "predicted_r", "seeds_needed_high"):
            assert cells.loc[key, name] == pytest.approx(own[name], nan_ok=True), (key, name)
    (summary,) = (offline_wandb.read(folder) for folder in compared.glob("wandb/offline-run-*"))
    assert (summary.name, summary.group) == ("comparison", runs[0].group)
    assert summary.summary["compare/d/smollm2-likert/ALL"] == pytest.approx(cells.loc["likert", "d"])
    logged = {key for row in summary.history for key in row}
    assert {"tables/cells", "tables/agreement", "figures/stability_by_template", "report"} <= logged


@pytest.mark.slow
def test_a_sweep_goes_on_after_a_job_that_fails(uninterrupted, tmp_path):
    _, store, _ = uninterrupted
    process = start(tmp_path, store, "-m", *SMALL, "capture.layers=[99],[29]")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "capture.layers: got 99; allowed: all, or from -30 to 29 (smollm2)" in out
    assert "Of 2 jobs 1 finished. Failed:" in " ".join(out.split())
    assert "Comparison · 1 cell of 2 jobs" in out
    assert "Probes: R² on held-out tasks" in out
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["template=ancored"], "prefs: template: got 'ancored'; allowed: one of agreement, anchored"),
        (["hydra.swep.dir=x"], "prefs: hydra.swep: there is no such key; did you mean 'sweep'? Known here: callbacks,"),
        (["capture.layers=[30]"], "prefs: capture.layers: got 30; allowed: all, or from -30 to 29"),
        # These come late, after torch is loaded.
        pytest.param(
            ["capture.layers=[3,7]", "probe.layers=[8]"],
            "prefs: probe.layers: got 8; allowed: a layer that is captured (3, 7)",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["dataset=file", "dataset.path=tasks.jsonl"],
            "tasks.jsonl:2: the `prompt` is empty",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(tmp_path, arguments, line):
    (tmp_path / "tasks.jsonl").write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    process = start(tmp_path, tmp_path / "store", *arguments)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert line in err
    assert len(err.strip().splitlines()) == 1
    assert "Loading" not in out


@pytest.mark.slow
def test_no_secret_is_written_anywhere(uninterrupted, tmp_path):
    _, store, _ = uninterrupted
    secret = "0123456789abcdef" * 2 + "deadbeef"
    env = environment(store) | {"WANDB_API_KEY": secret, "WANDB_MODE": "offline", "OPENAI_API_KEY": secret}
    command = [sys.executable, "-m", "prefs.run", *SMALL]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True, timeout=300)
    assert secret not in done.stdout + done.stderr
    for path in [*tmp_path.rglob("*"), *store.rglob("*")]:
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path


def test_help_config_completion_and_a_users_own_main_config(tmp_path):
    def output(*command: str, module: str = "prefs.run", **env: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", module, *command],
            cwd=tmp_path, env=environment(tmp_path) | env, capture_output=True, text=True, check=True, timeout=60,
        ).stdout  # fmt: skip

    printed = output("--help")
    assert "what do language models say they like" in printed
    assert "template: agreement, anchored, anchored_precise, binary, likert, stated" in printed
    assert "score" not in printed
    assert "text_file=PATH" in output("--help", module="prefs.score")
    assert "template=likert" in output("-sc", "query=bash", COMP_LINE="prefs-run template=li")
    own = "defaults:\n  - config\n  - _self_\nrating:\n  seeds: [7]\n"
    (tmp_path / "main.yaml").write_text(own)
    assert "- 7\n" in output("--config-dir", ".", "--config-name", "main", "--cfg", "job", "--package", "rating")
