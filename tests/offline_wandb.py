"""Reads an offline W&B run back: its log framing (LevelDB's), and W&B's own protocol buffers for what is in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32768, 7


@dataclass
class OfflineRun:
    """What one offline run logged."""

    name: str = ""
    group: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    artifacts: list[tuple[str, str]] = field(default_factory=list)
    exit_code: int | None = None


def read(folder: Path) -> OfflineRun:
    """Read the ``.wandb`` file of a run's folder."""
    (path,) = folder.glob("*.wandb")
    run = OfflineRun()
    for raw in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(raw)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.name, run.group = record.run.display_name, record.run.run_group
            run.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            run.history.append({_name(item): json.loads(item.value_json) for item in record.history.item})
        elif kind == "summary":
            run.summary |= {_name(item): json.loads(item.value_json) for item in record.summary.update}
        elif kind == "artifact":
            run.artifacts.append((record.artifact.type, record.artifact.name))
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def _name(item) -> str:
    """The metric; of a table or figure, which is logged in pieces, the name of the whole."""
    return item.key or item.nested_key[0]


def _records(content: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log: whole (type 1) or in pieces (2 first, 3 middle, 4 last), in blocks of 32 KiB."""
    start, pieces = HEADER, b""
    while start + HEADER <= len(content):
        if (left := BLOCK - start % BLOCK) < HEADER:
            start += left
            continue
        length, kind = int.from_bytes(content[start + 4 : start + 6], "little"), content[start + 6]
        start += HEADER + length
        pieces += content[start - length : start]
        if kind in (1, 4):
            yield pieces
            pieces = b""
