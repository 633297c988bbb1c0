"""What models said, one row a task or an answer: completions, sampled ratings, exact ratings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from prefs.data.template import Invalid
from prefs.results.result import Result, Table
from prefs.results.terminal import some
from prefs.stages.records import OTHER_DTYPE, Completion, Ratings, not_finite
from prefs.statistics.measured import Measured

if TYPE_CHECKING:
    from prefs.stages.context import CellContext, JobContext

# What a server may send in place of an answer whose logits are not finite: its first token, over and over.
REPEATED = re.compile(r"(.{1,8}?)\1{15,}", re.DOTALL)
# Why a task may have no completion, and so is not rated.
WITHOUT_COMPLETION = {
    Invalid.too_long: "too long for the completer's context",
    Invalid.thought_cut_off: "the completer's thought did not end: model.thinking.enabled and .max_tokens",
    Invalid.blocked: "blocked by the completer's server",
    Invalid.not_finite: "the completer's logits are not finite: "
    + OTHER_DTYPE.format("model.dtype, or completer.model.dtype,"),
    Invalid.no_answer: "the completer's server ended the answer before any text, for a reason of its own",
}


def completions(job: JobContext) -> Result:
    table = completions_table(job.completions, job.judged.refused)
    return Result(tables=(Table("completions", table, large=True),), remarks=tuple(_completion_remarks(job)))


def cut_off(completions: Sequence[Completion], completer: str, limit: int) -> list[str]:
    """How many completions end where their tokens did, and not where the model would have."""
    texts = [completion for completion in completions if completion.text is not None]
    cut = sum(not completion.finished for completion in texts)
    if not cut:
        return []
    return [
        f"{cut} of {len(texts)} completions ({cut / len(texts):.0%}) were cut off at {limit} tokens"
        f" (completer.max_new_tokens; model.completion_tokens of {completer}): what is rated is their beginning."
    ]


def _completion_remarks(job: JobContext) -> list[str]:
    remarks = cut_off(job.completions, job.roles.completer.name, job.config.completer.max_new_tokens)
    if job.roles.completer.backend == "openai":
        texts = {made.task.id: made.text or "" for made in job.completions}
        if loops := [task for task, text in texts.items() if REPEATED.fullmatch(text.strip())]:
            remarks.append(
                f"{len(loops)} of {len(texts)} completions are one token over and over: a loop, or what a server gives"
                f" whose logits are not finite (its log-probabilities would be NaN): {some(loops)}."
            )
    if unjudged := job.judged.without:
        reasons = ", ".join(f"{count} {reason}" for reason, count in unjudged.items())
        remarks.append(f"Completions without a verdict of judge {job.config.judge.name}: {reasons}.")
    if broken := not_finite([*job.rated.residuals.values(), *job.rated.rating_residuals.values()]):
        remarks.append(f"Activations: {broken}.")
    return remarks


def answers(cell: CellContext) -> Result:
    """A cell's sampled and exact ratings, and the tasks that have none."""
    ratings = cell.ratings
    tables = [Table("ratings", answers_table(ratings))]
    if cell.measured.exact is not None:
        reasons = [reason and reason.value for reason in map(ratings.without_mass.get, range(len(ratings.completions)))]
        tables.append(Table("exact", exact_table(cell.measured).assign(invalid=reasons)))
    if ratings.thoughts is not None:
        tables.append(Table("exact_by_thought", thoughts_table(ratings)))
    return Result(tables=tuple(tables), remarks=(*_remarks(ratings), *_unwanted(cell)))


def completions_table(completions: Sequence[Completion], refused: Sequence[bool | None]) -> pd.DataFrame:
    """One row a task."""
    tasks = [completion.task for completion in completions]
    return pd.DataFrame(
        {
            "task": [task.id for task in tasks],
            "origin": [task.origin for task in tasks],
            "topic": [task.topic for task in tasks],
            "prompt": [task.prompt for task in tasks],
            "completion": [completion.text for completion in completions],
            "finished": [completion.finished for completion in completions],
            "invalid": [completion.invalid.value if completion.invalid else None for completion in completions],
            "refused": pd.array(list(refused), dtype="boolean"),
        }
    )


def answers_table(ratings: Ratings) -> pd.DataFrame:
    """One row a task and rating seed: the answer as it was, the value read, or the reason why there is none."""
    names = ["task", "origin", "seed", "answer", "value", "invalid", *(["thought"] if ratings.thinks else [])]
    rows = [
        {
            "task": completion.task.id,
            "origin": completion.task.origin,
            "seed": answer.seed,
            "answer": answer.text,
            "value": answer.value,
            "invalid": answer.invalid.value if answer.invalid else None,
            "thought": answer.thought,
        }
        for completion, answers in zip(ratings.completions, ratings.answers, strict=True)
        for answer in answers
    ]
    return pd.DataFrame(rows, columns=names)


def exact_table(measured: Measured) -> pd.DataFrame:
    """One row a task: each option's probability before renormalising, mean, variance and valid mass.

    Of a rater that thinks they are of the mixture over its thoughts, with the part of the variance that is between
    them.
    """
    assert measured.mass is not None
    assert measured.exact is not None
    table = pd.DataFrame({"task": measured.tasks, "origin": measured.origins})
    for option, say in enumerate(measured.says):
        table[f"p({say})"] = measured.mass[:, option]
    table["mean"], table["variance"] = measured.exact.mean, measured.exact.variance
    if measured.thinks:
        table["between_thoughts"] = measured.exact.between
    table["valid_mass"] = measured.exact.valid_mass
    return table


def thoughts_table(ratings: Ratings) -> pd.DataFrame:
    """One row a task and thought: each option's probability after it, the thought, or why there is no rating."""
    assert ratings.thoughts is not None
    thoughts = ratings.thoughts
    rows = [
        {
            "task": completion.task.id,
            "origin": completion.task.origin,
            "thought_seed": seed,
            **{f"p({say})": thoughts.mass[row, k, option] for option, say in enumerate(ratings.template.says)},
            "thought": thoughts.texts[row][k],
            "invalid": reason.value if (reason := thoughts.invalid[row][k]) is not None else None,
        }
        for row, completion in enumerate(ratings.completions)
        for k, seed in enumerate(thoughts.seeds)
    ]
    return pd.DataFrame(rows)


def _remarks(ratings: Ratings) -> list[str]:
    remarks = []
    for reason, why in WITHOUT_COMPLETION.items():
        tasks = [completion.task.id for completion in ratings.completions if completion.invalid is reason]
        if tasks:
            remarks.append(f"{len(tasks)} task{'s' * (len(tasks) > 1)} without a completion ({why}): {some(tasks)}.")
    no_room = [
        completion.task.id
        for completion, answers in zip(ratings.completions, ratings.answers, strict=True)
        if completion.invalid is None and any(answer.invalid is Invalid.too_long for answer in answers)
    ]
    if no_room:
        remarks.append(
            f"The question does not fit into the rater's context behind {len(no_room)} tasks: {some(no_room)}."
        )
    invalid = ratings.invalid_counts()
    if invalid:
        counts = ", ".join(f"{count} {reason}" for reason, count in invalid.items())
        asked = len(ratings.completions) * len(ratings.seeds)
        remarks.append(f"{sum(invalid.values())} of {asked} sampled answers gave no rating: {counts}.")
    broken = [
        completion.task.id
        for row, (completion, answers) in enumerate(zip(ratings.completions, ratings.answers, strict=True))
        if completion.invalid is None
        and Invalid.not_finite in (ratings.without_mass.get(row), *(answer.invalid for answer in answers))
    ]
    if broken:
        remarks.append(
            f"The rater's logits are not finite for {len(broken)} of {len(ratings.completions)} tasks"
            f" ({OTHER_DTYPE.format('model.dtype')}): {some(broken)}."
        )
    return remarks


def _unwanted(cell: CellContext) -> list[str]:
    """Texts that are no answers: thoughts of models that were not to think, and nothing at all."""
    made, remarks = cell.ratings.completions, []
    rows = [answer for row in cell.ratings.answers for answer in row]
    completer = "model" if cell.config.completer.model is None else "completer.model"
    for kind, key, thinks, texts in (
        ("completions", completer, cell.job.roles.completer.thinking is not None, made),
        ("sampled answers", "model", cell.ratings.thinks, rows),
    ):
        thoughts = sum(bool(text.thought and text.thought.strip()) for text in texts)
        if thoughts and not thinks:
            remarks.append(
                f"{thoughts} of {len(texts)} {kind} came with a thought, which was split off: it is neither judged nor"
                f" rated, but uses up their tokens ({key}.thinking.enabled=true gives it tokens of its own)."
            )
    empty = sum(completion.text is not None and not completion.text.strip() for completion in made)
    if empty:
        remarks.append(f"{empty} of {len(made)} completions are empty, and rated as such.")
    return remarks
