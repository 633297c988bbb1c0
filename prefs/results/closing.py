"""The closing table in the terminal: what a researcher reads first, with what to be careful about said in words."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pandas as pd
from rich.table import Table

from prefs.data.task import ALL
from prefs.data.template import Invalid
from prefs.probes.controls import BLIND
from prefs.probes.outcome import AUC, NoProbe
from prefs.results.summary import Stability
from prefs.results.terminal import MISSING, new_table, number, spaced_layers, with_interval
from prefs.stages.probe import ProbeReport
from prefs.stages.records import Ratings
from prefs.statistics.measured import DIRECT
from prefs.statistics.refusal import MIN_GROUP

# Agreement below this is "slight" or "fair" in the words of Landis and Koch (1977).
FAIR_KAPPA = 0.4
# Why a task may have no completion, and so is not rated.
WITHOUT_COMPLETION = {
    Invalid.too_long: "too long for the completer's context",
    Invalid.thought_cut_off: "the completer's thought did not end: model.thinking.max_tokens",
    Invalid.blocked: "blocked by the completer's server",
}


def sampled_lines(rows: Sequence[Stability]) -> Table:
    """Stability of sampled ratings by origin."""
    seeds = len(rows[0].cross_seed.pearson.pairs)
    table = new_table(f"Sampled ratings: cross-seed r is mean ± SD over {seeds} pairs of rating seeds")
    for name in ("n", "valid", "cross-seed r", "informative r", "d", "mode (share)"):
        table.add_column(name, justify="right")
    for row in _all_last(rows):
        pearson, pearson_off, mode = row.cross_seed.pearson, row.cross_seed.informative, row.modal
        table.add_row(
            row.origin,
            str(row.n),
            f"{row.valid}/{row.answers}",
            MISSING if pearson.mean.value is None else f"{number(pearson.mean.value)} ± {number(pearson.sd.value)}",
            number(pearson_off.r.mean.value),
            number(pearson_off.d.value),
            MISSING if mode.rating is None else f"{mode.rating:g} ({number(mode.share.value)})",
            style=_weight(row.origin),
        )
    return table


def exact_lines(rows: Sequence[Stability]) -> Table:
    """Exact ratings by origin: how much of the model's answer is a rating, and what sampling would do to it.

    Of a rater that thinks also the share of a sampled rating's variance that is between its thoughts.
    """
    target = next(row.exact.target_r for row in rows if row.exact)
    thinks = rows[0].kind != DIRECT
    kind = f", {rows[0].kind}" if thinks else ""
    table = new_table(f"Exact ratings{kind}: predicted r is of two seeds sampled at temperature 1")
    between = ("by thought",) if thinks else ()
    for name in ("n", "valid mass", "mean ± SD", *between, "predicted r", f"seeds for r = {number(target)}"):
        table.add_column(name, justify="right")
    for row in _all_last(rows):
        if row.exact is None:
            continue
        moments, seeds = row.exact.moments, row.exact.seeds_needed.value
        table.add_row(
            row.origin,
            str(row.n),
            number(moments.valid_mass.value),
            f"{number(moments.mean.value)} ± {number(moments.sd.value)}",
            *((_share(moments.between.value, moments.noise.value),) if thinks else ()),
            number(row.exact.predicted_r.value),
            MISSING if seeds is None else f"{seeds:,.0f}",
            style=_weight(row.origin),
        )
    return table


def _share(part: float | None, whole: float | None) -> str:
    return MISSING if part is None or not whole else f"{part / whole:.0%}"


def refusal_lines(frame: pd.DataFrame, rated_by: str) -> Table:
    """Refusal × rating by origin."""
    table = new_table(f"Refusal × rating: point-biserial r with the {rated_by}")
    for name in ("n", "refused", "mean, refused", "mean, not", "r [95 %]"):
        table.add_column(name, justify="right")
    rows = frame.to_dict("records")
    for row in sorted(rows, key=lambda row: row["origin"] == ALL):
        r = f"{MISSING} {row['r_reason']}" if pd.isna(row["r"]) else with_interval(row, "r")
        means = (number(row["mean_refused"]), number(row["mean_not_refused"]))
        table.add_row(row["origin"], str(row["n"]), str(row["refused"]), *means, r, style=_weight(row["origin"]))
    return table


def probe_lines(report: ProbeReport, most: int = 6) -> Table:
    """The score on held-out tasks by target, position and layer, evenly spaced layers if there are many."""
    layers = sorted({int(layer) for layer in report.scores["layer"]})
    spaced = spaced_layers(layers, most)
    of = "" if len(spaced) == len(layers) else f" ({len(spaced)} of {len(layers)})"
    table = new_table(f"Probes: {report.metric} on held-out tasks, by layer{of}", first="target, position")
    for layer in spaced:
        table.add_column(str(layer), justify="right")
    scores = {(row["target"], row["position"], row["layer"]): row["score"] for row in report.scores.to_dict("records")}
    for target, position in dict.fromkeys((target, position) for target, position, _ in scores):
        cells = [number(scores[target, position, layer]) for layer in spaced]
        table.add_row(f"{target}, {position}", *cells)
    return table


def chosen_lines(report: ProbeReport) -> Table:
    """The figures to report: held-out predictions of the probes that each fold's training tasks chose."""
    table = new_table("Probes whose layer, position and penalty were chosen by the other folds", first="target")
    for name in ("n", f"{report.metric} [95 %]", "p", "ceiling", "position, layer"):
        table.add_column(name, justify="right")
    for row in report.chosen.to_dict("records"):
        p, ceiling = number(row["p"]), number(row["ceiling"])
        place = f"{row['position']}, {row['layer']}"
        table.add_row(row["target"], str(row["n"]), with_interval(row, "score"), p, ceiling, place)
    return table


def control_lines(report: ProbeReport) -> Table:
    """What the probes are compared with, by target."""
    table = new_table(f"Controls: {report.metric} on the same held-out tasks", first="control")
    targets = list(dict.fromkeys(report.controls["target"]))
    for target in targets:
        table.add_column(target, justify="right")
    table.add_row("probe", *(number(row["score"]) for row in report.chosen.to_dict("records")), style="bold")
    by_control = {(row["control"], row["target"]): row for row in report.controls.to_dict("records")}
    for control in dict.fromkeys(report.controls["control"]):
        rows = [by_control.get((control, target)) for target in targets]
        table.add_row(control, *("" if row is None else number(row["score"]) for row in rows))
    return table


def _weight(origin: str) -> str | None:
    return "bold" if origin == ALL else None


def remarks(
    ratings: Ratings, rows: Sequence[Stability], refusals: pd.DataFrame, report: ProbeReport | NoProbe | None
) -> list[str]:
    """What to be careful about, in plain words."""
    said = []
    whole = rows[0]
    for reason, what in WITHOUT_COMPLETION.items():
        tasks = [each.task.id for each in ratings.completions if each.invalid is reason]
        if tasks:
            said.append(f"{len(tasks)} task{'s' * (len(tasks) > 1)} without a completion ({what}): {_some(tasks)}.")
    no_room = [
        each.task.id
        for each, answers in zip(ratings.completions, ratings.answers, strict=True)
        if each.invalid is None and any(answer.invalid is Invalid.too_long for answer in answers)
    ]
    if no_room:
        said.append(
            f"The question does not fit into the rater's context behind {len(no_room)} tasks: {_some(no_room)}."
        )
    invalid = ratings.invalid_counts()
    if invalid:
        counts = ", ".join(f"{count} {reason}" for reason, count in invalid.items())
        said.append(f"{whole.answers - whole.valid} of {whole.answers} sampled answers gave no rating: {counts}.")
    moments = whole.exact.moments if whole.exact is not None else None
    valid_mass = moments.valid_mass.value if moments is not None else None
    if valid_mass is not None and valid_mass < 0.5:
        said.append(
            f"Only {valid_mass:.0%} of the model's probability is on the options: it mostly answers with"
            " something else, and only that part is measured. Try a prefill (template.NAME.prefill or model.prefill)."
        )
    r = whole.cross_seed.pearson.mean
    if r.value is None and ratings.seeds:
        said.append(f"Cross-seed r is undefined: {r.reason}.")
    elif r.value is not None and r.value < 0.3:
        said.append(
            f"Sampled ratings are mostly noise (cross-seed r {number(r.value)}): one seed's ratings say little about"
            " another's."
        )
    seeds = whole.exact.seeds_needed.value if whole.exact is not None else None
    if whole.exact is not None and seeds is not None and seeds > 20:
        said.append(
            f"A mean over {seeds:,.0f} seeds would be needed for r = {number(whole.exact.target_r)} between two"
            " such means (at temperature 1)"
            + ("." if ratings.thinks else "; the exact ratings have no sampling noise.")
        )
    said += _thought_remarks(ratings)
    share = whole.modal.share.value
    if share is not None and share > 0.8 and whole.modal.ratings >= 20:
        said.append(
            f"{share:.0%} of the ratings are {whole.modal.rating:g}: r flatters a model that nearly always says the"
            " same; see informative r and d."
        )
    sd = moments.sd.value if moments is not None else None
    if sd is not None and sd < 0.25 * _step(ratings):
        said.append(
            f"Exact ratings hardly differ between tasks (SD {number(sd)} on a scale from"
            f" {min(ratings.template.values):g} to {max(ratings.template.values):g})."
        )
    few = int(refusals["refused"].iloc[0])
    if 0 < few < MIN_GROUP:
        said.append(f"Refusal × rating rests on {few} refused task{'s' * (few > 1)}: too few for an interval.")
    if refusals["unjudged"].to_numpy().any():
        said.append("Refusals were not judged everywhere (no judge, or no completion).")
    if isinstance(report, NoProbe):
        said.append(f"No probe: {report.reason}.")
    elif report is not None:
        said += _probe_remarks(report)
    return said


def judges_remark(table: pd.DataFrame, name: str) -> str:
    """How far a judge that is a model and the phrases agree, over all tasks."""
    row = next(row for row in table.to_dict("records") if row["origin"] == ALL)
    counts = (
        f"{row['refused_both']} refused to both, {row['refused_model_only']} to {name} only,"
        f" {row['refused_phrases_only']} to the phrases only"
    )
    if pd.isna(row["kappa"]):
        return f"Judge {name} and phrases: Cohen's κ is undefined ({row['kappa_reason']}); {counts} of {row['n']}."
    doubt = "" if row["kappa"] >= FAIR_KAPPA else " They hardly agree: read some completions before you trust either."
    return f"Judge {name} and phrases: Cohen's κ {with_interval(row, 'kappa')}; {counts} of {row['n']}.{doubt}"


def _thought_remarks(ratings: Ratings) -> list[str]:
    thoughts = ratings.thoughts
    if thoughts is None:
        return []
    said = []
    reasons = [reason for row in thoughts.invalid for reason in row if reason is not None]
    if reasons:
        counts = ", ".join(f"{reasons.count(reason)} {reason.value}" for reason in dict.fromkeys(reasons))
        said.append(f"{len(reasons)} of {thoughts.mass[..., 0].size} thoughts gave no exact rating: {counts}.")
    if len(thoughts.seeds) == 1:
        said.append(
            "Exact ratings are after one thought each: what the same model would say after another is not known, and"
            " no r can be predicted. Draw more with rating.thoughts=4."
        )
    else:
        said.append(
            f"Exact ratings are mixtures over {len(thoughts.seeds)} thoughts a task and carry their noise; more"
            " thoughts (rating.thoughts) make it smaller."
        )
    return said


def _probe_remarks(report: ProbeReport) -> list[str]:
    said = []
    nothing = 0.5 if report.metric == AUC else 0.0
    controls = {(row["target"], row["control"]): float(row["score"]) for row in report.controls.to_dict("records")}
    for row in report.chosen.to_dict("records"):
        target, best, p = row["target"], row["score"], row["p"]
        beaten = {name: controls[target, name] for name in BLIND if controls.get((target, name), -math.inf) >= best}
        if pd.isna(best):
            said.append(f"Probe on {target}: undefined ({row['score_reason']}).")
        elif best <= nothing or p > 0.05:
            shuffled = "" if pd.isna(p) else f" (p = {number(p)} against shuffled targets)"
            said.append(f"Probe on {target}: it predicts held-out tasks no better than chance does{shuffled}.")
        elif beaten:
            control = max(beaten, key=lambda name: beaten[name])
            said.append(
                f"Probe on {target}: it does not beat the control by {control} ({number(beaten[control])}), which never"
                " looks into the model."
            )
        elif best > row["ceiling"] + 0.05:
            said.append(
                f"Probe on {target}: {number(best)} is above the noise ceiling {number(row['ceiling'])}, which is an"
                " estimate too; do not believe more than the ceiling."
            )
    said += [f"No probe on {each.target.name}: {each.reason}." for each in report.nothing]
    if report.left_out:
        positions = ", ".join(each.position for each in report.subject.residuals)
        said.append(f"{report.left_out} tasks lack a vector at {positions} (empty or too long) and are not probed.")
    return [*said, *report.without]


def _all_last(rows: Sequence[Stability]) -> list[Stability]:
    return [*(row for row in rows if row.origin != ALL), *(row for row in rows if row.origin == ALL)]


def _step(ratings: Ratings) -> float:
    values = sorted(ratings.template.values)
    return min(b - a for a, b in itertools.pairwise(values) if b > a)


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
