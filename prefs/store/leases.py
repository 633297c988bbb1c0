"""Batches shared out among the jobs that want them: each is computed by one of them, and read by the others.

Leases are files in the store's folder ``leases``, of hosts that share it without locks and without clocks that agree.
Nothing depends on them but work saved: records are keyed by content and parts appear whole or not at all, so that a
job that was taken for dead, and goes on beside its heir, writes the same records a second time.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from filelock import SoftFileLease, Timeout

from prefs.errors import UserError
from prefs.store.table import Store

log = logging.getLogger(__name__)

LOOK_AGAIN_S = (0.05, 2.0)  # at first, and in the end
# Where a file system cannot exchange two files (NFS), a dead job's lease is removed by whoever waited for so long.
REMOVED_AFTER_TERMS = 1.25
Batch = TypeVar("Batch")


def share(
    batches: Sequence[Batch],
    store: Store,
    *,
    leases: Callable[[Batch], Collection[str]],
    compute: Callable[[Batch], None],
    refresh: Callable[[], None],
) -> None:
    """Have all batches computed, by this job or by others that are at the same ones.

    A batch that another job holds is left until the others are done; then it is waited for, or taken over once that
    job is dead.

    Parameters
    ----------
    leases
        The names of the leases that a batch needs, as far as is known. None: the store lacks nothing of it.
    compute
        Computes what is lacking of a batch and writes it to the store.
    refresh
        Reads what others have written since.

    Raises
    ------
    UserError
        If the store cannot be written to.
    """
    left, told, pause = list(batches), False, LOOK_AGAIN_S[0]
    ours = _Leases(store.root / "leases", store.lease_s)
    while left:
        held = []
        for batch in left:
            names = leases(batch)
            if not names:
                continue
            if not ours.take(names):
                held.append(batch)
                continue
            try:
                refresh()  # whoever held it before may have done it
                if leases(batch):
                    compute(batch)
                    leases(batch)
            finally:
                ours.release()
        if held and len(held) == len(left):
            if not told:
                log.info("Waiting for what other jobs are computing (%s)", ", ".join(sorted(ours.others())))
                told = True
            time.sleep(pause)
            pause = min(2 * pause, LOOK_AGAIN_S[1])
            refresh()
        else:
            pause = LOOK_AGAIN_S[0]
        left = held


@dataclass
class _Leases:
    """The leases that this job holds, and those of others that it waits for. With a term of 0 nothing is leased."""

    folder: Path
    term_s: float
    held: list[SoftFileLease] = field(default_factory=list)
    # By name, those that others hold; when each last changed, by this host's clock, tells whether its holder is alive.
    waited_for: dict[str, SoftFileLease] = field(default_factory=dict)
    changed: dict[str, tuple[object, float]] = field(default_factory=dict)

    def take(self, names: Iterable[str]) -> bool:
        """Take all of these leases, or none; in one order, so that of two jobs that want some of the same one gets all.

        Raises
        ------
        UserError
            If the store cannot be written to.
        """
        if not self.term_s:
            return True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in sorted(set(names)):
                # All that contend for a lease must agree on its term.
                path = self.folder / f"{name}-{self.term_s:g}"
                lease = self.waited_for.pop(name, None) or SoftFileLease(path, lease_duration=self.term_s, timeout=0)
                try:
                    lease.acquire()
                except Timeout:
                    self.waited_for[name] = lease
                    self._break_if_dead(name, path)
                    self.release()
                    return False
                self.held.append(lease)
        except OSError as error:
            self.release()
            raise UserError(f"cannot write to the store at {self.folder}: {error.strerror}") from None
        return True

    def _break_if_dead(self, name: str, path: Path) -> None:
        with contextlib.suppress(OSError):
            stat = path.stat()
            state = stat.st_mtime_ns, stat.st_ino
            before, since = self.changed.get(name, (None, 0.0))
            if state != before:
                self.changed[name] = state, time.monotonic()
            elif time.monotonic() - since > REMOVED_AFTER_TERMS * self.term_s:
                self.waited_for[name].break_lock()

    def release(self) -> None:
        """Let go of all that are held."""
        while self.held:
            with contextlib.suppress(OSError):
                self.held.pop().release()

    def others(self) -> set[str]:
        """Who holds what is waited for, for people to read."""
        owners = [lease.owner for lease in self.waited_for.values()]
        # Of a container, the name of its process namespace follows.
        return {f"process {owner.pid} on {owner.hostname.partition('?')[0]}" for owner in owners if owner is not None}
