"""What probes are trained on: captured vectors, targets and folds, checked once, as one full batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import lightning
import torch
from torch.utils.data import DataLoader, Dataset


class ProbeBatch(NamedTuple):
    """All the tasks at once.

    ``features`` [n, L, d]; ``targets`` [T, n] with 0 where a target is missing; ``train`` [T, F, n] is 1 where fit f of
    target t trains on the task and 0 where it does not. All float64 once on the device.
    """

    features: torch.Tensor
    targets: torch.Tensor
    train: torch.Tensor


@dataclass(frozen=True)
class Moments:
    """Of the training tasks of each fit, for standardising with: none knows anything of its held-out tasks.

    ``mean`` and ``scale`` [T, L, F, d] of the features (``scale`` is the population SD, 1 where a feature is constant);
    ``target_mean`` [T, F], NaN where a target has no training task.
    """

    mean: torch.Tensor
    scale: torch.Tensor
    target_mean: torch.Tensor


class ProbeData(lightning.LightningDataModule):
    """Captured vectors with their targets and folds; fit f of the k + 1 holds out fold f, and the last holds out none.

    Parameters
    ----------
    features
        [n, L, d], bfloat16 or float32 (any floating type), never copied here.
    targets
        [n, T]; NaN where a task has no such target, which leaves the task out for that target.
    folds
        [n], integers from 0 to k - 1, with k of 2 or more.
    seed
        Of the loader. There is one batch, so it has no order to draw; the loader takes a number from PyTorch's global
        generator unless it has one of its own.

    Raises
    ------
    ValueError
        If the shapes do not agree, a fold is empty, a feature is NaN or infinite, or a target is infinite.
    """

    def __init__(self, features: torch.Tensor, targets: torch.Tensor, folds: torch.Tensor, *, seed: int = 0) -> None:
        super().__init__()
        _check(features, targets, folds)
        self.features = features
        self.folds = folds.long()
        self.k = int(folds.max()) + 1
        observed = ~targets.isnan().T
        self.targets = targets.T.double().masked_fill(~observed, 0.0)
        held_out = torch.stack([folds == fold for fold in range(self.k)] + [torch.zeros_like(folds, dtype=torch.bool)])
        self.train = (observed[:, None, :] & ~held_out[None]).double()
        self._generator = torch.Generator().manual_seed(seed)

    def train_dataloader(self) -> DataLoader[ProbeBatch]:
        """One batch with everything: the optimiser needs the whole objective, and a copy of it for nothing."""
        whole = _Whole(ProbeBatch(self.features, self.targets, self.train))
        return DataLoader(whole, batch_size=None, generator=self._generator)

    def on_after_batch_transfer(self, batch: ProbeBatch, dataloader_idx: int) -> ProbeBatch:
        """Widen on the device, where it is cheap, so that what travels is the captured type."""
        return batch._replace(features=batch.features.double())

    def moments(self) -> Moments:
        """Mean and SD of every fit's training tasks, from one pass over the features for each target.

        The moments of each fold are taken once and those of a fit put together from its training folds, by
        Chan, Golub and LeVeque (1983), "Algorithms for computing the sample variance", equation 2.1b for k parts.
        """
        parts = [self._target_moments(target) for target in range(len(self.targets))]
        count = self.train.sum(-1)
        target_mean = (self.train * self.targets[:, None, :]).sum(-1) / count
        mean, scale = (torch.stack(part) for part in zip(*parts, strict=True))
        return Moments(mean=mean, scale=scale, target_mean=target_mean)

    def _target_moments(self, target: int) -> tuple[torch.Tensor, torch.Tensor]:
        everyone = self.train[target, -1].bool()
        folds = [self.features[everyone & (self.folds == fold)].double() for fold in range(self.k)]
        counts = torch.tensor([float(len(rows)) for rows in folds], dtype=torch.float64)
        means = torch.stack([rows.sum(0) / max(len(rows), 1) for rows in folds])
        squares = torch.stack([(rows - mean).square().sum(0) for rows, mean in zip(folds, means, strict=True)])

        fit_means, fit_scales = [], []
        for fit in range(self.k + 1):
            kept = [fold for fold in range(self.k) if fold != fit]
            weight, n = counts[kept, None, None], counts[kept].sum().clamp(min=1)
            mean = (weight * means[kept]).sum(0) / n
            variance = (squares[kept] + weight * (means[kept] - mean).square()).sum(0) / n
            sd = variance.sqrt()
            # A constant feature has an SD of rounding error and not of 0: dividing by it would make noise of it.
            constant = sd <= n * torch.finfo(torch.float64).eps * mean.abs()
            fit_means.append(mean)
            fit_scales.append(sd.masked_fill(constant, 1.0))
        return torch.stack(fit_means, dim=1), torch.stack(fit_scales, dim=1)


class _Whole(Dataset[ProbeBatch]):
    """A data set whose one item is all of it."""

    def __init__(self, batch: ProbeBatch) -> None:
        self._batch = batch

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> ProbeBatch:
        return self._batch


def _check(features: torch.Tensor, targets: torch.Tensor, folds: torch.Tensor) -> None:
    if features.ndim != 3 or not features.is_floating_point() or 0 in features.shape:
        got = f"{list(features.shape)} {features.dtype}"
        raise ValueError(f"features must be [tasks, layers, d_model] floating-point numbers, at least one; got {got}")
    n = len(features)
    if targets.ndim != 2 or len(targets) != n or targets.shape[1] == 0:
        raise ValueError(f"targets must be [{n} tasks, targets], as features have {n} tasks; got {list(targets.shape)}")
    if folds.shape != (n,) or folds.is_floating_point():
        raise ValueError(f"folds must be [{n}] integers, one a task; got {list(folds.shape)} {folds.dtype}")
    present = folds.unique().tolist()
    if len(present) < 2 or present != list(range(len(present))):
        raise ValueError(f"folds must be numbered 0, 1, ... with a task in each and 2 or more of them; got {present}")
    # A finite sum would do as a quick test were it not for overflow, so look at one row at a time and save the memory.
    for row in range(n):
        finite = features[row].isfinite().all(-1)
        if not finite.all():
            layer = int((~finite).nonzero()[0])
            raise ValueError(
                f"features of row {row}, layer index {layer} have a NaN or infinity: capture that row again"
            )
    if targets.isinf().any():
        row, target = targets.isinf().nonzero()[0].tolist()
        raise ValueError(f"target index {target} of row {row} is infinite: give a number, or NaN for none")
