"""The probing stage: from captured residuals to the rating.

What probes bring is kept in the store: a job that probes the same vectors for the same targets in the same way reads
it, and trains nothing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from prefs.config import ProbeConfig
from prefs.models.types import Sampling
from prefs.probes.card import SavedProbe, save_probe
from prefs.probes.features import Captured, Features
from prefs.probes.outcome import NoProbe, Outcome, put_together, taken_apart
from prefs.probes.scores import score
from prefs.probes.targets import Target, targets_of
from prefs.probes.validated import MIN_TASKS, CrossValidated
from prefs.results.job_record import Work
from prefs.results.summary import columns, numeric
from prefs.stages.records import Residuals
from prefs.statistics.estimates import Resamples
from prefs.statistics.measured import Measured
from prefs.store.keys import digest
from prefs.store.leases import share
from prefs.store.table import Store
from prefs.store.vectors import StoredResult

log = logging.getLogger(__name__)

# Part of every key: raise it when probes are trained, tested or written down in another way.
FORMAT = 1
# Names of two cells: trained on, tested on.
Pair = tuple[str, str]


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
        What ``transfer`` is made of, for the job's next cell.
    """

    subject: Subject
    key: str
    features: Features
    rows: np.ndarray
    work: Work
    transfer: pd.DataFrame = field(default_factory=pd.DataFrame)
    pairs: Mapping[Pair, Sequence[Mapping[str, Any]]] = field(default_factory=dict)

    @property
    def left_out(self) -> int:
        """How many tasks of the cell are not probed."""
        return len(self.subject.measured.tasks) - len(self.rows)

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
    present = np.all([each.present() for each in subject.residuals], axis=0)
    rows, measured = np.flatnonzero(present), subject.measured
    needed = max(config.folds, MIN_TASKS)
    if (count := len(measured.tasks)) < config.folds:
        return NoProbe(f"{count} tasks cannot fill {config.folds} folds: give more tasks or fewer folds (probe.folds)")
    if len(rows) < needed:
        positions = ", ".join(each.position for each in subject.residuals)
        return NoProbe(f"{len(rows)} tasks have a vector at {positions}; {config.folds} folds need {needed} or more")
    targets = targets_of(measured.only(rows), subject.sampling, tuple(config.targets), config.threshold)
    if not targets:
        return NoProbe(f"these ratings have none of the targets {', '.join(config.targets)}")
    key = _key(subject, rows, config, bootstrap)
    kept = store.result("probes", {"probes": key})
    features = Captured(subject.residuals, rows.tolist())

    def train() -> Outcome | NoProbe:
        # Imported only now: a job that finds its probes should not wait for Lightning and scikit-learn.
        from prefs.probes.tested import Probed, train_and_test

        prompts, completions = ([texts[int(row)] for row in rows] for texts in (subject.prompts, subject.completions))
        return train_and_test(
            Probed(measured, rows, targets, features, prompts, completions), config, trainer(), bootstrap
        )

    outcome, trained = _found_or_trained(kept, store, train)
    if isinstance(outcome, NoProbe):
        return outcome
    count = len(outcome.results)
    report = ProbeReport(
        **{each.name: getattr(outcome, each.name) for each in fields(outcome)},
        subject=subject,
        key=key,
        features=features,
        rows=rows,
        work=Work(f"probes, {subject.name}", 0 if trained else count, count if trained else 0),
    )
    return _with_transfer(report, earlier, bootstrap, config.seed, store)


def _found_or_trained(
    kept: StoredResult, store: Store, train: Callable[[], Outcome | NoProbe]
) -> tuple[Outcome | NoProbe, bool]:
    """The outcome, and whether it was trained here; where jobs want the same at the same time, one of them trains."""
    found = _read(kept)
    if found is not None:
        for warning in found.warnings:
            log.warning("%s", warning)
        return found, False
    made: list[Outcome | NoProbe] = []

    def refresh() -> None:
        nonlocal found
        found = found or _read(kept)

    def compute(_: StoredResult) -> None:
        made.append(outcome := train())
        # What could not be had today may be there tomorrow.
        if isinstance(outcome, Outcome) and not outcome.without:
            kept.write(*taken_apart(outcome))

    def lacking(_: StoredResult) -> list[str]:
        return [] if made or found is not None else [kept.key()]

    share([kept], store, leases=lacking, compute=compute, refresh=refresh)
    if found is not None:
        return found, False
    (outcome,) = made
    return outcome, True


def _read(kept: StoredResult) -> Outcome | None:
    content = kept.read()
    return None if content is None else put_together(*content)


def _key(subject: Subject, rows: np.ndarray, config: ProbeConfig, bootstrap: int) -> str:
    """SHA-256 of all that determines an outcome: vectors, ratings, texts, and how probes are trained and tested."""
    settings = asdict(config)
    for name in ("name", "layers", "positions"):  # the last two are the residuals'
        del settings[name]
    embeddings = config.controls.texts and bool(config.controls.embedding_model)
    measured = subject.measured
    arrays = (measured.sampled, measured.mass, measured.refused, measured.by_thought, rows)
    return digest(
        {
            "format": FORMAT,
            "vectors": features_digest(subject.residuals),
            "sites": [[each.position, list(each.layers)] for each in subject.residuals],
            "ratings": [None if each is None else _digest(each) for each in arrays],
            "scale": [list(measured.says), list(measured.values), measured.thinks, asdict(subject.sampling)],
            "tasks": digest([measured.tasks, measured.origins, list(subject.prompts), list(subject.completions)]),
            "config": settings,
            "embeddings": embeddings and importlib.util.find_spec("sentence_transformers") is not None,
            "bootstrap": bootstrap,
        }
    )


def _digest(array: np.ndarray) -> list[Any]:
    content = np.ascontiguousarray(array)
    return [list(content.shape), content.dtype.str, hashlib.sha256(content.data).hexdigest()]


def _with_transfer(
    report: ProbeReport, earlier: Sequence[ProbeReport], bootstrap: int, seed: int, store: Store
) -> ProbeReport:
    """The report with its table of transfer: all pairs of targets of this cell and of those before it."""
    cells = [*earlier, report]
    pairs: dict[Pair, Sequence[Mapping[str, Any]]] = dict(earlier[-1].pairs) if earlier else {}
    rows = []
    for trained in cells:
        for tested in cells:
            pair = (trained.subject.name, tested.subject.name)
            if pair not in pairs:  # the job's cells before this one have theirs
                pairs[pair] = _transfers(trained, tested, bootstrap, seed, store)
            names = [
                {"trained_on": _label(trained, one.target, len(cells) > 1)}
                | {"tested_on": _label(tested, other.target, len(cells) > 1)}
                for one in trained.results
                for other in tested.results
            ]
            rows += [{**named, **scores} for named, scores in zip(names, pairs[pair], strict=True)]
    if len(rows) < 2:
        return replace(report, pairs=pairs)
    table = numeric(pd.DataFrame(rows), words=("trained_on", "tested_on"))
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
    made = [
        _transferred(trained, one, tested, other.target, bootstrap, seed)
        for one in trained.results
        for other in tested.results
    ]
    kept.write({}, made)
    return made


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
