"""What a bank of probes is trained on: batches of vectors, read when they are needed, and what standardises them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from prefs.probes.features import Features
from prefs.probes.folds import Splits

# Numbers of one batch of whole-data passes, [rows, sites, d_model]: 128 MiB in float32.
BATCH_NUMBERS = 2**25
# Features of up to this many bytes are kept in memory after they were read once, for training in many epochs.
CACHE_BYTES = 2**31
# Rows whose middle and spread are the reference from which sums of squares are taken, so that they do not cancel.
REFERENCE_ROWS = 512


class ProbeBatch(NamedTuple):
    """Some tasks: ``rows`` [b] are their numbers, ``features`` [b, S, d] as stored, ``targets`` [b, T] or [b, T, V]."""

    rows: torch.Tensor
    features: torch.Tensor
    targets: torch.Tensor


class Moments(NamedTuple):
    """``mean`` and ``scale`` (population SD, 1 where a feature is constant) of each fit's training tasks.

    [F, S, d] float64; none knows anything of the tasks that its fit holds out.
    """

    mean: torch.Tensor
    scale: torch.Tensor


class ProbeData(Dataset[ProbeBatch]):
    """Vectors of some sites with the targets of the same tasks.

    Parameters
    ----------
    features
        Of n tasks.
    columns
        Which of their sites.
    targets
        [n, T] numbers, or [n, T, V] shares of V options.
    splits
        Of the n tasks.
    values
        [V] what the options are worth, rising.
    batch_size
        Rows of a batch in random order; None: as many as `BATCH_NUMBERS` allows, in the order of the store.
    seed
        Of the random order.

    Raises
    ------
    ValueError
        If the shapes do not agree or a target is not finite.
    """

    def __init__(
        self,
        features: Features,
        columns: slice,
        targets: torch.Tensor,
        splits: Splits,
        *,
        values: Sequence[float] = (),
        batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        if len(targets) != features.n or splits.n != features.n or targets.ndim not in (2, 3) or 0 in targets.shape:
            raise ValueError(
                f"vectors of {features.n} tasks do not fit targets {list(targets.shape)} and {splits.n} groups"
            )
        if not targets.isfinite().all():
            raise ValueError("a target is NaN or infinite: leave its task out")
        self.features, self.columns, self.targets, self.splits = features, columns, targets, splits
        self.values = tuple(values)
        self.sites, self.d_model = features.sites[columns], features.d_model
        self.shuffled, self.seed = batch_size is not None, seed
        self.batch_size = min(features.n, batch_size or max(1, BATCH_NUMBERS // (len(self.sites) * self.d_model)))

    def __len__(self) -> int:
        return self.features.n

    def __getitems__(self, indices: Sequence[int]) -> ProbeBatch:
        """A batch, with one read; from memory, once it was read, where there is room and it will be read often."""
        rows = torch.as_tensor(indices)
        kept = self._kept if self.shuffled else None
        vectors = self.features.read(rows.tolist(), self.columns) if kept is None else kept[rows]
        return ProbeBatch(rows, vectors, self.targets[rows])

    @cached_property
    def _kept(self) -> torch.Tensor | None:
        if 2 * len(self) * len(self.sites) * self.d_model > CACHE_BYTES:
            return None
        vectors = self.features.read(self.features.order.tolist(), self.columns)
        return torch.empty_like(vectors).index_copy_(0, torch.as_tensor(self.features.order), vectors)

    def in_order(self, rows: np.ndarray | None = None) -> DataLoader[ProbeBatch]:
        """These rows (None: all), each once; in the order of the store if they are."""
        return self._loader((self.features.order if rows is None else rows).tolist())

    def in_random_order(self) -> DataLoader[ProbeBatch]:
        """All rows, in another order each epoch."""
        generator = torch.Generator().manual_seed(self.seed)
        return self._loader(RandomSampler(self, generator=generator), generator)

    def _loader(self, sampler: RandomSampler | list[int], generator: torch.Generator | None = None) -> DataLoader:
        # The loader draws a number from PyTorch's global generator unless it is given one.
        generator = generator or torch.Generator().manual_seed(self.seed)
        return DataLoader(self, self.batch_size, sampler=sampler, collate_fn=_as_it_is, generator=generator)  # type: ignore[arg-type]

    def reference(self) -> Moments:
        """Middle and spread [1, S, d] of the first rows, whichever fits hold them out: to take sums of squares from.

        They are taken away again, but for rounding. The middle is a median: a few rows far off, which one fit may hold
        out, do not move it away from the others.
        """
        first = self.features.read(self.features.order[:REFERENCE_ROWS].tolist(), self.columns).double()
        middle = first.median(0).values
        spread = (first - middle).square().mean(0).sqrt()
        return Moments(middle[None], spread.masked_fill(spread == 0, 1.0)[None])

    def moments(self) -> Moments:
        """Mean and scale of every fit's training tasks without its validation tasks, in one pass.

        The moments of each group are taken once and those of a fit put together from its training groups, by Chan,
        Golub and LeVeque (1983), "Algorithms for computing the sample variance", equation 2.1b for k parts.
        """
        k, start = self.splits.k, self.reference()
        count = torch.zeros(k, dtype=torch.float64)
        total, squares = (torch.zeros(k, len(self.sites), self.d_model, dtype=torch.float64) for _ in range(2))
        group = torch.as_tensor(np.where(self.splits.validation, -1, self.splits.group))
        for batch in self.in_order():
            shifted = (batch.features.double() - start.mean[0]) / start.scale[0]
            for number in range(k):
                mine = group[batch.rows] == number
                count[number] += mine.sum()
                total[number] += shifted[mine].sum(0)
                squares[number] += shifted[mine].square().sum(0)
        keep = 1 - torch.eye(k + 1, k, dtype=torch.float64)
        n = (keep @ count)[:, None, None]
        mean = torch.einsum("fk,ksd->fsd", keep, total) / n
        variance = torch.einsum("fk,ksd->fsd", keep, squares) / n - mean.square()
        return Moments(start.mean + mean * start.scale, scale_of(variance, mean, int(count.sum()), unit=start.scale))


def scale_of(variance: torch.Tensor, mean: torch.Tensor, n: int, unit: torch.Tensor | float = 1.0) -> torch.Tensor:
    """The SD of features in n tasks, times the unit that they are in; 1 where `constant` says so."""
    return (variance.clamp(min=0).sqrt() * unit).masked_fill(constant(variance, mean, n), 1.0)


def constant(variance: torch.Tensor, mean: torch.Tensor, n: int) -> torch.Tensor:
    """Which features are the same in n tasks, by the mean of their squares less the square of their mean.

    Of such a feature rounding is left, which would become noise if it were divided by. Mean and variance are of numbers
    taken from `ProbeData.reference`, so a feature that varies has no mean that is many times its SD.
    """
    return variance <= 4 * n * torch.finfo(torch.float64).eps * mean.square()


def _as_it_is(batch: ProbeBatch) -> ProbeBatch:
    return batch
