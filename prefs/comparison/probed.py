"""Probes read back from run folders: what they scored, what they predicted, and where they point."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from prefs.comparison.cells import Cell, Sweep, flat, read_table, telling
from prefs.errors import UserError

if TYPE_CHECKING:
    from prefs.probes.card import SavedProbe

FOLDER, FILE = "probe", "probe_chosen.parquet"
# What makes other probes of the same ratings.
SETTINGS = ("probe", "capture")
FIRST = ("probe.name", "probe.kind", "probe.targets", "probe.positions")


@dataclass(frozen=True, eq=False)
class Probed:
    """The probes of one cell.

    Attributes
    ----------
    name
        The cell's name; where jobs differ in nothing but their probes, with what tells these apart.
    chosen, controls, predictions
        The tables of the job: one row a target; a target and control; a target and task.
    saved
        The probes of those targets that have a sound file.
    """

    name: str
    cell: Cell
    chosen: pd.DataFrame
    controls: pd.DataFrame
    predictions: pd.DataFrame
    saved: tuple[SavedProbe, ...]

    @property
    def kind(self) -> str:
        return str(self.cell.job.config["probe"]["kind"])

    @property
    def main(self) -> str:
        """The target that stands for the cell: exact ratings, else means over seeds, else the first."""
        targets = list(dict.fromkeys(self.predictions["target"]))
        means = [name for name in targets if name.startswith("mean of ")]
        return "exact" if "exact" in targets else [*means, *targets][0]

    def label(self, target: str) -> str:
        return f"{self.name}: {target}"


def read_probes(found: Sweep) -> tuple[tuple[Probed, ...], tuple[str, ...]]:
    """The probes of a sweep's cells, and a line for each that is left out because its files are damaged.

    A cell that was measured twice counts once, but with all its probes where their settings differ.
    """
    probed: list[Probed] = []
    remarks: list[str] = []
    seen: set[tuple[str, str]] = set()
    # The later job first: of two with the same settings it is the one that counts.
    for cell in [*found.cells, *reversed(found.doubles)]:
        settings = (cell.name, json.dumps({name: cell.job.config.get(name) for name in SETTINGS}, sort_keys=True))
        if settings in seen or not (cell.job.folder / cell.key / FILE).exists():
            continue
        seen.add(settings)
        try:
            each, damaged = _read(cell)
        except UserError as error:
            remarks.append(f"{cell.name}: its probes are left out ({error}).")
            continue
        probed.append(each)
        remarks += damaged
    order = {cell.name: at for at, cell in enumerate(found.cells)}
    return tuple(sorted(_told_apart(probed), key=lambda each: order[each.cell.name])), tuple(remarks)


def _read(cell: Cell) -> tuple[Probed, list[str]]:
    folder = cell.job.folder / cell.key
    numbers = ("n", "score", "score_low", "score_high", "p", "ceiling", "layer")
    read = Probed(
        name=cell.name,
        cell=cell,
        chosen=read_table(folder / FILE, "target", "score_reason", "position", "penalty", "auc", *numbers),
        controls=read_table(folder / "probe_controls.parquet", "target", "control", "score"),
        predictions=read_table(folder / "probe_predictions.parquet", "target", "task", "predicted"),
        saved=(),
    )
    if read.chosen.empty or read.predictions.empty:
        raise UserError(f"{folder / FILE} or its predictions have no rows; run its job again")
    saved, remarks = [], []
    for each in sorted((folder / FOLDER).glob("*/")):
        try:
            saved.append(_sound(each))
        except UserError as error:
            remarks.append(f"{cell.name}: a probe is left out ({error}).")
    order = {target: at for at, target in enumerate(read.chosen["target"])}
    saved.sort(key=lambda each: order.get(each.probe.target, len(order)))
    return replace(read, saved=tuple(saved)), remarks


def _sound(folder: Path) -> SavedProbe:
    from prefs.probes.card import load_probe  # loads torch, which a comparison without probes does without

    saved = load_probe(folder)
    if not isinstance(saved.card.get("model"), dict):
        raise UserError(f"{folder}: the card does not say of which model the probe is; train the probe again")
    shape = None if saved.directions is None else tuple(saved.directions.shape)
    if shape not in (None, (len(saved.sites), saved.probe.d_model)):
        raise UserError(f"{folder}: directions {list(shape or ())} do not fit its card; train the probe again")
    return saved


def _told_apart(probed: Sequence[Probed]) -> list[Probed]:
    """Probes with names of their own, where the same ratings have several."""
    count = Counter(each.name for each in probed)
    several = [each for each in probed if count[each.name] > 1]
    facts = [flat({name: each.cell.job.config.get(name) for name in SETTINGS}) for each in several]
    extras = telling([(each.name,) for each in several], facts, FIRST)
    named = [
        replace(each, name=" ".join([each.name, *(f"{key}={value}" for key, value in extra.items())]))
        for each, extra in zip(several, extras, strict=True)
    ]
    return [*(each for each in probed if count[each.name] == 1), *named]
