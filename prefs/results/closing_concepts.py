"""The closing tables of concept vectors and of steering, and what to be careful about, in words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from rich.table import Table

from prefs.concepts.extract import HELD_OUT, Concept, NoConcept
from prefs.results.terminal import MISSING, new_table, number, spaced_layers, with_interval
from prefs.stages.dose_response import DoseResponse

# Below this, two halves of the tasks do not point the same way.
STEADY = 0.5


def steadiest(concept: Concept) -> str:
    """The position whose vectors agree best between halves of the tasks: chosen without looking at any test."""
    halves = _halves(concept)
    return max(halves, key=lambda position: np.nan_to_num(halves[position], nan=-1.0).mean())


def _halves(concept: Concept) -> dict[str, np.ndarray]:
    """The split-half cosines of all layers, by position."""
    table = concept.vectors
    positions = dict.fromkeys(str(each) for each in table["position"])
    return {each: table.loc[table["position"] == each, "split_half"].to_numpy(dtype=float) for each in positions}


def concept_lines(concept: Concept, cosines: pd.DataFrame, ratings: pd.DataFrame, rated: str, most: int = 6) -> Table:
    """One concept at its steadiest position: what its vectors separate and where they point, by layer.

    `cosines` has columns concept, with, position, layer, cosine; `ratings` concept, position, layer, r.
    """
    name, position = concept.config.name, steadiest(concept)
    layers = sorted({int(layer) for layer in concept.vectors["layer"]})
    spaced = spaced_layers(layers, most)
    of = "" if len(spaced) == len(layers) else f" ({len(spaced)} of {len(layers)})"
    table = new_table(f"Concept {name} at {position}, by layer{of}", first="AUC")
    table.padding = (0, 1, 0, 0)
    for title in ("n", *map(str, spaced)):
        table.add_column(title, justify="right", no_wrap=True)

    def add(title: str, frame: pd.DataFrame, column: str, style: str | None = None) -> None:
        here = frame.loc[(frame["concept"] == name) & (frame["position"] == position), :]
        values = dict(zip(here["layer"].astype(int), here[column], strict=True))
        if values:
            n = str(int(here["n"].max())) if "n" in here else ""
            table.add_row(title, n, *(number(values.get(layer)) for layer in spaced), style=style)

    for test in dict.fromkeys(concept.tests["test"]):
        rows = concept.tests.loc[concept.tests["test"] == test, :]
        add(str(test), rows, "auc", "bold" if test == HELD_OUT else None)
    table.add_section()
    held_out = concept.tests.loc[concept.tests["test"] == HELD_OUT, :]
    add("Cohen's d, held-out tasks", held_out, "d")
    add("split-half cosine", concept.vectors, "split_half")
    add("norm / activation norm", concept.vectors, "relative")
    if len(ratings):
        add(f"r with the {rated}", ratings, "r")
    for other in dict.fromkeys(cosines["with"]) if len(cosines) else ():
        add(f"cosine with {other}", cosines.loc[cosines["with"] == other, :], "cosine")
    return table


def concept_remarks(found: Sequence[Concept | NoConcept]) -> list[str]:
    """What was left out, and where there is no vector to speak of."""
    said: list[str] = []
    for each in found:
        if isinstance(each, NoConcept):
            said.append(f"No vectors of concept {each.key}: {each.reason}.")
            continue
        said += each.remarks
        bests = {position: float(np.nan_to_num(halves, nan=-1.0).max()) for position, halves in _halves(each).items()}
        unsteady = [position for position, best in bests.items() if best < STEADY]
        if unsteady:
            best = number(max(bests[position] for position in unsteady))
            said.append(
                f"Concept {each.config.name} at {', '.join(unsteady)}: other tasks would give another vector"
                f" (split-half cosine {best} at best), so what it separates or steers is mostly the noise of these"
                f" {each.n} tasks."
            )
        test = each.tests.loc[(each.tests["test"] == HELD_OUT) & (each.tests["position"] == steadiest(each)), :]
        if len(test) and not (test["auc_low"] > 0.5).any():
            said.append(
                f"Concept {each.config.name}: no layer tells the two conditions of held-out tasks apart at"
                f" {steadiest(each)} (AUC {number(float(test['auc'].max()))} at best)."
            )
    return said


def slope_lines(found: DoseResponse, unit: str) -> Table:
    """How far each vector moves the rating, beside its controls."""
    table = new_table(f"Steering at {found.at}: rating points a unit ({unit})", first="layer, vector")
    for name in ("slope [95 %]", "Δ at −1", "Δ at +1", "doses"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in dict.fromkeys(int(each) for each in found.slopes["layer"]):
        for row in found.slopes.loc[found.slopes["layer"] == layer, :].to_dict("records"):
            style = "bold" if row["control"] == "concept" else None
            deltas = (number(row[name]) for name in ("delta_minus", "delta_plus"))
            slope = with_interval(row, "slope")
            table.add_row(f"{layer}, {row['vector']}", slope, *deltas, str(int(row["doses"])), style=style)
        table.add_section()
    return table


def dose_lines(found: DoseResponse) -> Table:
    """The concept's own curve, and what it leaves of the model, a row a layer and coefficient."""
    doses = found.doses
    own = doses.loc[doses["control"].isin(["concept", "unsteered"]), :]
    table = new_table("Doses of the vector, and what they leave of the model", first="layer, dose")
    table.padding = (0, 1, 0, 0)
    for name in ("× norm", "rating", "Δ [95 %]", "mass", "perpl.", "inv.", "kept"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in sorted({int(layer) for layer in own["layer"].dropna()}):
        rows = own.loc[(own["layer"] == layer) | own["layer"].isna(), :]
        for row in rows.sort_values(by="coefficient").to_dict("records"):
            table.add_row(
                f"{layer}, {row['coefficient']:g}".replace("-", "−"),
                number(row["norm_multiple"]),
                number(row["mean"]),
                MISSING if row["coefficient"] == 0 else with_interval(row, "delta"),
                number(row["valid_mass"]),
                MISSING if np.isnan(row["perplexity_ratio"]) else f"× {row['perplexity_ratio']:.2g}",
                MISSING if np.isnan(row["invalid"]) else f"{row['invalid']:.0%}",
                "yes" if row["coherent"] else "no",
                style=None if row["coherent"] else "dim",
            )
        table.add_section()
    return table
