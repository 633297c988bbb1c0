"""The completing stage: one completion for each task, from the store or from the completer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

import pyarrow as pa

from prefs.data.task import Task
from prefs.data.template import Invalid
from prefs.job import StageCounts
from prefs.models.loading import Models, ModelSpec, recorded
from prefs.models.types import Request, Sampling, as_dicts
from prefs.stages.records import Completion, conversation, own_text, sample_row
from prefs.store.missing import Record, ReplyTable, Unit, Wanted, fill
from prefs.store.table import Store

SCHEMA = pa.schema(
    [
        ("text", pa.string()),
        ("tokens", pa.int32()),
        ("finished", pa.bool_()),
        ("invalid", pa.string()),
        ("thought", pa.string()),
    ]
)


def complete(
    tasks: Sequence[Task],
    completer: ModelSpec,
    sampling: Sampling,
    *,
    seed: int,
    system_prompt: str | None,
    store: Store,
    models: Models,
) -> tuple[list[Completion], StageCounts]:
    """Complete tasks, doing only what the store lacks.

    Returns
    -------
    completions
        One a task, in order. A prompt that leaves no room for ``max_new_tokens`` has none (``too_long``), nor has one
        that the completer does not answer.
    work
        What was reused and what computed.

    What another job is completing at the same time is waited for.

    Raises
    ------
    UserError
        If the completer stops in the middle of a batch; what it has answered is in the store.
    """
    table = store.table("completions", {"model": recorded(completer), "sampling": asdict(sampling)}, SCHEMA)
    kept = ReplyTable(table, "samples", sample_row)
    units = []
    for task in tasks:
        messages = conversation(task.prompt, system_prompt)
        key = table.key(messages=as_dicts(messages), seed=seed)
        request = Request(messages, sampling=sampling, seeds=(seed,))
        units.append(Unit(key, request, sampling.max_new_tokens, (Wanted(request, (Record(kept, key, seed),)),)))
    fill(units, partial(models.get, completer), completer.batch_tokens, store, label="Completing")
    completions = []
    for task, unit in zip(tasks, units, strict=True):
        row = table.rows[unit.key]
        text, thought, reason = own_text(row["text"], row["finished"], row["thought"], row["invalid"])
        completions.append(Completion(task, text, bool(row["finished"]), reason or Invalid.too_long, thought))
    total = len({unit.key for unit in units})
    return completions, StageCounts("completions", total - len(table.made), len(table.made))
