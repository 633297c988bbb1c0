"""Probes trained and tested on one cell, beside all that a probe has to be compared with."""

from __future__ import annotations

import importlib.util
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pandas as pd

from prefs.config import ProbeConfig
from prefs.errors import UserError
from prefs.probes import baselines, controls
from prefs.probes.crossval import cross_validate, held_out_origins
from prefs.probes.features import NOT_FINITE, Features, NotFinite
from prefs.probes.folds import assign_folds, resampled, tasks_of
from prefs.probes.outcome import AUC, R2, CrossValidated, NoProbe, Nothing, Outcome
from prefs.probes.scores import Scores, auc_columns, r2_columns, score
from prefs.probes.targets import Target
from prefs.progress import progress
from prefs.results.tables import columns, numeric
from prefs.statistics.estimates import LEVEL, Estimate, Resamples
from prefs.statistics.measured import Measured


def train_and_test(
    measured: Measured,
    same: Sequence[str],
    rows: np.ndarray,
    targets: Sequence[Target],
    features: Features,
    prompts: Sequence[str],
    completions: Sequence[str],
    config: ProbeConfig,
    bootstrap: int,
) -> Outcome | NoProbe:
    """Probes of all targets at all sites, cross-validated, and what they have to be compared with.

    Parameters
    ----------
    measured
        All tasks of a cell: folds are drawn over them.
    same
        Of each of these what `prefs.data.task.same_tasks` gives: tasks that are the same are held out together.
    rows
        [n] which of these are probed.
    targets, features
        Of the n tasks.
    prompts, completions
        [n] texts; what a reader could have predicted the rating from.
    """
    used, values, task = measured.only(rows), sorted(measured.values), tasks_of(np.array(same)[rows])
    with _heard(logging.getLogger("prefs.probes")) as warnings:
        try:
            folds = assign_folds(same, measured.origins, config.folds, config.seed)[rows]
        except ValueError as error:
            return NoProbe(f"{error} (probe.folds)")
        try:
            made = cross_validate(
                features,
                targets,
                folds,
                used.origins,
                config,
                bootstrap=bootstrap,
                same=task,
                values=values,
                show_progress=True,
            )
            results = [result for result in made if isinstance(result, CrossValidated)]
            nothing = [result for result in made if isinstance(result, Nothing)]
            if not results:
                return NoProbe("; ".join(f"{result.target.name}: {result.reason}" for result in nothing))
            draws = resampled(task, bootstrap, config.seed)
            predictors, without = _predictors(prompts, completions, used.origins, folds, config)
            compared = _controls(results, predictors, features, folds, draws, config)
            origins = _origins(results, features, used.origins, task, draws, config, values)
        except NotFinite as error:
            broken = used.tasks[error.row]
            return NoProbe(f"the vector of task {broken} at {error.site} {NOT_FINITE}")
    return Outcome(
        metric=AUC if results[0].target.binary else R2,
        scores=_scores(results, features, compared),
        chosen=_chosen(results, features),
        controls=compared,
        origins=origins,
        predictions=_predictions(results, used),
        results=results,
        nothing=nothing,
        without=without,
        warnings=warnings,
    )


@contextmanager
def _heard(log: logging.Logger) -> Iterator[list[str]]:
    """Warnings given while inside, so that a job that finds the probes in the store can give them again."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    log.addHandler(handler)
    try:
        yield messages
    finally:
        log.removeHandler(handler)


Predictors = dict[str, Callable[[np.ndarray], np.ndarray]]


def _predictors(
    prompts: Sequence[str], completions: Sequence[str], origins: Sequence[str], folds: np.ndarray, config: ProbeConfig
) -> tuple[Predictors, list[str]]:
    """Held-out predictions from targets for each control, and what was wanted but could not be had."""
    texts = [f"{prompt}\n\n{completion}" for prompt, completion in zip(prompts, completions, strict=True)]
    predictors: Predictors = {controls.ORIGIN: lambda y: baselines.origin_mean(y, origins, folds)}
    if not config.controls.texts:
        return predictors, []
    predictors[controls.LENGTH] = lambda y: baselines.length(y, prompts, completions, folds)
    predictors[controls.WORDS] = lambda y: baselines.content(y, texts, folds, config.seed)
    name = config.controls.embedding_model
    if name and importlib.util.find_spec("sentence_transformers"):
        try:
            vectors = baselines.embed(texts, name)
        except UserError as error:
            return predictors, [f"No control by sentence embeddings: {error}."]
        predictors[controls.EMBEDDING] = lambda y: baselines.on_vectors(y, vectors, folds)
    return predictors, []


def _controls(
    results: Sequence[CrossValidated],
    predictors: Predictors,
    features: Features,
    folds: np.ndarray,
    draws: Resamples,
    config: ProbeConfig,
) -> pd.DataFrame:
    """What the probes are compared with."""
    rows: list[dict[str, object]] = []

    def add(target: Target, control: str, estimate: Estimate) -> None:
        rows.append({"target": target.name, "control": control, **columns("score", estimate)})

    directions = config.controls.random_directions
    with progress("Controls", len(results) * (len(predictors) + bool(directions))) as advance:
        for result in results:
            target = result.target
            for name, predict in predictors.items():
                (scored,) = score(predict(target.values)[:, None], target.values, draws, binary=target.binary)
                add(target, name, target.main(scored))
                advance(1)
            if directions:
                # At the final probe's site.
                site = features.sites.index(result.final.site)
                vectors = features.read(range(features.n), slice(site, site + 1))[:, 0]
                predictions = baselines.random_directions(vectors, target.values, folds, directions, config.seed)
                seen, y = predictions[target.observed][:, :, None], target.values[target.observed][:, None]
                add(target, controls.RANDOM, _middle((auc_columns if target.binary else r2_columns)(seen, y)[:, 0]))
                advance(1)
            if result.within is not None:
                add(target, controls.WITHIN, result.within.r2)
            if len(result.chosen_null):
                add(target, controls.SHUFFLED, _middle(result.chosen_null))
    return numeric(pd.DataFrame(rows), words=("target", "control"))


def _middle(values: np.ndarray) -> Estimate:
    """Median and middle 95 % of a distribution."""
    values = values[~np.isnan(values)]
    if not len(values):
        return Estimate.missing("undefined for all", 0)
    low, middle, high = np.quantile(values, [(1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2])
    return Estimate(float(middle), float(low), float(high), len(values))


def _origins(
    results: Sequence[CrossValidated],
    features: Features,
    origins: Sequence[str],
    same: np.ndarray,
    draws: Resamples,
    config: ProbeConfig,
    values: Sequence[float],
) -> pd.DataFrame:
    """Each origin predicted by probes trained on the others, beside the same tasks predicted within the folds."""
    rows: list[dict[str, object]] = []
    for result in results if config.controls.held_out_origins else ():
        target, y = result.target, result.target.values
        predictions = held_out_origins(features, target, origins, config, same=same, values=values, show_progress=True)
        if predictions is None:
            continue
        within = np.full(len(y), np.nan)
        within[result.rows] = result.predictions
        for origin in dict.fromkeys(origins):
            mine = np.flatnonzero((np.asarray(origins) == origin) & np.isfinite(predictions))
            both = np.stack([predictions[mine], within[mine]], axis=1)
            out, inside = score(both, y[mine], Resamples(draws.times[:, mine]), binary=target.binary)
            row: dict[str, object] = {"target": target.name, "origin": origin, "n": len(mine)}
            row |= columns("score", target.main(out)) | columns("pearson", out.pearson)
            rows.append(row | {"within": target.main(inside).value, "within_pearson": inside.pearson.value})
    return numeric(pd.DataFrame(rows), words=("target", "origin")) if rows else pd.DataFrame()


def _measures(target: Target, scores: Scores) -> dict[str, object]:
    cells = columns("score", target.main(scores))
    for name in ("r2", "pearson", "spearman", "mae", "auc"):
        estimate: Estimate = getattr(scores, name)
        cells |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return cells


def _scores(results: Sequence[CrossValidated], features: Features, compared: pd.DataFrame) -> pd.DataFrame:
    rows = []
    origin_means = compared[compared["control"] == controls.ORIGIN].set_index("target")["score"]
    for result in results:
        target, (low, high) = result.target, result.null_band()
        for number, site in enumerate(features.sites):
            row: dict[str, object] = {"target": target.name, "position": site.position, "layer": site.layer}
            row |= {"n": len(result.rows)} | _measures(target, result.by_site[number])
            row |= {"p": result.site_p(number), "null_low": low[number], "null_high": high[number]}
            rows.append(row | {"ceiling": target.ceiling.value, "origin_mean": origin_means[target.name]})
    return numeric(pd.DataFrame(rows), words=("target", "position"))


def _chosen(results: Sequence[CrossValidated], features: Features) -> pd.DataFrame:
    rows = []
    for result in results:
        target, site = result.target, result.final.site
        sites = Counter(str(features.sites[chosen]) for chosen in result.chosen_sites)
        row: dict[str, object] = {"target": target.name, "n": len(result.rows)} | _measures(target, result.chosen)
        row |= {"p": result.p} | columns("ceiling", target.ceiling)
        row |= {"position": site.position, "layer": site.layer, "penalty": result.final_penalty}
        rows.append(row | {"sites": "; ".join(f"{name} ({count})" for name, count in sites.most_common())})
    return numeric(pd.DataFrame(rows), words=("target", "position", "sites"))


def _predictions(results: Sequence[CrossValidated], used: Measured) -> pd.DataFrame:
    tasks, origins = np.array(used.tasks, dtype=object), np.array(used.origins, dtype=object)
    return pd.concat(
        [
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
        ],
        ignore_index=True,
    )
