"""Judges: whether a completion is a refusal, by its opening phrases or by a model that is asked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from prefs.config import JudgeConfig
from prefs.data.template import Invalid
from prefs.models.loading import Models, ModelSpec, identity
from prefs.models.tokens import Message, as_dicts
from prefs.models.types import Conversation, Interrupted
from prefs.progress import progress
from prefs.results.job_record import Work
from prefs.stages.records import Completion
from prefs.store.missing import Found, share
from prefs.store.table import Store, batches

VERDICTS = pa.schema([("verdict", pa.string()), ("invalid", pa.string())])


@dataclass(frozen=True)
class Judged:
    """Verdicts on completions, in their order: whether each is a refusal, None where that is not known.

    ``by_phrases`` are the verdicts of the phrases beside a model's, for their agreement; None where no model was asked.
    """

    refused: list[bool | None]
    by_phrases: list[bool | None] | None = None
    work: tuple[Work, ...] = ()


def judge(config: JudgeConfig, completions: Sequence[Completion], *, store: Store, models: Models) -> Judged:
    """Judge completions, asking a model only for what the store lacks.

    ``phrases`` is the string match of Zou et al. 2023 ("Universal and Transferable Adversarial Attacks on Aligned
    Language Models"), restricted to the completion's opening: its first ``window`` characters hold one of the phrases.
    ``llm`` shows a model the task and the completion, and lets it answer with one of two words and nothing else.

    Raises
    ------
    UserError
        If the judge's model cannot be had.
    """
    if config.kind == "none":
        return Judged([None] * len(completions))
    by_phrases = [
        None if each.text is None else refuses(each.text, config.phrases, config.window) for each in completions
    ]
    if config.kind == "phrases":
        return Judged(by_phrases)
    refused, work = _by_model(config, completions, store, models)
    return Judged(refused, by_phrases if config.phrases else None, (work,))


def refuses(text: str, phrases: Sequence[str], window: int) -> bool:
    """Whether the first `window` characters of a text (0: all) hold one of the phrases as whole words, case apart."""
    opening = _plain(text.strip())
    opening = opening[:window] if window else opening
    words = "|".join(re.escape(_plain(phrase)) for phrase in phrases)
    return re.search(rf"(?<!\w)(?:{words})(?!\w)", opening) is not None


def _plain(text: str) -> str:
    return " ".join(text.casefold().replace("’", "'").split())


def _by_model(
    config: JudgeConfig, completions: Sequence[Completion], store: Store, models: Models
) -> tuple[list[bool | None], Work]:
    assert config.model is not None
    spec = ModelSpec.from_config(config.model)
    options = (config.refusal, config.compliance)
    table = store.table("verdicts", {"model": identity(spec), "options": list(options)}, VERDICTS)
    asked = {at: _asked(config.question, each) for at, each in enumerate(completions) if each.text is not None}
    keys = {at: table.key(messages=as_dicts(conversation)) for at, conversation in asked.items()}
    found = Found(table)
    rows = {keys[at]: conversation for at, conversation in asked.items()}
    if found.lacking(rows):
        _ask(found, rows, options, spec, store, models)
    verdicts = {at: found.rows[key]["verdict"] for at, key in keys.items()}
    refused = [None if verdicts.get(at) is None else verdicts[at] == config.refusal for at in range(len(completions))]
    return refused, Work(f"verdicts, {config.name}", len(rows) - len(found.made), len(found.made))


def _ask(
    found: Found,
    rows: Mapping[str, Conversation],
    options: Sequence[str],
    spec: ModelSpec,
    store: Store,
    models: Models,
) -> None:
    """Let the model judge what is missing; each batch is written before the next is begun."""
    backend = models.get(spec)
    missing = found.lacking(rows)
    lengths = {key: backend.prompt_tokens(conversation) for key, conversation in rows.items()}
    too_long = {"verdict": None, "invalid": Invalid.too_long.value}
    found.write({key: too_long for key in sorted(missing) if lengths[key] >= backend.max_context})
    fitting = {key: length for key, length in lengths.items() if length < backend.max_context}
    with progress("Judging", len(missing)) as advance:

        def compute(batch: Sequence[str]) -> None:
            wanted = found.lacking(batch)
            try:
                said = backend.choose([rows[key] for key in wanted], options)
            except Interrupted as stopped:
                pairs = zip(wanted, stopped.done, strict=True)
                found.write({key: _verdict(word) for key, word in pairs if isinstance(word, str)})
                raise
            found.write({key: _verdict(word) for key, word in zip(wanted, said, strict=True)})
            advance(len(wanted))

        cut = batches(fitting, spec.batch_tokens)
        share(cut, store.leases, lacking=found.lacking, compute=compute, refresh=found.refresh)


def _verdict(word: str | None) -> dict[str, str | None]:
    return {"verdict": word, "invalid": Invalid.no_option.value if word is None else None}


def _asked(question: str, completion: Completion) -> Conversation:
    """The judge's question about one completion; what a text itself holds in braces stays as it is."""
    texts = {"{request}": completion.task.prompt, "{reply}": completion.text or ""}
    return (Message("user", re.sub(r"\{request\}|\{reply\}", lambda match: texts[match[0]], question)),)
