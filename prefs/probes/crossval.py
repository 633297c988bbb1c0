"""Cross-validated probes: what they predict of tasks they never saw, with penalty and layer chosen by the others."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from prefs.probes.features import Features
from prefs.probes.folds import Splits
from prefs.probes.probe import Site
from prefs.probes.scores import auc_columns, r2_columns, score
from prefs.probes.targets import Target, alike
from prefs.probes.train import VALIDATED, Trained, Training, train
from prefs.probes.validated import MIN_TASKS, CrossValidated, Nothing, p_value
from prefs.statistics.estimates import Resamples

TOO_FEW = "too few to validate with some of them in every fold: use fewer folds (probe.folds), or probe=ridge"


def cross_validate(
    features: Features,
    targets: Sequence[Target],
    folds: np.ndarray,
    origins: Sequence[str],
    training: Training,
    *,
    permutations: int,
    bootstrap: int,
    values: Sequence[float] = (),
    show_progress: bool = False,
) -> list[CrossValidated | Nothing]:
    """Cross-validate probes of all targets at all sites.

    Parameters
    ----------
    features
        Of n tasks.
    targets
        Each of the n tasks.
    folds, origins
        [n].
    permutations
        How many times each target is shuffled over its tasks, for the null. Shuffled targets are trained on together
        with the true one, and choose their own penalties and sites.
    bootstrap
        Resamples of tasks for intervals.
    values
        What the options are worth, rising; for ``ordinal``.
    """
    found: dict[int, CrossValidated | Nothing] = {}
    together_at: dict[bytes, list[int]] = {}
    for at, target in enumerate(targets):
        reason = unusable(target, folds)
        if reason is not None:
            found[at] = Nothing(target, reason)
        else:
            together_at.setdefault(target.observed.tobytes(), []).append(at)
    # Targets of the same tasks share passes, sums and decompositions.
    for members in together_at.values():
        together = [targets[at] for at in members]
        rows = np.flatnonzero(together[0].observed)
        some = _Subset(features, rows)
        splits = Splits.of(folds[rows], training.seed)
        if training.kind in VALIDATED and not splits.validates:
            found |= {at: Nothing(targets[at], f"{len(rows)} tasks have it, {TOO_FEW}") for at in members}
            continue
        columns = _columns(together, rows, np.asarray(origins)[rows], training, permutations)
        trained = train(
            some,
            columns.values,
            splits,
            training,
            kept=len(together),
            values=values,
            show_progress=show_progress,
        )
        draws = Resamples.draw(len(rows), bootstrap, training.seed)
        for column, at in enumerate(members):
            found[at] = _summarised(
                targets[at], column, columns, trained, rows, folds[rows], features.sites, training, draws
            )
    return [found[at] for at in range(len(targets))]


def unusable(target: Target, folds: np.ndarray) -> str | None:
    """Why no probe can be cross-validated for a target; None where one can."""
    values = target.values[target.observed]
    k = int(folds.max()) + 1
    if len(values) < max(k, MIN_TASKS):
        return f"{len(values)} tasks have it, and {k} folds (probe.folds) need {max(k, MIN_TASKS)} or more"
    if target.constant:
        return f"all {len(values)} tasks have the same value, {values[0]:.4g}: there is nothing to predict"
    for fold in range(k):
        training = target.values[target.observed & (folds != fold)]
        if len(training) == target.observed.sum():
            return f"no task of fold {fold} has it: use fewer folds (probe.folds)"
        if alike(training):
            return f"all tasks but those of fold {fold} have the same value: use fewer folds (probe.folds)"
    return None


def held_out_origins(
    features: Features,
    target: Target,
    origins: Sequence[str],
    training: Training,
    *,
    values: Sequence[float] = (),
    show_progress: bool = False,
) -> np.ndarray | None:
    """Predictions [n] of each task by probes trained on the other origins, which also choose penalty and site.

    NaN for tasks without a target; None where fewer than two origins have one, or the others of one are all alike.
    """
    rows = np.flatnonzero(target.observed)
    names, group = np.unique(np.asarray(origins)[rows], return_inverse=True)
    y = target.values[rows]
    if len(names) < 2 or any(alike(y[group != each]) for each in range(len(names))):
        return None
    if any((group != each).sum() < MIN_TASKS for each in range(len(names))):
        return None
    splits = Splits.of(group, training.seed)
    if training.kind in VALIDATED and not splits.validates:
        return None
    trained = train(
        _Subset(features, rows),
        torch.as_tensor(_labels(target, rows, training)),
        splits,
        training,
        kept=0,
        values=values,
        show_progress=show_progress,
    )
    predictions = np.full(features.n, np.nan)
    predictions[rows] = _at_chosen(trained, group, 0)
    return predictions


class _Subset:
    """Some tasks of features."""

    def __init__(self, whole: Features, rows: np.ndarray) -> None:
        self._whole = whole
        self._rows = rows
        self.n, self.d_model = len(rows), whole.d_model
        place = np.full(whole.n, -1)
        place[rows] = np.arange(len(rows))
        self.order = place[whole.order][place[whole.order] >= 0]

    @property
    def sites(self) -> tuple[Site, ...]:
        return self._whole.sites

    def read(self, rows: Sequence[int], sites: slice) -> torch.Tensor:
        return self._whole.read(self._rows[np.asarray(rows)].tolist(), sites)


@dataclass(frozen=True, eq=False)
class _Columns:
    """The targets [m, T] (or [m, T, V]) of one training: the true ones, those within origins, and shuffled ones.

    ``numbers`` [m, T] are what predictions are scored on; ``shuffled[t]`` and ``within[t]`` say where those of target t
    are.
    """

    values: torch.Tensor
    numbers: np.ndarray
    within: dict[int, int]
    shuffled: dict[int, slice]


def _labels(target: Target, rows: np.ndarray, training: Training) -> np.ndarray:
    """[m, 1] numbers, or [m, 1, V] shares, to train on."""
    if training.kind == "ordinal":
        assert target.shares is not None
        return target.shares[rows][:, None]
    return target.values[rows][:, None]


def _columns(
    targets: Sequence[Target], rows: np.ndarray, origins: np.ndarray, training: Training, permutations: int
) -> _Columns:
    labels = [_labels(target, rows, training) for target in targets]
    numbers = [target.values[rows][:, None] for target in targets]
    within: dict[int, int] = {}
    shuffled: dict[int, slice] = {}
    for at, target in enumerate(targets):
        if target.binary or training.kind == "ordinal":
            continue
        left = less_origin_means(target.values[rows], origins)
        if float(np.ptp(left)) > 1e-9 * float(np.abs(target.values[rows]).max()):
            within[at] = len(numbers)
            labels.append(left[:, None])
            numbers.append(left[:, None])
    for at, target in enumerate(targets):
        rng = np.random.default_rng([training.seed, zlib.crc32(target.key.encode())])
        orders = np.stack([rng.permutation(len(rows)) for _ in range(permutations)], axis=1) if permutations else None
        start = sum(each.shape[1] for each in numbers)
        shuffled[at] = slice(start, start + permutations)
        if orders is not None:
            labels.append(labels[at][:, 0][orders])
            numbers.append(numbers[at][:, 0][orders])
    return _Columns(torch.as_tensor(np.concatenate(labels, axis=1)), np.concatenate(numbers, axis=1), within, shuffled)


def less_origin_means(values: np.ndarray, origins: np.ndarray) -> np.ndarray:
    """[m] values less the mean of their origin: what is left to explain within origins."""
    _, group = np.unique(origins, return_inverse=True)
    means = np.bincount(group, values) / np.bincount(group)
    return values - means[group]


def _at_chosen(trained: Trained, group: np.ndarray, column: int) -> np.ndarray:
    """[m] out-of-fold predictions at the site that each fit chose."""
    sites = trained.best_sites()[:-1, column]
    return trained.out_of_fold[np.arange(len(group)), sites[group], column].astype(np.float64)


def _summarised(
    target: Target,
    column: int,
    columns: _Columns,
    trained: Trained,
    rows: np.ndarray,
    folds: np.ndarray,
    sites: Sequence[Site],
    training: Training,
    draws: Resamples,
) -> CrossValidated:
    y = columns.numbers[:, column]
    predictions = _at_chosen(trained, folds, column)
    null_at = columns.shuffled[column]
    shuffled = columns.numbers[:, null_at]
    of = auc_columns if target.binary else r2_columns
    if shuffled.shape[1]:
        null = of(trained.out_of_fold[:, :, null_at], shuffled)
        at = range(null_at.start, null_at.stop)
        chosen_null = of(np.stack([_at_chosen(trained, folds, each) for each in at], axis=1)[:, None], shuffled)[0]
    else:
        null, chosen_null = np.empty((len(sites), 0)), np.empty(0)
    chosen = score(predictions[:, None], y, draws, binary=target.binary)[0]
    within = None
    if column in columns.within:
        there = columns.within[column]
        within = score(_at_chosen(trained, folds, there)[:, None], columns.numbers[:, there], draws)[0]
    best = trained.best_sites()[:, column]
    everyone = trained.chosen.shape[0] - 1
    final = trained.probe(everyone, int(best[-1]), column, target.name)
    directions = [trained.probe(everyone, site, column, target.name).direction() for site in range(len(sites))]
    pointing = [each for each in directions if each is not None]
    penalty = None
    if training.kind != "mean_difference":
        penalty = float(training.penalties[trained.chosen[everyone, best[-1], column]])
    return CrossValidated(
        target=target,
        rows=rows,
        folds=folds,
        by_site=score(trained.out_of_fold[:, :, column], y, draws, binary=target.binary),
        null=null,
        chosen_sites=best[:-1],
        predictions=predictions,
        chosen=chosen,
        chosen_null=chosen_null,
        p=p_value(target.main(chosen), chosen_null),
        within=within,
        final=final,
        final_directions=torch.stack(pointing) if pointing else None,
        final_penalty=penalty,
        by_fold=[trained.probe(fold, int(best[fold]), column, target.name) for fold in range(everyone)],
    )
