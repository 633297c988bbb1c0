"""Keys: the SHA-256 of the canonical JSON of everything that determines a record, and nothing else."""

from __future__ import annotations

import hashlib
import json

# Part of every specification: raise it when the meaning of a stored record changes.
FORMAT = 1


def canonical(value: object) -> str:
    """Canonical JSON: sorted names, no blanks, no NaN; equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: object) -> str:
    """SHA-256 of the canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()
