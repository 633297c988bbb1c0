"""Probes side by side: the tables of a comparison that are about probes. Pure functions of what jobs saved."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from prefs.comparison.cells import Cell, flat, telling
from prefs.comparison.probed import Probed
from prefs.probes.controls import BLIND
from prefs.results.summary import columns, numeric
from prefs.statistics.agreement import correlations
from prefs.statistics.estimates import Resamples

if TYPE_CHECKING:
    from prefs.probes.card import SavedProbe
    from prefs.probes.probe import Site

NO_DIRECTION = "all weights of one of them are 0"


def probe_table(probed: Sequence[Probed]) -> pd.DataFrame:
    """One row a cell and target: the score of held-out predictions, beside what it has to be compared with.

    ``score`` is R², or AUC of a target of yes and no (``metric``), of probes whose layer, position and penalty the
    other folds chose; ``position`` and ``layer`` are those of the probe of all tasks. ``best_control`` is the best of
    those that never look into the model; each control has a column of its own name.
    """
    rows: list[dict[str, object]] = []
    for each in probed:
        for row in each.chosen.to_dict("records"):
            mine = each.controls.loc[each.controls["target"] == row["target"], :]
            controls = {str(name): float(score) for name, score in zip(mine["control"], mine["score"], strict=True)}
            blind = {name: controls[name] for name in BLIND if not np.isnan(controls.get(name, np.nan))}
            best = max(blind, key=lambda name: blind[name]) if blind else None
            found: dict[str, object] = {"cell": each.name, "rater": each.cell.rater, "template": each.cell.key}
            found |= {"target": row["target"], "probe": each.kind, "metric": "R²" if pd.isna(row["auc"]) else "AUC"}
            found |= {name: row[name] for name in ("n", "score", "score_low", "score_high", "score_reason", "p")}
            found |= {"ceiling": row["ceiling"], "position": row["position"], "layer": row["layer"]}
            found |= {"penalty": row["penalty"], "best_control": best}
            found |= {"best_control_score": None if best is None else blind[best], **controls}
            rows.append(found)
    words = ("cell", "rater", "template", "target", "probe", "metric", "position", "best_control")
    return numeric(pd.DataFrame(rows), words=words) if rows else pd.DataFrame()


@dataclass(frozen=True, eq=False)
class _Pointing:
    """One probe's directions [S, d], float64 of norm 1 (0 where all weights are), by site."""

    label: str
    saved: SavedProbe
    at: Mapping[Site, np.ndarray]


def probe_cosines(probed: Sequence[Probed]) -> tuple[pd.DataFrame, tuple[str, ...]]:
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
    without = [each.label(probe.probe.target) for each in probed for probe in each.saved if probe.directions is None]
    if without:
        remarks.append(f"A probe of kind mlp has no direction, and so no cosine: {', '.join(without)}.")
    groups: dict[tuple[tuple[str, str], ...], list[tuple[Probed, SavedProbe]]] = {}
    for each in probed:
        for saved in each.saved:
            if saved.directions is not None:
                identity = flat({"model": saved.card["model"], "d": saved.probe.d_model})
                groups.setdefault(tuple(sorted(identity.items())), []).append((each, saved))
    raters = [", ".join(dict.fromkeys(each.cell.rater for each, _ in group)) for group in groups.values()]
    extras = telling([(name,) for name in raters], [dict(identity) for identity in groups], ("model.dtype", "model.id"))
    rows: list[dict[str, object]] = []
    for rater, extra, group in zip(raters, extras, groups.values(), strict=True):
        model = " ".join([rater, *(f"{key.removeprefix('model.')}={value}" for key, value in extra.items())])
        found = _cosines([_pointing(each, saved) for each, saved in group])
        if len(group) > 1 and not found:
            remarks.append(f"Probes of {model}: no two have a layer and position in common, and so no cosine.")
        rows += [{"model": model, **row} for row in found]
    if not rows:
        return pd.DataFrame(), tuple(remarks)
    return numeric(pd.DataFrame(rows), words=("model", "a", "b", "position", "shown")), tuple(remarks)


def _pointing(each: Probed, saved: SavedProbe) -> _Pointing:
    assert saved.directions is not None
    directions = saved.directions.double().numpy()
    norms = np.linalg.norm(directions, axis=1, keepdims=True)
    unit = np.divide(directions, norms, out=np.zeros_like(directions), where=norms > 0)
    return _Pointing(each.label(saved.probe.target), saved, dict(zip(saved.sites, unit, strict=True)))


def _cosines(group: Sequence[_Pointing]) -> list[dict[str, object]]:
    having = Counter(site for each in group for site in each.at)
    shared = [site for site, count in having.items() if count > 1]
    if not shared:
        return []
    # Of several chosen by as many, the first probe's.
    chosen = Counter(each.saved.probe.site for each in group if each.saved.probe.site in shared)
    shown = chosen.most_common(1)[0][0] if chosen else shared[0]
    d = group[0].saved.probe.d_model
    rows: list[dict[str, object]] = []
    for a, b in itertools.combinations(group, 2):
        for site in (site for site in shared if site in a.at and site in b.at):
            x, y = a.at[site], b.at[site]
            row: dict[str, object] = {"a": a.label, "b": b.label, "position": site.position, "layer": site.layer}
            pointing = bool(x.any() and y.any())
            row["cosine"] = float(np.clip(x @ y, -1, 1)) if pointing else None
            row["cosine_reason"] = None if pointing else NO_DIRECTION
            rows.append(row | {"d": d, "random_sd": d**-0.5, "shown": site == shown})
    return rows


def cosine_matrices(
    table: pd.DataFrame, probed: Sequence[Probed], *, all_targets: int, most: int
) -> dict[str, pd.DataFrame]:
    """Square matrices of `probe_cosines` at the site shown, one a model, by title.

    Where a model has more than `all_targets` probes, only those of each cell's main target; where these are more than
    `most`, none.
    """
    main = {each.label(each.main) for each in probed}
    panels = {}
    for model, rows in table.loc[table["shown"], :].groupby("model", sort=False):
        names = list(dict.fromkeys([*rows["a"], *rows["b"]]))
        if len(names) > all_targets:
            names = [name for name in names if name in main]
        if not 1 < len(names) <= max(most, all_targets):
            continue
        square = pd.DataFrame(np.eye(len(names)), index=names, columns=names)
        for row in rows.to_dict("records"):
            if row["a"] in names and row["b"] in names:
                square.loc[row["a"], row["b"]] = square.loc[row["b"], row["a"]] = row["cosine"]
        short = {name: name.removeprefix(f"{model}-") for name in names}
        site = f"{rows['position'].iloc[0]}, layer {rows['layer'].iloc[0]}"
        random = f"random directions: 0 ± {rows['random_sd'].iloc[0]:.2g}"
        panels[f"{model}\n{site}\n{random}"] = square.rename(index=short, columns=short)
    return panels


def probe_transfer(probed: Sequence[Probed], cells: Sequence[Cell], *, resamples: int, seed: int) -> pd.DataFrame:
    """Pearson r of each cell's held-out predictions with the ratings of every cell, on the tasks that both have.

    The probe is that of the cell's main target; it reads the activations of the row's model on the row's text
    (``trained_on``), and is scored against the column's ratings (``tested_on``: exact means, or else means over seeds).
    So it says whether what is read from one rater tells what another says; it is not the probe reading the other's
    activations. Each task is predicted by the probe that did not train on it. On the diagonal is the probe's own
    held-out r. ``ratings_r`` is the r of the two cells' ratings with each other: what predicting the row's ratings
    without error would reach.
    """
    draws = functools.cache(lambda count: Resamples.draw(count, resamples, seed))
    where = [{task: at for at, task in enumerate(cell.tasks())} for cell in cells]
    rows: list[dict[str, object]] = []
    for each in probed:
        keys, ratings = each.cell.tasks(), each.cell.measured.task_means
        predicted = _held_out(each)
        # Cells with the same tasks in common are resampled together.
        alike: dict[tuple[int, ...], list[int]] = {}
        for column, there in enumerate(where):
            common = (at for at, key in enumerate(keys) if key in there and np.isfinite(predicted[at]))
            alike.setdefault(tuple(common), []).append(column)
        found: dict[int, dict[str, object]] = {}
        for common, members in alike.items():
            mine = list(common)
            others = np.empty((len(mine), len(members)))
            for at, column in enumerate(members):
                there = [where[column][keys[row]] for row in mine]
                others[:, at] = cells[column].measured.task_means[there]
            of_ratings = correlations(ratings[mine], others)
            of_probe = correlations(predicted[mine], others, draws(len(mine)))
            for column, r, own in zip(members, of_probe, of_ratings, strict=True):
                row: dict[str, object] = {"trained_on": each.name, "tested_on": cells[column].name, "target": each.main}
                row |= {"ratings": "over seeds" if cells[column].measured.exact is None else "exact", "n": r.n}
                found[column] = row | columns("r", r) | {"ratings_r": own.value}
        rows += [found[column] for column in range(len(cells))]
    if len(rows) < 2:
        return pd.DataFrame()
    return numeric(pd.DataFrame(rows), words=("trained_on", "tested_on", "target", "ratings"))


def _held_out(probed: Probed) -> np.ndarray:
    """[T] the held-out prediction of each of the cell's tasks for its main target, NaN where there is none."""
    at_home = {task: at for at, task in enumerate(probed.cell.measured.tasks)}
    mine = probed.predictions.loc[probed.predictions["target"] == probed.main, :]
    predicted = np.full(len(at_home), np.nan)
    for task, value in zip(mine["task"], mine["predicted"], strict=True):
        if task in at_home:
            predicted[at_home[task]] = value
    return predicted
