"""Steering one cell, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np
import pandas as pd

from prefs.concepts.export import load_vectors
from prefs.config import CoherenceConfig, Config
from prefs.job import JobCounts
from prefs.models.loading import Models, ModelSpec
from prefs.models.types import Sampling
from prefs.results import figures
from prefs.results.result import Figure, Result, Table, View
from prefs.results.tables import columns, numeric
from prefs.results.terminal import MISSING, number, used, with_interval
from prefs.stages.probe import ProbeReport
from prefs.stages.records import OTHER_DTYPE, Completion, Ratings
from prefs.stages.steer import Dose, Responses, SteeringVector, Tokens, steer
from prefs.stages.steered_tokens import steered_tokens, tokens_view
from prefs.stages.steering_vectors import steering_vectors
from prefs.statistics.dose import mean_of, slope
from prefs.statistics.estimates import Estimate, Resamples
from prefs.statistics.exact import exact_summary
from prefs.store.table import Store

if TYPE_CHECKING:
    from prefs.stages.context import CellContext

UNSTEERED = "unsteered"
WORDS = ("vector", "control", "reason", "coherent", "task", "origin")


@dataclass(frozen=True, eq=False)
class DoseResponse:
    """What steering did to one cell's ratings.

    Attributes
    ----------
    tokens
        Which were steered.
    doses
        One row a vector, layer and coefficient: mean exact rating with its interval, its difference to the unsteered
        (paired over tasks), and whether the model was still coherent, with the reason if not.
    slopes
        One row a vector and layer: rating points a unit of the coefficient, over the coherent doses.
    ratings
        One row a vector, layer, coefficient and task.
    remarks
        What to be careful about.
    tokens_of_one
        One conversation token by token; see `steered_tokens`. Empty: none is shown.
    """

    tokens: str
    doses: pd.DataFrame
    slopes: pd.DataFrame
    ratings: pd.DataFrame
    remarks: Sequence[str]
    tokens_of_one: pd.DataFrame = field(default_factory=pd.DataFrame)

    def curves(self) -> pd.DataFrame:
        """Doses as `prefs.results.figures.dose_response` draws them: a panel a layer and a line a vector, all
        through the unsteered model. An ablation is no curve."""
        before = self.doses.loc[self.doses["control"] == UNSTEERED, :]
        steered = self.doses.loc[~self.doses["control"].isin([UNSTEERED, "ablation"]), :]
        curves = [
            pd.concat([before, rows], ignore_index=True).assign(panel=f"layer {int(layer)}", line=vector)
            for layer, of_layer in steered.groupby("layer", sort=False)
            for vector, rows in of_layer.groupby("vector", sort=False)
        ]
        return pd.concat(curves, ignore_index=True)


def steer_cell(cell: CellContext) -> Result:
    """The cell's ratings under steering, which the config wants."""
    unit = "vector" if cell.config.steering.unit == "vector" else "activation norm"
    with cell.job.noting_usage():
        doses = steered(cell)
    return dose_result(doses, cell.title, f"multiples of the {unit}")


def steered(cell: CellContext) -> DoseResponse | str:
    """One cell's ratings under steering; or why there are none, in words."""
    config, job, ratings = cell.config, cell.job, cell.ratings
    steering, concept = config.steering, None
    if steering.vector == "concept":
        key, concept = next(iter(job.concepts.items()))
        if isinstance(concept, str):
            return f"No steering, since there are no vectors of concept {key}."
    saved = load_vectors(steering.vector) if concept is None else concept.saved({})
    probes = cell.probed if isinstance(cell.probed, ProbeReport) else None
    vectors, without = steering_vectors(steering, job.sites.steered, saved, concept, probes)
    responses = steered_along(config, vectors, ratings, job.roles.rater, job.store, job.models, job.counts)
    if not responses.asked.any():
        return "No steering: no task has a completion that the question fits behind."
    if not responses.rated.any():
        mend = OTHER_DTYPE.format("model.dtype")
        return f"No steering: unsteered, the logits are not finite for any task ({mend})."
    example = steered_tokens(
        ratings.completions,
        job.roles.rater,
        ratings.question,
        at=steering.at,
        position=steering.position,
        system_prompt=config.rating.system_prompt,
        store=job.store,
    )
    doses = dose_response(
        ratings.completions,
        responses,
        ratings.template.values,
        vectors,
        tokens=steering.at,
        coherence=steering.coherence,
        bootstrap=config.stats.bootstrap,
        seed=config.stats.seed,
        without=without,
    )
    return replace(doses, tokens_of_one=example)


def steered_along(
    config: Config,
    vectors: Sequence[SteeringVector],
    ratings: Ratings,
    rater: ModelSpec,
    store: Store,
    models: Models,
    counts: JobCounts,
) -> Responses:
    """One cell's completions rated under every dose of these vectors."""
    steering = config.steering
    responses, work = steer(
        ratings.completions,
        rater,
        ratings.template,
        vectors,
        steering.coefficients,
        Sampling.from_config(config.rating),
        tokens=cast(Tokens, steering.at),
        seeds=steering.seeds,
        system_prompt=config.rating.system_prompt,
        store=store,
        models=models,
    )
    counts.add([work])
    return responses


def dose_response(
    completions: Sequence[Completion],
    responses: Responses,
    values: Sequence[float],
    vectors: Sequence[SteeringVector],
    *,
    tokens: str,
    coherence: CoherenceConfig,
    bootstrap: int,
    seed: int,
    without: Sequence[str] = (),
) -> DoseResponse:
    """Doses, slopes and remarks of what a steered rater answered."""
    tasks = np.flatnonzero(responses.rated)
    draws = Resamples.draw(len(tasks), bootstrap, seed)
    ratings = np.stack([exact_summary(mass[tasks], values).mean for mass in responses.mass])
    numbers = range(len(responses.doses))
    names = [_named(dose) for dose in responses.doses]
    states = [_state(responses, dose, tasks, coherence, draws) for dose in numbers]
    effects = []
    for rating in ratings:
        mean, delta = mean_of(rating, draws), mean_of(rating - ratings[0], draws)
        effects.append({"n": mean.n} | columns("mean", mean) | columns("delta", delta))
    rows = [name | effect | state for name, effect, state in zip(names, effects, states, strict=True)]
    doses = numeric(pd.DataFrame(rows), words=WORDS)
    slopes = numeric(
        pd.DataFrame([_slope(vector, responses, ratings, states, draws) for vector in vectors]), words=WORDS
    )

    per_task = pd.DataFrame(names).loc[np.repeat(numbers, len(tasks))].reset_index(drop=True)
    asked = [completions[row].task for row in tasks.tolist()]
    per_task["task"] = [task.id for task in asked] * len(numbers)
    per_task["origin"] = [task.origin for task in asked] * len(numbers)
    per_task["mean"] = ratings.ravel()
    per_task["valid_mass"] = responses.mass[:, tasks].sum(axis=-1).ravel()
    per_task["nll"] = responses.nll[:, tasks].ravel()

    remarks = [*_remarks(doses, slopes, int((~responses.asked).sum()), tokens), *without]
    if broken := int((responses.asked & ~responses.rated).sum()):
        remarks.append(
            f"Steering: {broken} tasks left out for which the unsteered model's logits are not finite"
            f" ({OTHER_DTYPE.format('model.dtype')})."
        )
    return DoseResponse(tokens, doses, slopes, numeric(per_task, words=WORDS), remarks)


def _named(dose: Dose) -> dict[str, object]:
    vector = dose.vector
    if vector is None:
        return {"vector": UNSTEERED, "control": UNSTEERED, "layer": None, "coefficient": 0.0, "norm_multiple": 0.0}
    multiple = None if vector.control == "ablation" else dose.coefficient * vector.relative
    named: dict[str, object] = {"vector": vector.name, "control": vector.control, "layer": vector.layer}
    return named | {"coefficient": dose.coefficient, "norm_multiple": multiple}


def _state(
    responses: Responses, dose: int, tasks: np.ndarray, allowed: CoherenceConfig, draws: Resamples
) -> dict[str, object]:
    """What a dose left of the model: numbers for the table, and whether it still counts."""
    valid = responses.mass[:, tasks].sum(axis=-1)
    mass, mass_before = _mean(valid[dose]), _mean(valid[0])
    ratio = math.exp(min(_mean(responses.nll[dose, tasks] - responses.nll[0, tasks]), 700.0))
    invalid, more = math.nan, Estimate.missing("nothing was sampled", 0)
    if responses.sampled.size:
        shares = np.isnan(responses.sampled[:, tasks]).mean(axis=-1)
        invalid, more = float(shares[dose].mean()), mean_of(shares[dose] - shares[0], draws)
    reasons = []
    if broken := int((~responses.finite[dose, tasks]).sum()):
        reasons.append(f"logits are not finite for {broken} of {len(tasks)} tasks")
    else:
        if mass < allowed.valid_mass * mass_before:
            reasons.append(f"valid mass {mass:.2f}, unsteered {mass_before:.2f}")
        if ratio > allowed.perplexity:
            reasons.append(f"perplexity × {ratio:.3g}")
        # Of few sampled answers a fifth is soon invalid by chance: its interval must lie above none, too.
        if more.value is not None and more.value > allowed.invalid and (more.low is None or more.low > 0):
            reasons.append(f"{more.value:.0%} more of the sampled answers invalid")
    state: dict[str, object] = {"valid_mass": mass, "perplexity_ratio": ratio, "invalid": invalid}
    return state | {"coherent": not reasons, "reason": "; ".join(reasons) or None}


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan


def _slope(
    vector: SteeringVector,
    responses: Responses,
    ratings: np.ndarray,
    states: Sequence[Mapping[str, object]],
    draws: Resamples,
) -> dict[str, object]:
    """How far a vector moves the rating a unit of its coefficient, over the doses that leave a coherent model."""
    given = {0.0: 0} | {dose.coefficient: row for row, dose in enumerate(responses.doses) if dose.vector is vector}
    kept = {coefficient: row for coefficient, row in sorted(given.items()) if states[row]["coherent"]}
    n = ratings.shape[1]
    deltas = {}
    for name, coefficient in (("delta_minus", -1.0), ("delta_plus", 1.0)):
        if coefficient in kept:
            deltas[name] = mean_of(ratings[kept[coefficient]] - ratings[0], draws)
        else:
            why = "not coherent" if coefficient in given else "was not given (steering.coefficients)"
            deltas[name] = Estimate.missing(f"coefficient {coefficient:g} {why}", n)
    relative, doses, estimate = vector.relative, len(kept), slope(ratings[list(kept.values())].T, list(kept), draws)
    if vector.control == "ablation":  # no curve: the direction is there or not
        n = int(np.isfinite(ratings[given[1.0]] - ratings[0]).sum())
        relative, doses, estimate = None, 1, Estimate.missing("an ablation has no coefficient", n)
        deltas["delta_minus"] = estimate
        if 1.0 not in kept:
            deltas["delta_plus"] = Estimate.missing(str(states[given[1.0]]["reason"]), n)
    row = {"vector": vector.name, "control": vector.control, "layer": vector.layer, "relative": relative}
    row |= {"n": estimate.n, "left_out": ratings.shape[1] - estimate.n, "doses": doses} | columns("slope", estimate)
    return row | columns("delta_minus", deltas["delta_minus"]) | columns("delta_plus", deltas["delta_plus"])


def _remarks(doses: pd.DataFrame, slopes: pd.DataFrame, left_out: int, tokens: str) -> list[str]:
    remarks = []
    if left_out:
        remarks.append(
            f"Steering: tasks without a completion, or that the question does not fit behind: {left_out} left out."
        )
    broken = doses.loc[~doses["coherent"].astype(bool), :]
    for (vector, layer), rows in broken.groupby(["vector", "layer"], sort=False):
        worst = rows["reason"].iloc[int(np.argmax(np.abs(rows["coefficient"].to_numpy(dtype=float))))]
        if rows["control"].iloc[0] == "ablation":
            remarks.append(f"Projecting the vector out at layer {int(layer)} leaves no coherent model ({worst}).")
            continue
        numbers = ", ".join(f"{value:g}".replace("-", "−") for value in rows["coefficient"])
        remarks.append(
            f"Steering by {vector} at layer {int(layer)}: coefficients {numbers} leave no coherent model ({worst}), and"
            " are in no slope."
        )
    if tokens in ("last", "question"):
        remarks.append(
            f"Steering at {tokens} begins after the completion, so its perplexity cannot change and checks nothing."
        )
    for row in slopes.loc[(slopes["control"] == "concept") & (slopes["left_out"] > 0), :].to_dict("records"):
        remarks.append(
            f"Steering by {row['vector']} at layer {row['layer']}: its slope is of {row['n']} tasks;"
            f" {row['left_out']} of {row['n'] + row['left_out']} have no rating at some of its doses and are left out."
        )
    for layer, rows in slopes.groupby("layer", sort=False):
        own = rows.loc[rows["control"] == "concept", :].iloc[0]
        others = rows.loc[rows["control"].isin(["random", "shuffled"]), "slope"].abs().dropna()
        if pd.notna(own["slope"]) and (steeper := int((others >= abs(own["slope"])).sum())):
            remarks.append(
                f"Layer {layer}: {steeper} of {len(others)} random and shuffled vectors of the same norm move the"
                f" rating at least as much as {own['vector']}, so its slope says nothing about the concept."
            )
    return remarks


def dose_result(doses: DoseResponse | str, title: str, unit: str) -> Result:
    """What steering did, for every medium; `unit` says what a coefficient counts ("multiples of the vector")."""
    if isinstance(doses, str):
        return Result(remarks=(doses,))
    tokens = "all tokens" if doses.tokens == "all" else doses.tokens
    example = doses.tokens_of_one
    draw = partial(
        figures.dose_response,
        title=f"Steering at {tokens}: {title}",
        table=doses.curves(),
        dose=f"coefficient ({unit})",
        label="mean exact rating",
    )
    return Result(
        "Steering",
        tables=(
            Table("steering_doses", doses.doses, "Steered ratings"),
            Table("steering_slopes", doses.slopes, f"Rating points a unit ({unit})"),
            Table("steering_ratings", doses.ratings, "Steered ratings of each task", large=True),
            *([Table("steering_tokens", example, "One task's tokens: steered, and read")] if len(example) else []),
        ),
        views=(
            _slope_view(doses, unit),
            _dose_view(doses.doses),
            *([tokens_view(example, doses.tokens)] if len(example) else []),
        ),
        figures=(Figure("dose_response", draw, "Steered ratings"),),
        remarks=tuple(doses.remarks),
        metrics={
            f"steering/slope/{row['vector']}/{row['layer']}": row["slope"] for row in doses.slopes.to_dict("records")
        },
    )


def _slope_view(doses: DoseResponse, unit: str) -> View:
    """How far each vector moves the rating, beside its controls."""
    view = View.of(
        f"Steering at {doses.tokens}: rating points a unit ({unit})",
        doses.slopes,
        {
            "layer, vector": lambda row: f"{int(row['layer'])}, {row['vector']}",
            "n": lambda row: used(row),
            "slope [95 %]": lambda row: with_interval(row, "slope"),
            "Δ at −1": lambda row: number(row["delta_minus"]),
            "Δ at +1": lambda row: number(row["delta_plus"]),
            "doses": lambda row: str(int(row["doses"])),
        },
        bold=lambda row: row["control"] == "concept",
    )
    return replace(view, gaps=_layer_ends(doses.slopes))


def _dose_view(doses: pd.DataFrame) -> View:
    """The concept's own curve, and what it leaves of the model, a row a layer and coefficient."""
    before = doses.loc[doses["control"] == UNSTEERED, :]
    own = doses.loc[doses["control"] == "concept", :]
    curves = [pd.concat([before.assign(layer=layer), rows]) for layer, rows in own.groupby("layer")]
    table = pd.concat(curves).sort_values(["layer", "coefficient"], kind="stable")
    view = View.of(
        "Doses of the vector, and what they leave of the model",
        table,
        {
            "layer, dose": lambda row: f"{int(row['layer'])}, {row['coefficient']:g}".replace("-", "−"),
            "× norm": lambda row: number(row["norm_multiple"]),
            "rating": lambda row: number(row["mean"]),
            "Δ [95 %]": lambda row: MISSING if row["coefficient"] == 0 else with_interval(row, "delta"),
            "mass": lambda row: number(row["valid_mass"]),
            "perpl.": lambda row: MISSING if pd.isna(row["perplexity_ratio"]) else f"× {row['perplexity_ratio']:.2g}",
            "inv.": lambda row: MISSING if pd.isna(row["invalid"]) else f"{row['invalid']:.0%}",
            "kept": lambda row: "yes" if row["coherent"] else "no",
        },
    )
    dim = frozenset(np.flatnonzero(~table["coherent"].to_numpy(dtype=bool)).tolist())
    return replace(view, dim=dim, gaps=_layer_ends(table), tight=True)


def _layer_ends(table: pd.DataFrame) -> frozenset[int]:
    """Numbers of the rows that are the last of their layer."""
    layers = table["layer"].to_numpy(dtype=float)
    return frozenset(np.flatnonzero(np.append(layers[1:] != layers[:-1], True)).tolist())
