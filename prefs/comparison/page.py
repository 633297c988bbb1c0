"""What stands in the page of a comparison: its sections, examples and configs."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from prefs import sweep
from prefs.comparison.cells import Cell, Sweep
from prefs.comparison.figures import MOST_CELLS, MOST_NAMES
from prefs.comparison.tables import Block
from prefs.data.task import ALL
from prefs.results.html import Config, Example, Figure, Rated, Report, Section, Table
from prefs.results.summary import by_origin
from prefs.results.terminal import number

EXAMPLES = 40
# Columns that name a cell, beside `cell`.
NAMES = ("rater", "template", "completer", "dataset", "condition", "completion_seed")


def comparison_page(
    folders: Sequence[Path],
    found: Sweep,
    blocks: Sequence[Block],
    tables: Mapping[str, pd.DataFrame],
    figures: Mapping[str, Path],
    remarks: Sequence[str],
    now: datetime.datetime,
) -> Report:
    """Everything that was found, to be read without a server."""

    def drawn(*starts: str) -> tuple[Figure, ...]:
        return tuple(Figure(name.replace("_", " "), path) for name, path in figures.items() if name.startswith(starts))

    cells = tables["cells"]
    whole = cells.loc[cells["origin"] == ALL, :].drop(columns="origin")
    jobs = pd.DataFrame(
        {
            "job": [str(job) for job in found.jobs],
            "status": [job.status for job in found.jobs],
            "error": [job.error or "" for job in found.jobs],
            "folder": [str(job.folder) for job in found.jobs],
        }
    )
    work = pd.DataFrame([vars(each) for each in found.work()], columns=["stage", "reused", "computed", "bytes"])
    spent = pd.DataFrame([vars(each) for each in found.spent()])
    sections = (
        Section(
            "Stability",
            "Cross-seed r: Pearson over tasks between two rating seeds, mean over pairs. Informative r: the same where"
            " at least one of the two ratings is off the cell's mode; d is the share of such tasks. Predicted r and"
            " valid mass are from exact ratings. Of a rater that thinks these are after one thought, or of the mixture"
            " over several (kind). Brackets are 95 % intervals over tasks.",
            drawn("stability_by"),
            (
                Table("All cells", _present(whole)),
                Table("By template, rater and origin", tables["stability_by"], "Pooled over pairs of seeds and cells."),
                Table("Cells by origin", _present(by_origin(tables["cells"]))),
            ),
        ),
        Section(
            "Ratings",
            "How often each rating is given: bars sampled, diamonds exact.",
            drawn("ratings_"),
            (Table("Shares of each rating", _present(tables["distribution"])),),
        ),
        Section(
            "Agreement",
            "Correlation over tasks of exact means: a template that is stable but measures something else shows here.",
            drawn("agreement_"),
            (Table("Pairs", _present(tables["agreement"])),),
        ),
        Section(
            "Where the noise comes from",
            "Random-effects variance components of one sampled rating, on scales from 0 to 1. Intervals are over"
            " tasks: of a handful of templates or raters they do not say how others would differ. A negative variance"
            " counts as 0 in the shares.",
            drawn("variance"),
            (Table("Variance components", _present(tables["variance"])),),
        ),
        Section(
            "Refusals",
            "Point-biserial r between being refused and the rating (the exact mean where there is one).",
            drawn("refused_"),
            (Table("Refusal × rating", _present(tables["refusals"])),),
        ),
        *_condition_sections(tables, drawn("conditions")),
        *_steering_sections(tables, drawn("steering")),
        *_probe_sections(tables, drawn("probe_")),
        Section(
            "Jobs",
            "",
            (),
            (
                Table("Jobs", jobs),
                Table("Work", work, "Records found in the store, and records computed."),
                *([Table("Spent", spent, "US dollars where the config gives prices.")] if len(spent) else []),
            ),
        ),
    )
    commands = [sweep.command(folder) or str(folder) for folder in folders]
    return Report(
        title=found.jobs[0].group or "Comparison",
        when=now.strftime("%Y-%m-%d %H:%M"),
        command="\n".join(commands),
        remarks=tuple(remarks),
        sections=sections,
        examples=_examples(blocks),
        examples_note=f"Up to {EXAMPLES} tasks, the same number of each origin as far as there are such.",
        configs=tuple(
            Config(str(job), yaml.safe_dump(dict(job.config), sort_keys=False, allow_unicode=True))
            for job in found.jobs
        ),
    )


def _condition_sections(tables: Mapping[str, pd.DataFrame], figures: tuple[Figure, ...]) -> list[Section]:
    """One section, where cells differ in the conditions of completing and rating."""
    if "conditions" not in tables:
        return []
    means, effects = tables["conditions"], tables["condition_effects"]
    whole = means["origin"] == ALL
    shown = [
        Table(
            "Means by condition",
            _present(means.loc[whole, :].drop(columns="origin")),
            "Over the tasks that have a rating there. valid is the mean valid mass of exact ratings, or the share of"
            " sampled answers that are valid.",
        ),
        Table(
            "Main effects and interaction",
            _present(effects),
            "Differences in rating points, over the tasks that have all their ratings; of a main effect, averaged over"
            " the levels of the other factor (over). standardised is divided by the SD over tasks: the root of the mean"
            " over conditions of the variance over tasks. The interaction is a difference of differences. rating over"
            " completing compares the two outermost contrasts without their signs.",
        ),
        Table(
            "Shares of the variation within tasks",
            _present(tables["condition_shares"]),
            "Sums of squares of a task's ratings about the task's mean over conditions. What differs from task to task"
            " in how conditions move it is task × condition, which in sampled ratings holds the seeds' noise.",
        ),
    ]
    if len(set(means["origin"])) > 2:
        shown.insert(1, Table("Means by condition and origin", _present(by_origin(means))))
    note = (
        "How much does the condition that a completion was written in move its rating, and how much the condition it is"
        " rated in? The same tasks in all; cells completed under one condition share their completions. Violins are"
        " over tasks; dots are means with 95 % intervals over tasks."
    )
    return [Section("Conditions", note, figures, tuple(shown))]


def _steering_sections(tables: Mapping[str, pd.DataFrame], figures: tuple[Figure, ...]) -> list[Section]:
    """One section, where any cell has steered ratings."""
    if "steering" not in tables:
        return []
    note = (
        "Mean rating with a vector added to the residual stream, by its coefficient; doses after which the model no"
        " longer answers coherently are hollow, and in no slope."
    )
    table = Table(
        "Slopes and changes",
        _present(tables["steering"]),
        "slope is in rating points a unit of the coefficient; delta_minus and delta_plus are the changes at"
        " the coefficients -1 and 1, where these were given. null_slope is the largest slope, without its sign, of the"
        " vectors of the layer"
        " that mean nothing (random directions, shuffled labels): a vector that does no more does nothing of its own.",
    )
    return [Section("Steering", note, figures, (table,))]


def _probe_sections(tables: Mapping[str, pd.DataFrame], figures: tuple[Figure, ...]) -> list[Section]:
    """One section, where any cell has probes."""
    if "probes" not in tables:
        return []
    probes = tables["probes"]
    last = list(probes.columns).index("best_control_score") + 1
    shown = [
        Table(
            "Probes by cell and target",
            probes.iloc[:, :last].drop(columns=["rater", "template"]),
            "p is that of each row by itself: of twenty probes of nothing one is expected at .05. No score can be above"
            " the ceiling but by chance. The best control is the best of those that never look into the model.",
        ),
        Table(
            "Controls",
            pd.concat([probes[["cell", "target", "score"]], probes.iloc[:, last:]], axis=1),
            "Of the same held-out tasks. A probe has to beat what is known without looking into the model: the origin,"
            " the lengths, the words. What it scores of shuffled targets is chance; of targets less the mean of their"
            " origin, what it reads within origins.",
        ),
    ]
    if "probe_cosines" in tables:
        table = tables["probe_cosines"]
        shown.append(
            Table(
                "Cosines at the site shown",
                table.loc[table["shown"], :].drop(columns="shown"),
                "One layer and position a model: the one that most of its probes chose. Directions there are those of"
                " the probes of all tasks at that place, whether or not it is the one a probe chose. The position"
                " 'rating' of two templates is two places of text but the same space. Probes of different models have"
                " no space in common and are not compared. random_sd is 1/√d, the standard deviation of the cosine of"
                " two random directions; probes that share nothing but their activations can be further apart or"
                " closer. All layers and positions are in probe_cosines.csv.",
            )
        )
    if "probe_transfer" in tables:
        shown.append(
            Table(
                "Transfer",
                tables["probe_transfer"],
                "The probe reads the row's model on the row's text (trained_on) and is scored against the column's"
                " ratings (tested_on), on the tasks that both have, each predicted by a probe that did not train on it."
                " On the diagonal is the probe's own held-out r. ratings_r is the r of the two cells' ratings: what"
                " predicting the row's ratings without error would reach. A probe read on another cell's activations is"
                " in each job's own probe_transfer.csv.",
            )
        )
    note = (
        "Scores are of held-out tasks, by probes whose layer, position and penalty were chosen by the other folds: R²,"
        " or AUC for targets of yes and no. A cosine or a transfer is worth no more than the worse of its two probes."
        f" Of more than {MOST_CELLS} probes of a model the matrix shows one target a cell; a matrix of more than"
        f" {MOST_NAMES} is not drawn."
    )
    return [Section("Probes", note, figures, tuple(shown))]


def _present(table: pd.DataFrame) -> pd.DataFrame:
    """A table without the columns that are the same in all rows or empty, and so say nothing."""
    alike = [name for name in NAMES if name in table and len(set(table[name])) <= 1]
    return table.drop(columns=alike)


def _examples(blocks: Sequence[Block]) -> tuple[Example, ...]:
    """Tasks with their completions and every cell's ratings; evenly over origins."""
    examples = []
    for block in blocks:
        first = block.cells[0]
        per_origin = -(-EXAMPLES // max(1, len(block.groups) - 1))
        chosen = sorted(int(row) for group in block.groups[1:] for row in group.tasks[:per_origin])[:EXAMPLES]
        answers = [_by_task(cell) for cell in block.cells]
        for row in chosen:
            rated = tuple(_rated(cell, row, by_task) for cell, by_task in zip(block.cells, answers, strict=True))
            task, origin = first.measured.tasks[row], first.measured.origins[row]
            examples.append(Example(task, origin, first.prompts[row], rated))
    return tuple(examples)


def _by_task(cell: Cell) -> dict[str, list[dict]]:
    """The sampled answers of each task."""
    answers: dict[str, list[dict]] = {}
    for row in cell.answers.to_dict("records"):
        answers.setdefault(str(row["task"]), []).append(row)
    return answers


def _rated(cell: Cell, row: int, answers: Mapping[str, list[dict]]) -> Rated:
    text, refused = cell.texts["completion"].iloc[row], cell.measured.refused[row]
    exact = cell.measured.exact
    mean = ""
    if exact is not None and np.isfinite(exact.mean[row]):
        mean = f"{number(float(exact.mean[row]))} (mass {number(float(exact.valid_mass[row]))})"
    sampled = []
    for answer in answers.get(cell.measured.tasks[row], []):
        reason, said = answer["invalid"], answer["answer"]
        if isinstance(reason, str):
            sampled.append(f"{reason}: {said}" if isinstance(said, str) else reason)
        else:
            sampled.append(f"{answer['value']:g}")
    return Rated(
        cell=cell.name,
        completion=None if pd.isna(text) else str(text),
        refused=None if np.isnan(refused) else bool(refused),
        exact=mean,
        sampled=tuple(sampled),
    )
