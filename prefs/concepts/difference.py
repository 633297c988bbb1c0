"""Differences of means between two conditions, paired over tasks, with what is needed to say how sure they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from prefs.probes.features import Features
from prefs.probes.probe import Site
from prefs.statistics.estimates import Resamples

# Bytes of the float32 sums of one block of sites.
BLOCK_BYTES = 2**29
# Tasks read at a time.
ROWS = 512


@dataclass(frozen=True, eq=False)
class Difference:
    """What two conditions differ by at S sites: mean over tasks of (first - second).

    Attributes
    ----------
    sites
        The S sites.
    n
        Tasks that it is a mean over.
    vector
        [S, d] float32.
    direction
        [K + 1, S, d] float32: of norm 1 (0 where the means are equal), without the tasks of fold k, and at last of all.
    threshold
        [K + 1, S] float64: the middle of the two means, projected on the same directions.
    activation_norm
        [S] float64: mean Euclidean norm of the vectors of both conditions.
    halves
        [splits, S] float64: cosine of the vectors of two random halves of the tasks.
    resampled
        [1 + B, S] float64: cosine of each resample's vector with `vector`; the first is 1.
    flipped
        [P, S] float64: norms of the vectors whose tasks have their two conditions exchanged by the toss of a coin.
    """

    sites: tuple[Site, ...]
    n: int
    vector: torch.Tensor
    direction: torch.Tensor
    threshold: torch.Tensor
    activation_norm: torch.Tensor
    halves: np.ndarray
    resampled: np.ndarray
    flipped: np.ndarray

    @property
    def norm(self) -> np.ndarray:
        """[S] Euclidean norms of `vector`."""
        return self.vector.double().norm(dim=-1).numpy()


def difference_of_means(
    first: Features,
    second: Features,
    folds: np.ndarray,
    *,
    task: np.ndarray,
    splits: int,
    draws: Resamples,
    flips: int,
    seed: int,
) -> Difference:
    """The difference of means, in one pass over the vectors; memory does not grow with the number of tasks but for
    the weights [resamples, tasks].

    Every number here is a weighted sum over tasks of first - second, so all are one matrix product: means of all tasks
    and of all but a fold, of random halves, of bootstrap resamples, and with random signs (the paired randomisation
    test of Fisher 1935).

    Parameters
    ----------
    first, second
        Vectors of the same n tasks in the same order, at the same sites.
    folds
        [n] from 0 to K - 1: which tasks are held out together.
    task
        [n] which task a row is, as `prefs.probes.folds.tasks_of` numbers them: rows of one are in one fold and half and
        have their conditions exchanged together.
    splits, flips
        How many random halves, and exchanges of conditions.
    draws
        Bootstrap resamples of the n tasks.
    seed
        Of the halves and flips.

    Raises
    ------
    ValueError
        If the two do not fit each other, or there are fewer than 2 tasks.
    NotFinite
        If a vector holds a NaN or an infinity.
    """
    n, sites = first.n, first.sites
    if (second.n, second.sites, second.d_model) != (n, sites, first.d_model) or len(folds) != n:
        raise ValueError("the two conditions must have vectors of the same tasks at the same sites")
    if n < 2 or not task.any():
        raise ValueError(f"{min(n, 1)} tasks have no halves: give 2 or more")
    k = int(folds.max()) + 1
    without_fold = np.stack([*(folds != fold for fold in range(k)), np.ones(n, dtype=bool)]).astype(np.float64)
    # Half of the tasks (where n is odd, one more in the other half).
    count = int(task.max()) + 1
    orders = np.random.default_rng([seed, 0]).permuted(np.tile(np.arange(count), (splits, 1)), axis=1)
    half = (orders < count // 2)[:, task].astype(np.float64)
    signs = np.random.default_rng([seed, 1]).choice([-1.0, 1.0], size=(flips, count))[:, task]
    weights = np.concatenate([without_fold, half, 1 - half, draws.times.astype(np.float64), signs])
    weights /= np.abs(weights).sum(axis=1, keepdims=True)
    ends = np.cumsum([k + 1, splits, splits, len(draws.times)])
    w = torch.from_numpy(weights).float()

    width = max(1, BLOCK_BYTES // (4 * len(w) * first.d_model))
    blocks = []
    for start in range(0, len(sites), width):
        block = slice(start, min(start + width, len(sites)))
        count = block.stop - start
        sums = torch.zeros(len(w), count, first.d_model)
        middles = torch.zeros(k + 1, count, first.d_model)
        norms = torch.zeros(count, dtype=torch.float64)
        for rows in _chunks(first.order):
            a, b = (features.read(rows.tolist(), block).float() for features in (first, second))
            weight = w[:, torch.from_numpy(rows)]
            sums += torch.einsum("rn,nsd->rsd", weight, a - b)
            middles += torch.einsum("rn,nsd->rsd", weight[: k + 1], (a + b) / 2)
            norms += (a.norm(dim=-1).double() + b.norm(dim=-1).double()).sum(dim=0)
        by_fold, one, other, resampled, flipped = torch.tensor_split(sums.double(), ends.tolist())
        lengths = by_fold.norm(dim=-1, keepdim=True)
        direction = torch.where(lengths > 0, by_fold / lengths.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
        threshold = (direction * middles.double()).sum(dim=-1)
        halves, resampled = _cosine(one, other), _cosine(resampled, by_fold[-1:])
        vector = by_fold[-1:].float()
        blocks.append(
            (vector, direction.float(), threshold, norms[None] / (2 * n), halves, resampled, flipped.norm(dim=-1))
        )
    vector, direction, threshold, activation_norm, *arrays = (
        torch.cat(part, dim=1) for part in zip(*blocks, strict=True)
    )
    halves, resampled, flipped = (array.numpy() for array in arrays)
    return Difference(sites, n, vector[0], direction, threshold, activation_norm[0], halves, resampled, flipped)


def shuffled_vector(first: Features, second: Features, site: Site, seed: int) -> torch.Tensor:
    """[d] float32: the vector at a site whose tasks have their conditions exchanged by the toss of a coin.

    As many tasks as can be are exchanged evenly: half of them keep their conditions, so that what the conditions differ
    by cancels, and what is left is the tasks' own noise.
    """
    column = first.sites.index(site)
    signs = np.ones(first.n)
    signs[np.random.default_rng(seed).permutation(first.n)[: first.n // 2]] = -1
    total = torch.zeros(first.d_model, dtype=torch.float64)
    for rows in _chunks(first.order):
        block = slice(column, column + 1)
        a, b = (features.read(rows.tolist(), block)[:, 0].double() for features in (first, second))
        total += torch.from_numpy(signs[rows]) @ (a - b)
    return (total / first.n).float()


def project(features: Features, difference: Difference, fit: np.ndarray) -> np.ndarray:
    """[n, S] float64: how far each task's vector lies along the directions from the middle of the two means.

    Parameters
    ----------
    features
        Vectors of n tasks at the difference's sites.
    fit
        [n] which of the difference's directions is meant for each task: a fold, which did not see it, or K.

    Raises
    ------
    NotFinite
        If a vector holds a NaN or an infinity.
    """
    if features.sites != difference.sites:
        raise ValueError("the vectors must be at the difference's sites")
    along = np.empty((features.n, len(features.sites)))
    width = max(1, BLOCK_BYTES // (4 * ROWS * features.d_model))
    for start in range(0, len(features.sites), width):
        block = slice(start, start + width)
        for rows in _chunks(features.order):
            vectors = features.read(rows.tolist(), block).float()
            for fold in np.unique(fit[rows]):
                chosen = fit[rows] == fold
                direction = difference.direction[fold, block].double()
                projected = torch.einsum("nsd,sd->ns", vectors[torch.from_numpy(chosen)].double(), direction)
                along[rows[chosen], block] = (projected - difference.threshold[fold, block]).numpy()
    zero = ~difference.direction.any(dim=-1).numpy()
    along[zero[fit]] = np.nan
    return along


def _chunks(order: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(order), ROWS):
        yield order[start : start + ROWS]


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[..., S] of [..., S, d], NaN where one is zero."""
    lengths = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(lengths > 0, (a * b).sum(dim=-1) / lengths, torch.nan).clamp(-1, 1)
