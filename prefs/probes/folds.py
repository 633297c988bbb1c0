"""Which tasks are held out together: k folds over tasks, each with the same mix of origins."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import numpy as np
from sklearn.model_selection import KFold, StratifiedKFold

log = logging.getLogger(__name__)


def assign_folds(keys: Sequence[str], strata: Sequence[str], folds: int, seed: int) -> np.ndarray:
    """Give every task a fold.

    A task's fold depends on the set of tasks and the seed, never on their order. Rows that share a key are one task
    and share its fold, so that a task is never both trained on and held out.

    Parameters
    ----------
    keys
        [n], what identifies the task of each row.
    strata
        [n], the task's origin; each fold gets its share of every origin. Where an origin has fewer tasks than there
        are folds that cannot be, so the folds are cut without regard to origin and a warning says why.
    folds
        Number of folds, 2 or more.
    seed
        Of the shuffle.

    Returns
    -------
    numpy.ndarray
        [n] int64, from 0 to folds - 1.

    Raises
    ------
    ValueError
        If there are fewer than 2 folds, fewer tasks than folds, or a task has two origins.
    """
    if len(keys) != len(strata):
        raise ValueError(f"every task needs one origin: got {len(keys)} tasks and {len(strata)} origins")
    if folds < 2:
        raise ValueError(f"folds={folds}: one fold is held out while the others train, so give 2 or more")
    origin_of = dict(zip(keys, strata, strict=True))
    if len(origin_of) < folds:
        raise ValueError(f"{len(origin_of)} tasks cannot fill {folds} folds: give more tasks or fewer folds")
    for key, origin in zip(keys, strata, strict=True):
        if origin_of[key] != origin:
            raise ValueError(f"task {key!r} has two origins, {origin!r} and {origin_of[key]!r}: give each task one")

    tasks = sorted(origin_of)
    origins = [origin_of[task] for task in tasks]
    fold_of: dict[str, int] = {}
    for fold, (_, held_out) in enumerate(_splitter(origins, folds, seed).split(np.zeros(len(tasks)), origins)):
        fold_of.update((tasks[at], fold) for at in held_out)
    return np.array([fold_of[key] for key in keys], dtype=np.int64)


def _splitter(origins: Sequence[str], folds: int, seed: int) -> StratifiedKFold | KFold:
    rarest, count = min(sorted(Counter(origins).items()), key=lambda item: item[1])
    if count >= folds:
        return StratifiedKFold(folds, shuffle=True, random_state=seed)
    log.warning("folds are not stratified by origin: %s has %d tasks, fewer than %d folds", rarest, count, folds)
    return KFold(folds, shuffle=True, random_state=seed)
