"""What a job's records are made with, as the store keeps it: by that `prefs.plan.why` tells what differs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from prefs.config import Config, ModelDType
from prefs.data.task import Task
from prefs.models.loading import SERVED, ModelSpec, identity
from prefs.stages.measure import Roles
from prefs.store.keys import digest

# What determines the records that models are asked for.
DETERMINING = (
    "model",
    "completer",
    "template",
    "dataset",
    "rating",
    "judge",
    "capture",
    "concept",
    "choice",
    "steering",
)


def made_with(config: Config, roles: Roles, tasks: Sequence[Task]) -> dict[str, Any]:
    """What `prefs.store.configs` keeps of a job: its config, and which models and tasks that meant."""
    specs = {"model": roles.rater, "completer.model": roles.completer, "judge.model": roles.judge}
    return {
        "config": {name: part for name, part in plain(resolved(config)).items() if name in DETERMINING},
        "models": {role: identity(spec)["revision"] for role, spec in specs.items() if spec is not None},
        "tasks": digest([asdict(task) for task in tasks]),
    }


def resolved(config: Config) -> Config:
    """A config whose models have the precision that they get on this machine, as records have."""

    def with_dtype(role: Any) -> Any:
        if role.model is None:
            return role
        dtype = ModelSpec.from_config(role.model).dtype
        return role if dtype == SERVED else replace(role, model=replace(role.model, dtype=ModelDType(dtype)))

    return replace(with_dtype(config), completer=with_dtype(config.completer), judge=with_dtype(config.judge))


def plain(config: Config) -> dict[str, Any]:
    """A config as JSON has it."""
    return json.loads(json.dumps(asdict(config), default=lambda member: member.name))
