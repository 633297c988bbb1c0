"""The parts of a collection: files that are written once, never changed, and named by their checksum.

A collection is the folder of everything that shares a specification (model, sampling, template ...). A part's name is
the checksum of its bytes, so damage is seen when it is read, and two jobs that write the same part write the same
file. There are no locks: a part appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from prefs.errors import UserError
from prefs.store.files import appear, file_checksum, write_durably
from prefs.store.keys import FORMAT, canonical, digest

log = logging.getLogger(__name__)

ABANDONED_AFTER_S = 24 * 3600


class Collection:
    """The parts in the folder of one specification; see `prefs.store.table` and `prefs.store.vectors`."""

    suffix: str

    def __init__(self, root: Path, kind: str, spec: Mapping[str, Any]):
        self.kind = kind
        self.spec = {"format": FORMAT, **spec}
        self.folder = root / kind / digest(self.spec)[:32]
        # The canonical JSON of what a key is the digest of, before and after the record.
        self._before, self._after = f'{{"kind":{canonical(kind)},"record":', f',"spec":{canonical(self.spec)}}}'
        # Names of the parts read so far, or written by this very object.
        self._known: set[str] = set()
        self._looked = self._tidied = False

    def key(self, **determinants: Any) -> str:
        """The key of a record: everything that determines it beyond the collection's specification."""
        text = f"{self._before}{canonical(determinants)}{self._after}"
        return hashlib.sha256(text.encode()).hexdigest()

    def _new_parts(self) -> Iterator[tuple[Path, Any]]:
        """The undamaged parts that are not known yet, by name, with what was `_loaded` of them; then they are known.

        A part whose bytes do not give its name is set aside and named in a warning.
        """
        try:
            names = sorted(set(self._names()) - self._known)
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"cannot read the store at {self.folder}: {error.strerror}") from None
        for name in names:
            if not name.endswith(self.suffix) or name.startswith("."):
                continue
            path = self.folder / name
            try:
                checksum, loaded = self._loaded(path)
                if checksum != name.removesuffix(self.suffix):
                    self._set_aside(path, "its bytes do not match its checksum")
                    continue
            except FileNotFoundError:
                continue  # set aside by another job
            except OSError as error:
                raise UserError(f"cannot read the store at {path}: {error.strerror}") from None
            self._known.add(name)
            yield path, loaded

    def _loaded(self, path: Path) -> tuple[str, Any]:
        """The checksum of a part, and of it what is kept from that reading."""
        return file_checksum(path), None

    def _names(self) -> list[str]:
        """The folder's files as they are now, also where other hosts write to it.

        An NFS client keeps what it knows of a folder for up to a minute. Making a file in it shows the client that
        others have changed it.
        """
        if self._known or self._looked:
            look = self.folder / f".part-{uuid.uuid4().hex}"
            with contextlib.suppress(OSError):  # a folder that cannot be written to
                look.touch()
                look.unlink()
        self._looked = True
        return os.listdir(self.folder)

    def _set_aside(self, path: Path, reason: str) -> None:
        aside = self.folder / "damaged"
        with contextlib.suppress(FileNotFoundError):
            aside.mkdir(exist_ok=True)
            path.rename(aside / path.name)
            log.warning("Store: %s is damaged (%s); set aside in %s and computed again", path.name, reason, aside)

    def _write(self, write: Callable[[Path], object]) -> Path:
        """Have a part written to a path: temporary name, flush, rename. Raises UserError where the disk refuses."""

        def written(temporary: Path) -> Path:
            write(temporary)
            return self.folder / f"{file_checksum(temporary)}{self.suffix}"

        try:
            if not self._tidied:
                self.folder.mkdir(parents=True, exist_ok=True)
                if not (self.folder / "spec.json").is_file():
                    write_durably(self.folder / "spec.json", (canonical(self.spec) + "\n").encode())
                self._forget_abandoned()
                self._tidied = True
            path = appear(self.folder, written)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"cannot write to the store at {self.folder}: {reason}") from None
        self._known.add(path.name)
        return path

    def _forget_abandoned(self) -> None:
        """Remove temporary files that a killed job left behind a day ago or more."""
        for path in self.folder.glob(".part-*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > ABANDONED_AFTER_S:
                    path.unlink()
