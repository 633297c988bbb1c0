"""Cross-validated probes: what they predict of tasks they never saw, with penalty and layer chosen by the others."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from prefs.config import ProbeConfig
from prefs.probes.features import Features
from prefs.probes.folds import Splits, resampled, shuffled, tasks_of
from prefs.probes.outcome import MIN_TASKS, CrossValidated, Nothing
from prefs.probes.scores import auc_columns, p_value, r2_columns, score
from prefs.probes.targets import Target, alike
from prefs.probes.train import Trained, bank_class, train

TOO_FEW = "too few to validate with some of them in every fold: use fewer folds (probe.folds), or probe=ridge"


def cross_validate(
    features: Features,
    targets: Sequence[Target],
    folds: np.ndarray,
    origins: Sequence[str],
    config: ProbeConfig,
    *,
    bootstrap: int,
    same: np.ndarray | None = None,
    values: Sequence[float] = (),
    show_progress: bool = False,
) -> list[CrossValidated | Nothing]:
    """Cross-validate probes of all targets at all sites.

    Shuffled targets (``config.controls.permutations`` of each, over its tasks) are trained on together with the true
    one, and choose their own penalties and sites.

    Parameters
    ----------
    features
        Of n tasks.
    targets
        Each of the n tasks.
    folds, origins
        [n].
    config
        The kind of probe and how it is trained.
    bootstrap
        Resamples of tasks for intervals.
    same
        [n] alike for tasks of one prompt, which are in one fold.
    values
        What the options are worth, rising.
    """
    outcomes: dict[int, CrossValidated | Nothing] = {}
    together: dict[bytes, list[int]] = {}
    for number, target in enumerate(targets):
        if reason := unusable(target, folds):
            outcomes[number] = Nothing(target, reason)
        else:
            together.setdefault(target.observed.tobytes(), []).append(number)
    # Targets of the same tasks share passes, sums and decompositions.
    for members in together.values():
        rows = np.flatnonzero(targets[members[0]].observed)
        task = np.arange(len(rows)) if same is None else tasks_of(same[rows])
        splits = Splits.draw(folds[rows], config.seed, task)
        if bank_class(config).validates and not splits.validates:
            outcomes |= {
                number: Nothing(targets[number], f"{len(rows)} tasks have it, {TOO_FEW}") for number in members
            }
            continue
        some = [targets[number] for number in members]
        shared = {"values": values, "show_progress": show_progress}
        made = _validated(features, some, rows, task, splits, np.asarray(origins)[rows], config, bootstrap, shared)
        outcomes |= zip(members, made, strict=True)
    return [outcomes[number] for number in range(len(targets))]


def unusable(target: Target, folds: np.ndarray) -> str | None:
    """Why no probe can be cross-validated for a target; None where one can."""
    values = target.values[target.observed]
    k = int(folds.max()) + 1
    if len(values) < max(k, MIN_TASKS):
        return f"{len(values)} tasks have it, and {k} folds (probe.folds) need {max(k, MIN_TASKS)} or more"
    if alike(values):
        return f"all {len(values)} tasks have the same value, {values[0]:.4g}: there is nothing to predict"
    for fold in range(k):
        training = target.values[target.observed & (folds != fold)]
        if len(training) == len(values):
            return f"no task of fold {fold} has it: use fewer folds (probe.folds)"
        if alike(training):
            return f"all tasks but those of fold {fold} have the same value: use fewer folds (probe.folds)"
    return None


def held_out_origins(
    features: Features,
    target: Target,
    origins: Sequence[str],
    config: ProbeConfig,
    *,
    same: np.ndarray | None = None,
    values: Sequence[float] = (),
    show_progress: bool = False,
) -> np.ndarray | None:
    """Predictions [n] of each task by probes trained on the other origins, which also choose penalty and site.

    NaN for tasks without a target, and for those that are the `same` [n] as one of another origin; None where fewer
    than two origins have one, or the others of one are too few or all alike.
    """
    names = np.asarray(origins)
    rows = np.flatnonzero(target.observed & ~_in_several(names, same))
    names, group = np.unique(names[rows], return_inverse=True)
    others = [target.values[rows][group != origin] for origin in range(len(names))]
    if len(names) < 2 or any(alike(y) or len(y) < MIN_TASKS for y in others):
        return None
    kind, splits = bank_class(config), Splits.draw(group, config.seed, None if same is None else same[rows])
    if kind.validates and not splits.validates:
        return None
    labels = torch.as_tensor(_labels(target, kind.on_shares)[rows][:, None])
    trained = train(features.only(rows), labels, splits, config, kept=0, values=values, show_progress=show_progress)
    predictions = np.full(features.n, np.nan)
    predictions[rows] = _at_chosen(trained, group, slice(0, 1))[:, 0]
    return predictions


def _in_several(origins: np.ndarray, same: np.ndarray | None) -> np.ndarray:
    """[n] bool: the tasks that are the same as one of another origin."""
    if same is None:
        return np.zeros(len(origins), dtype=bool)
    origins_of: dict[str, set[str]] = {}
    for task, origin in zip(same.tolist(), origins.tolist(), strict=True):
        origins_of.setdefault(task, set()).add(origin)
    return np.array([len(origins_of[task]) > 1 for task in same.tolist()])


def less_origin_means(values: np.ndarray, origins: np.ndarray) -> np.ndarray:
    """[m] values less the mean of their origin: what is left to explain within origins."""
    _, group = np.unique(origins, return_inverse=True)
    return values - (np.bincount(group, values) / np.bincount(group))[group]


def _labels(target: Target, shares: bool) -> np.ndarray:
    """[n] numbers, or [n, V] shares, to train on."""
    if not shares:
        return target.values
    assert target.shares is not None
    return target.shares


def _at_chosen(trained: Trained, group: np.ndarray, columns: slice) -> np.ndarray:
    """[m, T] out-of-fold predictions of some targets, each at the site that the task's fit chose for it."""
    sites = trained.best_sites()[:-1, columns][group]
    predictions = trained.out_of_fold[:, :, columns]
    return np.take_along_axis(predictions, sites[:, None], axis=1)[:, 0].astype(np.float64)


def _validated(
    features: Features,
    targets: Sequence[Target],
    rows: np.ndarray,
    task: np.ndarray,
    splits: Splits,
    origins: np.ndarray,
    config: ProbeConfig,
    bootstrap: int,
    shared: dict[str, Any],
) -> list[CrossValidated]:
    """Targets of the same tasks: one training, of the true ones, those within origins, and shuffled ones."""
    shares, permutations, m = bank_class(config).on_shares, config.controls.permutations, len(rows)
    # What is trained on, [m, columns] or [m, columns, V], and what predictions are scored on, [m, columns].
    labels = [_labels(target, shares)[rows][:, None] for target in targets]
    numbers = [target.values[rows][:, None] for target in targets]
    within: dict[int, slice] = {}
    for number, target in enumerate(targets):
        left = less_origin_means(target.values[rows], origins)
        # What is left of a target that is alike within origins is rounding.
        if not (target.binary or shares) and np.ptp(left) > 1e-9 * np.abs(target.values[rows]).max():
            within[number] = slice(len(numbers), len(numbers) + 1)
            labels.append(left[:, None])
            numbers.append(left[:, None])
    first = len(numbers)
    for number, target in enumerate(targets):
        rng = np.random.default_rng([config.seed, zlib.crc32(target.key.encode())])
        orders = np.array([shuffled(task, rng) for _ in range(permutations)], dtype=np.int64).reshape(-1, m).T
        labels.append(labels[number][:, 0][orders])
        numbers.append(numbers[number][:, 0][orders])
    y = np.concatenate(numbers, axis=1)
    trained = train(
        features.only(rows),
        torch.as_tensor(np.concatenate(labels, axis=1)),
        splits,
        config,
        kept=len(targets),
        **shared,
    )
    folds, best, last = splits.group, trained.best_sites(), splits.k
    draws = resampled(task, bootstrap, config.seed)
    results = []
    for number, target in enumerate(targets):
        columns = auc_columns if target.binary else r2_columns
        nulls, final = (
            slice(first + number * permutations, first + (number + 1) * permutations),
            int(best[last, number]),
        )
        predictions = _at_chosen(trained, folds, slice(number, number + 1))
        (chosen,) = score(predictions, y[:, number], draws, binary=target.binary)
        chosen_null = columns(_at_chosen(trained, folds, nulls)[:, None], y[:, nulls])[0]
        scored_within = None
        if number in within:
            left = within[number]
            (scored_within,) = score(_at_chosen(trained, folds, left), y[:, left][:, 0], draws)
        directions = [trained.probe(last, site, number, target.name).direction() for site in range(len(features.sites))]
        pointing = [direction for direction in directions if direction is not None]
        penalty = float(trained.penalty[last, final, number])
        results.append(
            CrossValidated(
                target=target,
                rows=rows,
                folds=folds,
                by_site=score(trained.out_of_fold[:, :, number], y[:, number], draws, binary=target.binary),
                null=columns(trained.out_of_fold[:, :, nulls], y[:, nulls]),
                chosen_sites=best[:last, number],
                predictions=predictions[:, 0],
                chosen=chosen,
                chosen_null=chosen_null,
                p=p_value(target.main(chosen), chosen_null),
                within=scored_within,
                final=trained.probe(last, final, number, target.name),
                final_directions=torch.stack(pointing) if pointing else None,
                final_penalty=None if np.isnan(penalty) else penalty,
                by_fold=[trained.probe(fold, int(best[fold, number]), number, target.name) for fold in range(last)],
            )
        )
    return results
