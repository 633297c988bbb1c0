"""Tasks that are described together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prefs.data.task import ALL
from prefs.statistics.estimates import Resamples


@dataclass(frozen=True)
class Group:
    """Tasks that are described together: their indices, and the resamples that all their statistics share."""

    origin: str
    tasks: np.ndarray
    draws: Resamples


def groups_by_origin(origins: Sequence[str], resamples: int, seed: int) -> list[Group]:
    """All tasks under ``ALL``, then those of each origin in the order of first appearance."""
    named = np.array(origins, dtype=object)
    indices = {ALL: np.arange(len(origins))}
    indices |= {origin: np.flatnonzero(named == origin) for origin in dict.fromkeys(origins)}
    return [Group(origin, tasks, Resamples.draw(len(tasks), resamples, seed)) for origin, tasks in indices.items()]
