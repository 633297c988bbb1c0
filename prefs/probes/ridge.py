"""Ridge regression in closed form: all sites, folds, penalties and targets from one pass over the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from prefs.errors import UserError
from prefs.probes.bank import ProbeBank
from prefs.probes.data import Moments, ProbeBatch, constant
from prefs.probes.folds import Splits
from prefs.probes.probe import Site
from prefs.probes.spectrum import Spectrum, spectrum


@dataclass(frozen=True)
class _Training:
    """A fit's training tasks at one site: what its penalties are solved from."""

    n: int
    mean: torch.Tensor
    scale: torch.Tensor
    target_mean: torch.Tensor
    target_squares: torch.Tensor


class RidgeBank(ProbeBank):
    """Each probe minimises mean squared error + penalty * ||w||^2 over its training tasks, with features standardised
    and target centred by them: scikit-learn's ``Ridge(alpha=penalty * n_train)`` behind a ``StandardScaler``.

    With more tasks than dimensions (*primal*) a pass keeps, of each group of tasks, the sums of x, x x', x y and y: of
    a fit they are the sum over its training groups, so memory does not grow with the number of tasks. With fewer
    (*dual*) it keeps the vectors themselves, which are then smaller than x x'. Several devices add up their sums.

    The penalty of each fit, site and target is the one with the least generalised cross-validation error on the fit's
    training tasks; Golub, Heath and Wahba (1979), "Generalized cross-validation as a method for choosing a good ridge
    parameter": (RSS / n) / (1 - tr(H) / n)^2, where the hat matrix H has the intercept in it.

    Parameters
    ----------
    penalties
        [P], each more than 0.
    reference
        [1, S, d]: near the features' mean and SD. Sums are taken from there, so that they do not cancel.
    keep_all
        Whether to keep the weights of all penalties (``all_weight`` [F, S, P, T, d], ``all_bias``), not only of the
        chosen ones.
    """

    form = "linear"
    number = torch.float64
    all_weight: torch.Tensor
    all_bias: torch.Tensor
    shift: torch.Tensor
    unit: torch.Tensor

    def __init__(
        self,
        sites: Sequence[Site],
        d_model: int,
        targets: int,
        splits: Splits,
        penalties: Sequence[float],
        reference: Moments,
        *,
        keep_all: bool = False,
    ) -> None:
        super().__init__(sites, d_model, targets, splits, len(penalties))
        if not penalties or any(not 0 < penalty < float("inf") for penalty in penalties):
            raise ValueError(f"penalties {list(penalties)}: give at least one, and each more than 0")
        self.automatic_optimization = False
        self.penalties = tuple(penalties)
        self.dual = splits.n <= d_model
        self.keep_all = keep_all
        fits, count = splits.fits, len(sites)
        self.weight = torch.nn.Parameter(torch.zeros(fits, count, targets, d_model, dtype=self.number))
        self.bias = torch.nn.Parameter(torch.zeros(fits, count, targets, dtype=self.number))
        if keep_all:
            self.register_buffer(
                "all_weight", torch.zeros(fits, count, len(penalties), targets, d_model, dtype=self.number)
            )
            self.register_buffer("all_bias", torch.zeros(fits, count, len(penalties), targets, dtype=self.number))
        self.register_buffer("shift", reference.mean[0].to(self.mean))
        self.register_buffer("unit", reference.scale[0].to(self.mean))
        self._sums: dict[str, torch.Tensor] = {}
        self._rows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def tensors(self, fit: int) -> Mapping[str, torch.Tensor]:
        return {"weight": self.weight[fit], "bias": self.bias[fit]}

    @torch.no_grad()
    def training_step(self, batch: ProbeBatch, batch_idx: int) -> None:
        """Add a batch to the sums, or keep it."""
        x = (batch.features.to(self.shift) - self.shift) / self.unit
        y = batch.targets.to(self.shift)
        if self.dual:
            self._rows.append((batch.rows, x, y))
            return
        if not self._sums:
            self._sums = self._nothing(y)
        group = self.group[batch.rows]
        for each in group.unique().tolist():
            mine = group == each
            here, there = x[mine].movedim(0, 1), y[mine]
            self._sums["count"][each] += len(there)
            self._sums["x"][each] += here.sum(1)
            # One site at a time: as one batched product it would need a copy of all of them.
            for site in range(len(self.sites)):
                self._sums["xx"][each, site].addmm_(here[site].T, here[site])
                self._sums["xy"][each, site].addmm_(here[site].T, there)
            self._sums["y"][each] += there.sum(0)
            self._sums["yy"][each] += there.square().sum(0)

    def _nothing(self, like: torch.Tensor) -> dict[str, torch.Tensor]:
        k, count, d, targets = self.splits.k, len(self.sites), self.mean.shape[-1], self.targets
        shapes = {"count": (k,), "x": (k, count, d), "xx": (k, count, d, d), "xy": (k, count, d, targets)}
        shapes |= {"y": (k, targets), "yy": (k, targets)}
        return {name: like.new_zeros(shape) for name, shape in shapes.items()}

    @torch.no_grad()
    def on_train_epoch_end(self) -> None:
        """Put the devices' shares together and solve; each device solves some of the fits."""
        strategy = self.trainer.strategy
        if self.dual:
            rows, x, y = (torch.cat(parts) for parts in zip(*self._rows, strict=True))
            self._rows = []
            if self.trainer.world_size > 1:
                rows, x, y = self._gathered(rows, x, y)
            solve = _Dual(self, rows, x, y)
        else:
            sums = self._sums or self._nothing(self.shift)
            solve = _Primal(self, {name: strategy.reduce(each, reduce_op="sum") for name, each in sums.items()})
            self._sums = {}
        jobs = [(fit, site) for site in range(len(self.sites)) for fit in range(self.splits.fits)]
        # What other devices solve is left at 0, to be added up.
        for part in self._solved():
            part.zero_()
        for fit, site in jobs[self.trainer.global_rank :: self.trainer.world_size]:
            solve(fit, site)
        if self.trainer.world_size > 1:
            for part in self._solved():
                part.copy_(strategy.reduce(part.clone(), reduce_op="sum"))

    def _solved(self) -> list[torch.Tensor]:
        extra = [self.all_weight, self.all_bias] if self.keep_all else []
        return [self.mean, self.scale, self.criterion, self.chosen, self.weight.data, self.bias.data, *extra]

    def _gathered(self, *parts: torch.Tensor) -> list[torch.Tensor]:
        """The rows of all devices, which may have different numbers of them."""
        strategy = self.trainer.strategy
        counts = strategy.all_gather(torch.tensor([len(parts[0])], device=self.device)).flatten().tolist()
        found = []
        for part in parts:
            padded = part.new_zeros((max(counts), *part.shape[1:]))
            padded[: len(part)] = part
            both = strategy.all_gather(padded)
            found.append(torch.cat([each[:count] for each, count in zip(both, counts, strict=True)]))
        return found

    def settle(
        self,
        fit: int,
        site: int,
        tasks: _Training,
        reduced: Spectrum,
        right: torch.Tensor,
        to_weights: torch.Tensor | None,
    ) -> None:
        """Solve for all penalties, choose, and write down the probes of one fit and site.

        ``reduced`` is of the training tasks' standardised x'x (primal, ``right`` [d, T] being x'y) or x x' (dual,
        ``right`` [n, T] being y, ``to_weights`` [n, d] the x that leads from its solution to weights).
        """
        n, size = tasks.n, len(right)
        turned = reduced.into(right)
        solutions = []
        for at, penalty in enumerate(self.penalties):
            alpha = penalty * n
            try:
                solution, trace = reduced.solve(alpha, turned)
            except ValueError:
                raise UserError(
                    f"probe.penalties: {penalty:g} is too small beside the rounding of sums over {n} tasks"
                ) from None
            solutions.append(solution)
            if to_weights is None:
                explained = (solution * turned).sum(0) + alpha * solution.square().sum(0)
                rss = (tasks.target_squares - explained).clamp(min=0)
            else:
                rss = alpha**2 * solution.square().sum(0)
            left = 1 - (1 + size - alpha * trace) / n
            self.criterion[fit, site, at] = rss / n / left**2 if left > 0 else torch.inf
        best = self.criterion[fit, site].argmin(0)
        self.chosen[fit, site] = best
        self.mean[fit, site] = self.shift[site] + tasks.mean * self.unit[site]
        self.scale[fit, site] = tasks.scale * self.unit[site]
        each = torch.stack(solutions)
        picked = each[best, :, torch.arange(self.targets)].T
        weight = reduced.back(picked.contiguous())
        self.weight[fit, site] = (weight if to_weights is None else to_weights.T @ weight).T
        self.bias[fit, site] = tasks.target_mean
        if self.keep_all:
            flat = reduced.back(each.movedim(0, 1).reshape(size, -1))
            flat = flat if to_weights is None else to_weights.T @ flat
            self.all_weight[fit, site] = flat.T.reshape(len(self.penalties), self.targets, -1)
            self.all_bias[fit, site] = tasks.target_mean


class _Primal:
    """Solves from sums, [k, ...] by group."""

    def __init__(self, bank: RidgeBank, sums: Mapping[str, torch.Tensor]) -> None:
        self._bank = bank
        self._sums = sums

    def __call__(self, fit: int, site: int) -> None:
        def of(name: str, *index: int) -> torch.Tensor:
            # Added up without the group held out: taking it from the whole would leave its rounding.
            total = torch.zeros_like(self._sums[name][(0, *index)])
            for group in range(self._bank.splits.k):
                if group != fit:
                    total += self._sums[name][(group, *index)]
            return total

        n = int(of("count"))
        mean, y = of("x", site) / n, of("y") / n
        xx = of("xx", site).addr(mean, mean, alpha=-n)
        variance = xx.diagonal() / n
        flat = constant(variance, mean, n)
        scale = variance.clamp(min=0).sqrt().masked_fill(flat, 1.0)
        xx = xx.div_(scale).div_(scale[:, None])
        right = (of("xy", site) - mean[:, None] * (n * y)) / scale[:, None]
        # A constant feature leaves rounding in its row and column, which must not become a weight.
        xx[flat] = 0
        xx[:, flat] = 0
        right[flat] = 0
        tasks = _Training(n, mean, scale, y, of("yy") - n * y.square())
        self._bank.settle(fit, site, tasks, spectrum(xx), right, None)


class _Dual:
    """Solves from the vectors [n, S, d] and targets [n, T] themselves."""

    def __init__(self, bank: RidgeBank, rows: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
        self._bank = bank
        self._group = bank.group[rows]
        self._x = x.movedim(0, 1)
        self._y = y

    def __call__(self, fit: int, site: int) -> None:
        train = self._group != fit
        x, y = self._x[site, train], self._y[train]
        mean = x.mean(0)
        x = x - mean
        variance = x.square().mean(0)
        flat = constant(variance, mean, len(x))
        scale = variance.sqrt().masked_fill(flat, 1.0)
        x = (x / scale).masked_fill(flat, 0.0)
        target_mean = y.mean(0)
        y = y - target_mean
        tasks = _Training(len(x), mean, scale, target_mean, y.square().sum(0))
        self._bank.settle(fit, site, tasks, spectrum(x @ x.T), y, x)
