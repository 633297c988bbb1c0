"""Difference of means: the direction from tasks rated low to tasks rated high, with a line fitted along it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from prefs.config import ProbeConfig
from prefs.probes.bank import ProbeBank
from prefs.probes.data import ProbeBatch, ProbeData


class MeanDifferenceBank(ProbeBank):
    """The mean of the tasks above the target's median less that of the others, in standardised features.

    Trained in two passes, without the validation tasks: the first takes the means, the second fits rating = bias +
    slope * projection by least squares. The squared error on the validation tasks compares sites.
    """

    epochs = 2
    median: torch.Tensor

    def __init__(self, data: ProbeData, config: ProbeConfig) -> None:
        super().__init__(data, config)
        self.standardise(data.moments())
        fits, count, d = self.mean.shape
        medians = []
        for fit in range(fits):
            y = data.targets[torch.as_tensor(self.splits.training(fit) & ~self.splits.validation)].double()
            # NumPy's, as PyTorch takes quantiles of 2^24 numbers at most.
            median = torch.from_numpy(np.median(y.numpy(), axis=0))
            # What lies on the median is low, unless nothing is higher: a target of 0 and 1 is cut between them.
            below = median - torch.finfo(torch.float64).eps * median.abs().clamp(min=1)
            medians.append(torch.where((y > median).any(0), median, below))
        self._buffers_of(median=torch.stack(medians))
        self.weight = torch.nn.Parameter(torch.zeros(fits, count, self.targets, d, dtype=self.number))
        self.bias = torch.nn.Parameter(torch.zeros(fits, count, self.targets, dtype=self.number))
        self._sums: dict[str, torch.Tensor] = {}

    @classmethod
    def numbers(cls, n: int, d_model: int, fits: int, targets: int, config: ProbeConfig) -> int:
        return 4 * fits * targets * d_model

    def tensors(self, fit: int) -> Mapping[str, torch.Tensor]:
        return {"weight": self.weight[fit], "bias": self.bias[fit]}

    def on_train_epoch_start(self) -> None:
        fits, count, d = self.mean.shape
        if self.trainer.current_epoch == 0:
            shapes = {"n": (fits, 2, self.targets), "x": (fits, 2, count, self.targets, d)}
        else:
            shapes = {"moments": (fits, 2, 6, count, self.targets)}
        self._sums = {name: self.mean.new_zeros(shape) for name, shape in shapes.items()}

    @torch.no_grad()
    def training_step(self, batch: ProbeBatch, batch_idx: int) -> None:
        """Add a batch to the sums: of low and high tasks, then of projections of training and validation tasks."""
        for fit in range(self.splits.fits):
            seen, left_out = self.group[batch.rows] != fit, self.validation[batch.rows]
            z = (batch.features.to(self.mean) - self.mean[fit]) / self.scale[fit]
            if self.trainer.current_epoch == 0:
                high = batch.targets.double() > self.median[fit]
                for side, chosen in enumerate((~high, high)):
                    mine = (chosen & (seen & ~left_out)[:, None]).to(z)
                    self._sums["n"][fit, side] += mine.sum(0)
                    self._sums["x"][fit, side] += torch.einsum("bsd,bt->std", z, mine)
                continue
            p = torch.einsum("bsd,std->bst", z, self.weight[fit])
            y = batch.targets.to(self.mean)[:, None].expand_as(p)
            parts = torch.stack([torch.ones_like(p), p, y, p * p, p * y, y * y])
            for part, mine in enumerate((seen & ~left_out, seen & left_out)):
                self._sums["moments"][fit, part] += parts[:, mine].sum(1)

    @torch.no_grad()
    def on_train_epoch_end(self) -> None:
        """Put the devices' shares together: the directions, and then the lines along them."""
        sums = {name: self.trainer.strategy.reduce(part, reduce_op="sum") for name, part in self._sums.items()}
        if self.trainer.current_epoch == 0:
            means = sums["x"] / sums["n"].clamp(min=1)[:, :, None, :, None]
            # Where all tasks are alike, a difference would be the rounding of a mean that is 0.
            self.weight.copy_((means[:, 1] - means[:, 0]) * (sums["n"] > 0).all(1)[:, None, :, None])
            return
        n, p, y, pp, py, _ = sums["moments"][:, 0].unbind(1)
        spread = n * pp - p * p
        slope = torch.where(spread > 0, (n * py - p * y) / spread, 0.0)
        self.bias.copy_((y - slope * p) / n)
        self.weight.mul_(slope[..., None])
        n, p, y, pp, py, yy = sums["moments"][:, 1].unbind(1)
        error = yy + slope**2 * pp + n * self.bias**2 + 2 * (slope * self.bias * p - slope * py - self.bias * y)
        self.criterion = (error / n)[:, :, None]
