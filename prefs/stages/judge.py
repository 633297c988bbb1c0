"""Judges: whether a completion is a refusal, by how it opens or by a model that is asked.

A judge is a function `(config, completions, *, model, store, models) -> Judged`, found by the config's ``_target_``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import pyarrow as pa
from hydra.utils import get_method

from prefs.config import JudgeConfig
from prefs.data.template import Invalid
from prefs.job import StageCounts
from prefs.models.loading import Models, ModelSpec, recorded
from prefs.models.size import billions
from prefs.models.types import Question, Reply, Request, as_dicts
from prefs.stages.phrases import refuses
from prefs.stages.records import Completion
from prefs.store.missing import Record, ReplyTable, Unit, Wanted, fill
from prefs.store.table import Store

# Billions of parameters from which a model is asked what its own refusals are: what is sold as 7B.
JUDGES_FROM = 6.5
VERDICTS = pa.schema([("verdict", pa.string()), ("invalid", pa.string())])


@dataclass(frozen=True)
class Judged:
    """Verdicts on completions, in their order: whether each is a refusal, None where that is not known.

    ``by_phrases`` are the verdicts of the phrases beside a model's, for their agreement; None where no model was asked.
    ``without`` are the reasons why completions have no verdict, with how many each.
    """

    refused: list[bool | None]
    by_phrases: list[bool | None] | None = None
    work: tuple[StageCounts, ...] = ()
    without: Mapping[str, int] = field(default_factory=dict)


def judging_model(config: JudgeConfig, completer: ModelSpec) -> ModelSpec | None:
    """The model that is asked: the config's, or else the completer itself where it is large enough to judge; None where
    none is."""
    if config.model is not None:
        return ModelSpec.from_config(config.model)
    if config.kind != "llm":
        return None
    size = billions(completer)
    able = completer.backend == "openai" if size is None else size >= JUDGES_FROM
    return completer if able else None


def judge(
    config: JudgeConfig,
    completions: Sequence[Completion],
    *,
    model: ModelSpec | None,
    store: Store,
    models: Models,
) -> Judged:
    """Judge completions, asking the `model` of `judging_model` only for what the store lacks.

    Raises
    ------
    UserError
        If the judge's model cannot be had.
    """
    if config.kind == "none":
        return Judged([None] * len(completions))
    judge_completions = get_method(config._target_)
    return judge_completions(config, completions, model=model, store=store, models=models)


def judged_by_phrases(
    config: JudgeConfig, completions: Sequence[Completion], *, model: ModelSpec | None, store: Store, models: Models
) -> Judged:
    """By how a completion opens: see `prefs.stages.phrases`."""
    return Judged(
        [
            None if completion.text is None else refuses(completion.text, config.phrases, config.window)
            for completion in completions
        ]
    )


def judged_by_llm(
    config: JudgeConfig, completions: Sequence[Completion], *, model: ModelSpec | None, store: Store, models: Models
) -> Judged:
    """A model is shown the task and the completion, and answers with one of two words and nothing else. The phrases
    judge beside it, and alone where there is no model."""
    by_phrases = judged_by_phrases(config, completions, model=None, store=store, models=models)
    if model is None:
        return by_phrases
    options = (config.refusal, config.compliance)
    table = store.table("verdicts", {"model": recorded(model), "options": list(options)}, VERDICTS)
    kept = ReplyTable(table, "choice", _verdict)
    units: dict[int, Unit] = {}
    for row, completion in enumerate(completions):
        if completion.text is not None:
            request = Request((), Question(_asked(config.question, completion), options), choose=True)
            key = table.key(messages=as_dicts(request.turns))
            units[row] = Unit(key, request, 0, (Wanted(request, (Record(kept, key),)),))
    fill(units.values(), partial(models.get, model), model.batch_tokens, store, label="Judging")
    refused: list[bool | None] = [None] * len(completions)
    without: Counter[str] = Counter()
    for row, unit in units.items():
        judgement = table.rows[unit.key]
        if judgement["verdict"] is None:
            without[judgement["invalid"]] += 1
        else:
            refused[row] = judgement["verdict"] == config.refusal
    total = len({unit.key for unit in units.values()})
    work = StageCounts(f"verdicts, {model.name}", total - len(table.made), len(table.made))
    return Judged(refused, by_phrases.refused, (work,), without)


def _verdict(reply: Reply | None, _: None) -> dict[str, str | None]:
    if reply is None:
        return {"verdict": None, "invalid": Invalid.too_long.value}
    reason = reply.invalid or Invalid.no_option.value
    return {"verdict": reply.choice, "invalid": reason if reply.choice is None else None}


def _asked(question: str, completion: Completion) -> str:
    """The judge's question about one completion; what a text itself holds in braces stays as it is."""
    texts = {"{request}": completion.task.prompt, "{reply}": completion.text or ""}
    return re.sub(r"\{request\}|\{reply\}", lambda match: texts[match[0]], question)
