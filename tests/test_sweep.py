"""What a multirun's folder says of it, held against what Hydra's own sweeper makes of the same command line; and what
its jobs ask a cluster for."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from hydra_app import shipped_configs
from simulated import hydra_sweep

from prefs.sweep import command, job_count, job_gpus, name_suffix, sweep_gpus, swept

# Overrides, what is swept over, and the suffix of the last job's name.
SWEEPS = {
    "nothing": (["template=likert"], {}, ""),
    "an experiment's sweep, one of its keys given": (
        ["+experiment=noise_sources", "completer.seed=7"],
        {"model": ("smollm2", "smollm2_plain")},
        "",
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
    "added keys": (
        ["+model.chat_template_kwargs.thinking=true,false", "++completer.seed=0,1"],
        {"+model.chat_template_kwargs.thinking": ("True", "False"), "++completer.seed": ("0", "1")},
        "-model.chat_template_kwargs.thinking=False-completer.seed=1",
    ),
    "a package": (
        ["completer=hf", "completer.model.path=x", "model@completer.model=smollm2,smollm2_plain"],
        {"model@completer.model": ("smollm2", "smollm2_plain")},
        "-model@completer.model=smollm2_plain",
    ),
    "new parameters of the sweeper on the command line": (
        [
            "+experiment=model_comparison",
            "+hydra.sweeper.params={template: 'likert,stated', completer.seed: 'range(0,2)'}",
        ],
        {"model": ("smollm2", "smollm2_plain"), "template": ("likert", "stated"), "completer.seed": ("0", "1")},
        "-completer.seed=1",
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


def test_the_command_line_can_be_pasted(tmp_path):
    overrides = ["model=smollm2,hf", "model.path=x", "completer.system_prompt='Be kind, please.'", "rating.seeds=[0,1]"]
    hydra_sweep(tmp_path, *overrides)
    words = shlex.split(command(tmp_path) or "")
    assert words[:4] == ["python", "-m", "prefs.run", "-m"]
    assert set(words[4:]) == set(overrides)


# As the Optuna sweeper has its parameters: intervals, not lists.
ANOTHER_SWEEPER = """
hydra:
  sweeper:
    _target_: hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper
    params: {completer.temperature: "interval(0.5, 1.5)"}
  overrides: {hydra: [], task: ["completer.top_p=interval(0.5,1)"]}
"""


@pytest.mark.parametrize("content", [None, "", "hydra: [", "- 1\n", "hydra: 3\n", "\x00", ANOTHER_SWEEPER])
def test_a_file_that_is_damaged_or_not_there_or_of_others_tells_nothing_and_stops_nothing(content, tmp_path):
    if content is not None:
        (tmp_path / "multirun.yaml").write_text(content)
    assert swept(tmp_path) == {}
    assert job_count(tmp_path) in (None, 1)
    if content is None:
        assert command(tmp_path) is None


UNKNOWN = ["model=hf", "model.path=x"]


@pytest.mark.parametrize(
    ("overrides", "gpus"),
    [
        ([], 0),
        (UNKNOWN, 1),
        ([*UNKNOWN, "model.device=cpu"], 0),
        (["model=gpt5nano", "model.gpus=2"], 0),
        (["model=llama70b"], 4),
        (["model=llama8b", "model.backend=vllm", "model.vllm.data_parallel_size=3"], 3),
        (["judge=llm", "model@judge.model=llama70b"], 4),
        # A sweep asks for what its largest job needs.
        (["model=llama8b,llama70b,smollm2", "template=anchored,likert"], 4),
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
