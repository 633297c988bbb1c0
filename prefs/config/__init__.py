"""Structured configs: what Hydra composes from ``conf/``, and the checks that need no model.

OmegaConf enforces names and types while it composes, so a misspelt key or a wrong type stops before anything is loaded.
What a type cannot say stands beside the field, as its limits; `rules` then refuse what does not go together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from prefs.config.choice import ChoiceConfig, ChoiceTemplate, PairsConfig, UtilityConfig
from prefs.config.keys import check_keys
from prefs.config.rules import check, conditions
from prefs.config.schema import (
    COMPLETION_POSITIONS,
    POSITIONS,
    TRAINER,
    ApiConfig,
    CaptureConfig,
    CoherenceConfig,
    CompleterConfig,
    ConceptConfig,
    Config,
    DatasetConfig,
    JudgeConfig,
    ModelConfig,
    ModelDType,
    ProbeConfig,
    ProbeControlsConfig,
    RatingConfig,
    RowReader,
    SourceConfig,
    StatsConfig,
    SteeringConfig,
    SteeringControlsConfig,
    ThinkingConfig,
    VllmConfig,
    WandbConfig,
)
from prefs.data.template import whole_numbers
from prefs.errors import missing_value
from prefs.sweep import sweep_gpus

# The YAML files: within the package of a wheel, beside it in a checkout.
CONF = next(path for path in (Path(__file__).parents[n] / "conf" for n in (1, 2)) if path.is_dir())

Schema = TypeVar("Schema")


def register() -> None:
    """Make known to Hydra the schema, under the name that ``conf/config.yaml`` begins with, and what configs call.

    ``${prefs.basename:PATH}`` is the last part of a path, less a data file's ending. ``${prefs.gpus:NONE}`` is how many
    GPUs each job of a sweep gets, and NONE where none needs any.
    """

    def gpus(none: Any, *, _root_: DictConfig) -> Any:
        return sweep_gpus(_root_) or none

    def basename(path: str) -> str:
        return re.sub(r"\.(jsonl?|csv)$", "", Path(str(path)).name)

    ConfigStore.instance().store(name="prefs_schema", node=Config)
    OmegaConf.register_new_resolver("prefs.basename", basename, replace=True)
    OmegaConf.register_new_resolver("prefs.gpus", gpus, replace=True)


def typed(cfg: DictConfig) -> Config:
    """The composed config as plain data classes, checked, with the system prompts that its conditions mean.

    Raises
    ------
    ConfigError
        If a value is missing or impossible.
    """
    config = filled(cfg, Config)
    check(config)
    for role in (config.completer, config.rating, config.choice):
        if role.condition is not None:
            role.system_prompt = conditions(config)[role.condition]
    return config


def filled(cfg: DictConfig, schema: type[Schema]) -> Schema:
    """A composed config as plain data classes of its schema.

    Raises
    ------
    ConfigError
        If a value is missing.
    UserError
        If a key is in no schema.
    """
    check_keys(cfg)
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise missing_value(missing[0])
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, schema)
    return config


def with_options(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A plain config in which templates have the options that their short scales mean."""
    templates = {
        key: {**template, "options": [{"say": str(n), "value": float(n), "also": []} for n in numbers]}
        for key, template in (plain.get("template") or {}).items()
        if (numbers := whole_numbers(template.get("scale"))) and not template.get("options")
    }
    return {**plain, "template": {**(plain.get("template") or {}), **templates}} if templates else dict(plain)


def with_prompts(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A plain config in which the system prompts stand that its conditions mean, where it has conditions that exist."""
    concept = next(iter((plain.get("concept") or {}).values()), {})
    conditions = concept.get("conditions") or {}
    roles = {role: plain.get(role) or {} for role in ("completer", "rating", "choice")}
    return dict(plain) | {
        name: {**role, "system_prompt": conditions[role["condition"]]}
        for name, role in roles.items()
        if role.get("condition") in conditions
    }
