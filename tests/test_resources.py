"""What jobs ask a cluster for, and what a launcher says that is not installed."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hydra import compose
from hydra_app import shipped_configs
from omegaconf import DictConfig

from prefs.sweep import job_gpus, sweep_gpus


@pytest.fixture(autouse=True)
def hydra():
    with shipped_configs():
        yield


def composed(*overrides: str) -> DictConfig:
    return compose("config", list(overrides))


@pytest.mark.parametrize(
    ("overrides", "gpus"),
    [
        ([], 0),
        (["model=hf", "model.path=x"], 1),
        (["model=hf", "model.path=x", "model.device=cpu"], 0),
        (["model=hf", "model.path=x", "model.device=cuda:1"], 1),
        (["model=gpt5nano"], 0),
        (["model=gpt5nano", "model.gpus=2"], 0),
        (["model=llama70b"], 4),
        (["model=llama8b", "model.backend=vllm", "model.vllm.data_parallel_size=3"], 3),
        (["model=hf", "model.path=x", "model.backend=vllm", "model.vllm.tensor_parallel_size=2"], 2),
        (["completer=hf", "completer.model.path=x"], 1),
        (["judge=llm", "model@judge.model=llama70b"], 4),
        (["model=hf", "model.path=x", "model.gpus=8"], 8),
    ],
)
def test_a_job_asks_for_what_its_largest_model_needs(overrides, gpus):
    assert job_gpus(composed(*overrides)) == gpus


@pytest.mark.parametrize(
    ("overrides", "gpus"),
    [
        (["template=anchored,likert"], 0),
        (["model=smollm2,llama8b"], 1),
        (["model=llama8b,llama70b,smollm2", "template=anchored,likert"], 4),
        (["model=llama8b", "model.gpus=choice(1,3)"], 3),
    ],
)
def test_a_sweep_asks_for_what_its_largest_job_needs(overrides, gpus):
    assert sweep_gpus(master(overrides)) == gpus


def master(overrides: list[str]) -> DictConfig:
    """A sweep's own config, as Hydra composes it: with what is swept over, and not yet any job."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    loader = GlobalHydra.instance().config_loader()
    return loader.load_configuration("config", overrides, run_mode=RunMode.MULTIRUN)


@pytest.mark.parametrize(("launcher", "plugin"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_launcher_that_is_not_installed_is_one_line(launcher, plugin, tmp_path):
    module = f"hydra_plugins.hydra_{plugin}_launcher.{plugin}_launcher"
    without = f"import sys; sys.modules[{module!r}] = None; from prefs.run import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", without, "-m", f"hydra/launcher={launcher}", "template=likert"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == (
        f"prefs: hydra/launcher={launcher} is not installed: pip install -e '.[{launcher}]' in the checkout"
    )
