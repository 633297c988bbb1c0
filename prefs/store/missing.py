"""Work shared out among the jobs that want it: each batch is computed by one of them, and read by the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from prefs.store.leases import Leases
from prefs.store.table import Table

log = logging.getLogger(__name__)

LOOK_AGAIN_S = (0.05, 2.0)  # at first, and in the end
Batch = TypeVar("Batch")


class Found:
    """A table's rows as a job knows them: those it found, those it made, and those that others have made meanwhile."""

    def __init__(self, table: Table):
        self.table = table
        self.rows = table.read()
        self.made: set[str] = set()

    def lacking(self, keys: Iterable[str]) -> list[str]:
        """Those of the keys that have no row yet."""
        return [key for key in keys if key not in self.rows]

    def write(self, rows: Mapping[str, dict[str, Any]]) -> None:
        """Write rows that were lacking."""
        self.table.append(rows)
        self.rows.put(rows)
        self.made.update(rows)

    def refresh(self) -> None:
        """Read what others have written since; of two rows with one key, the one known first stays."""
        self.table.read_new(self.rows)


def share(
    batches: Sequence[Batch],
    leases: Leases,
    *,
    lacking: Callable[[Batch], Collection[str]],
    compute: Callable[[Batch], None],
    refresh: Callable[[], None],
) -> None:
    """Have all batches computed, by this job or by others that are at the same ones.

    A batch that another job holds is left until the others are done; then it is waited for, or taken over once that
    job is dead.

    Parameters
    ----------
    lacking
        The leases that a batch needs: those of what the store lacks, as far as is known. None: it is done.
    compute
        Computes what is lacking of a batch and writes it to the store.
    refresh
        Reads what others have written since.

    Raises
    ------
    UserError
        If the store cannot be written to.
    """
    left, said, pause = list(batches), False, LOOK_AGAIN_S[0]
    with leases.holder() as holder:
        while left:
            held = []
            for batch in left:
                wanted = lacking(batch)
                if not wanted:
                    continue
                if not holder.take(wanted):
                    held.append(batch)
                    continue
                try:
                    if holder.news():
                        refresh()  # whoever held it before may have done it
                    if lacking(batch):
                        compute(batch)
                finally:
                    holder.release(wanted)
            if held and len(held) == len(left):
                others = holder.wait([key for batch in held for key in lacking(batch)], pause)
                if others and not said:
                    log.info("Waiting for what other jobs are computing (%s)", others)
                    said = True
                pause = min(2 * pause, LOOK_AGAIN_S[1])
                refresh()
            else:
                pause = LOOK_AGAIN_S[0]
            left = held
