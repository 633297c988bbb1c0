"""Steering one cell: with which vectors, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from prefs.concepts.card import SavedVectors
from prefs.concepts.difference import shuffled_vector
from prefs.concepts.extract import Concept
from prefs.config import CoherenceConfig, SteeringConfig
from prefs.errors import UserError
from prefs.probes.probe import Site
from prefs.results.summary import columns, numeric
from prefs.stages.probe import ProbeReport
from prefs.stages.records import Completion
from prefs.stages.steer import Arrow, Responses
from prefs.statistics.dose import mean_of, slope
from prefs.statistics.estimates import Estimate, Resamples
from prefs.statistics.exact import exact_summary

UNSTEERED = "unsteered"
WORDS = ("vector", "control", "reason", "coherent", "task", "origin")


def arrows(
    config: SteeringConfig,
    layers: Sequence[int],
    saved: SavedVectors,
    concept: Concept | None,
    probes: ProbeReport | None,
) -> tuple[list[Arrow], list[str]]:
    """The vector and its controls at each layer, all of the same norm; and what controls there are not, and why.

    Random directions are normal deviates; a shuffled vector is the difference of means of labels exchanged within
    half of the tasks; a probe's direction is that of the highest exact rating (or of its first target), at ``rating``
    where it was probed there.

    Raises
    ------
    UserError
        If there is no vector at a layer, or it is zero.
    """
    found: list[Arrow] = []
    without: list[str] = []
    for layer in layers:
        site = Site(layer, config.position)
        vector, activation_norm = saved.at(site)
        if not bool(vector.any()):
            raise UserError(f"the vector of {saved.concept} at {site} is zero: its two conditions do not differ there")
        vector = vector if config.unit == "vector" else vector / vector.norm() * activation_norm
        length = float(vector.norm())
        relative = length / activation_norm if activation_norm else math.nan

        def like(other: torch.Tensor, length: float = length) -> torch.Tensor:
            return other.float() / other.float().norm() * length

        found.append(Arrow(saved.concept, "concept", layer, vector.float(), relative))
        for at in range(config.controls.random):
            generator = torch.Generator().manual_seed(_seed(config.seed, layer, at))
            found.append(
                Arrow(f"random {at}", "random", layer, like(torch.randn(len(vector), generator=generator)), relative)
            )
        for at in range(config.controls.shuffled if concept is not None else 0):
            assert concept is not None
            other = shuffled_vector(concept.first, concept.second, site, _seed(config.seed, layer, at))
            if bool(other.any()):
                found.append(Arrow(f"shuffled labels {at}", "shuffled", layer, like(other), relative))
        of_probe = _probe_direction(probes, layer, config.position) if config.controls.probes else None
        if of_probe is not None:
            found.append(Arrow(of_probe[0], "probe", layer, like(of_probe[1]), relative))
        if config.controls.ablation:
            found.append(Arrow("ablation", "ablation", layer, vector.float(), relative))
    if config.controls.shuffled and concept is None:
        without.append("No control by shuffled labels: the vectors came from files, without the activations.")
    if config.controls.probes and not any(arrow.control == "probe" for arrow in found):
        without.append("No control by a probe's direction: no probe of this job has one at a steered layer.")
    return found, without


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(list(parts)).generate_state(1)[0])


def _probe_direction(report: ProbeReport | None, layer: int, position: str) -> tuple[str, torch.Tensor] | None:
    if report is None:
        return None
    results = sorted(report.results, key=lambda result: result.target.key != "exact")
    for result in results:
        for site in (Site(layer, "rating"), Site(layer, position)):
            if result.final_directions is not None and site in report.features.sites:
                direction = result.final_directions[report.features.sites.index(site)]
                if bool(direction.any()):
                    return f"probe on {result.target.name}, {site.position}", direction
    return None


@dataclass(frozen=True, eq=False)
class DoseResponse:
    """What steering did to one cell's ratings.

    Attributes
    ----------
    at
        Which tokens were steered.
    doses
        One row a vector, layer and coefficient: mean exact rating with its interval, its difference to the unsteered
        (paired over tasks), and whether the model was still coherent, with the reason if not.
    slopes
        One row a vector and layer: rating points a unit of the coefficient, over the coherent doses.
    ratings
        One row a vector, layer, coefficient and task.
    remarks
        What to be careful about.
    """

    at: str
    doses: pd.DataFrame
    slopes: pd.DataFrame
    ratings: pd.DataFrame
    remarks: Sequence[str]

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables by file name."""
        return {"steering_doses": self.doses, "steering_slopes": self.slopes, "steering_ratings": self.ratings}

    def curves(self) -> pd.DataFrame:
        """Doses as `prefs.results.figures.dose_response` draws them: a panel a layer and a line a vector, all
        through the unsteered model. An ablation is no curve."""
        before = self.doses.loc[self.doses["control"] == UNSTEERED, :]
        parts = []
        for layer in dict.fromkeys(int(each) for each in self.doses["layer"].dropna()):
            rows = self.doses.loc[(self.doses["layer"] == layer) & (self.doses["control"] != "ablation"), :]
            for vector in dict.fromkeys(rows["vector"]):
                line = pd.concat([before, rows.loc[rows["vector"] == vector, :]], ignore_index=True)
                parts.append(line.assign(panel=f"layer {layer}", line=vector))
        return pd.concat(parts, ignore_index=True)


def dose_response(
    completions: Sequence[Completion],
    responses: Responses,
    values: Sequence[float],
    found: Sequence[Arrow],
    *,
    at: str,
    coherence: CoherenceConfig,
    bootstrap: int,
    seed: int,
    without: Sequence[str] = (),
) -> DoseResponse:
    """Doses, slopes and remarks of what a steered rater answered."""
    tasks = np.flatnonzero(responses.asked)
    draws = Resamples.draw(len(tasks), bootstrap, seed)
    ratings = np.stack([exact_summary(mass[tasks], values).mean for mass in responses.mass])
    states = [_State.of(responses, dose, tasks, coherence, draws) for dose in range(len(responses.doses))]
    doses = pd.DataFrame(
        [
            {**_named(responses, dose), **_dose(ratings, dose, draws), **states[dose].cells}
            for dose in range(len(responses.doses))
        ]
    )
    doses = numeric(doses, words=WORDS)
    slopes = numeric(pd.DataFrame([_slope(arrow, responses, ratings, states, draws) for arrow in found]), words=WORDS)
    remarks = [*_remarks(doses, slopes, len(completions) - len(tasks), at), *without]
    return DoseResponse(at, doses, slopes, _per_task(completions, responses, ratings, tasks), remarks)


def _per_task(
    completions: Sequence[Completion], responses: Responses, ratings: np.ndarray, tasks: np.ndarray
) -> pd.DataFrame:
    """One row a dose and task."""
    named = pd.DataFrame([_named(responses, dose) for dose in range(len(responses.doses))])
    table = named.loc[named.index.repeat(len(tasks))].reset_index(drop=True)
    of_tasks = [completions[row].task for row in tasks.tolist()]
    table["task"] = [task.id for task in of_tasks] * len(named)
    table["origin"] = [task.origin for task in of_tasks] * len(named)
    table["mean"] = ratings.ravel()
    table["valid_mass"] = responses.mass[:, tasks].sum(axis=-1).ravel()
    table["nll"] = responses.nll[:, tasks].ravel()
    return numeric(table, words=WORDS)


def _named(responses: Responses, dose: int) -> dict[str, object]:
    each = responses.doses[dose]
    if each.arrow is None:
        return {"vector": UNSTEERED, "control": UNSTEERED, "layer": None, "coefficient": 0.0, "norm_multiple": 0.0}
    arrow = each.arrow
    multiple = None if arrow.control == "ablation" else each.coefficient * arrow.relative
    named: dict[str, object] = {"vector": arrow.name, "control": arrow.control, "layer": arrow.layer}
    return named | {"coefficient": each.coefficient, "norm_multiple": multiple}


def _dose(ratings: np.ndarray, dose: int, draws: Resamples) -> dict[str, object]:
    mean, delta = mean_of(ratings[dose], draws), mean_of(ratings[dose] - ratings[0], draws)
    return {"n": mean.n} | columns("mean", mean) | columns("delta", delta)


@dataclass(frozen=True)
class _State:
    """What a dose left of the model: numbers for the table, and whether it still counts."""

    cells: dict[str, object]

    @property
    def coherent(self) -> bool:
        return bool(self.cells["coherent"])

    @classmethod
    def of(
        cls, responses: Responses, dose: int, tasks: np.ndarray, allowed: CoherenceConfig, draws: Resamples
    ) -> _State:
        valid = responses.mass[:, tasks].sum(axis=-1)
        mass, mass_before = _mean(valid[dose]), _mean(valid[0])
        ratio = math.exp(min(_mean(responses.nll[dose, tasks] - responses.nll[0, tasks]), 700.0))
        shares = np.isnan(responses.sampled[:, tasks]).mean(axis=-1) if responses.sampled.size else None
        more = (
            Estimate.missing("nothing was sampled", 0) if shares is None else mean_of(shares[dose] - shares[0], draws)
        )
        invalid = math.nan if shares is None else float(shares[dose].mean())
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
        cells: dict[str, object] = {"valid_mass": mass, "perplexity_ratio": ratio, "invalid": invalid}
        return cls(cells | {"coherent": not reasons, "reason": "; ".join(reasons) or None})


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan


def _slope(
    arrow: Arrow, responses: Responses, ratings: np.ndarray, states: Sequence[_State], draws: Resamples
) -> dict[str, object]:
    mine = {each.coefficient: at for at, each in enumerate(responses.doses) if each.arrow is arrow}
    named: dict[str, object] = {"vector": arrow.name, "control": arrow.control, "layer": arrow.layer}
    if arrow.control == "ablation":
        # No curve: the direction is there or not.
        at = mine[1.0]
        delta = mean_of(ratings[at] - ratings[0], draws)
        none = Estimate.missing("an ablation has no coefficient", delta.n)
        plus = delta if states[at].coherent else Estimate.missing(str(states[at].cells["reason"]), delta.n)
        found = {"n": delta.n, "doses": 1} | columns("slope", none)
        return named | {"relative": None} | found | columns("delta_minus", none) | columns("delta_plus", plus)
    mine[0.0] = 0
    kept = {x: at for x, at in sorted(mine.items()) if states[at].coherent}
    estimate = slope(ratings[list(kept.values())].T, np.array(list(kept)), draws)
    row = named | {"relative": arrow.relative, "n": estimate.n, "doses": len(kept)} | columns("slope", estimate)
    for name, coefficient in (("delta_minus", -1.0), ("delta_plus", 1.0)):
        if coefficient in kept:
            delta = mean_of(ratings[kept[coefficient]] - ratings[0], draws)
        else:
            why = "not coherent" if coefficient in mine else "was not given (steering.coefficients)"
            delta = Estimate.missing(f"coefficient {coefficient:g} {why}", len(ratings[0]))
        row |= columns(name, delta)
    return row


def _remarks(doses: pd.DataFrame, slopes: pd.DataFrame, left_out: int, at: str) -> list[str]:
    said = []
    if left_out:
        said.append(
            f"Steering: tasks without a completion, or that the question does not fit behind: {left_out} left out."
        )
    broken = doses.loc[~doses["coherent"].astype(bool), :]
    for _, rows in broken.groupby(["vector", "layer"], sort=False):
        vector, layer = rows["vector"].iloc[0], int(rows["layer"].iloc[0])
        if rows["control"].iloc[0] == "ablation":
            said.append(
                f"Projecting the vector out at layer {layer} leaves no coherent model ({rows['reason'].iloc[0]})."
            )
            continue
        numbers = ", ".join(f"{value:g}".replace("-", "−") for value in rows["coefficient"])
        worst = rows["reason"].iloc[int(np.argmax(np.abs(rows["coefficient"].to_numpy(dtype=float))))]
        said.append(
            f"Steering by {vector} at layer {layer}: coefficients {numbers} leave no coherent model ({worst}), and"
            " are in no slope."
        )
    if at in ("last", "question"):
        said.append(
            f"Steering at {at} begins after the completion, so its perplexity cannot change and checks nothing."
        )
    for layer in dict.fromkeys(slopes["layer"].astype(int)):
        rows = slopes.loc[slopes["layer"] == layer, :]
        own = rows.loc[rows["control"] == "concept", :].iloc[0]
        others = rows.loc[rows["control"].isin(["random", "shuffled"]), "slope"].abs().dropna()
        if pd.isna(own["slope"]) or others.empty:
            continue
        steeper = int((others >= abs(own["slope"])).sum())
        if steeper:
            said.append(
                f"Layer {layer}: {steeper} of {len(others)} random and shuffled vectors of the same norm move the"
                f" rating at least as much as {own['vector']}, so its slope says nothing about the concept."
            )
    return said
