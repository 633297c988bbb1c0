"""What a bank of probes is trained on, as Lightning wants it: batches of vectors, read when they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler

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


@dataclass(frozen=True)
class Moments:
    """``mean`` and ``scale`` (population SD, 1 where a feature is constant) of each fit's training tasks.

    [F, S, d] float64; none knows anything of the tasks that its fit holds out.
    """

    mean: torch.Tensor
    scale: torch.Tensor


class ProbeData(lightning.LightningDataModule):
    """Vectors of some sites with the targets of the same tasks.

    Parameters
    ----------
    features
        Of n tasks.
    sites
        Which of their sites.
    targets
        [n, T] numbers, or [n, T, V] shares of V options.
    splits
        Of the n tasks.
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
        sites: slice,
        targets: torch.Tensor,
        splits: Splits,
        *,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if len(targets) != features.n or splits.n != features.n or targets.ndim not in (2, 3) or 0 in targets.shape:
            raise ValueError(
                f"vectors of {features.n} tasks do not fit targets {list(targets.shape)} and {splits.n} groups"
            )
        if not targets.isfinite().all():
            raise ValueError("a target is NaN or infinite: leave its task out")
        self.features = features
        self.sites = sites
        self.targets = targets
        self.splits = splits
        self.d_model = features.d_model
        self.count = len(features.sites[sites])
        whole = features.n * self.count * self.d_model
        rows = max(1, BATCH_NUMBERS // (self.count * self.d_model))
        self._shuffled = batch_size is not None
        self._rows = _Rows(features, sites, targets, cached=self._shuffled and 2 * whole <= CACHE_BYTES)
        self._batch_size = min(features.n, rows if batch_size is None else batch_size)
        self._seed = seed

    def train_dataloader(self) -> DataLoader[ProbeBatch]:
        """All tasks, each once; a bank leaves out for each fit what this holds out.

        Passes for sums are shared out here among devices: Lightning's own sampler repeats tasks to even out shares.
        """
        if not self._shuffled:
            rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
            return self._loader(_InOrder(self.features.order[rank::world]))
        generator = torch.Generator().manual_seed(self._seed)
        return self._loader(RandomSampler(self._rows, generator=generator), generator)

    def val_dataloader(self) -> DataLoader[ProbeBatch]:
        """The validation tasks."""
        order = self.features.order
        return self._loader(_InOrder(order[self.splits.validation[order]]))

    def predict_dataloader(self) -> DataLoader[ProbeBatch]:
        """All tasks in the order of the store."""
        return self._loader(_InOrder(self.features.order))

    def _loader(self, sampler: Sampler[int], generator: torch.Generator | None = None) -> DataLoader[ProbeBatch]:
        # The loader draws a number from PyTorch's global generator unless it is given one.
        return DataLoader(
            self._rows,
            batch_size=self._batch_size,
            sampler=sampler,
            collate_fn=_as_it_is,  # type: ignore[arg-type]
            generator=generator or torch.Generator().manual_seed(self._seed),
        )

    def reference(self) -> Moments:
        """Middle and spread [1, S, d] of the first rows, whichever fits hold them out: to take sums of squares from.

        They are taken away again, but for rounding. The middle is a median: a few rows far off, which one fit may hold
        out, do not move it away from the others.
        """
        first = self.features.read(self.features.order[:REFERENCE_ROWS].tolist(), self.sites).double()
        middle = first.median(0).values
        spread = (first - middle).square().mean(0).sqrt()
        return Moments(middle[None], spread.masked_fill(spread == 0, 1.0)[None])

    def moments(self, *, without_validation: bool) -> Moments:
        """Mean and scale of every fit's training tasks, in one pass.

        The moments of each group are taken once and those of a fit put together from its training groups, by Chan,
        Golub and LeVeque (1983), "Algorithms for computing the sample variance", equation 2.1b for k parts.
        """
        k, shape = self.splits.k, (self.count, self.d_model)
        start = self.reference()
        count = torch.zeros(k, dtype=torch.float64)
        total, squares = (torch.zeros(k, *shape, dtype=torch.float64) for _ in range(2))
        group, left_out = torch.as_tensor(self.splits.group), torch.as_tensor(self.splits.validation)
        for batch in self.predict_dataloader():
            shifted = (batch.features.double() - start.mean[0]) / start.scale[0]
            for each in range(k):
                mine = group[batch.rows] == each
                if without_validation:
                    mine &= ~left_out[batch.rows]
                count[each] += mine.sum()
                total[each] += shifted[mine].sum(0)
                squares[each] += shifted[mine].square().sum(0)
        keep = 1 - torch.eye(k + 1, k, dtype=torch.float64)
        n = (keep @ count)[:, None, None]
        mean = torch.einsum("fk,ksd->fsd", keep, total) / n
        variance = torch.einsum("fk,ksd->fsd", keep, squares) / n - mean.square()
        scale = variance.clamp(min=0).sqrt() * start.scale
        scale = scale.masked_fill(constant(variance, mean, int(count.sum())), 1.0)
        return Moments(start.mean + mean * start.scale, scale)


def constant(variance: torch.Tensor, mean: torch.Tensor, n: int) -> torch.Tensor:
    """Which features are the same in n tasks, by the mean of their squares less the square of their mean.

    Of such a feature rounding is left, which would become noise if it were divided by. Mean and variance are of numbers
    taken from `ProbeData.reference`, so a feature that varies has no mean that is many times its SD.
    """
    return variance <= 4 * n * torch.finfo(torch.float64).eps * mean.square()


class _Rows(Dataset[ProbeBatch]):
    """The tasks. A batch is fetched with one read; kept in memory from the first read on where there is room."""

    def __init__(self, features: Features, sites: slice, targets: torch.Tensor, *, cached: bool) -> None:
        self._features = features
        self._sites = sites
        self._targets = targets
        self._cached = cached
        self._kept: torch.Tensor | None = None

    def __len__(self) -> int:
        return self._features.n

    def __getitem__(self, index: int) -> ProbeBatch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> ProbeBatch:
        rows = torch.as_tensor(indices)
        if not self._cached:
            return ProbeBatch(rows, self._features.read(rows.tolist(), self._sites), self._targets[rows])
        if self._kept is None:
            order = self._features.order
            found = self._features.read(order.tolist(), self._sites)
            self._kept = torch.empty_like(found)
            self._kept[order] = found
        return ProbeBatch(rows, self._kept[rows], self._targets[rows])


class _InOrder(SequentialSampler):
    """The rows of a given order."""

    def __init__(self, order: np.ndarray) -> None:
        self._order = order.tolist()

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self):
        return iter(self._order)


def _as_it_is(batch: ProbeBatch) -> ProbeBatch:
    return batch
