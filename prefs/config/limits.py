"""What a value of a config has to be: limits, which stand in the metadata of its field, and the one checker of all."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import field, fields, is_dataclass
from typing import Any, NamedTuple

from prefs.errors import ConfigError


class Limit(NamedTuple):
    """What a value has to be: a test of it, and what to tell its user. With `items`, of each item of a list, or key."""

    holds: Callable[[Any], bool]
    allowed: str | tuple[str, ...]
    items: bool = False


def limited(default: Any, *limits: Limit) -> Any:
    """A field with a default (of a list or dict, a copy for each object) and its limits. None is within every limit."""
    metadata = {"limits": limits}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def at_least(low: int, allowed: str = "") -> Limit:
    return Limit(lambda value: low <= value < math.inf, allowed or f"{low} or more")


def above(low: int, allowed: str = "") -> Limit:
    return Limit(lambda value: low < value < math.inf, allowed or f"more than {low}")


def between(low: int, high: int) -> Limit:
    return Limit(lambda value: low <= value <= high, f"{low} to {high}")


def one_of(*choices: str) -> Limit:
    return Limit(lambda value: value in choices, choices)


def items_of(*choices: str) -> Limit:
    return Limit(lambda value: value in choices, choices, items=True)


def matching(pattern: str, allowed: str) -> Limit:
    return Limit(re.compile(pattern).fullmatch, allowed)  # type: ignore[arg-type]


def not_empty(allowed: str) -> Limit:
    return Limit(lambda value: bool(value.strip() if isinstance(value, str) else value), allowed)


def distinct(allowed: str) -> Limit:
    return Limit(lambda values: len(set(values)) == len(values), allowed)


def layers_or_all(allowed: str) -> Limit:
    return Limit(lambda value: value == "all" or is_layers(value), allowed)


def is_layers(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(layer) is int for layer in value)


SHARE = Limit(lambda value: 0 < value <= 1, "more than 0, at most 1")
TEMPERATURE = at_least(0, "0 (always the likeliest token) or more")
SEED = at_least(0, "seeds that are 0 or more")
SEEDS = (
    Limit(lambda seeds: all(seed >= 0 for seed in seeds), SEED.allowed),
    distinct("seeds that differ from each other"),
)
DEVICE = matching(r"auto|cpu|mps|cuda(:\d+)?", "auto, cpu, mps, cuda or cuda:N")


def check_limits(config: Any, key: str = "") -> None:
    """Hold every field of a structured config, and of those within it, against the field's limits.

    Raises
    ------
    ConfigError
        Naming the key, what it got and what is allowed.
    """
    for entry in fields(config):
        name, value = key + entry.name, getattr(config, entry.name)
        for limit in entry.metadata.get("limits", ()):
            for part in value if limit.items and value is not None else [value]:
                if part is not None and not limit.holds(part):
                    raise ConfigError(name, part, limit.allowed)
        for inner, part in value.items() if isinstance(value, dict) else [("", value)]:
            if is_dataclass(part):
                check_limits(part, f"{name}.{inner}." if inner else f"{name}.")
