"""The probing stage: from captured residuals to the rating, beside all that a probe has to be compared with."""

from __future__ import annotations

import hashlib
import importlib.util
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from prefs.config import ProbeConfig
from prefs.errors import UserError
from prefs.measured import Measured
from prefs.models.backend import Sampling
from prefs.probes import baselines
from prefs.probes import controls as names
from prefs.probes.card import SavedProbe, save_probe
from prefs.probes.crossval import MIN_TASKS, CrossValidated, Nothing, cross_validate, held_out_origins
from prefs.probes.descent import Descent
from prefs.probes.features import Captured, Features, NotFinite
from prefs.probes.folds import assign_folds
from prefs.probes.scores import Scores, auc_columns, r2_of, score
from prefs.probes.targets import Target, targets_of
from prefs.probes.train import Training
from prefs.progress import progress
from prefs.records import Residuals
from prefs.statistics.estimates import LEVEL, Estimate, Resamples
from prefs.summary import columns, numeric

R2, AUC = "R²", "AUC"
# Cell and target trained on, cell and target tested on.
Pair = tuple[str, str, str, str]


@dataclass(frozen=True)
class Subject:
    """What is probed: one cell's ratings with the vectors of the same tasks.

    Attributes
    ----------
    name
        The cell's name, short; for the transfer matrix.
    prompts, completions
        [T] texts; what a reader could have predicted the rating from.
    residuals
        One for each position.
    """

    name: str
    measured: Measured
    sampling: Sampling
    prompts: Sequence[str]
    completions: Sequence[str]
    residuals: Sequence[Residuals]


@dataclass(frozen=True, eq=False)
class ProbeReport:
    """Probes of one cell: tables of what was found, and what is saved of them.

    Attributes
    ----------
    metric
        What ``score`` is in all tables: R² on held-out tasks, or AUC for targets of yes and no.
    scores
        One row a target, position and layer.
    chosen
        One row a target: the penalty and site of each fold chosen by the other folds, and all these predictions
        scored together. This is the figure to report.
    controls
        One row a target and control.
    origins
        One row a target and origin: held out from training, and within the folds.
    transfer
        One row a pair of targets: trained on one, tested on the other, on held-out tasks.
    predictions
        One row a target and task, of the probes in ``chosen``.
    pairs
        What ``transfer`` is made of, for the job's next cell.
    """

    subject: Subject
    metric: str
    scores: pd.DataFrame
    chosen: pd.DataFrame
    controls: pd.DataFrame
    origins: pd.DataFrame
    transfer: pd.DataFrame
    predictions: pd.DataFrame
    results: Sequence[CrossValidated]
    nothing: Sequence[Nothing]
    features: Features
    rows: np.ndarray
    left_out: int
    without: Sequence[str]
    pairs: Mapping[Pair, dict[str, object]] = field(default_factory=dict)

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables by file name."""
        named = {
            "probe": self.scores,
            "probe_chosen": self.chosen,
            "probe_controls": self.controls,
            "probe_origins": self.origins,
            "probe_transfer": self.transfer,
            "probe_predictions": self.predictions,
        }
        return {name: table for name, table in named.items() if len(table)}

    def save(self, folder: Path, card: dict[str, Any]) -> dict[str, list[Path]]:
        """Write a folder for each target with its probe and card; returns the files by target key."""
        written = {}
        for result, row in zip(self.results, self.chosen.to_dict("records"), strict=True):
            kept = ("score", "score_low", "score_high", "r2", "pearson", "spearman", "mae", "p", "ceiling")
            metrics = {name: None if pd.isna(row[name]) else float(row[name]) for name in kept}
            own = {
                "target_key": result.target.key,
                "metric": self.metric,
                "metrics": metrics,
                "metrics_are": "of held-out tasks, with site and penalty chosen by the other folds",
                "penalty": result.final_penalty,
                "n": len(result.rows),
            }
            saved = SavedProbe(result.final, {**card, **own}, result.final_directions, self.features.sites)
            written[result.target.key] = save_probe(folder / result.target.key, saved)
        return written


@dataclass(frozen=True)
class NoProbe:
    """Why no probe was trained."""

    reason: str


def probe(
    subject: Subject, config: ProbeConfig, bootstrap: int, earlier: Sequence[ProbeReport]
) -> ProbeReport | NoProbe:
    """Train and test probes of a cell's targets on the tasks that have a vector at all positions.

    `earlier` are the job's other cells so far, for the transfer between them.
    """
    present = np.all([each.present() for each in subject.residuals], axis=0)
    rows, measured = np.flatnonzero(present), subject.measured
    try:
        folds = assign_folds(measured.tasks, measured.origins, config.folds, config.seed)[rows]
    except ValueError as error:
        return NoProbe(f"{error} (probe.folds)")
    needed = max(config.folds, MIN_TASKS)
    if len(rows) < needed:
        positions = ", ".join(each.position for each in subject.residuals)
        return NoProbe(f"{len(rows)} tasks have a vector at {positions}; {config.folds} folds need {needed} or more")
    used = measured.only(rows)
    targets = targets_of(used, subject.sampling, tuple(config.targets), config.threshold)
    if not targets:
        return NoProbe(f"these ratings have none of the targets {', '.join(config.targets)}")
    features = Captured(subject.residuals, rows.tolist())
    training = _training(config)
    scale = sorted(measured.values)
    try:
        found = cross_validate(
            features,
            targets,
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
        texts = _Texts.of(subject, rows)
        draws = Resamples.draw(len(rows), bootstrap, config.seed)
        controls, without = _controls(results, features, texts, used.origins, folds, draws, config)
        origins = _origins(results, features, used.origins, training, draws, config, scale)
    except NotFinite as error:
        task = used.tasks[error.row]
        return NoProbe(f"the vector of task {task} at {error.site} holds a NaN or an infinity: capture it again")
    report = ProbeReport(
        subject=subject,
        metric=AUC if results[0].target.binary else R2,
        scores=_scores(results, features, controls),
        chosen=_chosen(results, features),
        controls=controls,
        origins=origins,
        transfer=pd.DataFrame(),
        predictions=_predictions(results, used),
        results=results,
        nothing=nothing,
        features=features,
        rows=rows,
        left_out=len(measured.tasks) - len(rows),
        without=without,
    )
    return _with_transfer(report, earlier, bootstrap, config.seed)


def _training(config: ProbeConfig) -> Training:
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
        trainer=config.trainer,
        seed=config.seed,
    )


@dataclass(frozen=True)
class _Texts:
    """[n] prompts and completions of the tasks probed."""

    prompts: Sequence[str]
    completions: Sequence[str]

    @classmethod
    def of(cls, subject: Subject, rows: np.ndarray) -> _Texts:
        return cls([subject.prompts[int(row)] for row in rows], [subject.completions[int(row)] for row in rows])

    @property
    def both(self) -> list[str]:
        return [f"{prompt}\n\n{text}" for prompt, text in zip(self.prompts, self.completions, strict=True)]


def _controls(
    results: Sequence[CrossValidated],
    features: Features,
    texts: _Texts,
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
        predictors[names.LENGTH] = lambda y: baselines.length(y, texts.prompts, texts.completions, folds)
        predictors[names.WORDS] = lambda y: baselines.content(y, texts.both, folds, config.seed)
        name = config.controls.embedding_model
        if name and importlib.util.find_spec("sentence_transformers"):
            try:
                vectors = baselines.embed(texts.both, name)
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
                rows.append(_random(result, features, folds, config))
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


def _with_transfer(report: ProbeReport, earlier: Sequence[ProbeReport], bootstrap: int, seed: int) -> ProbeReport:
    """The report with its table of transfer: all pairs of targets of this cell and of those before it."""
    cells = [*earlier, report]
    pairs: dict[Pair, dict[str, object]] = dict(earlier[-1].pairs) if earlier else {}
    rows = []
    for trained in cells:
        for tested in cells:
            for result in trained.results:
                for other in tested.results:
                    pair = (trained.subject.name, result.target.name, tested.subject.name, other.target.name)
                    if pair not in pairs:  # the job's cells before this one have theirs
                        pairs[pair] = _transferred(trained, result, tested, other.target, bootstrap, seed)
                    row: dict[str, object] = {"trained_on": _label(trained, result.target, len(cells) > 1)}
                    rows.append(row | {"tested_on": _label(tested, other.target, len(cells) > 1)} | pairs[pair])
    if len(rows) < 2:
        return replace(report, pairs=pairs)
    table = numeric(pd.DataFrame(rows), words=("trained_on", "tested_on"))
    return replace(report, transfer=table, pairs=pairs)


def _label(report: ProbeReport, target: Target, several: bool) -> str:
    return f"{report.subject.name}: {target.name}" if several else target.name


def _transferred(
    trained: ProbeReport, result: CrossValidated, tested: ProbeReport, target: Target, bootstrap: int, seed: int
) -> dict[str, object]:
    """Probes of one target's folds, on another target's vectors of the tasks that they held out."""
    fold_of = dict(zip((trained.rows[row] for row in result.rows), result.folds, strict=True))
    predictions = np.full(tested.features.n, np.nan)
    for fold, each in enumerate(result.by_fold):
        rows = [at for at, task in enumerate(tested.rows) if fold_of.get(task) == fold and target.observed[at]]
        if rows and each.site in tested.features.sites:
            site = tested.features.sites.index(each.site)
            vectors = tested.features.read(rows, slice(site, site + 1))[:, 0]
            predictions[rows] = each.predict(vectors).double().numpy()
    draws = Resamples.draw(tested.features.n, bootstrap, seed)
    scores = score(predictions[:, None], target.values, draws, binary=target.binary)[0]
    cells = {"n": scores.pearson.n} | columns("r", scores.pearson)
    return cells | {"r2": scores.r2.value, "spearman": scores.spearman.value, "auc": scores.auc.value}


def features_digest(residuals: Sequence[Residuals]) -> str:
    """SHA-256 of the keys of the vectors that probes saw: which data they are from."""
    keys = "".join(key or "-" for each in residuals for key in each.keys)
    return hashlib.sha256(keys.encode()).hexdigest()
