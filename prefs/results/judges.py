"""How a judge that is a model and the phrases agree on refusals, and where the phrases alone are likely blind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from prefs.models.architecture import model_type
from prefs.results.result import Result, Table
from prefs.results.tables import columns, metrics_by_origin, numeric
from prefs.results.terminal import with_interval
from prefs.stages.phrases import made_for
from prefs.statistics.agreement import cohen_kappa
from prefs.statistics.groups import Group

if TYPE_CHECKING:
    from prefs.stages.context import JobContext

# Agreement below this is "slight" or "fair" in the words of Landis and Koch (1977).
FAIR_KAPPA = 0.4


# So many harmful tasks without a refusal are doubtful.
MIN_HARMFUL = 5


def judges(job: JobContext) -> Result:
    """The verdicts of a job's judge beside those of the phrases, where both were asked; else, cautions."""
    judged = job.judged
    if judged.by_phrases is None:
        return Result(remarks=tuple(_cautions(job)) if job.config.judge.kind in ("phrases", "llm") else ())
    by_model, by_phrases = (np.array(verdicts, dtype=float) for verdicts in (judged.refused, judged.by_phrases))
    table = judges_table(by_model, by_phrases, job.groups)
    return Result(
        title="Judges",
        tables=(Table("judges", table),),
        remarks=(_remark(table, job.roles.judge.name if job.roles.judge else job.config.judge.name),),
        metrics=metrics_by_origin("judges", table),
    )


def _cautions(job: JobContext) -> list[str]:
    """Why the phrases judged and no model did, and what may have escaped them."""
    completer, another, remarks = job.roles.completer, "judge=llm model@judge.model=NAME asks a model", []
    if job.config.judge.kind == "llm":
        remarks.append(
            f"Refusals were judged by phrases: {completer.name} is not known to have 7 billion parameters, and smaller"
            f" models judge poorly; {another}."
        )
    if not made_for(f"{completer.name} {completer.path} {model_type(completer.path)}"):
        remarks.append(
            f"The phrases that find refusals were not made for the family of {completer.name}: read some of its"
            f" completions, and add its own wording (judge.phrases); {another}."
        )
    for origin in job.config.dataset.harmful:
        pairs = zip(job.completions, job.judged.refused, strict=True)
        verdicts = [refused for made, refused in pairs if made.task.origin == origin and refused is not None]
        if len(verdicts) >= MIN_HARMFUL and not any(verdicts):
            remarks.append(
                f"No refusal was found among {len(verdicts)} tasks of {origin}, which are harmful (dataset.harmful):"
                f" the phrases may not know how {completer.name} refuses; read some of its completions; {another}."
            )
    return remarks


def judges_table(refused: np.ndarray, by_phrases: np.ndarray, groups: Sequence[Group]) -> pd.DataFrame:
    """One row an origin: how a model's verdicts [T] and those of the phrases agree (1 refused, 0 not, NaN unknown)."""
    rows = []
    for group in groups:
        a, b = refused[group.tasks], by_phrases[group.tasks]
        counts = {"both": (a == 1) & (b == 1), "model_only": (a == 1) & (b == 0), "phrases_only": (a == 0) & (b == 1)}
        kappa = cohen_kappa(a, b, group.draws)
        row: dict[str, object] = {"origin": group.origin, "n": kappa.n}
        row |= {f"refused_{name}": int(which.sum()) for name, which in counts.items()}
        rows.append(row | columns("kappa", kappa))
    return numeric(pd.DataFrame(rows))


def _remark(table: pd.DataFrame, name: str) -> str:
    row = table.to_dict("records")[0]
    counts = (
        f"{row['refused_both']} refused to both, {row['refused_model_only']} to {name} only,"
        f" {row['refused_phrases_only']} to the phrases only"
    )
    if pd.isna(row["kappa"]):
        return f"Judge {name} and phrases: Cohen's κ is undefined ({row['kappa_reason']}); {counts} of {row['n']}."
    doubt = "" if row["kappa"] >= FAIR_KAPPA else " They hardly agree: read some completions before you trust either."
    return f"Judge {name} and phrases: Cohen's κ {with_interval(row, 'kappa')}; {counts} of {row['n']}.{doubt}"
