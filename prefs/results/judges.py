"""How a judge that is a model and the phrases agree on what is a refusal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from prefs.results.result import Result, Table
from prefs.results.tables import columns, metrics_by_origin, numeric
from prefs.results.terminal import with_interval
from prefs.statistics.agreement import cohen_kappa
from prefs.statistics.groups import Group

if TYPE_CHECKING:
    from prefs.stages.context import JobContext

# Agreement below this is "slight" or "fair" in the words of Landis and Koch (1977).
FAIR_KAPPA = 0.4


def judges(job: JobContext) -> Result:
    """The verdicts of a job's judge beside those of the phrases, where both were asked."""
    judged = job.judged
    if judged.by_phrases is None:
        return Result()
    by_model, by_phrases = (np.array(verdicts, dtype=float) for verdicts in (judged.refused, judged.by_phrases))
    table = judges_table(by_model, by_phrases, job.groups)
    return Result(
        title="Judges",
        tables=(Table("judges", table),),
        remarks=(_remark(table, job.config.judge.name),),
        metrics=metrics_by_origin("judges", table),
    )


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
