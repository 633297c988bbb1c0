"""The program's configs as Hydra composes them, without running it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hydra import initialize_config_dir

from prefs.config import CONF, register


@contextmanager
def shipped_configs() -> Iterator[None]:
    """Inside, `hydra.compose` and Hydra's config loader know what ships."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield
