"""What a job does with concepts: extract their vectors once, and for each cell compare them with its ratings and
probes, and steer with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pandas as pd
from rich.table import Table

from prefs.concepts.card import SavedVectors, check_model, load_vectors
from prefs.concepts.cell import probe_cosines, rating_correlations
from prefs.concepts.extract import Concept, NoConcept, concept_cosines, extract, read_all
from prefs.concepts.reading import Reader
from prefs.config import COMPLETION_POSITIONS, Config
from prefs.data.task import Task
from prefs.errors import UserError
from prefs.models.architecture import Architecture
from prefs.models.loading import Models, ModelSpec, identity
from prefs.models.types import Capture, Sampling
from prefs.probes.outcome import NoProbe
from prefs.probes.probe import Site
from prefs.results import closing_concepts
from prefs.results import figures as plots
from prefs.results.job_record import Doings
from prefs.stages.dose_response import DoseResponse, arrows, dose_response
from prefs.stages.probe import ProbeReport
from prefs.stages.records import Rated, Ratings
from prefs.stages.steer import Arrow, Place, Responses, steer
from prefs.statistics.measured import Measured
from prefs.store.table import Store

FOLDER = "concept"


@dataclass(frozen=True)
class Concepts:
    """The concepts of a job, and its tables of them by file name."""

    found: Sequence[Concept | NoConcept]
    tables: Mapping[str, pd.DataFrame]

    @property
    def there(self) -> list[Concept]:
        return [each for each in self.found if isinstance(each, Concept)]

    def save(
        self, folder: Path, model: Mapping[str, Any], family: str, plain_config: Mapping[str, Any]
    ) -> dict[str, list[Path]]:
        """Write the vectors of each concept with their card; returns the files by concept."""
        written = {}
        for each in self.there:
            card = {
                "model": dict(model),
                "model_config": plain_config["model"],
                "completer": plain_config["completer"],
                "dataset": plain_config["dataset"]["name"],
                "config": plain_config["concept"][each.key],
            }
            written[each.key] = each.save(folder / FOLDER / each.key, card, family)
        return written


def extracted(
    config: Config,
    tasks: Sequence[Task],
    completer: ModelSpec,
    rater: ModelSpec,
    capture: Capture | None,
    store: Store,
    models: Models,
    doings: Doings,
) -> Concepts:
    """The vectors of a job's concepts; none where it has none, or captures nothing in the conversation.

    Of a shard's tasks alone there are none either, but what they come from is put into the store.
    """
    reader = reader_of(config, completer, rater, capture, store, models)
    if reader is None:
        return Concepts((), {})
    try:
        if config.shard is not None:
            read_all(config.concept, tasks, reader)
            return Concepts((), {})
        found = extract(config.concept, tasks, reader, bootstrap=config.stats.bootstrap)
    finally:
        doings.did(reader.done())
    there = [each for each in found if isinstance(each, Concept)]
    tables = {
        "concept_vectors": [each.vectors for each in there],
        "concept_tests": [each.tests for each in there],
        "concept_cosines": [concept_cosines(there)] if len(there) > 1 else [],
    }
    return Concepts(found, {name: pd.concat(each, ignore_index=True) for name, each in tables.items() if each})


def reader_of(
    config: Config, completer: ModelSpec, rater: ModelSpec, capture: Capture | None, store: Store, models: Models
) -> Reader | None:
    """What reads tasks under a job's conditions; None where it has no concept, or captures nothing in conversations."""
    positions = tuple(each for each in capture.positions if each in COMPLETION_POSITIONS) if capture else ()
    if not config.concept or capture is None or not positions:
        return None
    return Reader(
        completer=completer,
        subject=rater,
        sampling=Sampling.from_config(config.completer),
        seed=config.completer.seed,
        capture=replace(capture, positions=positions),
        store=store,
        models=models,
        dtype=config.capture.dtype.value,
    )


@dataclass(frozen=True)
class CellConcepts:
    """What concepts have to do with one cell: tables by file name, figures, lines for the terminal, and remarks."""

    tables: Mapping[str, pd.DataFrame]
    figures: Sequence[Path]
    lines: Sequence[Table]
    remarks: Sequence[str]


def compared(
    concepts: Concepts,
    measured: Measured,
    rated: Rated,
    probed: ProbeReport | NoProbe | None,
    config: Config,
    folder: Path,
    title: str,
) -> CellConcepts:
    """A cell's ratings and probes beside the job's concept vectors."""
    if not concepts.there:
        return CellConcepts({}, (), (), closing_concepts.concept_remarks(concepts.found))
    stats = config.stats
    ratings = rating_correlations(concepts.there, measured, rated.residuals, stats.bootstrap, stats.seed)
    with_probes = probe_cosines(concepts.there, probed) if isinstance(probed, ProbeReport) else pd.DataFrame()
    among = _both_ways(concepts.tables.get("concept_cosines", pd.DataFrame()))
    cosines = pd.concat([with_probes, among], ignore_index=True)
    is_exact = measured.exact is not None
    rated_as = "exact rating" if is_exact else "mean rating"
    tables = {"concept_ratings": ratings, "concept_probe_cosines": with_probes}
    figures, lines = [], []
    for each in concepts.there:
        lines.append(closing_concepts.concept_lines(each, cosines, ratings, rated_as))
        figures.append(
            plots.concept_by_layer(
                folder / "figures" / f"concept_{each.key}.png",
                title=f"Concept {each.config.name}: {title}",
                tests=each.tests,
                lines=_lines(each, cosines, ratings, rated_as),
            )
        )
    shown = {name: table for name, table in tables.items() if len(table)}
    return CellConcepts(shown, figures, lines, closing_concepts.concept_remarks(concepts.found))


def _both_ways(cosines: pd.DataFrame) -> pd.DataFrame:
    """A table of pairs with each pair under either concept."""
    if cosines.empty:
        return cosines
    named = cosines["with"].str.removeprefix("concept ")
    turned = cosines.assign(**{"concept": named, "with": "concept " + cosines["concept"]})
    return pd.concat([cosines, turned], ignore_index=True)


def _lines(concept: Concept, cosines: pd.DataFrame, ratings: pd.DataFrame, rated_as: str) -> pd.DataFrame:
    own = [concept.vectors.assign(line="split-half cosine", value=concept.vectors["split_half"])]
    for line, table, column in ((None, cosines, "cosine"), (f"r with the {rated_as}", ratings, "r")):
        if len(table):
            rows = table.loc[table["concept"] == concept.config.name, :]
            named = "cosine with " + rows["with"] if line is None else line
            own.append(rows.assign(line=named, value=rows[column]))
    return pd.concat([each.loc[:, ["line", "position", "layer", "value"]] for each in own], ignore_index=True)


def steered(
    config: Config,
    layers: Sequence[int],
    concepts: Concepts,
    ratings: Ratings,
    rater: ModelSpec,
    probed: ProbeReport | NoProbe | None,
    store: Store,
    models: Models,
    doings: Doings,
) -> DoseResponse | str | None:
    """One cell's ratings under steering; or why there are none, in words; None where none are wanted."""
    steering = config.steering
    if steering.vector == "none":
        return None
    concept: Concept | None = None
    if steering.vector == "concept":
        first = concepts.found[0]
        if isinstance(first, NoConcept):
            return f"No steering, since there are no vectors of concept {first.key}."
        concept, saved = first, first.saved({})
    else:
        saved = load_vectors(Path(steering.vector).expanduser())  # which `check_saved` has seen
    found, without = arrows(steering, layers, saved, concept, probed if isinstance(probed, ProbeReport) else None)
    responses = steered_along(config, found, ratings, rater, store, models, doings)
    if not responses.asked.any():
        return "No steering: no task has a completion that the question fits behind."
    return dose_response(
        ratings.completions,
        responses,
        ratings.template.values,
        found,
        at=steering.at,
        coherence=steering.coherence,
        bootstrap=config.stats.bootstrap,
        seed=config.stats.seed,
        without=without,
    )


def steered_along(
    config: Config,
    found: Sequence[Arrow],
    ratings: Ratings,
    rater: ModelSpec,
    store: Store,
    models: Models,
    doings: Doings,
) -> Responses:
    """One cell's completions rated under every dose of these vectors."""
    steering = config.steering
    responses, work = steer(
        ratings.completions,
        rater,
        ratings.template,
        found,
        steering.coefficients,
        Sampling.from_config(config.rating),
        at=cast(Place, steering.at),
        seeds=steering.seeds,
        system_prompt=config.rating.system_prompt,
        store=store,
        models=models,
    )
    doings.did([work])
    return responses


def check_saved(config: Config, rater: ModelSpec, layers: Sequence[int], architecture: Architecture) -> None:
    """Refuse saved vectors that do not fit the model, before it is loaded.

    Raises
    ------
    UserError
        If they are of another model, or lack a layer or the position.
    """
    if config.steering.vector in ("none", "concept"):
        return
    saved: SavedVectors = load_vectors(Path(config.steering.vector).expanduser())
    check_model(saved, identity(rater), rater.name)
    if saved.vectors.shape[-1] != architecture.d_model:
        width = saved.vectors.shape[-1]
        raise UserError(f"the vectors of {saved.concept} have {width} numbers; {rater.name} has {architecture.d_model}")
    for layer in layers:
        saved.at(Site(layer, config.steering.position))
