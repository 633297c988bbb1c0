"""The completing stage: one completion for each task, from the store or from the completer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import pyarrow as pa

from prefs.chat import Message, as_dicts
from prefs.jobs import Work
from prefs.models.backend import Conversation, Sampling
from prefs.models.loading import Models, ModelSpec, identity
from prefs.progress import progress
from prefs.records import Completion
from prefs.store import Store, batches
from prefs.tasks import Task

SCHEMA = pa.schema([("text", pa.string()), ("tokens", pa.int32()), ("finished", pa.bool_()), ("invalid", pa.string())])


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
        One a task, in order. A prompt that leaves no room for ``max_new_tokens`` has none (``too_long``).
    work
        What was reused and what computed.
    """
    table = store.table(
        "completions",
        {"model": identity(completer), "sampling": asdict(sampling)},
        SCHEMA,
    )
    conversations = [conversation(task.prompt, system_prompt) for task in tasks]
    keys = [table.key(messages=as_dicts(messages), seed=seed) for messages in conversations]
    rows = dict(zip(keys, conversations, strict=True))
    found = table.read()
    missing = rows.keys() - found.keys()
    if missing:
        backend = models.get(completer)
        lengths = {key: backend.prompt_tokens(messages) + sampling.max_new_tokens for key, messages in rows.items()}
        too_long = {key for key in missing if lengths[key] > backend.max_context}
        refused = {
            key: {
                "text": None,
                "tokens": lengths[key] - sampling.max_new_tokens,
                "finished": True,
                "invalid": "too_long",
            }
            for key in sorted(too_long)
        }
        table.append(refused)
        found |= refused
        fitting = {key: length for key, length in lengths.items() if length <= backend.max_context}
        with progress("Completing", len(missing - too_long)) as advance:
            for batch in batches(fitting, completer.batch_tokens):
                new = [key for key in batch if key in missing]
                if not new:
                    continue
                samples = dict(zip(batch, backend.complete([rows[key] for key in batch], seed, sampling), strict=True))
                done = {
                    key: {"text": sample.text, "tokens": sample.tokens, "finished": sample.finished, "invalid": None}
                    for key, sample in samples.items()
                    if key in missing
                }
                table.append(done)
                found |= done
                advance(len(new))
    completions = [
        Completion(task, found[key]["text"], bool(found[key]["finished"]))
        for task, key in zip(tasks, keys, strict=True)
    ]
    return completions, Work("completions", len(rows) - len(missing), len(missing))
