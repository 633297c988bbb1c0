"""Keys that nothing reads. Hydra's ``+`` puts any key into any part of a config, and OmegaConf keeps it in silence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from prefs.errors import UserError, dotted, unknown_key


def check_keys(cfg: DictConfig) -> None:
    """Refuse a key that no field of the schema has. Parts without a schema, which are handed on, take any.

    Raises
    ------
    UserError
        Naming the key and the nearest one that is read.
    """
    for key, known in _unknown(cfg, ""):
        raise UserError(unknown_key(key, known, (other for other in dotted(cfg) if not _is_within(other, key))))


def check_hydra_keys(hydra: DictConfig) -> None:
    """The same of Hydra's own config, where only overrides are the user's: Hydra adds keys to it, too.

    Raises
    ------
    UserError
        Naming the key and the nearest one that is read.
    """
    added = [override.lstrip("+").partition("=")[0] for override in hydra.overrides.hydra if override[:1] == "+"]
    for key, known in _unknown(hydra, "hydra."):
        if any(_is_within(override, key) for override in added):
            raise UserError(unknown_key(key, known))


def _is_within(key: str, part: str) -> bool:
    return f"{key}.".startswith(f"{part}.")


def _unknown(part: Any, prefix: str) -> Iterator[tuple[str, list[str]]]:
    """Each key without a field, and the fields beside it."""
    schema = OmegaConf.get_type(part)
    known = [field.name for field in fields(schema)] if is_dataclass(schema) else None
    values = part.items_ex(resolve=False) if isinstance(part, DictConfig) else enumerate(part._iter_ex(resolve=False))
    for name, value in values:
        if known is not None and name not in known:
            yield f"{prefix}{name}", known
        elif isinstance(value, DictConfig | ListConfig) and not (
            value._is_none() or value._is_missing() or value._is_interpolation()
        ):
            yield from _unknown(value, f"{prefix}{name}.")
