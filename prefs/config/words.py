"""YAML reads some words as something else: `Yes` is true to it, `+1` is 1 and `010` is 8. Where a config means text,
that is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from prefs.errors import UserError


def check_words(cfg: DictConfig, shipped: Path) -> None:
    """Refuse text of the composed config that YAML, or the command line's grammar, has turned into other words.

    What stays as it was written ("3", "0.5") may. The files in the folder `shipped` are not looked at.

    Raises
    ------
    UserError
        Naming the key, what was written and what it became; in a file also its line.
    """
    for place, key, written, read in (*_of_files(shipped), *_of_overrides()):
        if str(read) != written and OmegaConf.select(cfg, key, throw_on_missing=False) == str(read):
            raise UserError(f'{key}: {place}{written} is read as {str(read)!r}; text goes in quotes ("{written}")')


def _of_files(shipped: Path) -> Iterator[tuple[str, str, str, Any]]:
    """Of all in the user's files that is no text to YAML: where it stands, its key, as it is written and is read."""
    if not GlobalHydra.instance().is_initialized():  # in a process of a launcher's: the one that started it has looked
        return
    hydra, loader = HydraConfig.get(), GlobalHydra.instance().config_loader()
    folders = [Path(source.path) for source in loader.get_sources() if source.scheme() == "file"]
    folders = [folder for folder in folders if folder != shipped]
    if not folders:
        return
    mode = hydra.mode or RunMode.RUN
    for default in loader.compute_defaults_list(hydra.job.config_name, list(hydra.overrides.task), mode).defaults:
        files = [folder / f"{default.config_path}.yaml" for folder in folders]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            continue
        text = file.read_text(encoding="utf-8")
        content = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
        for path, node, read in _scalars(yaml.compose(text, yaml.SafeLoader), content, default.package or ""):
            yield f"{file.name}, line {node.start_mark.line + 1}: ", path, node.value, read


def _scalars(node: yaml.Node | None, content: Any, path: str) -> Iterator[tuple[str, yaml.ScalarNode, Any]]:
    if isinstance(node, yaml.MappingNode) and isinstance(content, dict):
        for name, value in node.value:
            if name.value in content:
                yield from _scalars(value, content[name.value], f"{path}.{name.value}".lstrip("."))
    elif isinstance(node, yaml.SequenceNode) and isinstance(content, list):
        for number, (value, read) in enumerate(zip(node.value, content, strict=True)):
            yield from _scalars(value, read, f"{path}[{number}]")
    elif isinstance(node, yaml.ScalarNode) and isinstance(content, bool | int | float):
        yield path, node, content


def _of_overrides() -> Iterator[tuple[str, str, str, Any]]:
    """As `_of_files`, of the command line."""
    for override in OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task)):
        if isinstance(read := override.value(), bool | int | float):
            yield "", override.key_or_group, str(override.input_line).partition("=")[2], read
