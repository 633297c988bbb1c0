"""What a job asks a cluster for, from its models' configs. Imported while Hydra composes, so nothing heavy here."""

from __future__ import annotations

from itertools import chain

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from prefs.sweep import given

ROLES = ("model", "completer.model", "judge.model")


def job_gpus(config: DictConfig) -> int:
    """How many GPUs a job needs at least: those of its largest model. All its models share them."""
    return max(_gpus(OmegaConf.select(config, role)) for role in ROLES)


def _gpus(model: DictConfig | None) -> int:
    if model is None or model.backend == "openai":
        return 0
    if model.gpus is not None:
        return model.gpus
    if model.backend == "vllm":
        return model.vllm.tensor_parallel_size * model.vllm.data_parallel_size
    return 0 if model.device in ("cpu", "mps") else 1


def sweep_gpus(master: DictConfig) -> int:
    """The same for a whole sweep, whose launcher gives all jobs alike: the most that any of its jobs needs.

    `master` is the sweep's own config, as Hydra composes it before it has any job.
    """
    loader = GlobalHydra.instance().config_loader()
    overrides = {each.get_key_element(): each for each in OverridesParser.create(loader).parse_overrides(given(master))}
    jobs = chain.from_iterable(BasicSweeper.split_arguments(list(overrides.values()), None))
    return max(job_gpus(loader.load_sweep_config(master, job)) for job in jobs)
