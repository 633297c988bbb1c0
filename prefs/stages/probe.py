"""The probing stage: from captured residuals to the rating, and how what was found is told.

What probes bring is kept in the store: a job that probes the same vectors for the same targets in the same way reads
it, and trains nothing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from prefs.config import ProbeConfig
from prefs.data.task import same_tasks
from prefs.job import StageCounts
from prefs.models.types import Sampling
from prefs.probes.card import SavedProbe, save_probe
from prefs.probes.controls import BLIND
from prefs.probes.features import Captured, Features
from prefs.probes.outcome import AUC, MIN_TASKS, CrossValidated, NoProbe, Outcome, put_together, taken_apart
from prefs.probes.scores import score
from prefs.probes.targets import Target, TaskUtilities, targets_of
from prefs.results import figures
from prefs.results.result import Figure, Result, Series, Table, View
from prefs.results.tables import columns, numeric
from prefs.results.terminal import number, spaced_layers, with_interval
from prefs.stages.records import Residuals, not_finite
from prefs.statistics.estimates import Resamples
from prefs.statistics.measured import Measured
from prefs.store.keys import digest
from prefs.store.leases import share
from prefs.store.table import Store
from prefs.store.vectors import StoredResult

log = logging.getLogger(__name__)

# Part of every key: raise it when probes are trained, tested or written down in another way.
FORMAT = 1
# Names, places and classes that do not change what is trained: positions and layers are the residuals'.
NOT_IN_KEY = ("name", "_target_", "binary", "layers", "positions")


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
    utilities
        Of the T tasks, where they were chosen between.
    """

    name: str
    measured: Measured
    sampling: Sampling
    prompts: Sequence[str]
    completions: Sequence[str]
    residuals: Sequence[Residuals]
    utilities: TaskUtilities | None = None


@dataclass(frozen=True, eq=False)
class ProbeReport(Outcome):
    """Probes of one cell: what was found, of what, and what else a job says of it.

    Attributes
    ----------
    key
        What the outcome is called in the store.
    rows
        The tasks probed, of all of the cell.
    work
        How many probes were found in the store, one a target, and how many trained.
    transfer
        One row a pair of targets: trained on one, tested on the other, on held-out tasks.
    pairs
        What ``transfer`` is made of, by the names of two cells: trained on, tested on; for the job's next cell.
    """

    subject: Subject
    key: str
    features: Features
    rows: np.ndarray
    work: StageCounts
    transfer: pd.DataFrame = field(default_factory=pd.DataFrame)
    pairs: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]] = field(default_factory=dict)

    def save(self, folder: Path, card: dict[str, Any]) -> dict[str, list[Path]]:
        """Write a folder for each target with its probe and card; returns the files by target key."""
        written = {}
        for result, row in zip(self.results, self.chosen.to_dict("records"), strict=True):
            kept = ("score", "score_low", "score_high", "r2", "pearson", "spearman", "mae", "p", "ceiling")
            own = {
                "target_key": result.target.key,
                "metric": self.metric,
                "metrics": {name: None if pd.isna(row[name]) else float(row[name]) for name in kept},
                "metrics_are": "of held-out tasks, with site and penalty chosen by the other folds",
                "penalty": result.final_penalty,
                "n": len(result.rows),
            }
            saved = SavedProbe(result.final, {**card, **own}, result.final_directions, self.features.sites)
            written[result.target.key] = save_probe(folder / result.target.key, saved)
        return written


def probe(
    subject: Subject,
    config: ProbeConfig,
    bootstrap: int,
    earlier: Sequence[ProbeReport],
    store: Store,
    trainer: Callable[[], Mapping[str, Any]] = dict,
) -> ProbeReport | NoProbe:
    """Probes of a cell's targets on the tasks that have a vector at all positions: from the store, or trained now.

    `earlier` are the job's other cells so far, for the transfer between them. `trainer` makes the arguments of
    Lightning's Trainer from ``config.trainer``, and is called only where something is trained.
    """
    rows = np.flatnonzero(np.all([position.present() for position in subject.residuals], axis=0))
    measured, needed = subject.measured, max(config.folds, MIN_TASKS)
    if (count := len(measured.tasks)) < config.folds:
        return NoProbe(f"{count} tasks cannot fill {config.folds} folds: give more tasks or fewer folds (probe.folds)")
    if len(rows) < needed:
        positions = ", ".join(captured.position for captured in subject.residuals)
        broken = not_finite(subject.residuals)
        return NoProbe(
            f"{len(rows)} tasks have a vector at {positions}; {config.folds} folds need {needed} or more"
            + (f" ({broken})" if broken else "")
        )
    utilities = subject.utilities and replace(subject.utilities, values=subject.utilities.values[rows])
    targets = targets_of(measured.only(rows), subject.sampling, tuple(config.targets), config.threshold, utilities)
    if not targets:
        return NoProbe(f"these ratings have none of the targets {', '.join(config.targets)}")
    same = same_tasks(measured.tasks, subject.prompts)
    key, features = _key(subject, same, rows, config, bootstrap), Captured(subject.residuals, rows.tolist())

    def train() -> Outcome | NoProbe:
        # Imported only now: a job that finds its probes should not wait for Lightning and scikit-learn.
        from prefs.probes.tested import train_and_test

        prompts, completions = (
            [texts[row] for row in rows.tolist()] for texts in (subject.prompts, subject.completions)
        )
        made = replace(config, trainer=dict(trainer()))
        return train_and_test(measured, same, rows, targets, features, prompts, completions, made, bootstrap)

    outcome, trained = _found_or_trained(store.result("probes", {"probes": key}), store, train)
    if isinstance(outcome, NoProbe):
        return outcome
    count = len(outcome.results)
    work = StageCounts(f"probes, {subject.name}", 0 if trained else count, count if trained else 0)
    report = ProbeReport(**vars(outcome), subject=subject, key=key, features=features, rows=rows, work=work)
    return _with_transfer(report, earlier, bootstrap, config.seed, store)


def _found_or_trained(
    kept: StoredResult, store: Store, train: Callable[[], Outcome | NoProbe]
) -> tuple[Outcome | NoProbe, bool]:
    """The outcome, and whether it was trained here; where jobs want the same at the same time, one of them trains."""
    stored, trained = _read(kept), False
    if stored is not None:
        for warning in stored.warnings:
            log.warning("%s", warning)
        return stored, False
    outcome: Outcome | NoProbe | None = None

    def refresh() -> None:
        nonlocal outcome
        outcome = outcome or _read(kept)

    def compute(_: StoredResult) -> None:
        nonlocal outcome, trained
        outcome, trained = train(), True
        # What could not be had today may be there tomorrow.
        if isinstance(outcome, Outcome) and not outcome.without:
            kept.write(*taken_apart(outcome))

    def leases(_: StoredResult) -> list[str]:
        return [] if outcome else [kept.key()]

    share([kept], store, leases=leases, compute=compute, refresh=refresh)
    assert outcome is not None
    return outcome, trained


def _read(kept: StoredResult) -> Outcome | None:
    content = kept.read()
    return None if content is None else put_together(*content)


def _key(subject: Subject, same: Sequence[str], rows: np.ndarray, config: ProbeConfig, bootstrap: int) -> str:
    """SHA-256 of all that determines an outcome: vectors, ratings, texts, and how probes are trained and tested."""
    embeddings = config.controls.texts and bool(config.controls.embedding_model)
    settings = {**asdict(config), "penalties": config.penalties or []}
    # Of the classes here the kind tells; another's may have the same.
    others = {} if config._target_.startswith("prefs.") else {"class": config._target_}
    measured = subject.measured
    arrays = (measured.sampled, measured.mass, measured.refused, measured.by_thought, rows)
    utilities = subject.utilities
    chosen = {} if utilities is None else {"utilities": [_digest(utilities.values), asdict(utilities.reliability)]}
    return digest(
        {
            **chosen,
            "format": FORMAT,
            "vectors": features_digest(subject.residuals),
            "sites": [[captured.position, list(captured.layers)] for captured in subject.residuals],
            "ratings": [None if array is None else _digest(array) for array in arrays],
            "scale": [list(measured.says), list(measured.values), measured.thinks, asdict(subject.sampling)],
            "tasks": digest([measured.tasks, measured.origins, list(subject.prompts), list(subject.completions)]),
            # Of tasks that all differ, folds are as they were before any were told to be the same.
            **({} if list(same) == list(measured.tasks) else {"same": list(same)}),
            "config": {name: value for name, value in settings.items() if name not in NOT_IN_KEY},
            "embeddings": embeddings and importlib.util.find_spec("sentence_transformers") is not None,
            "bootstrap": bootstrap,
            **others,
        }
    )


def _digest(array: np.ndarray) -> list[Any]:
    content = np.ascontiguousarray(array)
    return [list(content.shape), content.dtype.str, hashlib.sha256(content.data).hexdigest()]


def features_digest(residuals: Sequence[Residuals]) -> str:
    """SHA-256 of the keys of the vectors that probes saw: which data they are from."""
    keys = "".join(key or "-" for captured in residuals for key in captured.keys)
    return hashlib.sha256(keys.encode()).hexdigest()


# --- transfer


def _with_transfer(
    report: ProbeReport, earlier: Sequence[ProbeReport], bootstrap: int, seed: int, store: Store
) -> ProbeReport:
    """The report with its table of transfer: all pairs of targets of this cell and of those before it."""
    cells = [*earlier, report]
    pairs = dict(earlier[-1].pairs) if earlier else {}
    rows = []

    def label(cell: ProbeReport, target: Target) -> str:
        return f"{cell.subject.name}: {target.name}" if earlier else target.name

    for trained in cells:
        for tested in cells:
            pair = (trained.subject.name, tested.subject.name)
            if pair not in pairs:  # the job's cells before this one have theirs
                pairs[pair] = _transfers(trained, tested, bootstrap, seed, store)
            targets = [(one.target, other.target) for one in trained.results for other in tested.results]
            rows += [
                {"trained_on": label(trained, one), "tested_on": label(tested, other), **scores}
                for (one, other), scores in zip(targets, pairs[pair], strict=True)
            ]
    table = numeric(pd.DataFrame(rows), words=("trained_on", "tested_on")) if len(rows) > 1 else pd.DataFrame()
    return replace(report, transfer=table, pairs=pairs)


def _transfers(
    trained: ProbeReport, tested: ProbeReport, bootstrap: int, seed: int, store: Store
) -> Sequence[Mapping[str, Any]]:
    """The transfer from each target of a cell to each of another: from the store, or tried out now."""
    kept = store.result(
        "probe_transfers", {"trained": trained.key, "tested": tested.key, "bootstrap": bootstrap, "seed": seed}
    )
    content = kept.read()
    if content is not None:
        return content[1]
    draws = Resamples.draw(tested.features.n, bootstrap, seed)
    made = [
        _transferred(trained, one, tested, other.target, draws) for one in trained.results for other in tested.results
    ]
    kept.write({}, made)
    return made


def _transferred(
    trained: ProbeReport, result: CrossValidated, tested: ProbeReport, target: Target, draws: Resamples
) -> dict[str, object]:
    """Probes of one target's folds, on another target's vectors of the tasks that they held out."""
    fold_of = dict(zip(trained.rows[result.rows], result.folds, strict=True))
    folds = np.array([fold_of.get(task, -1) for task in tested.rows])
    predictions = np.full(tested.features.n, np.nan)
    for fold, chosen in enumerate(result.by_fold):
        rows = np.flatnonzero((folds == fold) & target.observed)
        if len(rows) and chosen.site in tested.features.sites:
            site = tested.features.sites.index(chosen.site)
            vectors = tested.features.read(rows.tolist(), slice(site, site + 1))[:, 0]
            predictions[rows] = chosen.predict(vectors).double().numpy()
    (scores,) = score(predictions[:, None], target.values, draws, binary=target.binary)
    cells = {"n": scores.pearson.n} | columns("r", scores.pearson)
    return cells | {"r2": scores.r2.value, "spearman": scores.spearman.value, "auc": scores.auc.value}


# --- what is told


def probe_result(report: ProbeReport | NoProbe, title: str) -> Result:
    """Everything that a cell's probes are told by; `title` names the cell in its figures."""
    if isinstance(report, NoProbe):
        return Result(remarks=(f"No probe: {report.reason}.",))
    metric = report.metric
    tables = (
        Table("probe", report.scores, f"{metric} on held-out tasks, by position and layer"),
        Table("probe_chosen", report.chosen, "Probes whose layer, position and penalty were chosen by the other folds"),
        Table("probe_controls", report.controls, "Controls, on the same held-out tasks"),
        Table("probe_origins", report.origins, "Probes on an origin never trained on"),
        Table("probe_transfer", report.transfer, "Probes of one target on another"),
        Table("probe_predictions", report.predictions, "Held-out predictions", large=True),
    )
    drawn = [
        ("probe_by_layer", "Probes by layer", report.scores, partial(figures.probe_by_layer, metric=metric)),
        ("probe_predictions", "Held-out predictions", report.predictions, figures.predicted_against_measured),
        ("probe_origins", "Probes on an origin never trained on", report.origins,
         partial(figures.origins_held_out, metric=metric)),
        ("probe_transfer", "Probe transfer", report.transfer, figures.transfer),
    ]  # fmt: skip
    return Result(
        title="Probes",
        tables=tuple(table for table in tables if len(table.frame)),
        views=(_by_layer(report), _chosen(report), _controls(report)),
        figures=tuple(
            Figure(name, partial(draw, title=f"{what}: {title}", table=table), what)
            for name, what, table, draw in drawn
            if len(table)
        ),
        remarks=tuple(_remarks(report)),
        metrics=_metrics(report),
        series=(_series(report),),
    )


def _by_layer(report: ProbeReport, most: int = 6) -> View:
    """The score on held-out tasks by target, position and layer, evenly spaced layers if there are many."""
    layers = sorted({int(layer) for layer in report.scores["layer"]})
    spaced = spaced_layers(layers, most)
    some = "" if len(spaced) == len(layers) else f" ({len(spaced)} of {len(layers)})"
    scores = {(row["target"], row["position"], row["layer"]): row["score"] for row in report.scores.to_dict("records")}
    rows = [
        [f"{target}, {position}", *(number(scores[target, position, layer]) for layer in spaced)]
        for target, position in dict.fromkeys((target, position) for target, position, _ in scores)
    ]
    title = f"Probes: {report.metric} on held-out tasks, by layer{some}"
    return View(title, ["target, position", *map(str, spaced)], rows)


def _chosen(report: ProbeReport) -> View:
    """The figures to report: held-out predictions of the probes that each fold's training tasks chose."""
    return View.of(
        "Probes whose layer, position and penalty were chosen by the other folds",
        report.chosen,
        {
            "target": lambda row: row["target"],
            "n": lambda row: str(row["n"]),
            f"{report.metric} [95 %]": lambda row: with_interval(row, "score"),
            "p": lambda row: number(row["p"]),
            "ceiling": lambda row: number(row["ceiling"]),
            "position, layer": lambda row: f"{row['position']}, {row['layer']}",
        },
    )


def _controls(report: ProbeReport) -> View:
    """What the probes are compared with, by target."""
    targets = list(dict.fromkeys(report.controls["target"]))
    scores = {(row["control"], row["target"]): number(row["score"]) for row in report.controls.to_dict("records")}
    rows = [["probe", *map(number, report.chosen["score"])]] + [
        [control, *(scores.get((control, target), "") for target in targets)]
        for control in dict.fromkeys(report.controls["control"])
    ]
    title = f"Controls: {report.metric} on the same held-out tasks"
    return View(title, ["control", *targets], rows, bold=frozenset({0}))


def _remarks(report: ProbeReport) -> list[str]:
    """What to be careful about."""
    remarks = []
    chance = 0.5 if report.metric == AUC else 0.0
    controls = {(row["target"], row["control"]): float(row["score"]) for row in report.controls.to_dict("records")}
    for row in report.chosen.to_dict("records"):
        target, best, p = row["target"], row["score"], row["p"]
        beaten = {name: controls[target, name] for name in BLIND if controls.get((target, name), -math.inf) >= best}
        if pd.isna(best):
            remarks.append(f"Probe on {target}: undefined ({row['score_reason']}).")
        elif best <= chance or p > 0.05:
            shuffled = "" if pd.isna(p) else f" (p = {number(p)} against shuffled targets)"
            remarks.append(f"Probe on {target}: it predicts held-out tasks no better than chance does{shuffled}.")
        elif beaten:
            control = max(beaten, key=lambda name: beaten[name])
            remarks.append(
                f"Probe on {target}: it does not beat the control by {control} ({number(beaten[control])}), which never"
                " looks into the model."
            )
        elif best > row["ceiling"] + 0.05:
            remarks.append(
                f"Probe on {target}: {number(best)} is above the noise ceiling {number(row['ceiling'])}, which is an"
                " estimate too; do not believe more than the ceiling."
            )
    remarks += [f"No probe on {untrained.target.name}: {untrained.reason}." for untrained in report.nothing]
    if left_out := len(report.subject.measured.tasks) - len(report.rows):
        positions = ", ".join(captured.position for captured in report.subject.residuals)
        remarks.append(
            f"{left_out} tasks lack a vector at {positions} (empty, too long or not finite) and are not probed."
        )
    return [*remarks, *report.without]


def _metrics(report: ProbeReport) -> dict[str, float | None]:
    names = ("score", "r2", "pearson", "auc", "p", "ceiling", "layer")
    chosen, controls = report.chosen.to_dict("records"), report.controls.to_dict("records")
    return {f"probe/chosen/{name}/{row['target']}": row[name] for row in chosen for name in names} | {
        f"probe/control/{row['control']}/{row['target']}": row["score"] for row in controls
    }


def _series(report: ProbeReport) -> Series:
    """The score by layer, of each position and target."""
    wide = report.scores.pivot(index="layer", columns=["position", "target"], values="score")
    wide.columns = [f"probe/{position}/{target}" for position, target in wide.columns]
    return Series("probe/layer", wide.rename_axis("probe/layer").reset_index())
