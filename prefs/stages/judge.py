"""Judges: whether a completion is a refusal, by its opening phrases or by a model that is asked.

A judge is a function `(config, completions, *, store, models) -> Judged`, found by the config's ``_target_``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
from hydra.utils import get_method

from prefs.config import JudgeConfig
from prefs.data.template import Invalid
from prefs.job import StageCounts
from prefs.models.loading import Models, ModelSpec, recorded
from prefs.models.types import Question, Reply, Request, as_dicts
from prefs.stages.records import Completion
from prefs.store.missing import Record, ReplyTable, Unit, Wanted, fill
from prefs.store.table import Store

VERDICTS = pa.schema([("verdict", pa.string()), ("invalid", pa.string())])


@dataclass(frozen=True)
class Judged:
    """Verdicts on completions, in their order: whether each is a refusal, None where that is not known.

    ``by_phrases`` are the verdicts of the phrases beside a model's, for their agreement; None where no model was asked.
    """

    refused: list[bool | None]
    by_phrases: list[bool | None] | None = None
    work: tuple[StageCounts, ...] = ()


def judge(config: JudgeConfig, completions: Sequence[Completion], *, store: Store, models: Models) -> Judged:
    """Judge completions, asking a model only for what the store lacks.

    Raises
    ------
    UserError
        If the judge's model cannot be had.
    """
    if config.kind == "none":
        return Judged([None] * len(completions))
    judge_completions = get_method(config._target_)
    return judge_completions(config, completions, store=store, models=models)


def judged_by_phrases(
    config: JudgeConfig, completions: Sequence[Completion], *, store: Store, models: Models
) -> Judged:
    """By the completion's opening: whether its first ``window`` characters hold one of the phrases.

    The string match of Zou et al. 2023 ("Universal and Transferable Adversarial Attacks on Aligned Language Models"),
    restricted to the opening.
    """
    return Judged(
        [
            None if completion.text is None else refuses(completion.text, config.phrases, config.window)
            for completion in completions
        ]
    )


def refuses(text: str, phrases: Sequence[str], window: int) -> bool:
    """Whether the first `window` characters of a text (0: all) hold one of the phrases as whole words, case apart."""
    opening = _plain(text.strip())
    opening = opening[:window] if window else opening
    words = "|".join(re.escape(_plain(phrase)) for phrase in phrases)
    return re.search(rf"(?<!\w)(?:{words})(?!\w)", opening) is not None


def _plain(text: str) -> str:
    return " ".join(text.casefold().replace("’", "'").split())


def judged_by_llm(config: JudgeConfig, completions: Sequence[Completion], *, store: Store, models: Models) -> Judged:
    """A model is shown the task and the completion, and answers with one of two words and nothing else."""
    assert config.model is not None
    spec = ModelSpec.from_config(config.model)
    options = (config.refusal, config.compliance)
    table = store.table("verdicts", {"model": recorded(spec), "options": list(options)}, VERDICTS)
    kept = ReplyTable(table, "choice", _verdict)
    units: dict[int, Unit] = {}
    for row, completion in enumerate(completions):
        if completion.text is not None:
            request = Request((), Question(_asked(config.question, completion), options), choose=True)
            key = table.key(messages=as_dicts(request.turns))
            units[row] = Unit(key, request, 0, (Wanted(request, (Record(kept, key),)),))
    fill(units.values(), partial(models.get, spec), spec.batch_tokens, store, label="Judging")
    refused: list[bool | None] = [None] * len(completions)
    for row, unit in units.items():
        verdict = table.rows[unit.key]["verdict"]
        refused[row] = None if verdict is None else verdict == config.refusal
    by_phrases = judged_by_phrases(config, completions, store=store, models=models) if config.phrases else None
    total = len({unit.key for unit in units.values()})
    work = StageCounts(f"verdicts, {config.name}", total - len(table.made), len(table.made))
    return Judged(refused, by_phrases.refused if by_phrases else None, (work,))


def _verdict(reply: Reply | None, _: None) -> dict[str, str | None]:
    if reply is None:
        return {"verdict": None, "invalid": Invalid.too_long.value}
    return {"verdict": reply.choice, "invalid": Invalid.no_option.value if reply.choice is None else None}


def _asked(question: str, completion: Completion) -> str:
    """The judge's question about one completion; what a text itself holds in braces stays as it is."""
    texts = {"{request}": completion.task.prompt, "{reply}": completion.text or ""}
    return re.sub(r"\{request\}|\{reply\}", lambda match: texts[match[0]], question)
