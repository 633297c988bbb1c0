"""Concept vectors and steering as a user runs them, on the real embedded model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import offline_wandb
import pandas as pd
import pytest
import torch
from gguf import GGUFReader
from test_run import run, start

from prefs.concepts.export import load_vectors
from prefs.probes.probe import Site

pytestmark = pytest.mark.slow

SMALL = (
    "dataset.limit=8",
    "completer.max_new_tokens=8",
    "rating.seeds=[0]",
    "stats.bootstrap=50",
    "capture.layers=[0,8,15]",
    "probe.folds=2",
    "concept.liking_math.folds=2",
    "concept.liking_math.splits=10",
    "wandb.mode=offline",
)


@pytest.fixture(scope="module")
def extracted(tmp_path_factory) -> tuple[Path, Path, str]:
    """A small run of the experiment: its folder, its store and what it printed."""
    folder, store = tmp_path_factory.mktemp("vectors"), tmp_path_factory.mktemp("store")
    folds = "concept.liking_poetry.folds=2"
    printed = run(folder, store, "+experiment=concept_vectors", *SMALL, folds, f"hydra.run.dir={folder}/job")
    return folder / "job", store, printed


def test_vectors_tables_and_figures(extracted):
    folder, _, printed = extracted
    assert "Concept liking_math at last_prompt, by layer" in printed
    for row in ("held-out tasks", "other", "wording second", "texts differ, no prompt", "concept liking_poetry"):
        assert row in printed
    saved = load_vectors(folder / "concept" / "liking_math")
    assert saved.card["model"]["id"] == "embedded:smollm2"
    assert saved.card["n"] == 4
    assert saved.vectors.shape == (9, 576)
    reader = GGUFReader(folder / "concept" / "liking_math" / "last_prompt.gguf")
    (tensor,) = [tensor for tensor in reader.tensors if tensor.name == "direction.15"]
    torch.testing.assert_close(torch.tensor(tensor.data), saved.vector(Site(15, "last_prompt"))[0])
    tests = pd.read_parquet(folder / "concept_tests.parquet")
    assert {"held-out tasks", "origin ALPACA", "concept liking_poetry"} <= set(tests["test"])
    cosines = pd.read_parquet(folder / "anchored_precise" / "concept_probe_cosines.parquet")
    assert set(cosines["with"]) == {"probe on exact"}
    assert cosines["cosine"].abs().max() < 1
    assert (folder / "anchored_precise" / "figures" / "concept_liking_math.png").stat().st_size > 10_000
    (logged,) = folder.glob("wandb/offline-run-*")
    logs = offline_wandb.read(logged)
    names = {key for row in logs.history for key in row}
    assert {"tables/concept_tests", "tables/concept_vectors", "figures/concept_liking_math"} <= names
    assert ("concept", "concept-smollm2-liking_math") in logs.artifacts
    assert pd.read_parquet(folder / "anchored_precise" / "concept_ratings.parquet")["r"].notna().any()


def test_steering_by_the_job_s_vector_and_by_its_file_is_the_same(extracted, tmp_path):
    folder, store, _ = extracted
    few = ("steering.layers=[15]", "steering.coefficients=[-4,4]", "steering.controls.random=1")
    printed = run(tmp_path, store, "+experiment=steering", *SMALL, *few, f"hydra.run.dir={tmp_path}/one")
    assert "Steering at all" in printed
    assert "concepts, residual vectors" in printed
    doses = pd.read_parquet(tmp_path / "one" / "anchored_precise" / "steering_doses.parquet")
    assert set(doses["control"]) == {"unsteered", "concept", "random", "shuffled", "probe", "ablation"}
    assert (tmp_path / "one" / "anchored_precise" / "figures" / "dose_response.png").stat().st_size > 10_000
    vector = folder / "concept" / "liking_math"
    run(
        tmp_path, store, *SMALL[:6], "dataset.origins=[MATH]", "steering=concept", *few, f"steering.vector={vector}",
        "steering.position=last_prompt", "probe=none", "capture=none", "wandb.mode=disabled",
        f"hydra.run.dir={tmp_path}/two",
    )  # fmt: skip
    again = pd.read_parquet(tmp_path / "two" / "anchored_precise" / "steering_doses.parquet")
    columns = ["vector", "layer", "coefficient", "mean", "valid_mass"]
    one, two = (table.loc[table["control"] == "concept", columns].reset_index(drop=True) for table in (doses, again))
    # From a vector that went through a file; other tasks of the same data set.
    pd.testing.assert_frame_equal(one.drop(columns=["mean", "valid_mass"]), two.drop(columns=["mean", "valid_mass"]))
    assert two["mean"].between(1, 5).all()


def test_vectors_of_another_model_are_refused_before_anything_is_loaded(extracted, tmp_path):
    folder, store, _ = extracted
    copy = tmp_path / "vectors"
    shutil.copytree(folder / "concept" / "liking_math", copy)
    card = json.loads((copy / "vectors.json").read_text())
    card["model"]["revision"] = "another"
    (copy / "vectors.json").write_text(json.dumps(card))
    given = ("steering=concept", f"steering.vector={copy}", "steering.position=last_prompt")
    assert "the vectors of liking_math are of another model than smollm2: revision 'another' and" in refused(
        tmp_path, store, *given
    )
    own = (given[0], f"steering.vector={folder}/concept/liking_math", given[2])
    layer = refused(tmp_path, store, *own, "steering.layers=[7]")
    assert "liking_math has no vector at last_prompt, layer 7; it has last_prompt, last_completion, mean" in layer


def refused(folder: Path, store: Path, *arguments: str) -> str:
    process = start(folder, store, *arguments)
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 2, printed
    (line,) = [line for line in printed.splitlines() if line.startswith("prefs: ")]
    return line
