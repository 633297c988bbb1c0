"""Probes side by side, read back from run folders: what they score, where they point, and what they tell of others."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from rich.table import Column

from prefs.comparison.cells import Cell, Sweep, flat, named, read_table, telling
from prefs.comparison.show import MOST_CELLS, counted, names_column, numbered, numbers, square
from prefs.errors import UserError
from prefs.probes.controls import BLIND
from prefs.results import figures
from prefs.results.result import Excerpt, Result, Table, View, figure
from prefs.results.tables import columns, distinct, numeric
from prefs.results.terminal import number, some, with_interval
from prefs.statistics.agreement import correlations
from prefs.statistics.estimates import Resamples

if TYPE_CHECKING:
    from prefs.probes.card import SavedProbe
    from prefs.probes.probe import Site

FILE = "probe_chosen.parquet"
# What makes other probes of the same ratings, and what of it is looked at first for telling them apart.
SETTINGS = ("probe", "capture")
FIRST = ("probe.name", "probe.kind", "probe.targets", "probe.positions")
# The ceiling on R² below which a target is called noise, how many probes one remark names, and how many names are at a
# side of a matrix at most.
NOISE, MOST_NAMED, MOST_NAMES = 0.1, 6, 24
NOTE = (
    "Scores are of held-out tasks, by probes whose layer, position and penalty were chosen by the other folds: R², or"
    " AUC for targets of yes and no. A cosine or a transfer is worth no more than the worse of its two probes. Of more"
    f" than {MOST_CELLS} probes of a model the matrix shows one target a cell; a matrix of more than {MOST_NAMES} is"
    " not drawn."
)
PROBES_NOTE = (
    "p is that of each row by itself: of twenty probes of nothing one is expected at .05. No score can be above the"
    " ceiling but by chance. The best control is the best of those that never look into the model."
)
CONTROLS_NOTE = (
    "Of the same held-out tasks. A probe has to beat what is known without looking into the model: the origin, the"
    " lengths, the words. What it scores of shuffled targets is chance; of targets less the mean of their origin, what"
    " it reads within origins."
)
COSINES_NOTE = (
    "One layer and position a model: the one that most of its probes chose. Directions there are those of the probes of"
    " all tasks at that place, whether or not it is the one a probe chose. The position 'rating' of two templates is"
    " two places of text but the same space. Probes of different models have no space in common and are not compared."
    " random_sd is 1/√d, the standard deviation of the cosine of two random directions; probes that share nothing but"
    " their activations can be further apart or closer. All layers and positions are in probe_cosines.csv."
)
TRANSFER_NOTE = (
    "The probe reads the row's model on the row's text (trained_on) and is scored against the column's ratings"
    " (tested_on), on the tasks that both have, each predicted by a probe that did not train on it. On the diagonal is"
    " the probe's own held-out r. ratings_r is the r of the two cells' ratings: what predicting the row's ratings"
    " without error would reach. A probe read on another cell's activations is in each job's own probe_transfer.csv."
)


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
    def main(self) -> str:
        """The target that stands for the cell: exact ratings, else means over seeds, else the first."""
        targets = list(dict.fromkeys(self.predictions["target"]))
        means = [name for name in targets if name.startswith("mean of ")]
        return "exact" if "exact" in targets else [*means, *targets][0]

    def label(self, target: str) -> str:
        return f"{self.name}: {target}"


def probes(sweep: Sweep) -> Result:
    """Scores, cosines and transfer of all probes; nothing but remarks where no cell has any."""
    probed, damaged = read_probes(sweep)
    if not probed:
        return Result(remarks=tuple(damaged))
    scores = probe_table(probed)
    cosines, without = probe_cosines(probed)
    transfer = probe_transfer(probed, sweep)
    last = list(scores.columns).index("best_control_score") + 1
    controls = pd.concat([scores[["cell", "target", "score"]], scores.iloc[:, last:]], axis=1)
    excerpts = (
        Excerpt("Probes by cell and target", scores.iloc[:, :last].drop(columns=["rater", "template"]), PROBES_NOTE),
        Excerpt("Controls", controls, CONTROLS_NOTE),
    )
    tables, drawn = [Table("probes", scores, excerpts=excerpts)], []
    if len(cosines):
        shown = cosines.loc[cosines["shown"], :].drop(columns="shown")
        excerpts = (Excerpt("Cosines at the site shown", shown, COSINES_NOTE),)
        tables.append(Table("probe_cosines", cosines, excerpts=excerpts))
        # A figure each: names are long, and side by side too small to be read.
        panels = cosine_matrices(cosines, probed, all_targets=MOST_CELLS, most=MOST_NAMES)
        for count, (title, matrix) in enumerate(panels.items()):
            drawn.append(
                figure(
                    numbered("probe_cosines", count),
                    figures.matrices,
                    title="Cosine similarity of probes",
                    panels={title: matrix},
                    label="cosine of the directions",
                )
            )
    if len(transfer):
        tables.append(Table("probe_transfer", transfer, "Transfer", TRANSFER_NOTE))
        if max(len(distinct(transfer, side)) for side in ("trained_on", "tested_on")) <= MOST_NAMES:
            title = "Probe transfer\nthe probe reads the row's model;\nscored against the column's ratings"
            pairs = transfer.drop_duplicates(["trained_on", "tested_on"])
            drawn.append(figure("probe_transfer", figures.transfer, title=title, table=pairs))
    remarks = (*probe_remarks(scores), *damaged, *without)
    metrics = {f"compare/probe/{row['cell']}/{row['target']}": row["score"] for row in scores.to_dict("records")}
    return Result("Probes", NOTE, tuple(tables), (_view(scores),), tuple(drawn), remarks, metrics)


def probed_cells(sweep: Sweep) -> list[tuple[str, Cell]]:
    """The cells that have probes, each with a name for them."""
    return sweep.variants(SETTINGS, FIRST, lambda cell: (cell.folder / FILE).exists())


def read_probes(sweep: Sweep) -> tuple[list[Probed], list[str]]:
    """The probes of a sweep's cells, and a sentence for each that is left out because its files are damaged."""
    probed: list[Probed] = []
    remarks: list[str] = []
    numbers = ("n", "score", "score_low", "score_high", "p", "ceiling", "layer")
    for name, cell in probed_cells(sweep):
        folder = cell.folder
        try:
            chosen = read_table(folder / FILE, "target", "score_reason", "position", "penalty", "auc", *numbers)
            controls = read_table(folder / "probe_controls.parquet", "target", "control", "score")
            predictions = read_table(folder / "probe_predictions.parquet", "target", "task", "predicted")
            if chosen.empty or predictions.empty:
                raise UserError(f"{folder / FILE} or its predictions have no rows; run its job again")
        except UserError as error:
            remarks.append(f"{cell.name}: its probes are left out ({error}).")
            continue
        saved = []
        for path in sorted((folder / "probe").glob("*/")):
            try:
                saved.append(_load(path))
            except UserError as error:
                remarks.append(f"{cell.name}: a probe is left out ({error}).")
        order = list(chosen["target"])
        saved.sort(key=lambda one: order.index(one.probe.target) if one.probe.target in order else len(order))
        probed.append(Probed(name, cell, chosen, controls, predictions, tuple(saved)))
    return probed, remarks


def _load(folder: Path) -> SavedProbe:
    from prefs.probes.card import load_probe  # loads torch, which a comparison without probes does without

    saved = load_probe(folder)
    if not isinstance(saved.card.get("model"), dict):
        raise UserError(f"{folder}: the card does not say of which model the probe is; train the probe again")
    shape = None if saved.directions is None else tuple(saved.directions.shape)
    if shape not in (None, (len(saved.sites), saved.probe.d_model)):
        raise UserError(f"{folder}: directions {list(shape or ())} do not fit its card; train the probe again")
    return saved


def probe_table(probed: Sequence[Probed]) -> pd.DataFrame:
    """One row a cell and target: the score of held-out predictions, beside what it has to be compared with.

    ``score`` is R², or AUC of a target of yes and no (``metric``), of probes whose layer, position and penalty the
    other folds chose; ``position`` and ``layer`` are those of the probe of all tasks. ``best_control`` is the best of
    those that never look into the model; each control has a column of its own name.
    """
    shown = ("n", "score", "score_low", "score_high", "score_reason", "p", "ceiling", "position", "layer", "penalty")
    rows: list[dict[str, object]] = []
    for one in probed:
        for row in one.chosen.to_dict("records"):
            own = one.controls.loc[one.controls["target"] == row["target"], :]
            controls = {str(name): float(score) for name, score in zip(own["control"], own["score"], strict=True)}
            blind = {name: controls[name] for name in BLIND if not np.isnan(controls.get(name, np.nan))}
            best = max(blind, key=lambda name: blind[name]) if blind else None
            rows.append(
                {
                    "cell": one.name,
                    "rater": one.cell.rater,
                    "template": one.cell.key,
                    "target": row["target"],
                    "probe": str(one.cell.job.config["probe"]["kind"]),
                    "metric": "R²" if pd.isna(row["auc"]) else "AUC",
                    **{name: row[name] for name in shown},
                    "best_control": best,
                    "best_control_score": None if best is None else blind[best],
                    **controls,
                }
            )
    words = ("cell", "rater", "template", "target", "probe", "metric", "position", "best_control")
    return numeric(pd.DataFrame(rows), words=words)


def _view(scores: pd.DataFrame) -> View:
    """Each cell's probes by target, beside the best control that never looks into the model."""
    metrics = " or ".join(distinct(scores, "metric"))
    one_rater = len(distinct(scores, "rater")) == 1
    rows: list[tuple[str, ...]] = []
    headings = set()
    for cell, targets in scores.groupby("cell", sort=False):
        headings.add(len(rows))
        rows.append((str(cell).removeprefix(f"{targets['rater'].iloc[0]}-" if one_rater else ""),))
        for row in targets.to_dict("records"):
            others = (number(row[name]) for name in ("p", "ceiling", "best_control_score"))
            site = f"{row['layer']}, {row['position']}"
            rows.append((f"  {row['target']}", with_interval(row, "score"), *others, site))
    title = f"Probes: {metrics} on {counted(scores)} held-out tasks; control: the best without the model"
    site = Column("layer, position", no_wrap=True)
    heads = (names_column("target"), *numbers(f"{metrics} [95 %]", "p", "ceiling", "control"), site)
    return View(title, heads, rows, frozenset(headings))


def probe_cosines(probed: Sequence[Probed]) -> tuple[pd.DataFrame, list[str]]:
    """Cosine similarity of the directions of every two probes of one model, at each site that both have.

    Probes are compared where they are of the same model (its identity, and so its weights and precision) and of the
    same width. A direction is that of the probe of all tasks at the site, whether or not this is the site that it
    chose. Position ``rating`` of two templates is two places of text, but one space.

    Returns
    -------
    table
        One row a pair and site: model, a, b, position, layer, cosine, d (the width), ``random_sd``, which is 1/√d, the
        standard deviation of the cosine of two random directions, and whether the site is ``shown``: one a model, the
        one that most of its probes chose of those that at least two have.
    remarks
        What was left out.
    """
    remarks: list[str] = []
    without: list[str] = []
    groups: dict[tuple[tuple[str, str], ...], list[tuple[Probed, SavedProbe]]] = {}
    for one, saved in ((owner, saved) for owner in probed for saved in owner.saved):
        if saved.directions is None:
            without.append(one.label(saved.probe.target))
        else:
            identity = flat({"model": saved.card["model"], "d": saved.probe.d_model})
            groups.setdefault(tuple(sorted(identity.items())), []).append((one, saved))
    if without:
        remarks.append(f"A probe of kind mlp has no direction, and so no cosine: {', '.join(without)}.")
    raters = [", ".join(dict.fromkeys(one.cell.rater for one, _ in group)) for group in groups.values()]
    extras = telling([(name,) for name in raters], [dict(identity) for identity in groups], ("model.dtype", "model.id"))
    rows: list[dict[str, object]] = []
    for rater, extra, group in zip(raters, extras, groups.values(), strict=True):
        model = named(rater, {key.removeprefix("model."): value for key, value in extra.items()})
        pairs = _cosines({one.label(saved.probe.target): saved for one, saved in group})
        if len(group) > 1 and not pairs:
            remarks.append(f"Probes of {model}: no two have a layer and position in common, and so no cosine.")
        rows += [{"model": model, **row} for row in pairs]
    if not rows:
        return pd.DataFrame(), remarks
    return numeric(pd.DataFrame(rows), words=("model", "a", "b", "position", "shown")), remarks


def _cosines(group: Mapping[str, SavedProbe]) -> list[dict[str, object]]:
    """Of the probes of one model, by label."""
    directions = {label: _unit_directions(saved) for label, saved in group.items()}
    having = Counter(site for by_site in directions.values() for site in by_site)
    shared = [site for site, count in having.items() if count > 1]
    # Of several chosen by as many, the first probe's.
    chosen = Counter(saved.probe.site for saved in group.values() if saved.probe.site in shared)
    shown = chosen.most_common(1)[0][0] if chosen else next(iter(shared), None)
    d = next(iter(group.values())).probe.d_model
    rows: list[dict[str, object]] = []
    for (a, x), (b, y) in itertools.combinations(directions.items(), 2):
        for site in (site for site in shared if site in x and site in y):
            pointing = bool(x[site].any() and y[site].any())
            row: dict[str, object] = {"a": a, "b": b, "position": site.position, "layer": site.layer}
            row["cosine"] = float(np.clip(x[site] @ y[site], -1, 1)) if pointing else None
            row["cosine_reason"] = None if pointing else "all weights of one of them are 0"
            rows.append(row | {"d": d, "random_sd": d**-0.5, "shown": site == shown})
    return rows


def _unit_directions(saved: SavedProbe) -> dict[Site, np.ndarray]:
    """A probe's direction at each site [d], float64 of norm 1; 0 where all weights are."""
    assert saved.directions is not None
    directions = saved.directions.double().numpy()
    norms = np.linalg.norm(directions, axis=1, keepdims=True)
    unit = np.divide(directions, norms, out=np.zeros_like(directions), where=norms > 0)
    return dict(zip(saved.sites, unit, strict=True))


def cosine_matrices(
    cosines: pd.DataFrame, probed: Sequence[Probed], *, all_targets: int, most: int
) -> dict[str, pd.DataFrame]:
    """Square matrices of `probe_cosines` at the site shown, one a model, by title.

    Where a model has more than `all_targets` probes, only those of each cell's main target; where these are more than
    `most`, none.
    """
    main = [one.label(one.main) for one in probed]
    panels = {}
    for model, rows in cosines.loc[cosines["shown"], :].groupby("model", sort=False):
        if len({*rows["a"], *rows["b"]}) > all_targets:
            rows = rows.loc[rows["a"].isin(main) & rows["b"].isin(main), :]
        matrix = square({(row["a"], row["b"]): row["cosine"] for row in rows.to_dict("records")})
        if 1 < len(matrix) <= max(most, all_targets):
            row, short = rows.iloc[0], {name: name.removeprefix(f"{model}-") for name in matrix}
            random = f"random directions: 0 ± {row['random_sd']:.2g}"
            title = f"{model}\n{row['position']}, layer {row['layer']}\n{random}"
            panels[title] = matrix.rename(index=short, columns=short)
    return panels


def probe_transfer(probed: Sequence[Probed], sweep: Sweep) -> pd.DataFrame:
    """Pearson r of each cell's held-out predictions with the ratings of every cell, on the tasks that both have.

    The probe is that of the cell's main target; it reads the activations of the row's model on the row's text
    (``trained_on``), and is scored against the column's ratings (``tested_on``: exact means, or else means over seeds).
    So it says whether what is read from one rater tells what another says; it is not the probe reading the other's
    activations. Each task is predicted by the probe that did not train on it. On the diagonal is the probe's own
    held-out r. ``ratings_r`` is the r of the two cells' ratings with each other: what predicting the row's ratings
    without error would reach.
    """
    draws = functools.cache(lambda count: Resamples.draw(count, sweep.stats.bootstrap, sweep.stats.seed))
    ratings = [pd.Series(cell.measured.task_means, index=pd.Index(cell.tasks())) for cell in sweep.cells]
    rows: list[dict[str, object]] = []
    for one in probed:
        predictions = one.predictions.loc[one.predictions["target"] == one.main, :].set_index("task")["predicted"]
        own = pd.DataFrame(
            {
                "predicted": predictions.reindex(one.cell.measured.tasks).to_numpy(),
                "rating": one.cell.measured.task_means,
            },
            index=pd.Index(one.cell.tasks()),
        )
        own = own.loc[np.isfinite(own["predicted"].to_numpy(dtype=float)), :]
        # Cells with the same tasks in common are resampled together.
        alike: dict[tuple[bool, ...], list[int]] = {}
        for column, others in enumerate(ratings):
            alike.setdefault(tuple(own.index.isin(others.index)), []).append(column)
        by_column: dict[int, dict[str, object]] = {}
        for common, members in alike.items():
            mine = own.loc[list(common), :]
            others = np.stack([ratings[column].reindex(mine.index).to_numpy() for column in members], axis=1)
            of_ratings = correlations(mine["rating"].to_numpy(), others)
            of_probe = correlations(mine["predicted"].to_numpy(), others, draws(len(mine)))
            for column, r, ratings_r in zip(members, of_probe, of_ratings, strict=True):
                cell = sweep.cells[column]
                row: dict[str, object] = {"trained_on": one.name, "tested_on": cell.name, "target": one.main}
                row |= {"ratings": "over seeds" if cell.measured.exact is None else "exact", "n": r.n}
                by_column[column] = row | columns("r", r) | {"ratings_r": ratings_r.value}
        rows += [by_column[column] for column in range(len(ratings))]
    if len(rows) < 2:
        return pd.DataFrame()
    return numeric(pd.DataFrame(rows), words=("trained_on", "tested_on", "target", "ratings"))


def probe_remarks(scores: pd.DataFrame) -> list[str]:
    """Which probes are not to be believed, and why: each is named once, for the first reason that holds."""
    remarks: dict[str, list[str]] = {
        f"Targets that are mostly noise (the best R² that any probe can reach is under {number(NOISE)}): %s. What their"
        " probes score, and where they point, says next to nothing.": [],
        "Probes that predict held-out tasks no better than chance does: %s. Cosines with them and their transfer mean"
        " nothing.": [],
        "Probes that do not beat a control that never looks into the model: %s.": [],
        "Probes that score above the noise ceiling, which is an estimate too: %s. Do not believe more than the"
        " ceiling.": [],
    }
    noise, chance, blind, above = remarks.values()
    for row in scores.to_dict("records"):
        name, score, ceiling = f"{row['cell']}: {row['target']}", row["score"], row["ceiling"]
        if ceiling < NOISE:
            noise.append(f"{name} ({number(ceiling)})")
        elif pd.isna(score) or score <= (0.5 if row["metric"] == "AUC" else 0.0) or row["p"] > 0.05:
            chance.append(f"{name} ({number(score)})")
        elif row["best_control_score"] >= score:
            blind.append(f"{name} ({row['best_control']} {number(row['best_control_score'])})")
        elif score > ceiling + 0.05:
            above.append(f"{name} ({number(score)} of {number(ceiling)})")
    return [remark % some(names, MOST_NAMED) for remark, names in remarks.items() if names]
