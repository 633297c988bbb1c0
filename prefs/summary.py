"""A cell in numbers: the statistics of one template's ratings by origin, as frozen records and as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from prefs.config import StatsConfig
from prefs.estimates import Estimate
from prefs.records import Ratings
from prefs.refusal import RefusalRating, refusal_rating
from prefs.stability import (
    CrossSeed,
    Informative,
    Intraclass,
    Modal,
    SeedsNeeded,
    cross_seed,
    exact_summary,
    informative,
    intraclass,
    modal,
    predicted_r,
    seeds_needed,
)
from prefs.tasks import ALL

NOT_ASKED = "rating.exact=false"


@dataclass(frozen=True)
class Exact:
    """The exact ratings of some tasks: mean over tasks of the mean and of the valid mass, SD of the means."""

    mean: float
    sd: float
    valid_mass: float
    predicted_r: Estimate
    seeds_needed: SeedsNeeded


@dataclass(frozen=True)
class Stability:
    """How stable and how informative the ratings of one origin (or of all) are."""

    origin: str
    n: int
    answers: int
    valid: int
    mean: float | None
    cross_seed: CrossSeed
    informative: Informative
    icc: Intraclass
    modal: Modal
    exact: Exact | None


def by_origin(ratings: Ratings) -> dict[str, np.ndarray]:
    """Indices of the tasks by origin, in the order of first appearance, after all of them under ``ALL``."""
    origins = [completion.task.origin for completion in ratings.completions]
    groups = {ALL: np.arange(len(origins))}
    for origin in dict.fromkeys(origins):
        groups[origin] = np.flatnonzero(np.array(origins) == origin)
    return groups


def stability(ratings: Ratings, stats: StatsConfig) -> list[Stability]:
    """Stability of all tasks and of each origin."""
    return [_stability(ratings, origin, tasks, stats) for origin, tasks in by_origin(ratings).items()]


def _stability(ratings: Ratings, origin: str, tasks: np.ndarray, stats: StatsConfig) -> Stability:
    x = ratings.sampled[tasks]
    draws = {"bootstrap": stats.bootstrap, "seed": stats.seed}
    return Stability(
        origin=origin,
        n=len(tasks),
        answers=x.size,
        valid=int(np.isfinite(x).sum()),
        mean=float(np.nanmean(x)) if np.isfinite(x).any() else None,
        cross_seed=cross_seed(x, **draws),
        informative=informative(x, **draws),
        icc=intraclass(x, **draws),
        modal=modal(x, **draws),
        exact=None if ratings.mass is None else _exact(ratings.mass[tasks], ratings.template.values, stats),
    )


def _exact(mass: np.ndarray, values: Sequence[float], stats: StatsConfig) -> Exact:
    summary = exact_summary(mass, values)
    asked = np.isfinite(summary.mean)
    m = summary.mean[asked]
    valid_mass = summary.valid_mass[np.isfinite(summary.valid_mass)]
    return Exact(
        mean=float(m.mean()) if len(m) else np.nan,
        sd=float(m.std(ddof=1)) if len(m) > 1 else np.nan,
        valid_mass=float(valid_mass.mean()) if len(valid_mass) else np.nan,
        predicted_r=predicted_r(summary.mean, summary.variance, bootstrap=stats.bootstrap, seed=stats.seed),
        seeds_needed=seeds_needed(summary.mean, summary.variance, stats.target_r),
    )


def task_means(ratings: Ratings) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Exact mean and mean of the valid sampled ratings of each task, [tasks] each; None where not asked for."""
    exact = None if ratings.mass is None else exact_summary(ratings.mass, ratings.template.values).mean
    if not ratings.seeds:
        return exact, None
    x = ratings.sampled
    count = np.isfinite(x).sum(axis=1)
    sampled = np.divide(np.nansum(x, axis=1), count, out=np.full(len(x), np.nan), where=count > 0)
    return exact, sampled


def refusals(ratings: Ratings, refused: Sequence[bool | None], stats: StatsConfig) -> dict[str, RefusalRating]:
    """Refusal × rating by origin. The rating is the exact mean where there is one, else the mean over seeds.

    Tasks without a verdict (no completion, no judge) are left out and counted.
    """
    exact, sampled = task_means(ratings)
    rating = exact if exact is not None else sampled
    assert rating is not None  # `config.check` asks for one of them
    return {
        origin: refusal_rating(
            [refused[task] for task in tasks], rating[tasks], bootstrap=stats.bootstrap, seed=stats.seed
        )
        for origin, tasks in by_origin(ratings).items()
    }


def stability_table(rows: Sequence[Stability]) -> pd.DataFrame:
    """One row an origin; a missing statistic is empty, with its reason in the column beside it."""
    table = []
    for row in rows:
        cells: dict[str, object] = {"origin": row.origin, "n": row.n, "answers": row.answers, "valid": row.valid}
        cells["mean_rating"] = row.mean
        pearson = row.cross_seed.pearson
        cells |= _columns("cross_seed_r", pearson.mean)
        cells |= {"cross_seed_r_sd": pearson.sd.value, "cross_seed_pairs": pearson.pairs_defined}
        cells |= _columns("cross_seed_rho", row.cross_seed.spearman.mean, interval=False)
        cells |= _columns("informative_r", row.informative.r.mean)
        cells |= _columns("d", row.informative.d)
        cells |= _columns("icc1", row.icc.single) | _columns("icc1k", row.icc.mean)
        cells |= {"modal_rating": row.modal.rating} | _columns("modal_share", row.modal.share)
        if row.exact is not None:
            cells |= {"exact_mean": row.exact.mean, "exact_sd": row.exact.sd, "valid_mass": row.exact.valid_mass}
            cells |= _columns("predicted_r", row.exact.predicted_r)
            cells["seeds_needed"] = row.exact.seeds_needed.seeds
            cells["seeds_needed_reason"] = row.exact.seeds_needed.reason
        else:
            cells |= dict.fromkeys(("exact_mean", "exact_sd", "valid_mass", "predicted_r", "seeds_needed"))
            cells["predicted_r_reason"] = NOT_ASKED
        table.append(cells)
    return _numeric(pd.DataFrame(table))


def refusal_table(rows: Mapping[str, RefusalRating]) -> pd.DataFrame:
    """One row an origin, as in the report's table."""
    table = pd.DataFrame(
        [
            {
                "origin": origin,
                "n": row.n,
                "refused": row.refused,
                "unrated": row.unrated,
                "unjudged": row.unjudged,
                "mean_refused": row.mean_refused,
                "mean_not_refused": row.mean_not_refused,
                **_columns("r", row.r),
            }
            for origin, row in rows.items()
        ]
    )
    return _numeric(table)


def _numeric(table: pd.DataFrame) -> pd.DataFrame:
    """Missing statistics as NaN, so that a column of numbers is one even when all of it is missing."""
    words = [name for name in table.columns if name == "origin" or name.endswith("_reason")]
    return table.assign(**{name: pd.to_numeric(table[name]) for name in table.columns.drop(words)})


def _columns(name: str, estimate: Estimate, *, interval: bool = True) -> dict[str, object]:
    columns: dict[str, object] = {name: estimate.value}
    if interval:
        columns |= {f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return columns | {f"{name}_reason": estimate.reason}
