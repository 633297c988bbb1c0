"""Each run and each sweep has a folder of its own, however many begin at the same time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.utils import setup_globals
from omegaconf import DictConfig, OmegaConf
from sweeps import environment, job

from prefs.config.folders import BY_THE_SECOND, ClaimFolder, claiming_folders


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """The program with a key that nothing reads: it ends before anything is loaded, and leaves its job's record."""
    return subprocess.Popen(
        [sys.executable, "-m", "prefs.run", *arguments, "+model.nosuch=1"],
        cwd=folder, env=environment(folder / "store"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def hydra_config(run: str, sweep: str = "multirun") -> DictConfig:
    """What `ClaimFolder` reads of Hydra's config."""
    setup_globals()
    return OmegaConf.create({"hydra": {"run": {"dir": run}, "sweep": {"dir": sweep}, "overrides": {"hydra": []}}})


def test_runs_that_begin_together_share_no_folder(tmp_path):
    names = ("a", "b", "c")
    started = [start(tmp_path, f"wandb.project={name}") for name in names]
    for process in started:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 2, said
        assert said.startswith("prefs: model.nosuch: there is no such key")
    folders = list(tmp_path.glob("outputs/*/*"))
    assert sorted(job(folder)["overrides"][0] for folder in folders) == [f"wandb.project={name}" for name in names]


@pytest.mark.slow
def test_sweeps_that_begin_together_share_no_folder(tmp_path):
    started = [start(tmp_path, "-m", f"wandb.project={name},{name}{name}") for name in ("a", "b")]
    for process in started:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 2, said
    folders = list(tmp_path.glob("multirun/*/*"))
    found = [{job(folder / number)["overrides"][0][-1] for number in ("0", "1")} for folder in folders]
    assert sorted(found, key=min) == [{"a"}, {"b"}]


def test_of_the_same_second_each_gets_another_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = hydra_config(f"outputs/{BY_THE_SECOND}", f"it's/{BY_THE_SECOND}")
    claim, named = ClaimFolder(), first.hydra.run.dir
    configs = [first]
    for _ in range(2):
        configs.append(hydra_config(f"outputs/{BY_THE_SECOND}", f"it's/{BY_THE_SECOND}"))
        OmegaConf.copy_cache(first, configs[-1])
    for config in configs:
        claim.on_run_start(config)
        claim.on_multirun_start(config)
    assert [config.hydra.run.dir for config in configs] == [named, f"{named}-2", f"{named}-3"]
    assert all(Path(config.hydra.run.dir).is_dir() for config in configs)
    again = str(configs[1].hydra.sweep.dir).replace("'", "\\'")
    assert [list(config.hydra.overrides.hydra) for config in configs[:2]] == [[], [f"hydra.sweep.dir='{again}'"]]


def test_a_folder_of_one_s_own_is_taken_as_it_is_but_not_while_another_run_writes_there(tmp_path, capsys):
    mine = tmp_path / "mine"
    config, argument = hydra_config(str(mine), str(mine)), f"hydra.run.dir={mine}"
    taken = f"got '{mine}'; allowed: a folder that no other run is writing to"
    with claiming_folders():
        ClaimFolder().on_run_start(config)
        with pytest.raises(SystemExit):
            ClaimFolder().on_multirun_start(config)
        assert capsys.readouterr().err.strip() == f"prefs: hydra.sweep.dir: {taken}"
        process = start(tmp_path, argument)
        _, said = process.communicate(timeout=120)
        assert (process.returncode, said.strip()) == (2, f"prefs: hydra.run.dir: {taken}")
        assert [path.name for path in mine.iterdir()] == [".lock"]
    assert not list(mine.iterdir())
    _, said = start(tmp_path, argument).communicate(timeout=120)
    assert "model.nosuch" in said
    assert config.hydra.run.dir == str(mine)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        ClaimFolder().on_run_start(hydra_config(str(tmp_path / "file" / "run")))
    assert capsys.readouterr().err.startswith("prefs: hydra.run.dir: cannot write to ")
