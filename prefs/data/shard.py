"""A share of a run's tasks, so that several jobs can make the same cells together, wherever and whenever they run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from prefs.errors import ConfigError, UserError

KEY = "shard"
ALLOWED = "null, or i/n: share i of n, from 1/n to n/n"
Item = TypeVar("Item")


@dataclass(frozen=True)
class Shard:
    """Share `number`, from 1, of `count`."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``2/8``.

        Raises
        ------
        ConfigError
            If it is something else, or there is no such share.
        """
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise ConfigError(KEY, text, ALLOWED)
        return cls(int(found[1]), int(found[2]))

    def of(self, tasks: Sequence[Item]) -> list[Item]:
        """Every `count`-th task, so that each share has about as many of every origin.

        Raises
        ------
        UserError
            If there are fewer tasks than shares, and none is left for this one.
        """
        share = list(tasks[self.number - 1 :: self.count])
        if not share:
            raise UserError(f"{KEY}: {self} has no task; there are only {len(tasks)}")
        return share

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"
