"""A cell in numbers: the statistics of one template's ratings by origin, as frozen records and as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from prefs.data.task import ALL
from prefs.statistics.agreement import cohen_kappa
from prefs.statistics.estimates import Estimate, Resamples
from prefs.statistics.exact import (
    ONE_THOUGHT,
    ExactMoments,
    ExactSummary,
    exact_moments,
    exact_summary,
    predicted_r,
    seeds_needed,
)
from prefs.statistics.measured import Measured
from prefs.statistics.refusal import RefusalRating, refusal_rating
from prefs.statistics.sampled import CrossSeed, Intraclass, Modal, cross_seed, distribution, intraclass, modal

NOT_ASKED = "rating.exact=false"


@dataclass(frozen=True)
class Group:
    """Tasks that are described together: their indices, and the resamples that all their statistics share."""

    origin: str
    tasks: np.ndarray
    draws: Resamples


@dataclass(frozen=True)
class Exact:
    """The exact ratings of some tasks, and what they predict of sampled ones."""

    moments: ExactMoments
    predicted_r: Estimate
    seeds_needed: Estimate
    target_r: float


@dataclass(frozen=True)
class Stability:
    """How stable and how informative the ratings of one origin (or of all) are."""

    origin: str
    n: int
    kind: str
    answers: int
    valid: int
    mean: float | None
    cross_seed: CrossSeed
    icc: Intraclass
    modal: Modal
    exact: Exact | None


def groups_by_origin(origins: Sequence[str], resamples: int, seed: int) -> list[Group]:
    """All tasks under ``ALL``, then those of each origin in the order of first appearance."""
    named = np.array(origins, dtype=object)
    indices = {ALL: np.arange(len(origins))}
    indices |= {origin: np.flatnonzero(named == origin) for origin in dict.fromkeys(origins)}
    return [Group(origin, tasks, Resamples.draw(len(tasks), resamples, seed)) for origin, tasks in indices.items()]


def stability(measured: Measured, groups: Sequence[Group], target_r: float) -> list[Stability]:
    """Stability of each group's ratings; `target_r` is what the number of seeds needed is for."""
    return [_stability(measured, group, target_r) for group in groups]


def _stability(measured: Measured, group: Group, target_r: float) -> Stability:
    measured = measured.only(group.tasks)
    x = measured.sampled
    return Stability(
        origin=group.origin,
        n=len(group.tasks),
        kind=measured.kind,
        answers=x.size,
        valid=int(np.isfinite(x).sum()),
        mean=float(np.nanmean(x)) if np.isfinite(x).any() else None,
        cross_seed=cross_seed(x, group.draws),
        icc=intraclass(x, group.draws),
        modal=modal(x, group.draws),
        exact=None if measured.exact is None else _exact(measured.exact, group, target_r),
    )


def _exact(exact: ExactSummary, group: Group, target_r: float) -> Exact:
    m, w, own = exact.mean, exact.variance, exact.uncertainty
    if np.isfinite(m).any() and not np.isfinite(w).any():
        predicted = needed = Estimate.missing(ONE_THOUGHT, int(np.isfinite(m).sum()))
    else:
        predicted = predicted_r(m, w, draws=group.draws, uncertainty=own)
        needed = seeds_needed(m, w, target_r, group.draws, own)
    return Exact(exact_moments(exact, group.draws), predicted, needed, target_r)


def refusals(measured: Measured, groups: Sequence[Group]) -> dict[str, RefusalRating]:
    """Refusal × rating by group. The rating is the exact mean where there is one, else the mean over seeds.

    Tasks without a verdict (no completion, no judge) are left out and counted.
    """
    rating = measured.task_means
    return {
        group.origin: refusal_rating(measured.refused[group.tasks], rating[group.tasks], group.draws)
        for group in groups
    }


def stability_table(rows: Sequence[Stability]) -> pd.DataFrame:
    """One row an origin; a missing statistic is empty, with its reason in the column beside it."""
    table = []
    for row in rows:
        pearson, informative = row.cross_seed.pearson, row.cross_seed.informative
        cells: dict[str, object] = {"origin": row.origin, "n": row.n, "kind": row.kind}
        cells |= {"answers": row.answers, "valid": row.valid}
        cells["mean_rating"] = row.mean
        cells |= columns("cross_seed_r", pearson.mean)
        cells |= {"cross_seed_r_sd": pearson.sd.value, "cross_seed_pairs": pearson.pairs_defined}
        cells |= columns("cross_seed_rho", row.cross_seed.spearman.mean)
        cells |= columns("informative_r", informative.r.mean) | {"informative_r_sd": informative.r.sd.value}
        cells |= columns("d", informative.d)
        cells |= columns("icc1", row.icc.single) | columns("icc1k", row.icc.mean)
        cells |= {"modal_rating": row.modal.rating} | columns("modal_share", row.modal.share)
        exact = row.exact
        estimates = {
            "exact_mean": exact and exact.moments.mean,
            "exact_sd": exact and exact.moments.sd,
            "sampling_variance": exact and exact.moments.noise,
            "between_thoughts": exact and exact.moments.between,
            "valid_mass": exact and exact.moments.valid_mass,
            "predicted_r": exact and exact.predicted_r,
            "seeds_needed": exact and exact.seeds_needed,
        }
        for name, estimate in estimates.items():
            cells |= columns(name, estimate or Estimate.missing(NOT_ASKED, row.n))
        table.append(cells)
    return numeric(pd.DataFrame(table), words=("origin", "kind"))


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
                **columns("mean_refused", row.mean_refused),
                **columns("mean_not_refused", row.mean_not_refused),
                **columns("r", row.r),
            }
            for origin, row in rows.items()
        ]
    )
    return numeric(table)


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


def distribution_table(measured: Measured, groups: Sequence[Group]) -> pd.DataFrame:
    """One row an origin and option, in order of value: its share of valid sampled ratings, and its exact share.

    The exact share is the mean over tasks of the option's renormalised probability: what sampling for ever would give
    if every task had the same number of valid answers.
    """
    rows = []
    order = np.argsort(measured.values)
    for group in groups:
        sampled = distribution(measured.sampled[group.tasks], measured.values, group.draws)
        exact = _exact_shares(measured, group)
        for at in order:
            row: dict[str, object] = {"origin": group.origin, "n": len(group.tasks)}
            row |= {"option": measured.says[at], "value": measured.values[at]}
            row |= columns("sampled_share", sampled[at]) | columns("exact_share", exact[at])
            rows.append(row)
    return numeric(pd.DataFrame(rows), words=("origin", "option"))


def _exact_shares(measured: Measured, group: Group) -> list[Estimate]:
    if measured.mass is None:
        return [Estimate.missing(NOT_ASKED, len(group.tasks))] * len(measured.values)
    mass = measured.mass[group.tasks]
    # On a scale where one option is worth 1 and the others 0, the mean is that option's probability.
    return [exact_moments(exact_summary(mass, scale), group.draws).mean for scale in np.eye(mass.shape[1])]


def by_origin(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of a table that are of one origin each."""
    return table.loc[table["origin"] != ALL, :]


def numeric(table: pd.DataFrame, words: Sequence[str] = ("origin",)) -> pd.DataFrame:
    """Missing statistics as NaN, so that a column of numbers is one even when all of it is missing.

    Columns of `words`, and reasons, stay as they are.
    """
    kept = [name for name in table.columns if name in words or name.endswith("_reason")]
    return table.assign(**{name: pd.to_numeric(table[name]) for name in table.columns.drop(kept)})


def columns(name: str, estimate: Estimate) -> dict[str, object]:
    """An estimate as four columns: value, interval, and the reason where there is no value."""
    return {
        name: estimate.value,
        f"{name}_low": estimate.low,
        f"{name}_high": estimate.high,
        f"{name}_reason": estimate.reason,
    }
