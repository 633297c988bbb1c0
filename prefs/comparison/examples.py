"""Some tasks of a comparison, with their completions and every cell's ratings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from prefs.comparison.cells import Cell, Sweep
from prefs.results.html import Example, Rated
from prefs.results.terminal import number

EXAMPLES = 40
NOTE = f"Up to {EXAMPLES} tasks, the same number of each origin as far as there are such."


def examples(sweep: Sweep) -> tuple[Example, ...]:
    """Tasks of each block, evenly over origins."""
    made = []
    for block in sweep.blocks:
        per_origin = -(-EXAMPLES // max(1, len(block.groups) - 1))
        rows = sorted(int(row) for group in block.groups[1:] for row in group.tasks[:per_origin])[:EXAMPLES]
        answers = [
            {task: rows.to_dict("records") for task, rows in cell.answers.groupby("task")} for cell in block.cells
        ]
        first = block.cells[0]
        for row in rows:
            task, origin = first.measured.tasks[row], first.measured.origins[row]
            ratings = tuple(
                _rated(cell, row, by_task.get(task, [])) for cell, by_task in zip(block.cells, answers, strict=True)
            )
            made.append(Example(task, origin, first.prompts[row], ratings))
    return tuple(made)


def _rated(cell: Cell, row: int, answers: list[dict[Any, Any]]) -> Rated:
    text, refused, exact = cell.texts["completion"].iloc[row], cell.measured.refused[row], cell.measured.exact
    sampled = []
    for answer in answers:
        reason, words = answer["invalid"], answer["answer"]
        if isinstance(reason, str):
            sampled.append(f"{reason}: {words}" if isinstance(words, str) else reason)
        else:
            sampled.append(f"{answer['value']:g}")
    return Rated(
        cell=cell.name,
        completion=None if pd.isna(text) else str(text),
        refused=None if np.isnan(refused) else bool(refused),
        exact=""
        if exact is None or not np.isfinite(exact.mean[row])
        else f"{number(float(exact.mean[row]))} (mass {number(float(exact.valid_mass[row]))})",
        sampled=tuple(sampled),
    )
