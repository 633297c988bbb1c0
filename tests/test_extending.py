"""The worked examples of docs/extending.md, run as they stand there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

DOCS = Path(__file__).parents[1] / "docs" / "extending.md"
# What a reader does by editing a file of the package is done here before it is imported.
DRIVER = """
import sys
exec(open("position.py").read())
from prefs import pipeline
exec(open("medians.py").read())
from prefs.pipeline import *
pipeline.STAGES = (*pipeline.STAGES, {line})
from prefs.run import main
main()
"""


@pytest.mark.slow
def test_the_examples_run_as_they_stand(tmp_path):
    blocks = re.findall(r"```(python|yaml)\n(.*?)```", DOCS.read_text(), re.DOTALL)
    python = [text for kind, text in blocks if kind == "python"]
    yaml = [text for kind, text in blocks if kind == "yaml"]
    names = ("my_probes.py", "my_judges.py", "position.py", "medians.py")
    for name, text in zip(names, python, strict=False):
        (tmp_path / name).write_text(text)
    for name, text in zip(("probe/sign_difference.yaml", "judge/length.yaml"), yaml, strict=True):
        path = tmp_path / "my_conf" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    (tmp_path / "driver.py").write_text(DRIVER.format(line=python[4].strip()))
    overrides = ("+experiment=smoke", "dataset.limit=8", "probe=sign_difference", "judge=length", "hydra.run.dir=run")
    few = ("completer.max_new_tokens=8", "rating.seeds=[0]", "stats.bootstrap=20")
    positions = ("capture.positions=[middle_completion,rating]", "probe.positions=null", "capture.layers=[10,20]")
    done = subprocess.run(
        [sys.executable, "driver.py", "--config-dir", "my_conf", *overrides, *few, *positions],
        cwd=tmp_path,
        env={**os.environ, "PREFS_STORE": str(tmp_path / "store"), "WANDB_MODE": "disabled"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Median rating by origin" in done.stdout
    cell = tmp_path / "run" / "anchored_precise"
    exact, medians = pd.read_csv(cell / "exact.csv"), pd.read_csv(cell / "medians.csv")
    assert medians["median"][0] == pytest.approx(exact["mean"].median())
    completions = pd.read_csv(tmp_path / "run" / "completions.csv", keep_default_na=False)
    assert list(completions["refused"]) == [len(text) < 40 for text in completions["completion"]]
    probe = pd.read_csv(cell / "probe.csv")
    assert set(probe["position"]) == {"middle_completion", "rating"}
    cards = [json.loads(card.read_text()) for card in cell.glob("probe/*/probe.json")]
    assert {card["config"]["kind"] for card in cards} == {"sign_difference"}
