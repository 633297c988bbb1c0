"""What a store's records were made with: the configs that it has served, a file each, since keys are digests."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from prefs.store.files import write_durably
from prefs.store.table import Store

FOLDER = "configs"


def remember(store: Store, content: Mapping[str, Any]) -> None:
    """Keep what a job makes its records with. Of a store that cannot be written to its records will tell."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=lambda member: member.name)
    path = store.root / FOLDER / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
    if not path.is_file():
        with contextlib.suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            write_durably(path, text.encode())


def remembered(store: Store) -> list[dict[str, Any]]:
    """What was kept, the newest first; what cannot be read is left out."""
    kept = []
    for path in (store.root / FOLDER).glob("*.json"):
        with contextlib.suppress(OSError, ValueError):
            kept.append((path.stat().st_mtime_ns, path.name, json.loads(path.read_text())))
    return [content for *_, content in sorted(kept, key=lambda entry: entry[:2], reverse=True)]
