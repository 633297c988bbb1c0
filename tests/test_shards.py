"""Shards: every task is in one of them, and a run on a store that shards have filled computes nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sweeps import environment, jobs

from prefs.errors import ConfigError, UserError
from prefs.sweep import Shard

SMALL = [
    "dataset.limit=7",
    "completer.max_new_tokens=4",
    "rating.seeds=[0]",
    "rating.max_new_tokens=2",
    "capture.layers=[3,7]",
    "probe=none",
    "concept=liking_math",
    "concept.liking_math.origins=null",
    "concept.liking_math.folds=2",
    "wandb.mode=disabled",
]


@given(st.integers(1, 60), st.integers(1, 60))
def test_every_task_is_in_one_shard(tasks, count):
    shards = [Shard.parse(f"{number}/{count}") for number in range(1, min(count, tasks) + 1)]
    shares = [shard.share(range(tasks)) for shard in shards]
    assert sorted(task for share in shares for task in share) == list(range(tasks))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [str(shard) for shard in shards] == [f"{number}/{count}" for number in range(1, len(shards) + 1)]


@pytest.mark.parametrize("text", ["0/4", "5/4", "1/0", "1", "a/b", "-1/4", "1.5/4", "1/4\n", "²/4"])
def test_what_is_no_shard_is_refused(text):
    with pytest.raises(ConfigError, match=r"shard: got .* allowed: null, or i/n"):
        Shard.parse(text)


def test_more_shards_than_tasks():
    with pytest.raises(UserError, match="shard: 4/4 has no task; there are only 3"):
        Shard(4, 4).share("abc")


@pytest.mark.slow
def test_shards_are_merged_by_reading_the_store(tmp_path):
    def prefs(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "prefs.run", *arguments, *SMALL],
            cwd=tmp_path, env=environment(tmp_path / "store"), capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    printed = prefs("-m", "shard=1/2,2/2", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert printed.count("The same command without shard= shows the whole") == 2
    assert "omparison" not in printed
    made = [{work["stage"]: work["computed"] for work in job["work"]} for job in jobs(tmp_path)]
    assert [computed["completions"] for computed in made] == [4, 3]
    assert made[0].keys() == made[1].keys()
    assert any(stage.startswith("concepts") for stage in made[0])
    whole = prefs("hydra.run.dir=whole")
    assert "Loading" not in whole
    assert (tmp_path / "whole" / "anchored_precise" / "stability.csv").is_file()
    compared = subprocess.run(
        [sys.executable, "-m", "prefs.compare", "sweep"], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert compared.returncode == 2
    assert "these jobs made shards; the same command without shard=" in compared.stderr
