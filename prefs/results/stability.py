"""How stable and how informative the ratings of a cell are, by origin: sampled ones, and what exact ones predict."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from prefs.results import figures
from prefs.results.result import Figure, Result, Row, Table, View
from prefs.results.tables import all_last, by_origin, columns, is_all, metrics_by_origin, numeric
from prefs.results.terminal import MISSING, number
from prefs.stages.records import Answer, Ratings
from prefs.statistics.estimates import Estimate
from prefs.statistics.exact import (
    ONE_THOUGHT,
    ExactMoments,
    exact_moments,
    predicted_r,
    seeds_needed,
)
from prefs.statistics.groups import Group
from prefs.statistics.measured import DIRECT, Measured
from prefs.statistics.sampled import CrossSeed, Intraclass, Modal, cross_seed, intraclass, modal

if TYPE_CHECKING:
    from prefs.stages.context import CellContext

NOT_ASKED = "rating.exact=false"
# With fewer sampled answers, nothing is said of their share.
FEW_ANSWERS = 20
COLUMN_OF_MOMENT = {"mean": "exact_mean", "sd": "exact_sd", "noise": "sampling_variance", "between": "between_thoughts"}


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
    exact: ExactMoments | None
    predicted_r: Estimate
    seeds_needed: Estimate


def cell_stability(cell: CellContext) -> Result:
    measured, target_r = cell.measured, cell.config.stats.target_r
    rows = stability(measured, cell.groups, target_r)
    table = stability_table(rows)
    views = [_sampled_view(table, len(rows[0].cross_seed.pearson.pairs))] if cell.ratings.seeds else []
    if measured.exact is not None:
        views.append(_exact_view(table, measured.kind, target_r))
    bars = by_origin(table)
    bars = bars.assign(group=[f"{origin}\nn = {n}" for origin, n in zip(bars["origin"], bars["n"], strict=True)])
    title = f"Stability over {len(cell.ratings.seeds)} rating seeds: {cell.title}"
    return Result(
        title="Stability",
        tables=(Table("stability", table),),
        views=tuple(views),
        figures=(
            Figure("cross_seed_r", partial(figures.stability_bars, title=title, table=bars), "Stability by origin"),
        ),
        remarks=tuple(_remarks(cell.ratings, rows[0], target_r)),
        metrics=metrics_by_origin("stability", table),
    )


def stability(measured: Measured, groups: Sequence[Group], target_r: float) -> list[Stability]:
    """Stability of each group's ratings; `target_r` is what the number of seeds needed is for."""
    return [_stability(measured.only(group.tasks), group, target_r) for group in groups]


def _stability(measured: Measured, group: Group, target_r: float) -> Stability:
    x, n, exact = measured.sampled, len(group.tasks), measured.exact
    predicted = needed = Estimate.missing(NOT_ASKED, n)
    if exact is not None and np.isfinite(exact.mean).any() and not np.isfinite(exact.variance).any():
        predicted = needed = Estimate.missing(ONE_THOUGHT, int(np.isfinite(exact.mean).sum()))
    elif exact is not None:
        m, w, own = exact.mean, exact.variance, exact.uncertainty
        predicted = predicted_r(m, w, draws=group.draws, uncertainty=own)
        needed = seeds_needed(m, w, target_r, group.draws, own)
    return Stability(
        origin=group.origin,
        n=n,
        kind=measured.kind,
        answers=x.size,
        valid=int(np.isfinite(x).sum()),
        mean=float(np.nanmean(x)) if np.isfinite(x).any() else None,
        cross_seed=cross_seed(x, group.draws),
        icc=intraclass(x, group.draws),
        modal=modal(x, group.draws),
        exact=None if exact is None else exact_moments(exact, group.draws),
        predicted_r=predicted,
        seeds_needed=needed,
    )


def stability_table(rows: Sequence[Stability]) -> pd.DataFrame:
    """One row an origin; a missing statistic is empty, with its reason in the column beside it."""
    table = []
    for row in rows:
        pearson, informative, exact = row.cross_seed.pearson, row.cross_seed.informative, row.exact
        cells: dict[str, object] = {"origin": row.origin, "n": row.n, "kind": row.kind}
        cells |= {"answers": row.answers, "valid": row.valid, "mean_rating": row.mean}
        cells |= columns("cross_seed_r", pearson.mean)
        cells |= {"cross_seed_r_sd": pearson.sd.value, "cross_seed_pairs": pearson.pairs_defined}
        cells |= columns("cross_seed_rho", row.cross_seed.spearman.mean)
        cells |= columns("informative_r", informative.r.mean) | {"informative_r_sd": informative.r.sd.value}
        cells |= columns("d", informative.d) | columns("icc1", row.icc.single) | columns("icc1k", row.icc.mean)
        cells |= {"modal_rating": row.modal.rating} | columns("modal_share", row.modal.share)
        for name in ("mean", "sd", "noise", "between", "valid_mass"):
            estimate = Estimate.missing(NOT_ASKED, row.n) if exact is None else getattr(exact, name)
            cells |= columns(COLUMN_OF_MOMENT.get(name, name), estimate)
        cells |= columns("predicted_r", row.predicted_r) | columns("seeds_needed", row.seeds_needed)
        table.append(cells)
    return numeric(pd.DataFrame(table), words=("origin", "kind"))


def r_and_sd(row: Mapping[Any, Any]) -> str:
    """Cross-seed r as views have it, with its SD over pairs of seeds."""
    r = number(row["cross_seed_r"])
    return r if r == MISSING else f"{r} ± {number(row['cross_seed_r_sd'])}"


def mode(row: Mapping[Any, Any]) -> str:
    """The modal rating as views have it, with its share."""
    return MISSING if pd.isna(row["modal_rating"]) else f"{row['modal_rating']:g} ({number(row['modal_share'])})"


def _sampled_view(table: pd.DataFrame, pairs: int) -> View:
    return View.of(
        f"Sampled ratings: cross-seed r is mean ± SD over {pairs} pairs of rating seeds",
        all_last(table),
        {
            "origin": lambda row: row["origin"],
            "n": lambda row: str(row["n"]),
            "valid": lambda row: f"{row['valid']}/{row['answers']}",
            "cross-seed r": r_and_sd,
            "informative r": lambda row: number(row["informative_r"]),
            "d": lambda row: number(row["d"]),
            "mode (share)": mode,
        },
        bold=is_all,
    )


def _exact_view(table: pd.DataFrame, kind: str, target_r: float) -> View:
    """How much of the model's answer is a rating, and what sampling would do to it.

    Of a rater that thinks also the share of a sampled rating's variance that is between its thoughts.
    """

    def by_thought(row: Row) -> str:
        part, whole = row["between_thoughts"], row["sampling_variance"]
        return MISSING if pd.isna(part) or not whole else f"{part / whole:.0%}"

    def seeds(row: Row) -> str:
        return MISSING if pd.isna(row["seeds_needed"]) else f"{row['seeds_needed']:,.0f}"

    thinks = kind != DIRECT
    return View.of(
        f"Exact ratings{f', {kind}' * thinks}: predicted r is of two seeds sampled at temperature 1",
        all_last(table),
        {
            "origin": lambda row: row["origin"],
            "n": lambda row: str(row["n"]),
            "valid mass": lambda row: number(row["valid_mass"]),
            "mean ± SD": lambda row: f"{number(row['exact_mean'])} ± {number(row['exact_sd'])}",
            **({"by thought": by_thought} if thinks else {}),
            "predicted r": lambda row: number(row["predicted_r"]),
            f"seeds for r = {number(target_r)}": seeds,
        },
        bold=is_all,
    )


def _remarks(ratings: Ratings, whole: Stability, target_r: float) -> list[str]:
    remarks = []
    exact, r, modal = whole.exact, whole.cross_seed.pearson.mean, whole.modal
    valid_mass, sd = (exact.valid_mass.value, exact.sd.value) if exact else (None, None)
    seeds = whole.seeds_needed.value
    if valid_mass is not None and valid_mass < 0.5:
        remarks.append(
            f"Only {valid_mass:.0%} of the model's probability is on the options: it mostly answers with"
            " something else, and only that part is measured. Try a prefill (template.NAME.prefill or model.prefill)."
        )
    remarks += share_remarks(ratings.answers, valid_mass)
    if r.value is None and ratings.seeds:
        remarks.append(f"Cross-seed r is undefined: {r.reason}.")
    elif r.value is not None and r.value < 0.3:
        remarks.append(
            f"Sampled ratings are mostly noise (cross-seed r {number(r.value)}): one seed's ratings say little about"
            " another's."
        )
    if seeds is not None and seeds > 20:
        remarks.append(
            f"A mean over {seeds:,.0f} seeds would be needed for r = {number(target_r)} between two such means (at"
            f" temperature 1){'.' if ratings.thinks else '; the exact ratings have no sampling noise.'}"
        )
    remarks += _thought_remarks(ratings)
    if modal.share.value is not None and modal.share.value > 0.8 and modal.ratings >= 20:
        remarks.append(
            f"{modal.share.value:.0%} of the ratings are {modal.rating:g}: r flatters a model that nearly always says"
            " the same; see informative r and d."
        )
    values = sorted(ratings.template.values)
    step = min(b - a for a, b in itertools.pairwise(values) if b > a)
    if sd is not None and sd < 0.25 * step:
        remarks.append(
            f"Exact ratings hardly differ between tasks (SD {number(sd)} on a scale from {values[0]:g} to"
            f" {values[-1]:g})."
        )
    return remarks


def share_remarks(answers: Sequence[Sequence[Answer]], valid_mass: float | None) -> list[str]:
    """Where sampled answers are ratings more often, or less, than the valid mass lets expect (by three standard errors
    and .1)."""
    values = [answer.value for row in answers for answer in row if answer.text is not None]
    if valid_mass is None or len(values) < FEW_ANSWERS:
        return []
    share = sum(value is not None for value in values) / len(values)
    if abs(share - valid_mass) < max(0.1, 3 * math.sqrt(share * (1 - share) / len(values))):
        return []
    return [
        f"Valid mass is {number(valid_mass)}, but {number(share)} of the sampled answers give a rating: exact and"
        " sampled ratings are of different answers. The table `ratings` has them; docs/stability.md says how both read."
    ]


def _thought_remarks(ratings: Ratings) -> list[str]:
    thoughts = ratings.thoughts
    if thoughts is None:
        return []
    remarks = []
    reasons = [reason for row in thoughts.invalid for reason in row if reason is not None]
    if reasons:
        counts = ", ".join(f"{reasons.count(reason)} {reason.value}" for reason in dict.fromkeys(reasons))
        remarks.append(f"{len(reasons)} of {thoughts.mass[..., 0].size} thoughts gave no exact rating: {counts}.")
    if len(thoughts.seeds) == 1:
        remarks.append(
            "Exact ratings are after one thought each: what the same model would say after another is not known, and"
            " no r can be predicted. Draw more with rating.thoughts=4."
        )
    else:
        remarks.append(
            f"Exact ratings are mixtures over {len(thoughts.seeds)} thoughts a task and carry their noise; more"
            " thoughts (rating.thoughts) make it smaller."
        )
    return remarks
