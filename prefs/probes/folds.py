"""Which tasks are held out together: k folds over tasks with the same mix of origins, or one origin at a time."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prefs.statistics.estimates import Resamples

log = logging.getLogger(__name__)

# Of the training tasks of a fit, the share that validates it where training has no closed form.
VALIDATION_SHARE = 0.2


@dataclass(frozen=True, eq=False)
class Splits:
    """Which tasks each fit trains on: fit f of the first k holds out group f, and the last, fit k, holds out none.

    Attributes
    ----------
    group
        [n] int64, from 0 to k - 1: folds, or origins.
    validation
        [n] bool: tasks that choose (when to stop, which penalty, which layer) in the fits that do not hold them out.
    """

    group: np.ndarray
    validation: np.ndarray

    @classmethod
    def draw(cls, group: np.ndarray, seed: int, same: np.ndarray | None = None) -> Splits:
        """Splits by these groups, with a share of each for validation, drawn by the seed.

        Rows that share a value of `same` [n] (tasks of one prompt) validate together, or train.

        Raises
        ------
        ValueError
            If the groups are not numbered 0, 1, ... with a task in each, or are fewer than 2.
        """
        group = np.asarray(group)
        if group.ndim != 1 or not np.issubdtype(group.dtype, np.integer):
            raise ValueError(f"groups must be [tasks] integers; got {list(group.shape)} {group.dtype}")
        present = np.unique(group).tolist()
        if len(present) < 2 or present != list(range(len(present))):
            raise ValueError(f"groups must be numbered 0, 1, ... with a task in each and 2 or more; got {present}")
        validation = np.zeros(len(group), dtype=bool)
        rng = np.random.default_rng(seed)
        members = [np.flatnonzero(group == number) for number in present]
        # Groups of one have no share to give: together they are as one more group.
        alone = np.concatenate([np.zeros(0, dtype=np.int64), *(rows for rows in members if len(rows) == 1)])
        for some in (*(rows for rows in members if len(rows) > 1), alone):
            rows = rng.permutation(some)
            # Rounded up, so that a small group validates too; never all of it.
            validation[rows[: max(0, min(math.ceil(VALIDATION_SHARE * len(rows)), len(rows) - 1))]] = True
        if same is not None:
            _, first, which = np.unique(same, return_index=True, return_inverse=True)
            validation = validation[first[which]]
        return cls(group.astype(np.int64), validation)

    @property
    def k(self) -> int:
        return int(self.group.max()) + 1

    @property
    def fits(self) -> int:
        return self.k + 1

    @property
    def n(self) -> int:
        return len(self.group)

    def training(self, fit: int) -> np.ndarray:
        """[n] bool: the tasks that a fit does not hold out; its validation tasks are among them."""
        return self.group != fit

    @property
    def validates(self) -> bool:
        """Whether every fit has tasks to validate with, and others to train on."""
        fits = map(self.training, range(self.fits))
        return all(0 < self.validation[training].sum() < training.sum() for training in fits)


def tasks_of(same: np.ndarray) -> np.ndarray:
    """[n] int64, 0, 1, ...: the task of each row, numbered by first appearance; rows with one value are one task."""
    _, first, which = np.unique(same, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[which]


def shuffled(task: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[n] an order of rows in which tasks (as `tasks_of` numbers them) have exchanged places with others of as many
    rows."""
    size, order = np.bincount(task), np.empty(len(task), dtype=np.int64)
    for count in np.unique(size):
        members = np.flatnonzero(size[task] == count)
        rows = members[np.argsort(task[members], kind="stable")].reshape(-1, count)
        order[rows] = rows[rng.permutation(len(rows))]
    return order


def resampled(task: np.ndarray, resamples: int, seed: int) -> Resamples:
    """Resamples of tasks (as `tasks_of` numbers them), each with all its rows."""
    return Resamples(Resamples.draw(int(task.max(initial=-1)) + 1, resamples, seed).times[:, task])


def assign_folds(keys: Sequence[str], strata: Sequence[str], folds: int, seed: int) -> np.ndarray:
    """Give every task a fold, [n] int64 from 0 to folds - 1.

    A task's fold depends on the set of tasks and the seed, never on their order. Rows that share a key are one task
    and share its fold, so that a task is never both trained on and held out.

    Parameters
    ----------
    keys
        [n], what identifies the task of each row, as `prefs.data.task.same_tasks` gives it.
    strata
        [n], the task's origin (of several the first by name); each fold gets its share of every origin. Where an
        origin has fewer tasks than there are folds that cannot be, so the folds are cut without regard to origin and a
        warning says why.
    folds
        Number of folds, 2 or more.
    seed
        Of the shuffle.

    Raises
    ------
    ValueError
        If there are fewer than 2 folds, or fewer tasks than folds.
    """
    # Imported only now: it takes a quarter of a second, and a job that finds its probes cuts no folds.
    from sklearn.model_selection import KFold, StratifiedKFold

    if len(keys) != len(strata):
        raise ValueError(f"every task needs one origin: got {len(keys)} tasks and {len(strata)} origins")
    if folds < 2:
        raise ValueError(f"folds={folds}: one fold is held out while the others train, so give 2 or more")
    origin_of = dict(sorted(zip(keys, strata, strict=True), reverse=True))
    if len(origin_of) < folds:
        raise ValueError(f"{len(origin_of)} tasks cannot fill {folds} folds: give more tasks or fewer folds")
    tasks = sorted(origin_of)
    origins = [origin_of[task] for task in tasks]
    rarest, count = min(sorted(Counter(origins).items()), key=lambda item: item[1])
    if count < folds:
        log.warning("folds are not stratified by origin: %s has %d tasks, fewer than %d folds", rarest, count, folds)
    splitter = (StratifiedKFold if count >= folds else KFold)(folds, shuffle=True, random_state=seed)
    fold_of = {
        tasks[row]: fold
        for fold, (_, held_out) in enumerate(splitter.split(np.zeros(len(tasks)), origins))
        for row in held_out
    }
    return np.array([fold_of[key] for key in keys], dtype=np.int64)
