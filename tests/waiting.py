"""Waiting for what other threads and processes do."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(done: Callable[[], object], at_most_s: float = 20.0, told: Callable[[], str] = str) -> float:
    """Seconds until something is so; where that takes too long, `told` is what to say."""
    start = time.monotonic()
    while not done():
        assert time.monotonic() - start < at_most_s, told()
        time.sleep(0.02)
    return time.monotonic() - start
