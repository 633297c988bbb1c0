"""What choices between tasks came to: pairs, utilities, what the order decides, what ratings share with utilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.special import expit

from prefs.data.task import ALL
from prefs.probes.targets import UTILITY, TaskUtilities
from prefs.results import choice_figures as figures
from prefs.results.result import Result, Row, Table, View, figure
from prefs.results.tables import all_last, columns, is_all, metrics_by_origin, numeric
from prefs.results.terminal import MISSING, number, with_interval
from prefs.stages.choose import Chosen, choose, utility_model
from prefs.stages.probe import ProbeReport
from prefs.statistics.agreement import correlation
from prefs.statistics.choices import NO_PAIRS, consistency, triads
from prefs.statistics.estimates import Estimate, Floats, Resamples
from prefs.statistics.exact import reliability as rating_reliability
from prefs.statistics.groups import Group, groups_by_origin
from prefs.statistics.sampled import intraclass
from prefs.statistics.utilities import (
    LEAST_SPREAD,
    MOST_SPREAD,
    HeldOut,
    held_out,
    preferred,
    reliability,
    split_half,
)

if TYPE_CHECKING:
    from prefs.stages.context import CellContext, JobContext

# Below these, or above, there is something to be careful about.
LITTLE_MASS = 0.5
MOSTLY_ORDER = 0.5
RELIABLE = 0.7


@dataclass(frozen=True, eq=False)
class Revealed:
    """Choices with what they rest on: groups of tasks with their resamples, and utilities of halves of the pairs."""

    chosen: Chosen
    bootstrap: int
    seed: int

    @cached_property
    def groups(self) -> list[Group]:
        """All tasks, and those of each origin."""
        return groups_by_origin([c.task.origin for c in self.chosen.completions], self.bootstrap, self.seed)

    @cached_property
    def halves(self) -> list[tuple[Floats, Floats]]:
        utilities, config = self.chosen.utilities, self.chosen.config
        if utilities is None:
            return []
        wanted = config.utility
        return split_half(self.chosen.choices, utility_model(config), utilities.penalty, wanted.splits, wanted.seed)

    @cached_property
    def u(self) -> Floats:
        """[T], NaN where there is none."""
        utilities = self.chosen.utilities
        return np.full(len(self.chosen.completions), np.nan) if utilities is None else utilities.u

    def of_tasks(self, tasks: Sequence[str]) -> TaskUtilities:
        """Utilities of tasks by their ids, NaN where there is none, and the reliability of all."""
        known = dict(zip([c.task.id for c in self.chosen.completions], self.u.tolist(), strict=True))
        return TaskUtilities(np.array([known.get(task, np.nan) for task in tasks]), self.reliability(self.groups[0]))

    def reliability(self, group: Group) -> Estimate:
        """Of the utilities of a group of tasks: over disjoint halves of the pairs."""
        return reliability(self.halves, group.tasks, group.draws)

    @cached_property
    def held_out(self) -> HeldOut:
        choices, utilities = self.chosen.choices, self.chosen.utilities
        if utilities is None:
            return HeldOut(*[Estimate.missing(NO_PAIRS, 0)] * len(fields(HeldOut)))
        count = int(choices.held_out.sum())
        return held_out(choices, utilities, Resamples.draw(count, self.bootstrap, self.seed))


def choices(job: JobContext) -> Result:
    """Have the rater choose between the tasks, and describe it."""
    chosen = choose(job.config.choice, job.completions, job.roles.rater, job.store, job.models)
    job.counts.add([chosen.work])
    job.revealed = Revealed(chosen, job.config.stats.bootstrap, job.config.stats.seed)
    return choices_result(job.revealed, f"{job.roles.rater.name}, {chosen.config.name}")


def choices_result(revealed: Revealed, title: str) -> Result:
    """Tables, views, figures and remarks of some choices."""
    table, rounds = choices_table(revealed), rounds_table(revealed)
    utilities, pairs = utilities_table(revealed), pairs_table(revealed)
    drawn = [
        figure("utilities_by_origin", figures.utilities_by_origin, title=f"Utilities: {title}", table=utilities),
        figure("choice_position", figures.choice_position, title=f"Both orders of a pair: {title}", table=pairs),
    ]
    if len(rounds) > 1:
        drawn.append(figure("choice_rounds", figures.choice_rounds, title=f"Rounds: {title}", table=rounds))
    return Result(
        title="Choices",
        note="Utilities are in log odds, of mean 0. A preference is the mean of both orders, the position bias half of"
        " their difference.",
        tables=(
            Table("choices", table, "Choices by origin"),
            Table("utilities", utilities, "Utilities", large=True),
            Table("pairs", pairs, "Pairs", large=True),
            Table("rounds", rounds, "Rounds"),
        ),
        views=(_view(table), _scale(table)),
        figures=tuple(drawn),
        remarks=tuple(_remarks(revealed, table)),
        metrics=metrics_by_origin("choices", table),
    )


def pairs_table(revealed: Revealed) -> pd.DataFrame:
    """One row a pair: the probability that its first task is chosen where it is shown first and second, the preference
    and the position bias in log odds, and how much of each answer was a choice."""
    chosen = revealed.chosen
    choices = chosen.choices
    ids = np.array([completion.task.id for completion in chosen.completions], dtype=object)
    p = choices.p
    return pd.DataFrame(
        {
            "task_a": ids[choices.pairs[:, 0]],
            "task_b": ids[choices.pairs[:, 1]],
            "round": choices.rounds,
            "held_out": choices.held_out,
            "p_shown_first": p[:, 0],
            "p_shown_second": p[:, 1],
            "preference": choices.preference,
            "bias": choices.bias,
            "mass_shown_first": choices.valid[:, 0],
            "mass_shown_second": choices.valid[:, 1],
        }
    )


def utilities_table(revealed: Revealed) -> pd.DataFrame:
    """One row a task: its utility with its standard error, how many pairs it rests on, and how often it is chosen."""
    chosen, utilities = revealed.chosen, revealed.chosen.utilities
    fitted = chosen.choices.only(~chosen.choices.held_out)
    tasks, preference = len(chosen.completions), fitted.preference
    known = np.isfinite(preference)
    a, b = fitted.pairs[known].T
    p = expit(preference[known])
    degree = np.bincount(a, minlength=tasks) + np.bincount(b, minlength=tasks)
    won = np.bincount(a, p, tasks) + np.bincount(b, 1 - p, tasks)
    missing = np.full(tasks, np.nan)
    return pd.DataFrame(
        {
            "task": [completion.task.id for completion in chosen.completions],
            "origin": [completion.task.origin for completion in chosen.completions],
            "utility": revealed.u,
            "se": missing if utilities is None else utilities.se,
            "degree": degree,
            "chosen": np.divide(won, degree, out=missing.copy(), where=degree > 0),
            "component": np.zeros(tasks, int) if utilities is None else utilities.component,
        }
    )


def choices_table(revealed: Revealed) -> pd.DataFrame:
    """One row an origin: pairs that have a task of it, how consistent they are, and its tasks' utilities. What is of
    all pairs together stands in the row of all."""
    chosen = revealed.chosen
    rows = []
    for group in revealed.groups:
        inside = np.atleast_1d(np.isin(chosen.choices.pairs, group.tasks).any(axis=1))
        own = chosen.choices.only(inside)
        draws = Resamples.draw(len(own.pairs), revealed.bootstrap, revealed.seed)
        consistent = consistency(own, draws)
        whole = group.origin == ALL
        counted = triads(chosen.choices) if whole else None
        cyclic = None if counted is None or not counted.measured else counted.cyclic / counted.measured
        u = revealed.u[group.tasks]
        row: dict[str, object] = {"origin": group.origin, "n": len(group.tasks), "pairs": len(own.pairs)}
        row |= columns("valid_mass", consistent.valid) | columns("p_first", consistent.first)
        row |= columns("order_consistency", consistent.consistent)
        row |= columns("r_between_orders", consistent.between_orders) | columns("position_bias", consistent.bias)
        row |= {"mean_utility": _mean(u), "sd_utility": float(np.nanstd(u, ddof=1)) if _count(u) > 1 else None}
        row |= columns("reliability", revealed.reliability(group))
        for column in fields(HeldOut):
            estimate = getattr(revealed.held_out, column.name)
            row |= columns(column.name, estimate if whole else Estimate.missing("of all pairs only", 0))
        row |= {"triads": counted.measured if counted else None, "cyclic": cyclic}
        rows.append(row)
    return numeric(pd.DataFrame(rows))


def rounds_table(revealed: Revealed) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"round": round_.number, "pairs": round_.pairs, "median_se": round_.median_se}
            for round_ in revealed.chosen.rounds
        ],
        columns=["round", "pairs", "median_se"],
    )


def _count(values: Floats) -> int:
    return int(np.isfinite(values).sum())


def _mean(values: Floats) -> float | None:
    return float(np.nanmean(values)) if _count(values) else None


def _view(table: pd.DataFrame) -> View:
    return View.of(
        "Choices between tasks",
        all_last(table),
        {
            "origin": lambda row: row["origin"],
            "n": lambda row: str(row["n"]),
            "pairs": lambda row: str(row["pairs"]),
            "valid mass": lambda row: number(row["valid_mass"]),
            "P(first)": lambda row: number(row["p_first"]),
            "same in both": lambda row: number(row["order_consistency"]),
            "r of orders": lambda row: number(row["r_between_orders"]),
        },
        bold=is_all,
    )


def _scale(table: pd.DataFrame) -> View:
    def held(row: Row) -> str:
        if pd.isna(row["accuracy"]):
            return MISSING
        most = "" if pd.isna(row["most_accurate"]) else f" of {number(row['most_accurate'])}"
        return f"{number(row['accuracy'])}{most}"

    return View.of(
        "Utilities, in log odds: reliability over halves of the pairs, accuracy on held-out pairs",
        all_last(table),
        {
            "origin": lambda row: row["origin"],
            "mean": lambda row: number(row["mean_utility"]),
            "SD": lambda row: number(row["sd_utility"]),
            "reliability": lambda row: number(row["reliability"]),
            "accuracy": held,
            "residual SD": lambda row: number(row["residual"]),
            "cyclic": lambda row: MISSING if pd.isna(row["cyclic"]) else f"{row['cyclic']:.0%}",
        },
        bold=is_all,
    )


def _remarks(revealed: Revealed, table: pd.DataFrame) -> list[str]:
    """What to be careful about, with its number."""
    chosen, row = revealed.chosen, table.iloc[0]
    utilities, remarks = chosen.utilities, []
    tasks = len(chosen.completions)
    if tasks < 2:
        return [f"No choices: there {'is one task' if tasks else 'are no tasks'} to choose between."]
    unanswered = int((~np.isfinite(chosen.choices.logits)).all(axis=1).sum())
    if unanswered:
        remarks.append(f"{unanswered} of {len(chosen.choices.pairs)} pairs have no choice in either order.")
    if chosen.invalid:
        reasons = ", ".join(f"{count} {reason}" for reason, count in chosen.invalid.items())
        remarks.append(f"Answers that are no choice: {reasons}. They are a win of neither task.")
    if utilities is None:
        return [*remarks, "No utilities: no pair was chosen between."]
    if row["valid_mass"] < LITTLE_MASS:
        remarks.append(
            f"Little of the answers is a choice at all (valid mass {number(row['valid_mass'])}): the model may refuse"
            " to choose, or answer in other words."
        )
    if chosen.config.orders == "random":
        remarks.append(
            "Each pair was asked in one order only: what follows the order and what is preferred cannot be told apart."
        )
    elif row["order_consistency"] < MOSTLY_ORDER or row["order_consistency"] < abs(2 * row["p_first"] - 1):
        place = "first" if row["p_first"] > 0.5 else "second"
        share = max(row["p_first"], 1 - row["p_first"])
        remarks.append(
            f"Choices mostly follow the position: the task shown {place} is chosen with {number(share)}, and only"
            f" {row['order_consistency']:.0%} of pairs have the same winner in both orders. Utilities rest on what is"
            " left when both orders are averaged."
        )
    if utilities.components > 1:
        remarks.append(
            f"The graph of pairs is in {utilities.components} pieces: utilities of tasks of different pieces are not on"
            " one scale."
        )
        remarks += _apart(revealed)
    alone = tasks - _count(utilities.u)
    if alone:
        remarks.append(f"{alone} of {tasks} tasks have no utility: no choice for or against them.")
    if utilities.spread is not None:
        bound = (utilities.spread <= LEAST_SPREAD * 1.001) | (utilities.spread >= MOST_SPREAD * 0.999)
        if bound.any():
            remarks.append(f"The SDs of {int(bound.sum())} tasks are at their bound, and say nothing.")
    if not row["reliability"] >= RELIABLE:
        reached = MISSING if pd.isna(row["reliability"]) else number(row["reliability"])
        degree = 2 * (~chosen.choices.held_out).sum() / tasks
        remarks.append(
            f"Utilities are not reliable (halves of the pairs agree to {reached}, stepped up to all of them):"
            f" {degree:.0f} pairs a task are too few, or there is little to find. More by choice.pairs.degree."
        )
    return remarks


def _apart(revealed: Revealed) -> list[str]:
    """Origins of which no task is connected with one of another."""
    utilities = revealed.chosen.utilities
    assert utilities is not None
    pieces: dict[int, set[str]] = {}
    for completion, piece, u in zip(revealed.chosen.completions, utilities.component, utilities.u, strict=True):
        if np.isfinite(u):
            pieces.setdefault(int(piece), set()).add(completion.task.origin)
    alone = [next(iter(origins)) for origins in pieces.values() if len(origins) == 1]
    origins = [origin for origin in dict.fromkeys(alone) if sum(origin in own for own in pieces.values()) == 1]
    return [f"{origin} was never compared with another origin." for origin in origins] if len(pieces) > 1 else []


def utility_and_rating(cell: CellContext) -> Result:
    """What a cell's ratings share with the utilities of the same tasks."""
    revealed = cell.job.revealed
    assert revealed is not None
    table = utility_rating_table(revealed, cell)
    scattered = pd.DataFrame(
        {
            "origin": list(cell.measured.origins),
            "rating": cell.measured.task_means,
            "utility": revealed.of_tasks(cell.measured.tasks).values,
        }
    )
    title = f"Utility against rating: {cell.title}"
    return Result(
        title="Utilities and ratings",
        tables=(Table("utility_rating", table),),
        views=(
            View.of(
                "Utility × rating: r over tasks, and divided by what both can reach (disattenuated)",
                all_last(table),
                {
                    "origin": lambda row: row["origin"],
                    "n": lambda row: str(row["n"]),
                    "r [95 %]": lambda row: with_interval(row, "r"),
                    "disattenuated": lambda row: number(row["disattenuated"]),
                },
                bold=is_all,
            ),
        ),
        figures=(figure("utility_rating", figures.utility_against_rating, title=title, table=scattered),),
        metrics=metrics_by_origin("utility_rating", table),
    )


def utility_rating_table(revealed: Revealed, cell: CellContext) -> pd.DataFrame:
    """One row an origin: r of utilities and ratings, raw, and disattenuated by the reliability of both (Spearman
    1904)."""
    utility, rating = revealed.of_tasks(cell.measured.tasks).values, cell.measured.task_means
    exact = cell.measured.exact
    whole = {group.origin: group for group in revealed.groups}
    rows = []
    for group in cell.groups:
        r = correlation(utility[group.tasks], rating[group.tasks], group.draws)
        reliable = [revealed.reliability(whole[group.origin]).value if group.origin in whole else None]
        if exact is not None:
            reliable.append(rating_reliability(cell.measured.only(group.tasks).exact).value)  # type: ignore[arg-type]
        else:
            reliable.append(intraclass(cell.measured.sampled[group.tasks]).mean.value)
        known = [value for value in reliable if value is not None and value > 0]
        both = float(np.sqrt(np.prod(known))) if len(known) == 2 else None
        rows.append(
            {"origin": group.origin, "n": r.n}
            | columns("r", r)
            | {"disattenuated": None if r.value is None or both is None else r.value / both}
        )
    return numeric(pd.DataFrame(rows))


def pairs_by_probe(cell: CellContext) -> Result:
    """Of pairs that were held out, how often a probe on utilities names the preferred task, each of the two predicted
    by the fit that did not see it."""
    revealed, probed = cell.job.revealed, cell.probed
    assert revealed is not None
    if not isinstance(probed, ProbeReport):
        return Result()
    rows = probed.predictions.loc[probed.predictions["target"] == UTILITY, :]
    predicted = dict(zip(rows["task"], rows["predicted"], strict=True))
    u = np.array([predicted.get(c.task.id, np.nan) for c in revealed.chosen.completions], dtype=float)
    left_out = revealed.chosen.choices.only(revealed.chosen.choices.held_out)
    draws = Resamples.draw(len(left_out.pairs), revealed.bootstrap, revealed.seed)
    a, b = left_out.pairs.T
    accuracy = preferred(left_out.preference, u[a] - u[b], draws)
    frame = numeric(pd.DataFrame([{"n": accuracy.n} | columns("accuracy", accuracy)]), words=())
    by_utilities = revealed.held_out.accuracy.value
    beside = "" if by_utilities is None else f"; the utilities themselves {number(by_utilities)}"
    text = f"Probe on {UTILITY}: of {accuracy.n} held-out pairs it names the preferred task with"
    told = [f"{text} {with_interval(frame.iloc[0].to_dict(), 'accuracy')}{beside}."] if accuracy.defined else []
    return Result(
        title="Pairs by probe",
        tables=(Table("pairs_by_probe", frame),),
        remarks=tuple(told),
        metrics={"choices/pairs_by_probe": accuracy.value},
    )
