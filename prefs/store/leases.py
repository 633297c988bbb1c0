"""Leases: who is computing which records, so that jobs that share a store do not make them twice.

Made for a folder that hosts share over NFS, without POSIX locks and without clocks that agree:

- A holder is a file with its name in it, and a number that a thread raises every few seconds. Whoever waits watches
  that number by its own monotonic clock, and takes a holder for dead whose number stood still for a whole term; on the
  same host, at once when the process is gone.
- A lease is a hard link ``KEY`` to its holder's file. Making one is atomic, only one of several that try succeeds, and
  it takes no file of its own, which on a local disk is what costs.
- The lease of a dead holder X is never removed by others, which two could do at once: ``KEY.X`` is the lease on what
  X left, and is taken in the same way.
- Every holder leaves a mark in one file, ``visits``. As long as that is what it was and nobody else is there, nobody
  else can have written, and there is nothing to read again.

Nothing depends on leases but work saved. Records are keyed by content and parts appear whole or not at all, so a
holder that was only asleep, and goes on beside its heir, writes the same records a second time.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prefs.errors import UserError

log = logging.getLogger(__name__)

BEATS_A_TERM = 6
# What a file system says that has no hard links, or not so many of them.
NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK, errno.EXDEV}
FORGOTTEN_AFTER_S = 24 * 3600


@dataclass(frozen=True)
class Leases:
    """The leases of a store. `term_s` is how long a holder may give no sign of life; with 0 nothing is leased."""

    folder: Path
    term_s: float

    @contextmanager
    def holder(self) -> Iterator[Holder]:
        """Hold leases while inside; what is still held at the end is let go.

        Raises
        ------
        UserError
            If the folder cannot be written to.
        """
        holder = Holder(self.folder, self.term_s)
        try:
            yield holder
        finally:
            holder.close()


class Holder:
    """One process at one stage, which takes leases and lets them go. Its file appears with its first lease."""

    def __init__(self, folder: Path, term_s: float):
        self.name = uuid.uuid4().hex
        self.term_s = term_s
        self._folder = folder
        self._holders = folder / "holders"
        self._file = self._holders / self.name
        self._visits = folder / "visits"
        self._visited: tuple[int, int] | None = None
        self._others: set[str] = set()
        self._held: set[str] = set()
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._dead: set[str] = set()
        self._over = threading.Event()
        self._beating: threading.Thread | None = None

    def take(self, keys: Iterable[str]) -> bool:
        """Take the leases of all these records, or none.

        They are taken in one order by everybody, so that of two that want some of the same one gets all of its own.

        Raises
        ------
        UserError
            If the store cannot be written to.
        """
        if not self.term_s:
            return True
        taken = []
        try:
            self._begin()
            for key in sorted(set(keys)):
                if not self._take(key):
                    self.release(taken)
                    return False
                taken.append(key)
        except OSError as error:
            self.release(taken)
            if error.errno in NO_LINKS:
                log.warning("No leases at %s (%s): jobs may do the same work", self._folder, error.strerror)
                self.term_s = 0.0
                return True
            raise UserError(f"cannot write to the store at {self._folder}: {error.strerror}") from None
        return True

    def release(self, keys: Iterable[str]) -> None:
        """Let go of leases, once what they stand for is in the store or was given up."""
        for key in keys:
            if key not in self._held:
                continue
            self._held.remove(key)
            links = self._chain(key)
            if not links or links[-1][1] != self.name:
                continue  # somebody took us for dead, and holds it now
            with contextlib.suppress(OSError):
                # The first goes first: whoever comes when it is gone begins anew, and reads the store again.
                for link, _ in links:
                    os.unlink(link)

    def news(self) -> bool:
        """Whether others may have written since this was last asked; true the first time.

        Others write while they hold something, and so they have to be there, or to have been.
        """
        if self._beating is None:
            return True
        visited, others = _state(self._visits), self._others
        if visited is None or visited != self._visited:
            self._visited, self._others = visited, self._present()
            return True
        self._others = {name for name in others if not self._is_dead(name)}
        return bool(others)

    def wait(self, keys: Iterable[str], at_most_s: float) -> str:
        """Sleep a little while others hold some of these leases; who does, for people to read."""
        time.sleep(at_most_s)
        holders = {_target(f"{self._folder}/{key}") for key in keys} - {None, self.name}
        told = {self._told(name) for name in holders if name is not None}
        return ", ".join(sorted(told - {""}))

    def close(self) -> None:
        """Let go of everything, and leave."""
        self.release(list(self._held))
        self._over.set()
        if self._beating is not None:
            self._beating.join()
            with contextlib.suppress(OSError):
                self._file.unlink()

    def _begin(self) -> None:
        if self._beating is not None:
            return
        self._holders.mkdir(parents=True, exist_ok=True)
        self._forget()
        self._beat(0)
        with self._visits.open("ab") as file:
            file.write(b".")
            file.flush()
            os.fsync(file.fileno())
        self._beating = threading.Thread(target=self._live, name="leases", daemon=True)
        self._beating.start()

    def _live(self) -> None:
        beat = 0
        while not self._over.wait(self.term_s / BEATS_A_TERM):
            beat += 1
            with contextlib.suppress(OSError):  # a full disk, a server that is away: the next beat may get through
                self._beat(beat)

    def _beat(self, number: int) -> None:
        """Write in place: leases are this very file, and a part of a line is only another number."""
        content = f"{self.name} {number:012d} {_process()}\n".encode()
        with self._file.open("r+b" if number else "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def _take(self, key: str) -> bool:
        links: list[tuple[str, str]] = []
        while True:
            end = f"{self._folder}/{key}" + (f".{links[-1][1]}" if links else "")
            try:
                os.link(self._file, end)
            except FileNotFoundError:  # asleep for a day, and swept up
                self._beat(0)
                continue
            except FileExistsError:
                links = self._chain(key)
                if not links:
                    continue  # let go just now
                holder = links[-1][1]
                if holder == self.name and key not in self._held:
                    break  # made all the same: a server did as it was told, and its answer was lost
                if not self._is_dead(holder):
                    return False
                log.info("A job that was at some of these records is gone%s; going on", self._told(holder, " (%s)"))
                continue
            # What led here may have been let go just now, and begun anew by another.
            if not links or self._chain(key) == [*links, (end, self.name)]:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(end)
            links = []
        self._held.add(key)
        return True

    def _chain(self, key: str) -> list[tuple[str, str]]:
        """The links of a lease with their holders: each but the last was taken for dead, and left it to the next."""
        links: list[tuple[str, str]] = []
        link = f"{self._folder}/{key}"
        while (holder := _target(link)) is not None:
            links.append((link, holder))
            link = f"{self._folder}/{key}.{holder}"
        return links

    def _present(self) -> set[str]:
        """The other holders that are there, also where an NFS client thinks that it knows: it looks again into a folder
        that it has changed."""
        look = self._holders / f".{uuid.uuid4().hex}"
        with contextlib.suppress(OSError):
            os.link(self._file, look)
            look.unlink()
        return {name for name in os.listdir(self._holders) if not name.startswith(".")} - {self.name}

    def _is_dead(self, name: str) -> bool:
        if name == self.name:
            return False
        if name in self._dead:
            return True
        try:
            beat = (self._holders / name).read_bytes()
        except FileNotFoundError:
            dead = True  # it left
        except OSError:
            dead = False  # there is no telling
        else:
            before, since = self._seen.get(name, (None, 0.0))
            if beat != before:
                self._seen[name] = (beat, since := time.monotonic())
            dead = _is_gone(beat) or time.monotonic() - since > self.term_s
        if dead:
            self._dead.add(name)
        return dead

    def _told(self, name: str, form: str = "%s") -> str:
        try:
            words = (self._holders / name).read_bytes().decode(errors="replace").split()
        except OSError:
            return ""
        return form % f"process {words[4]} on {words[2]}" if len(words) == 6 else ""

    def _forget(self) -> None:
        """Remove what holders left behind that have been dead for a day."""
        gone = []
        for path in self._holders.iterdir():
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > max(FORGOTTEN_AFTER_S, 2 * self.term_s):
                    gone.append(path.name)
        for link in self._folder.iterdir() if gone else ():
            if _target(str(link)) in gone:
                link.unlink(missing_ok=True)
        for name in gone:
            (self._holders / name).unlink(missing_ok=True)


def _target(link: str) -> str | None:
    """The name of a lease's holder."""
    try:
        file = os.open(link, os.O_RDONLY)
    except OSError:  # none there, or let go this moment
        return None
    try:
        return os.read(file, 32).decode(errors="replace")
    except OSError:
        return None
    finally:
        os.close(file)


def _state(path: Path) -> tuple[int, int] | None:
    """What tells whether a file has changed. Opening it makes an NFS client ask its server."""
    try:
        with path.open("rb") as file:
            state = os.fstat(file.fileno())
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns


def _process(number: int | None = None) -> str:
    """This process, or another of this host: host, what tells one boot and container from another, number, start."""
    number = number or os.getpid()
    return f"{socket.gethostname()} {_boot()} {number} {_started(number)}"


def _boot() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return "unknown"


def _started(number: int) -> str:
    """When a process of this host began, in its kernel's ticks; a zombie is none any more."""
    try:
        words = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        return "unknown" if words[0] in "ZX" else words[19]
    except (OSError, IndexError):
        return "unknown"


def _is_gone(beat: bytes) -> bool:
    """Whether a holder's process ran on this host, and runs no more."""
    words: Sequence[str] = beat.decode(errors="replace").split()
    if len(words) != 6 or words[2:4] != [socket.gethostname(), _boot()] or "unknown" in (words[3], words[5]):
        return False
    return _started(int(words[4])) != words[5]
