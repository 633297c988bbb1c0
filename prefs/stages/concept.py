"""What a job does with concepts: extract their vectors once, and compare them with each cell's ratings and probes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from prefs.concepts.difference import project
from prefs.concepts.extract import HELD_OUT, WORDS, Concept, extract, read_all
from prefs.concepts.reading import Reader
from prefs.config import COMPLETION_POSITIONS, Config
from prefs.models.loading import Models, ModelSpec, identity
from prefs.models.types import Capture, Sampling
from prefs.probes.features import Captured
from prefs.probes.probe import Site
from prefs.probes.scores import score
from prefs.results import figures
from prefs.results.result import Artifact, Figure, Result, Table, View
from prefs.results.tables import columns, numeric
from prefs.results.terminal import number, spaced_layers
from prefs.stages.probe import ProbeReport
from prefs.stages.records import Residuals
from prefs.statistics.estimates import Resamples
from prefs.statistics.measured import Measured
from prefs.store.table import Store

if TYPE_CHECKING:
    from prefs.stages.context import CellContext, JobContext

# By key, each concept of a job with its vectors; or the reason why there are none.
Concepts = Mapping[str, Concept | str]

FOLDER = "concept"
# Below this, two halves of the tasks do not point the same way.
STEADY = 0.5


def extract_concepts(job: JobContext) -> Result:
    """Extract the vectors of a job's concepts: none where it has none, or captures nothing in the conversation.

    Of a shard's tasks alone there are none either, but what they come from is put into the store.
    """
    config, roles = job.config, job.roles
    job.concepts = {}
    reader = reader_of(config, roles.completer, roles.rater, job.sites.capture, job.store, job.models)
    if reader is None:
        return Result()
    try:
        if config.shard is None:
            job.concepts = extract(config.concept, job.tasks, reader, bootstrap=config.stats.bootstrap)
        else:
            read_all(config.concept, job.tasks, reader)
    finally:
        job.counts.add(reader.done())
    concepts = extracted(job.concepts)
    tables = (
        Table("concept_vectors", _joined([concept.vectors for concept in concepts]), "Concept vectors"),
        Table("concept_tests", _joined([concept.tests for concept in concepts]), "What concept vectors separate"),
        Table("concept_cosines", _concept_cosines(concepts), "Cosines of concept vectors"),
    )
    return Result(
        "Concept vectors",
        tables=tuple(table for table in tables if len(table.frame)),
        remarks=tuple(remark for key, concept in job.concepts.items() for remark in concept_remarks(key, concept)),
        artifacts=tuple(_artifact(concept, job) for concept in concepts),
    )


def extracted(concepts: Concepts) -> list[Concept]:
    """Those that have vectors."""
    return [concept for concept in concepts.values() if isinstance(concept, Concept)]


def _artifact(concept: Concept, job: JobContext) -> Artifact:
    """A concept's vectors with their card and control vectors, in a folder of its own."""
    rater, plain_config = job.roles.rater, job.plain_config
    card = {
        "model": identity(rater),
        "model_config": plain_config["model"],
        "completer": plain_config["completer"],
        "dataset": plain_config["dataset"]["name"],
        "config": plain_config["concept"][concept.key],
    }
    family = job.sites.architecture.family if job.sites.architecture else ""

    def save(folder: Path) -> list[Path]:
        return concept.save(folder / FOLDER / concept.key, card, family)

    return Artifact(f"concept-{rater.name}-{concept.key}", "concept", save, {"model": card["model"]})


def _joined(frames: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def reader_of(
    config: Config, completer: ModelSpec, rater: ModelSpec, capture: Capture | None, store: Store, models: Models
) -> Reader | None:
    """What reads tasks under a job's conditions; None where it has no concept, or captures nothing in conversations."""
    positions = tuple(name for name in capture.positions if name in COMPLETION_POSITIONS) if capture else ()
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


def compare_concepts(cell: CellContext) -> Result:
    """A cell's ratings and probes beside the job's concept vectors: tables, and a view and a figure a concept."""
    concepts, measured, stats = extracted(cell.job.concepts), cell.measured, cell.config.stats
    ratings = rating_correlations(concepts, measured, cell.job.rated.residuals, stats.bootstrap, stats.seed)
    with_probes = _probe_cosines(concepts, cell.probed) if isinstance(cell.probed, ProbeReport) else pd.DataFrame()
    among = _concept_cosines(concepts)
    if len(among):  # each pair under either concept
        names = among["with"].str.removeprefix("concept ")
        turned = among.assign(**{"concept": names, "with": "concept " + among["concept"]})
        among = pd.concat([among, turned], ignore_index=True)
    cosines = pd.concat([with_probes, among], ignore_index=True)
    with_rating = f"r with the {'exact rating' if measured.exact is not None else 'mean rating'}"
    tables = (
        Table("concept_ratings", ratings, "Projections on concept vectors, and ratings"),
        Table("concept_probe_cosines", with_probes, "Cosines of concept vectors and probes"),
    )
    by_layer = []
    for concept in concepts:
        title = f"Concept {concept.config.name}: {cell.title}"
        curves = _curves(concept, cosines, ratings, with_rating)
        draw = partial(figures.concept_by_layer, title=title, tests=concept.tests, lines=curves)
        by_layer.append(Figure(f"concept_{concept.key}", draw, f"Concept {concept.config.name} by layer"))
    return Result(
        "Concept vectors beside ratings and probes",
        tables=tuple(table for table in tables if len(table.frame)),
        views=tuple(concept_view(concept, cosines, ratings, with_rating) for concept in concepts),
        figures=tuple(by_layer),
    )


def rating_correlations(
    concepts: Sequence[Concept], measured: Measured, residuals: Mapping[str, Residuals], bootstrap: int, seed: int
) -> pd.DataFrame:
    """Pearson r over tasks of the projection on each concept's vector with the rating, one row a concept and site.

    The projections are of the job's own completions, and the rating is the exact mean (else the mean over seeds). A
    task that the vector is from is projected on one without its fold.
    """
    positions = list(residuals.values())
    if not concepts or not positions:
        return pd.DataFrame()
    kept = np.flatnonzero(np.all([residual.present() for residual in positions], axis=0))
    if not len(kept):
        return pd.DataFrame()
    rating, tasks = measured.task_means[kept], [measured.tasks[row] for row in kept]
    draws = Resamples.draw(len(kept), bootstrap, seed)
    rows = []
    for concept in concepts:
        along = project(Captured(positions, kept.tolist()), concept.difference, concept.fits(tasks))
        for site, scores in zip(concept.difference.sites, score(along, rating, draws), strict=True):
            row: dict[str, object] = {"concept": concept.config.name, **site._asdict(), "n": scores.pearson.n}
            rows.append(row | columns("r", scores.pearson))
    return numeric(pd.DataFrame(rows), words=WORDS)


def _probe_cosines(concepts: Sequence[Concept], report: ProbeReport) -> pd.DataFrame:
    """Cosine of each concept's vector with the direction of each probe, at the sites that both have."""
    return _cosines(
        (concept, f"probe on {result.target.name}", site, direction.double())
        for concept in concepts
        for result in report.results
        if result.final_directions is not None
        for site, direction in zip(report.features.sites, result.final_directions, strict=True)
        if site in concept.difference.sites
    )


def _concept_cosines(concepts: Sequence[Concept]) -> pd.DataFrame:
    """Cosine of the vectors of every two concepts, one row a pair and site."""
    return _cosines(
        (one, f"concept {other.config.name}", site, other.direction(site))
        for one, other in itertools.combinations(concepts, 2)
        for site in one.difference.sites
    )


def _cosines(pairs: Iterable[tuple[Concept, str, Site, torch.Tensor]]) -> pd.DataFrame:
    """One row a pair of a concept and another direction [d] at a site; missing where one of the two is 0.

    ``random_sd`` is 1/√d, the standard deviation of the cosine of two random directions.
    """
    rows = []
    for concept, other, site, direction in pairs:
        own = concept.direction(site)
        cosine = float((own @ direction).clamp(-1, 1)) if bool(own.any() and direction.any()) else None
        row = {"concept": concept.config.name, "with": other, **site._asdict()}
        rows.append(row | {"cosine": cosine, "random_sd": len(own) ** -0.5})
    return numeric(pd.DataFrame(rows), words=WORDS) if rows else pd.DataFrame()


def _curves(concept: Concept, cosines: pd.DataFrame, ratings: pd.DataFrame, with_rating: str) -> pd.DataFrame:
    """The lower half of a concept's figure: what there is from -1 to 1, one row a line, position and layer."""
    own = [concept.vectors.assign(line="split-half cosine", value=concept.vectors["split_half"])]
    if len(cosines):
        rows = cosines.loc[cosines["concept"] == concept.config.name, :]
        own.append(rows.assign(line="cosine with " + rows["with"], value=rows["cosine"]))
    if len(ratings):
        rows = ratings.loc[ratings["concept"] == concept.config.name, :]
        own.append(rows.assign(line=with_rating, value=rows["r"]))
    return pd.concat([rows.loc[:, ["line", "position", "layer", "value"]] for rows in own], ignore_index=True)


def split_halves(concept: Concept) -> dict[str, np.ndarray]:
    """The split-half cosines of all layers by position, the steadiest first: chosen without looking at any test."""
    groups = concept.vectors.groupby("position", sort=False)["split_half"]
    halves = {str(position): np.nan_to_num(values.to_numpy(dtype=float), nan=-1.0) for position, values in groups}
    return dict(sorted(halves.items(), key=lambda item: -item[1].mean()))


def concept_view(
    concept: Concept, cosines: pd.DataFrame, ratings: pd.DataFrame, with_rating: str, most: int = 6
) -> View:
    """One concept at its steadiest position: what its vectors separate and where they point, by layer.

    `cosines` has columns concept, with, position, layer, cosine; `ratings` concept, position, layer, r.
    """
    name, position = concept.config.name, next(iter(split_halves(concept)))
    layers = sorted({int(layer) for layer in concept.vectors["layer"]})
    shown = spaced_layers(layers, most)
    part = "" if len(shown) == len(layers) else f" ({len(shown)} of {len(layers)})"
    held_out = concept.tests.loc[concept.tests["test"] == HELD_OUT, :]
    tests = concept.tests.groupby("test", sort=False)
    quantities = [(str(test), rows, "auc") for test, rows in tests]
    last_test = len(quantities) - 1
    quantities += [
        ("Cohen's d, held-out tasks", held_out, "d"),
        ("split-half cosine", concept.vectors, "split_half"),
        ("norm / activation norm", concept.vectors, "relative"),
    ]
    if len(ratings):
        quantities.append((with_rating, ratings, "r"))
    if len(cosines):
        quantities += [(f"cosine with {other}", rows, "cosine") for other, rows in cosines.groupby("with", sort=False)]
    rows = []
    for label, frame, column in quantities:
        own = frame.loc[(frame["concept"] == name) & (frame["position"] == position), :]
        values = dict(zip(own["layer"].astype(int), own[column], strict=True))
        if values:
            n = str(int(own["n"].max())) if "n" in own else ""
            rows.append([label, n, *(number(values.get(layer)) for layer in shown)])
    return View(
        f"Concept {name} at {position}, by layer{part}",
        ["AUC", "n", *map(str, shown)],
        rows,
        bold=frozenset(index for index, row in enumerate(rows) if row[0] == HELD_OUT),
        gaps=frozenset({last_test}),
        tight=True,
    )


def concept_remarks(key: str, concept: Concept | str) -> list[str]:
    """What was left out, and where there is no vector to speak of."""
    if isinstance(concept, str):
        return [f"No vectors of concept {key}: {concept}."]
    remarks, name, halves = list(concept.remarks), concept.config.name, split_halves(concept)
    unsteady = [position for position in dict.fromkeys(concept.vectors["position"]) if halves[position].max() < STEADY]
    if unsteady:
        best = number(float(max(halves[position].max() for position in unsteady)))
        remarks.append(
            f"Concept {name} at {', '.join(unsteady)}: other tasks would give another vector (split-half cosine {best}"
            f" at best), so what it separates or steers is mostly the noise of these {concept.n} tasks."
        )
    steadiest, tests = next(iter(halves)), concept.tests
    test = tests.loc[(tests["test"] == HELD_OUT) & (tests["position"] == steadiest), :]
    if len(test) and not (test["auc_low"] > 0.5).any():
        best = number(float(test["auc"].max()))
        remarks.append(
            f"Concept {name}: no layer tells the two conditions of held-out tasks apart at {steadiest} (AUC {best} at"
            " best)."
        )
    return remarks
