"""What a multirun's folder says of it, held against what Hydra's own sweeper makes of the same command line; and what
its jobs ask a cluster for."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from hydra_app import shipped_configs
from omegaconf import OmegaConf
from simulated import hydra_sweep

from prefs.sweep import (
    NoteSweep,
    command,
    job_count,
    job_gpus,
    name_suffix,
    noting_sweeps,
    sweep_gpus,
    sweep_name,
    swept,
)

# Overrides, what is swept over, and the suffix of the last job's name.
SWEEPS = {
    "nothing": (["template=likert"], {}, ""),
    "an experiment without a sweep": (["+experiment=template_comparison"], {}, ""),
    "an experiment's own sweep": (
        ["+experiment=noise_sources"],
        {"model": ("smollm2", "smollm2_plain"), "completer.seed": ("0", "1")},
        "-completer.seed=1",
    ),
    "an experiment's sweep, one of its keys given": (
        ["+experiment=noise_sources", "completer.seed=7"],
        {"model": ("smollm2", "smollm2_plain")},
        "",
    ),
    "an experiment's sweep, one of its keys swept otherwise": (
        ["+experiment=noise_sources", "completer.seed=2,3,4", "model=smollm2"],
        {"completer.seed": ("2", "3", "4")},
        "-completer.seed=4",
    ),
    "a range": (
        ["model=smollm2,smollm2_plain", "completer.seed=range(0,3)"],
        {"model": ("smollm2", "smollm2_plain"), "completer.seed": ("0", "1", "2")},
        "-completer.seed=2",
    ),
    "lists": (
        ["rating.seeds=[0,1],[0,1,2]", "template=[anchored,likert]"],
        {"rating.seeds": ("[0,1]", "[0,1,2]")},
        "-rating.seeds=[0,1,2]",
    ),
    "choice, sort and shuffle": (
        ["completer.seed=choice(3,1)", "judge=sort(phrases,none)", "completer.temperature=sort(choice(1.0,0.5))"],
        {
            "completer.seed": ("3", "1"),
            "judge": ("none", "phrases"),
            "completer.temperature": ("0.5", "1.0"),
        },
        "-completer.seed=1-judge=phrases-completer.temperature=1.0",
    ),
    "quoted values": (
        ["""completer.system_prompt='Be kind, please.',"It's = 1" """.strip(), "completer.seed=1"],
        {"completer.system_prompt": ("'Be kind, please.'", '"It\'s = 1"')},
        '-completer.system_prompt="It\'s = 1"',
    ),
    "one quoted value with a comma is one value": (["completer.system_prompt='a, b'"], {}, ""),
    "added keys": (
        ["+model.chat_template_kwargs.thinking=true,false", "++completer.seed=0,1"],
        {"+model.chat_template_kwargs.thinking": ("True", "False"), "++completer.seed": ("0", "1")},
        "-model.chat_template_kwargs.thinking=False-completer.seed=1",
    ),
    "experiments": (
        ["+experiment=refusals,template_comparison"],
        {"+experiment": ("refusals", "template_comparison")},
        "",
    ),
    "a package": (
        ["completer=hf", "completer.model.path=x", "model@completer.model=smollm2,smollm2_plain"],
        {"model@completer.model": ("smollm2", "smollm2_plain")},
        "-model@completer.model=smollm2_plain",
    ),
    "the sweeper's parameters on the command line": (
        ["+experiment=model_comparison", "hydra.sweeper.params.model='smollm2,smollm2_plain,hf'", "model.path=x"],
        {"model": ("smollm2", "smollm2_plain", "hf")},
        "",
    ),
    "new parameters of the sweeper on the command line": (
        [
            "+experiment=model_comparison",
            "+hydra.sweeper.params={template: 'likert,stated', completer.seed: 'range(0,2)'}",
        ],
        {"model": ("smollm2", "smollm2_plain"), "template": ("likert", "stated"), "completer.seed": ("0", "1")},
        "-completer.seed=1",
    ),
    "batches": (
        ["completer.seed=0,1,2", "hydra.sweeper.max_batch_size=2"],
        {"completer.seed": ("0", "1", "2")},
        "-completer.seed=2",
    ),
    "a deleted key": (["~judge", "completer.seed=0,1"], {"completer.seed": ("0", "1")}, "-completer.seed=1"),
    "all of a group": (
        ["judge=glob(*)", "completer.seed=0,1"],
        {"judge": ("gpt5nano", "llm", "none", "phrases"), "completer.seed": ("0", "1")},
        "-judge=phrases-completer.seed=1",
    ),
}


@pytest.mark.parametrize("case", SWEEPS)
def test_a_sweep_is_read_back_as_hydra_splits_it(case, tmp_path):
    overrides, values, suffix = SWEEPS[case]
    jobs = hydra_sweep(tmp_path, *overrides)
    assert swept(tmp_path) == values
    assert job_count(tmp_path) == len(jobs)
    assert name_suffix(jobs[-1], values) == suffix
    # What the name leaves out is in the rater's and template's names, or is the experiment.
    named = ("model", "template", "+experiment")
    names = {str((name_suffix(job, values), [word for word in job if word.partition("=")[0] in named])) for job in jobs}
    assert len(names) == len(jobs)


def test_a_job_is_found_by_its_overrides_whatever_their_order():
    sweep = {"model": ("a", "b"), "completer.seed": ("0", "1"), "+rating.x": ("1", "2")}
    assert name_suffix(["completer.seed=1", "model=a", "+rating.x=2"], sweep) == "-completer.seed=1-rating.x=2"
    assert name_suffix(["completer.seed=1"], {}) == ""


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=smollm2,smollm2_plain", "completer.system_prompt='Be kind, please.'", "rating.seeds=[0,1]"],
        ["+experiment=model_comparison", "hydra.sweeper.params.model='smollm2_plain,smollm2'"],
    ],
)
def test_the_command_line_can_be_pasted(tmp_path, overrides):
    hydra_sweep(tmp_path, *overrides)
    words = shlex.split(command(tmp_path) or "")
    assert words[:4] == ["python", "-m", "prefs.run", "-m"]
    assert set(words[4:]) == set(overrides)


@pytest.mark.parametrize(
    "content", [None, "", "hydra: [", "- 1\n", "hydra: 3\n", "\x00", "hydra:\n  overrides:\n    task: ["]
)
def test_a_file_that_is_damaged_or_not_there_tells_nothing_and_stops_nothing(content, tmp_path):
    if content is not None:
        (tmp_path / "multirun.yaml").write_text(content)
    assert swept(tmp_path) == {}
    assert job_count(tmp_path) in (None, 1)
    if content is None:
        assert command(tmp_path) is None


def test_another_sweepers_parameters_tell_nothing(tmp_path):
    # As the Optuna sweeper has them: intervals, not lists.
    (tmp_path / "multirun.yaml").write_text(
        "hydra:\n  sweeper:\n    _target_: hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper\n"
        "    n_trials: 5\n    params:\n      completer.temperature: interval(0.5, 1.5)\n"
        "  overrides:\n    hydra: []\n    task:\n    - completer.top_p=interval(0.5,1)\n"
    )
    assert swept(tmp_path) == {}
    assert job_count(tmp_path) is None


def test_names_of_sweeps():
    folder = Path("/runs/multirun/2026-11-24/04-27-26")
    assert sweep_name(folder, None) == "2026-11-24/04-27-26"
    assert sweep_name(folder, "noise_sources") == "noise_sources 2026-11-24/04-27-26"


def test_sweeps_are_noted_only_inside():
    begun = OmegaConf.create({"hydra": {"sweep": {"dir": "multirun/a"}}})
    NoteSweep().on_multirun_start(begun)
    with noting_sweeps() as folders:
        NoteSweep().on_multirun_start(begun)
    NoteSweep().on_multirun_start(begun)
    assert folders == [Path("multirun/a").absolute()]


UNKNOWN = ["model=hf", "model.path=x"]


@pytest.mark.parametrize(
    ("overrides", "gpus"),
    [
        ([], 0),
        (UNKNOWN, 1),
        ([*UNKNOWN, "model.device=cpu"], 0),
        ([*UNKNOWN, "model.device=cuda:1"], 1),
        (["model=gpt5nano", "model.gpus=2"], 0),
        (["model=llama70b"], 4),
        (["model=llama8b", "model.backend=vllm", "model.vllm.data_parallel_size=3"], 3),
        ([*UNKNOWN, "model.backend=vllm", "model.vllm.tensor_parallel_size=2"], 2),
        (["completer=hf", "completer.model.path=x"], 1),
        (["judge=llm", "model@judge.model=llama70b"], 4),
        ([*UNKNOWN, "model.gpus=8"], 8),
        # A sweep asks for what its largest job needs.
        (["template=anchored,likert"], 0),
        (["model=smollm2,llama8b"], 1),
        (["model=llama8b,llama70b,smollm2", "template=anchored,likert"], 4),
        (["model=llama8b", "model.gpus=choice(1,3)"], 3),
    ],
)
def test_a_job_asks_for_what_its_largest_model_needs(overrides, gpus):
    with shipped_configs():
        # A sweep's own config, as Hydra composes it: with what is swept over, and not yet any job.
        loader = GlobalHydra.instance().config_loader()
        assert sweep_gpus(loader.load_configuration("config", overrides, run_mode=RunMode.MULTIRUN)) == gpus
        if not any("," in override for override in overrides):
            assert job_gpus(compose("config", overrides)) == gpus


@pytest.mark.parametrize(("launcher", "plugin"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_launcher_that_is_not_installed_is_one_line(launcher, plugin, tmp_path):
    module = f"hydra_plugins.hydra_{plugin}_launcher.{plugin}_launcher"
    without = f"import sys; sys.modules[{module!r}] = None; from prefs.run import main; main()"
    command = [sys.executable, "-c", without, "-m", f"hydra/launcher={launcher}", "template=likert"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == (
        f"prefs: hydra/launcher={launcher} is not installed: pip install -e '.[{launcher}]' in the checkout"
    )
