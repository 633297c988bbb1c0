"""Ridge regression in closed form: all sites, folds, penalties and targets from one pass over the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from prefs.config import ProbeConfig
from prefs.errors import ConfigError, UserError
from prefs.probes.bank import ProbeBank
from prefs.probes.data import ProbeBatch, ProbeData, constant, scale_of


class RidgeBank(ProbeBank):
    """Each probe minimises mean squared error + penalty * ||w||^2 over its training tasks, with features standardised
    and target centred by them: scikit-learn's ``Ridge(alpha=penalty * n_train)`` behind a ``StandardScaler``.

    With more tasks than dimensions (*primal*) a pass keeps, of each group of tasks, the sums of x, x x', x y and y: of
    a fit they are the sum over its training groups, so memory does not grow with the number of tasks. With fewer
    (*dual*) it keeps the vectors themselves, which are then smaller than x x'. Several devices add up their sums.

    The penalty of each fit, site and target is the one with the least generalised cross-validation error on the fit's
    training tasks; Golub, Heath and Wahba (1979), "Generalized cross-validation as a method for choosing a good ridge
    parameter": (RSS / n) / (1 - tr(H) / n)^2, where the hat matrix H has the intercept in it.
    """

    validates = False
    epochs = 1
    shift: torch.Tensor
    unit: torch.Tensor

    def __init__(self, data: ProbeData, config: ProbeConfig) -> None:
        super().__init__(data, config)
        self.dual = len(data) <= data.d_model
        fits, count, d = self.mean.shape
        self.weight = torch.nn.Parameter(torch.zeros(fits, count, self.targets, d, dtype=self.number))
        self.bias = torch.nn.Parameter(torch.zeros(fits, count, self.targets, dtype=self.number))
        # Sums are taken from near the features' mean and SD, so that they do not cancel.
        reference = data.reference()
        self._buffers_of(shift=reference.mean[0].to(self.mean), unit=reference.scale[0].to(self.mean))
        self._sums: dict[str, torch.Tensor] = {}

    @classmethod
    def penalties_of(cls, config: ProbeConfig) -> tuple[float, ...]:
        if not config.penalties or any(not 0 < penalty < float("inf") for penalty in config.penalties):
            raise ConfigError("probe.penalties", config.penalties, "at least one number, each more than 0")
        return tuple(config.penalties)

    @classmethod
    def numbers(cls, n: int, d_model: int, fits: int, targets: int, config: ProbeConfig) -> int:
        return (n * d_model if n <= d_model else (fits + 3) * d_model**2) + fits * targets * d_model

    def tensors(self, fit: int) -> Mapping[str, torch.Tensor]:
        return {"weight": self.weight[fit], "bias": self.bias[fit]}

    def on_train_epoch_start(self) -> None:
        n, k, (_, count, d), targets = len(self.data), self.splits.k, self.mean.shape, self.targets
        if self.dual:
            shapes: dict[str, tuple[int, ...]] = {"x": (count, n, d), "y": (n, targets)}
        else:
            shapes = {"n": (k,), "x": (k, count, d), "xx": (k, count, d, d), "xy": (k, count, d, targets)}
            shapes |= {"y": (k, targets), "yy": (k, targets)}
        self._sums = {name: self.shift.new_zeros(shape) for name, shape in shapes.items()}

    @torch.no_grad()
    def training_step(self, batch: ProbeBatch, batch_idx: int) -> None:
        """Add a batch to the sums, or keep it."""
        x = ((batch.features.to(self.shift) - self.shift) / self.unit).movedim(0, 1)
        y, sums = batch.targets.to(self.shift), self._sums
        if self.dual:
            sums["x"][:, batch.rows], sums["y"][batch.rows] = x, y
            return
        group = self.group[batch.rows]
        for number in group.unique().tolist():
            some, wanted = x[:, group == number], y[group == number]
            sums["n"][number] += len(wanted)
            sums["x"][number] += some.sum(1)
            sums["y"][number] += wanted.sum(0)
            sums["yy"][number] += wanted.square().sum(0)
            # One site at a time: as one batched product it would need a copy of all of them.
            for site in range(len(self.sites)):
                sums["xx"][number, site].addmm_(some[site].T, some[site])
                sums["xy"][number, site].addmm_(some[site].T, wanted)

    @torch.no_grad()
    def on_train_epoch_end(self) -> None:
        """Put the devices' shares together and solve; each device solves some of the fits."""
        strategy = self.trainer.strategy
        sums = {name: strategy.reduce(part, reduce_op="sum") for name, part in self._sums.items()}
        self._sums = {}
        solved = [self.mean, self.scale, self.criterion, self.chosen, self.weight.data, self.bias.data]
        for part in solved:  # what other devices solve is left at 0, to be added up
            part.zero_()
        pairs = [(fit, site) for site in range(len(self.sites)) for fit in range(self.splits.fits)]
        for fit, site in pairs[self.trainer.global_rank :: self.trainer.world_size]:
            self._solve(fit, site, sums)
        if self.trainer.world_size > 1:
            for part in solved:
                part.copy_(strategy.reduce(part.clone(), reduce_op="sum"))

    def _solve(self, fit: int, site: int, sums: Mapping[str, torch.Tensor]) -> None:
        """Solve for all penalties, choose, and write down the probes of one fit and site."""
        training = self.group != fit
        x = None
        if self.dual:
            x, y = sums["x"][site, training], sums["y"][training]
            n, mean, target_mean = len(x), x.mean(0), y.mean(0)
            x, right = x - mean, y - target_mean
            variance = x.square().mean(0)
            scale = scale_of(variance, mean, n)
            x = (x / scale).masked_fill(constant(variance, mean, n), 0.0)
            matrix, target_squares = x @ x.T, right.square().sum(0)
        else:

            def total(name: str, *index: int) -> Any:
                # Added up without the group held out: taking it from the whole would leave its rounding.
                return sum(sums[name][(group, *index)] for group in range(self.splits.k) if group != fit)

            n = int(total("n"))
            mean, target_mean = total("x", site) / n, total("y") / n
            matrix = total("xx", site).addr(mean, mean, alpha=-n)
            variance = matrix.diagonal() / n
            flat, scale = constant(variance, mean, n), scale_of(variance, mean, n)
            matrix = matrix.div_(scale).div_(scale[:, None])
            right = (total("xy", site) - mean[:, None] * (n * target_mean)) / scale[:, None]
            # A constant feature leaves rounding in its row and column, which must not become a weight.
            matrix[flat], matrix[:, flat], right[flat] = 0, 0, 0
            target_squares = total("yy") - n * target_mean.square()
        values, vectors = torch.linalg.eigh(matrix)
        values = values.clamp(min=0)
        # [P, 1]; the penalties of sums, not of means.
        alphas = n * values.new_tensor(self.penalties)[:, None]
        rounding = len(values) * torch.finfo(values.dtype).eps * values[-1]
        for penalty, alpha in zip(self.penalties, alphas.flatten(), strict=True):
            if values[0] + alpha <= rounding:
                raise UserError(f"probe.penalties: {penalty:g} is too small beside the rounding of sums over {n} tasks")
        turned = vectors.T @ right
        solutions = turned / (values + alphas)[:, :, None]
        squares = solutions.square().sum(1)
        if x is None:
            rss = (target_squares - (solutions * turned).sum(1) - alphas * squares).clamp(min=0)
        else:
            rss = alphas**2 * squares
        left = 1 - (1 + (values / (values + alphas)).sum(1, keepdim=True)) / n
        self.criterion[fit, site] = torch.where(left > 0, rss / n / left.square(), torch.inf)
        best = self.criterion[fit, site].argmin(0)
        weight = vectors @ solutions[best, :, torch.arange(self.targets)].T
        self.chosen[fit, site], self.bias[fit, site] = best, target_mean
        self.weight[fit, site] = (weight if x is None else x.T @ weight).T
        self.mean[fit, site] = self.shift[site] + mean * self.unit[site]
        self.scale[fit, site] = scale * self.unit[site]
