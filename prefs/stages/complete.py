"""The completing stage: one completion for each task, from the store or from the completer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from prefs.data.task import Task
from prefs.data.template import Invalid
from prefs.models.loading import Models, ModelSpec, identity
from prefs.models.tokens import Message, as_dicts
from prefs.models.types import Conversation, Interrupted, Sample, Sampling
from prefs.progress import progress
from prefs.results.job_record import Work
from prefs.stages.records import Completion
from prefs.store.missing import Found, share
from prefs.store.table import Store, batches

SCHEMA = pa.schema(
    [
        ("text", pa.string()),
        ("tokens", pa.int32()),
        ("finished", pa.bool_()),
        ("invalid", pa.string()),
        ("thought", pa.string()),
    ]
)


def conversation(prompt: str, system_prompt: str | None) -> Conversation:
    """A task as messages."""
    system = (Message("system", system_prompt),) if system_prompt is not None else ()
    return (*system, Message("user", prompt))


def complete(
    tasks: Sequence[Task],
    completer: ModelSpec,
    sampling: Sampling,
    *,
    seed: int,
    system_prompt: str | None,
    store: Store,
    models: Models,
) -> tuple[list[Completion], Work]:
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
    Interrupted
        If the completer stops in the middle of a batch; what it has answered is in the store.
    """
    table = store.table(
        "completions",
        {"model": identity(completer), "sampling": asdict(sampling)},
        SCHEMA,
    )
    conversations = [conversation(task.prompt, system_prompt) for task in tasks]
    keys = [table.key(messages=as_dicts(messages), seed=seed) for messages in conversations]
    rows = dict(zip(keys, conversations, strict=True))
    found = Found(table)
    missing = found.lacking(rows)
    if missing:
        backend = models.get(completer)
        lengths = {key: backend.prompt_tokens(messages) + sampling.max_new_tokens for key, messages in rows.items()}
        too_long = [key for key in missing if lengths[key] > backend.max_context]
        found.write({key: _too_long(lengths[key] - sampling.max_new_tokens) for key in sorted(too_long)})
        fitting = {key: length for key, length in lengths.items() if length <= backend.max_context}
        with progress("Completing", len(missing) - len(too_long)) as advance:

            def compute(batch: Sequence[str]) -> None:
                new = found.lacking(batch)
                asked = new if completer.rows_apart else batch
                try:
                    samples = backend.complete([rows[key] for key in asked], seed, sampling)
                except Interrupted as stopped:
                    found.write(_records(asked, stopped.done, new))
                    raise
                found.write(_records(asked, samples, new))
                advance(len(new))

            share(
                batches(fitting, completer.batch_tokens),
                store.leases,
                lacking=found.lacking,
                compute=compute,
                refresh=found.refresh,
            )
    completions = [_completion(task, found.rows[key]) for task, key in zip(tasks, keys, strict=True)]
    return completions, Work("completions", len(rows) - len(found.made), len(found.made))


def _too_long(tokens: int) -> dict[str, Any]:
    return {"text": None, "tokens": tokens, "finished": True, "invalid": Invalid.too_long.value, "thought": None}


def _records(keys: Sequence[str], samples: Sequence[object], missing: Collection[str]) -> dict[str, dict[str, Any]]:
    """What to store of a batch: the rows that were answered, and lacking until now."""
    return {
        key: asdict(sample)
        for key, sample in zip(keys, samples, strict=True)
        if key in missing and isinstance(sample, Sample)
    }


def _completion(task: Task, record: Mapping[str, Any]) -> Completion:
    if record["invalid"] is not None:
        return Completion(task, None, bool(record["finished"]), Invalid(record["invalid"]))
    return Completion(task, record["text"], bool(record["finished"]))
