"""Probes trained and tested on one cell, beside all that a probe has to be compared with."""

from __future__ import annotations

import importlib.util
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from prefs.config import ProbeConfig
from prefs.errors import UserError
from prefs.probes import baselines
from prefs.probes import controls as names
from prefs.probes.crossval import cross_validate, held_out_origins
from prefs.probes.descent import Descent
from prefs.probes.features import Features, NotFinite
from prefs.probes.folds import assign_folds
from prefs.probes.outcome import AUC, R2, NoProbe, Outcome
from prefs.probes.scores import Scores, auc_columns, r2_of, score
from prefs.probes.targets import Target
from prefs.probes.train import Training
from prefs.probes.validated import CrossValidated, Nothing
from prefs.progress import progress
from prefs.results.summary import columns, numeric
from prefs.statistics.estimates import LEVEL, Estimate, Resamples
from prefs.statistics.measured import Measured


@dataclass(frozen=True, eq=False)
class Probed:
    """What is probed: n tasks of a cell, with their targets and vectors.

    Attributes
    ----------
    every
        All tasks of the cell: folds are drawn over them.
    rows
        [n] which of these are probed.
    prompts, completions
        [n] texts; what a reader could have predicted the rating from.
    """

    every: Measured
    rows: np.ndarray
    targets: Sequence[Target]
    features: Features
    prompts: Sequence[str]
    completions: Sequence[str]

    @property
    def texts(self) -> list[str]:
        return [f"{prompt}\n\n{text}" for prompt, text in zip(self.prompts, self.completions, strict=True)]


def train_and_test(of: Probed, config: ProbeConfig, trainer: Mapping[str, Any], bootstrap: int) -> Outcome | NoProbe:
    """Probes of all targets at all sites, cross-validated, and what they have to be compared with.

    `trainer` are the arguments of Lightning's Trainer.
    """
    used, features = of.every.only(of.rows), of.features
    training, scale = _training(config, trainer), sorted(of.every.values)
    with _heard(logging.getLogger("prefs.probes")) as warnings:
        try:
            folds = assign_folds(of.every.tasks, of.every.origins, config.folds, config.seed)[of.rows]
        except ValueError as error:
            return NoProbe(f"{error} (probe.folds)")
        try:
            found = cross_validate(
                features,
                of.targets,
                folds,
                used.origins,
                training,
                permutations=config.controls.permutations,
                bootstrap=bootstrap,
                values=scale,
                show_progress=True,
            )
            results = [each for each in found if isinstance(each, CrossValidated)]
            nothing = [each for each in found if isinstance(each, Nothing)]
            if not results:
                return NoProbe("; ".join(f"{each.target.name}: {each.reason}" for each in nothing))
            draws = Resamples.draw(len(of.rows), bootstrap, config.seed)
            controls, without = _controls(results, of, used.origins, folds, draws, config)
            origins = _origins(results, features, used.origins, training, draws, config, scale)
        except NotFinite as error:
            task = used.tasks[error.row]
            return NoProbe(f"the vector of task {task} at {error.site} holds a NaN or an infinity: capture it again")
    return Outcome(
        metric=AUC if results[0].target.binary else R2,
        scores=_scores(results, features, controls),
        chosen=_chosen(results, features),
        controls=controls,
        origins=origins,
        predictions=_predictions(results, used),
        results=results,
        nothing=nothing,
        without=without,
        warnings=warnings,
    )


class _Ear(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@contextmanager
def _heard(log: logging.Logger) -> Iterator[list[str]]:
    """Warnings said while inside, so that a job that finds the probes in the store can say them again."""
    ear = _Ear()
    log.addHandler(ear)
    try:
        yield ear.said
    finally:
        log.removeHandler(ear)


def _training(config: ProbeConfig, trainer: Mapping[str, Any]) -> Training:
    return Training(
        kind=config.kind,  # type: ignore[arg-type]
        penalties=tuple(config.penalties) or (0.0,),
        batch_size=config.batch_size,
        max_epochs=config.max_epochs,
        descent=Descent(
            optimizer=config.optimizer,
            learning_rate=config.learning_rate,
            momentum=config.momentum,
            patience=config.patience,
            min_delta=config.min_delta,
            hidden=config.hidden,
            seed=config.seed,
        ),
        trainer=trainer,
        seed=config.seed,
    )


def _controls(
    results: Sequence[CrossValidated],
    of: Probed,
    origins: Sequence[str],
    folds: np.ndarray,
    draws: Resamples,
    config: ProbeConfig,
) -> tuple[pd.DataFrame, list[str]]:
    """What the probes are compared with, and what was wanted but could not be had."""
    without: list[str] = []
    predictors: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        names.ORIGIN: lambda y: baselines.origin_mean(y, origins, folds)
    }
    if config.controls.texts:
        predictors[names.LENGTH] = lambda y: baselines.length(y, of.prompts, of.completions, folds)
        predictors[names.WORDS] = lambda y: baselines.content(y, of.texts, folds, config.seed)
        name = config.controls.embedding_model
        if name and importlib.util.find_spec("sentence_transformers"):
            try:
                vectors = baselines.embed(of.texts, name)
                predictors[names.EMBEDDING] = lambda y: baselines.on_vectors(y, vectors, folds)
            except UserError as error:
                without.append(f"No control by sentence embeddings: {error}.")
    rows: list[dict[str, object]] = []
    count = len(results) * (len(predictors) + bool(config.controls.random_directions))
    with progress("Controls", count) as advance:
        for result in results:
            y = result.target.values
            for name, predict in predictors.items():
                scored = score(predict(y)[:, None], y, draws, binary=result.target.binary)[0]
                rows.append({"target": result.target.name, "control": name, **columns("score", result.main(scored))})
                advance(1)
            if config.controls.random_directions:
                rows.append(_random(result, of.features, folds, config))
                advance(1)
            if result.within is not None:
                row = {"target": result.target.name, "control": names.WITHIN}
                rows.append({**row, **columns("score", result.within.r2)})
            if len(result.chosen_null):
                rows.append({"target": result.target.name, "control": names.SHUFFLED} | _middle(result.chosen_null))
    return numeric(pd.DataFrame(rows), words=("target", "control")), without


def _random(result: CrossValidated, features: Features, folds: np.ndarray, config: ProbeConfig) -> dict[str, object]:
    """The median over random directions at the final probe's site, and the middle 95 % of them."""
    site = features.sites.index(result.final.site)
    vectors = features.read(range(features.n), slice(site, site + 1)).float()
    y = result.target.values
    predictions = baselines.random_directions(vectors, y, folds, config.controls.random_directions, config.seed)[:, 0]
    if result.target.binary:
        there = result.target.observed
        scores = auc_columns(predictions[there][:, :, None], np.broadcast_to(y[there][:, None], (there.sum(), 1)))[:, 0]
    else:
        scores = r2_of(predictions, y)
    return {"target": result.target.name, "control": names.RANDOM} | _middle(scores)


def _middle(values: np.ndarray) -> dict[str, object]:
    """Median and middle 95 % of a distribution."""
    values = values[~np.isnan(values)]
    if not len(values):
        return columns("score", Estimate.missing("undefined for all", 0))
    low, middle, high = np.quantile(values, [(1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2])
    return columns("score", Estimate(float(middle), float(low), float(high), len(values)))


def _origins(
    results: Sequence[CrossValidated],
    features: Features,
    origins: Sequence[str],
    training: Training,
    draws: Resamples,
    config: ProbeConfig,
    scale: Sequence[float],
) -> pd.DataFrame:
    """Each origin predicted by probes trained on the others, beside the same tasks predicted within the folds."""
    if not config.controls.held_out_origins:
        return pd.DataFrame()
    rows: list[dict[str, object]] = []
    named = np.asarray(origins)
    for result in results:
        y = result.target.values
        predictions = held_out_origins(features, result.target, origins, training, values=scale, show_progress=True)
        within = np.full(len(y), np.nan)
        within[result.rows] = result.predictions
        if predictions is None:
            continue
        for origin in dict.fromkeys(origins):
            mine = np.flatnonzero((named == origin) & result.target.observed)
            some = Resamples(draws.times[:, mine])
            out, inside = score(
                np.stack([predictions[mine], within[mine]], axis=1), y[mine], some, binary=result.target.binary
            )
            row: dict[str, object] = {"target": result.target.name, "origin": origin, "n": len(mine)}
            row |= columns("score", result.main(out)) | columns("pearson", out.pearson)
            row |= {"within": result.main(inside).value, "within_pearson": inside.pearson.value}
            rows.append(row)
    return numeric(pd.DataFrame(rows), words=("target", "origin")) if rows else pd.DataFrame()


def _measures(scores: Scores, main: Estimate) -> dict[str, object]:
    cells = columns("score", main)
    for name in ("r2", "pearson", "spearman", "mae", "auc"):
        each: Estimate = getattr(scores, name)
        cells |= {name: each.value, f"{name}_low": each.low, f"{name}_high": each.high}
    return cells


def _scores(results: Sequence[CrossValidated], features: Features, controls: pd.DataFrame) -> pd.DataFrame:
    rows = []
    of_origin = {row["target"]: row["score"] for row in controls.to_dict("records") if row["control"] == names.ORIGIN}
    for result in results:
        low, high = result.null_band()
        for at, site in enumerate(features.sites):
            scores = result.by_site[at]
            row: dict[str, object] = {"target": result.target.name, "position": site.position, "layer": site.layer}
            row |= {"n": len(result.rows)} | _measures(scores, result.main(scores))
            row |= {"p": result.site_p(at), "null_low": low[at], "null_high": high[at]}
            row |= {"ceiling": result.target.ceiling.value, "origin_mean": of_origin[result.target.name]}
            rows.append(row)
    return numeric(pd.DataFrame(rows), words=("target", "position"))


def _chosen(results: Sequence[CrossValidated], features: Features) -> pd.DataFrame:
    rows = []
    for result in results:
        sites = Counter(str(features.sites[site]) for site in result.chosen_sites)
        row: dict[str, object] = {"target": result.target.name, "n": len(result.rows)}
        row |= _measures(result.chosen, result.main(result.chosen)) | {"p": result.p}
        row |= columns("ceiling", result.target.ceiling)
        row |= {"position": result.final.site.position, "layer": result.final.site.layer}
        row |= {"penalty": result.final_penalty}
        row["sites"] = "; ".join(f"{site} ({count})" for site, count in sites.most_common())
        rows.append(row)
    return numeric(pd.DataFrame(rows), words=("target", "position", "sites"))


def _predictions(results: Sequence[CrossValidated], used: Measured) -> pd.DataFrame:
    tasks, origins = np.array(used.tasks, dtype=object), np.array(used.origins, dtype=object)
    frames = [
        pd.DataFrame(
            {
                "target": result.target.name,
                "task": tasks[result.rows],
                "origin": origins[result.rows],
                "fold": result.folds,
                "measured": result.target.values[result.rows],
                "predicted": result.predictions,
            }
        )
        for result in results
    ]
    return pd.concat(frames, ignore_index=True)
