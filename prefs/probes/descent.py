"""Probes trained by gradient descent: one optimiser for the whole bank, each probe at its own best epoch."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, gelu, logsigmoid, softplus
from torch.utils.data import DataLoader

from prefs.config import ProbeConfig
from prefs.errors import ConfigError
from prefs.probes.bank import ProbeBank
from prefs.probes.data import ProbeBatch, ProbeData

# No option's share starts nearer to 0 or 1 than this, where a logit has no bounds.
LEAST_SHARE = 1e-3
# SDs beyond which a feature counts as this far.
FARTHEST = 1e12


class DescentBank(ProbeBank):
    """A bank whose probes learn by gradient descent on standardised features, on all tasks a fit may see but its
    validation tasks; these tell when to stop, and choose among penalties and sites.

    Penalties are decoupled weight decay (Loshchilov and Hutter 2019). A probe that has not become better by
    ``min_delta`` for ``patience`` epochs is done. Losses are summed over the bank, so that no probe's gradient depends
    on another's. Weights are [F, S, P, T, ...].

    Attributes
    ----------
    diverged
        [F, S, P, T] bool: the probes that had a loss which is not finite.
    decayed
        Which parameters the penalty pulls to 0.
    """

    precision = "32-true"
    decayed: tuple[str, ...] = ("weight",)
    decay: torch.Tensor
    stale: torch.Tensor
    diverged: torch.Tensor

    def __init__(self, data: ProbeData, config: ProbeConfig) -> None:
        super().__init__(data, config)
        self.shape = self.criterion.shape
        self.standardise(data.moments())
        self.parts = torch.nn.ParameterDict(self.initial(torch.Generator().manual_seed(config.seed)))
        self.best = torch.nn.ParameterDict(
            {name: torch.nn.Parameter(part.detach().clone(), requires_grad=False) for name, part in self.parts.items()}
        )
        self._buffers_of(
            decay=torch.tensor(self.penalties, dtype=self.number),
            stale=torch.zeros(self.shape, dtype=torch.long),
            diverged=torch.zeros(self.shape, dtype=torch.bool),
        )
        self._total, self._count = torch.empty(0), torch.empty(0)

    @classmethod
    def penalties_of(cls, config: ProbeConfig) -> tuple[float, ...]:
        if not config.penalties or any(not 0 <= penalty < float("inf") for penalty in config.penalties):
            raise ConfigError("probe.penalties", config.penalties, "at least one number, each 0 or more")
        return tuple(config.penalties)

    @classmethod
    def numbers(cls, n: int, d_model: int, fits: int, targets: int, config: ProbeConfig) -> int:
        # The parameters, their gradients, the optimiser's two moments, and the best.
        parameters = fits * len(cls.penalties_of(config)) * targets * cls.inputs(d_model, config)
        return 6 * parameters + 2 * config.batch_size * d_model

    @classmethod
    def inputs(cls, d_model: int, config: ProbeConfig) -> int:
        """About how many parameters one probe has."""
        return d_model + 8

    def initial(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Where the parameters start: at what predicts the mean of a fit's training tasks, whatever the features.

        What is random is the same for all probes, so that none depends on which others there are.
        """
        return {"weight": torch.zeros(*self.shape, self.data.d_model), "bias": torch.zeros(self.shape)}

    def _training_means(self, targets: torch.Tensor) -> torch.Tensor:
        """[F, T] (or [F, T, V]) means of each fit's training tasks."""
        rows = [self.splits.training(fit) & ~self.splits.validation for fit in range(self.splits.fits)]
        return torch.stack([targets[torch.as_tensor(mine)].double().mean(0) for mine in rows])

    def outputs(self, z: torch.Tensor) -> torch.Tensor:
        """Scores [F, b, S, P, T] from features [b, S, d] as `_standardised` gives them."""
        return self._product(z, self.parts["weight"]) + self.parts["bias"][:, None]

    def losses(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Losses [F, b, S, P, T] of outputs and targets [b, T] (or [b, T, V])."""
        raise NotImplementedError

    def _reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and scale [S, d] that a batch is standardised with: of the fit in which a feature spreads least.

        A task far off, which one fit holds out, would leave that fit nothing but rounding in units of the others.
        """
        scale, fit = self.scale.min(0)
        return self.mean.gather(0, fit[None])[0], scale

    def _standardised(self, features: torch.Tensor) -> torch.Tensor:
        """[b, S, d], by `_reference`; `_product` makes up for what the moments of each fit differ from it."""
        mean, scale = self._reference()
        # Finite also where a fit that does not see the task would overflow: its loss is left out, and 0 * inf is NaN.
        return ((features.to(self.mean) - mean) / scale).clamp(-FARTHEST, FARTHEST)

    def _product(self, z: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """[F, b, S, P, T] = each fit's standardised features . weight [F, S, P, T, d].

        With z standardised by (m, s) and a fit by (m', s'), its features are z s/s' + (m - m')/s'. The factor goes to
        the weights and the rest into a constant, as there are far fewer weights than features of a batch times fits.
        """
        fits, count, penalties, targets, d = weight.shape
        mean, scale = self._reference()
        factor = (scale / self.scale)[:, :, None, None]
        offset = ((mean - self.mean) / self.scale)[:, :, None, None]
        flat = (weight * factor).transpose(0, 1).reshape(count, fits * penalties * targets, d)
        out = torch.bmm(z.transpose(0, 1), flat.transpose(1, 2)).reshape(count, -1, fits, penalties, targets)
        return out.permute(2, 1, 0, 3, 4) + (weight * offset).sum(-1)[:, None]

    def _seen(self, batch: ProbeBatch, *, validation: bool) -> torch.Tensor:
        """[F, b] bool: the rows of a batch that each fit trains on, or validates with."""
        fits = torch.arange(self.splits.fits, device=self.device)[:, None]
        return (self.group[batch.rows] != fits) & (self.validation[batch.rows] == validation)

    def _losses(self, batch: ProbeBatch, seen: torch.Tensor) -> torch.Tensor:
        """Losses [F, b, S, P, T], 0 of the rows not seen: an infinite one times a weight of 0 would be NaN."""
        losses = self.losses(self.outputs(self._standardised(batch.features)), batch.targets)
        return losses.masked_fill(~seen[:, :, None, None, None], 0.0)

    def training_step(self, batch: ProbeBatch, batch_idx: int) -> torch.Tensor:
        """The sum over probes of each one's mean loss."""
        seen = self._seen(batch, validation=False)
        weight = seen / seen.sum(1, keepdim=True).clamp(min=1)
        total = (self._losses(batch, seen) * weight[:, :, None, None, None]).sum()
        self.log("probe/loss", total.detach() / math.prod(self.shape))
        return total

    @torch.no_grad()
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """The penalty, which PyTorch's optimisers know only as one number for a whole parameter.

        Between gradient and step, as in AdamW itself.
        """
        # A decay beyond 0 would swing ever wider.
        keep = (1 - self.settings.learning_rate * self.decay).clamp(min=0)
        for name in self.decayed:
            part = self.parts[name]
            part.mul_(keep.reshape(1, 1, -1, *[1] * (part.ndim - 3)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW or SGD, without their own decay."""
        parts = list(self.parts.values())
        if self.settings.optimizer == "sgd":
            return torch.optim.SGD(parts, lr=self.settings.learning_rate, momentum=self.settings.momentum)
        return torch.optim.AdamW(parts, lr=self.settings.learning_rate, weight_decay=0.0)

    def val_dataloader(self) -> DataLoader[ProbeBatch]:
        """The validation tasks."""
        order = self.data.features.order
        return self.data.in_order(order[self.splits.validation[order]])

    def on_validation_epoch_start(self) -> None:
        self._total = torch.zeros(self.shape, device=self.device, dtype=self.mean.dtype)
        self._count = torch.zeros(self.splits.fits, device=self.device, dtype=self.mean.dtype)

    def validation_step(self, batch: ProbeBatch, batch_idx: int) -> None:
        """Add up each probe's loss on its fit's validation tasks."""
        seen = self._seen(batch, validation=True)
        self._total += self._losses(batch, seen).sum(1)
        self._count += seen.sum(1)

    def on_validation_epoch_end(self) -> None:
        """Keep what has become better."""
        strategy = self.trainer.strategy
        total, count = (strategy.reduce(part, reduce_op="sum") for part in (self._total, self._count))
        loss = total / count[:, None, None, None]
        self.diverged = self.diverged | ~loss.isfinite()
        # What has stopped stays so, however long others go on.
        better = (loss < self.criterion - self.settings.min_delta) & ~self.stopped()
        self.criterion = torch.where(better, loss, self.criterion)
        self.stale = torch.where(better, 0, self.stale + 1)
        for name, part in self.parts.items():
            wide = better.reshape(*better.shape, *[1] * (part.ndim - 4))
            self.best[name].data = torch.where(wide, part.detach(), self.best[name])
        self.log("probe/validation_loss", loss.mean())
        self.log("probe/stopped", self.stopped().float().mean())

    def stopped(self) -> torch.Tensor:
        """[F, S, P, T] bool: the probes whose patience has run out."""
        return self.stale >= self.settings.patience

    def on_train_epoch_end(self) -> None:
        """End the training when every probe has run out of patience."""
        if bool(self.stopped().all()):
            self.trainer.should_stop = True

    def on_train_end(self) -> None:
        """Choose each fit's penalty."""
        self.chosen = self.criterion.argmin(2)

    def tensors(self, fit: int) -> dict[str, torch.Tensor]:
        """The best parameters of one fit's chosen penalties, each [S, T, ...]."""
        site = torch.arange(len(self.sites), device=self.device)[:, None]
        target = torch.arange(self.targets, device=self.device)[None]
        return {name: part.detach()[fit][site, self.chosen[fit], target] for name, part in self.best.items()}


class LinearBank(DescentBank):
    """Linear probes; squared error of targets in units of their SD over the training tasks."""

    last = "weight"
    center: torch.Tensor
    spread: torch.Tensor

    def __init__(self, data: ProbeData, config: ProbeConfig) -> None:
        super().__init__(data, config)
        center = self._training_means(data.targets)
        spread = (self._training_means(data.targets.double().square()) - center.square()).clamp(min=0).sqrt()
        spread = torch.where(spread > 1e-9 * center.abs(), spread, 1.0)
        self._buffers_of(center=center[:, None, None].to(self.mean), spread=spread[:, None, None].to(self.mean))

    def losses(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        wanted = (targets.to(outputs)[None, :, None, None] - self.center[:, None]) / self.spread[:, None]
        return (outputs - wanted).square()

    def tensors(self, fit: int) -> dict[str, torch.Tensor]:
        best, spread = super().tensors(fit), self.spread[fit, 0]
        bias = best["bias"] * spread + self.center[fit, 0]
        return best | {self.last: best[self.last] * spread[:, :, None], "bias": bias}  # in units of the rating


class MlpBank(LinearBank):
    """Perceptrons with one hidden layer (GELU); squared error."""

    form = "mlp"
    last = "out_weight"
    decayed = ("hidden_weight", "out_weight")

    @classmethod
    def inputs(cls, d_model: int, config: ProbeConfig) -> int:
        return config.hidden * (d_model + 2)

    def initial(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        h, d = self.settings.hidden, self.data.d_model
        return {
            "hidden_weight": (torch.randn(h, d, generator=generator) / math.sqrt(d)).repeat(*self.shape, 1, 1),
            "hidden_bias": torch.zeros(*self.shape, h),
            "out_weight": (torch.randn(h, generator=generator) / math.sqrt(h)).repeat(*self.shape, 1),
            "bias": torch.zeros(self.shape),
        }

    def outputs(self, z: torch.Tensor) -> torch.Tensor:
        parts = self.parts
        fits, count, penalties, targets, h, d = parts["hidden_weight"].shape
        weight = parts["hidden_weight"].reshape(fits, count, penalties, targets * h, d)
        hidden = self._product(z, weight).unflatten(-1, (targets, h))
        hidden = gelu(hidden + parts["hidden_bias"][:, None])
        return (hidden * parts["out_weight"][:, None]).sum(-1) + parts["bias"][:, None]


class LogisticBank(DescentBank):
    """Logistic regression of a target that is 0 or 1; cross-entropy."""

    form = "logistic"

    def initial(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        odds = self._training_means(self.data.targets).clamp(LEAST_SHARE, 1 - LEAST_SHARE).logit()
        bias = odds[:, None, None].expand(self.shape).to(self.mean).clone()
        return super().initial(generator) | {"bias": bias}

    def losses(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        wanted = targets.to(outputs)[None, :, None, None].expand_as(outputs)
        return binary_cross_entropy_with_logits(outputs, wanted, reduction="none")


class OrdinalBank(DescentBank):
    """Cumulative-logit probes of V ordered options; McCullagh (1980), "Regression models for ordinal data".

    A target is the share of each option: all of it on one for a single rating, the exact distribution, or how often it
    was given over seeds. The loss is cross-entropy with it.
    """

    form = "ordinal"
    on_shares = True

    def initial(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        # Thresholds are the first and the softplus of the steps from one to the next, so that they rise.
        below = self._training_means(self.data.targets).cumsum(-1)[..., :-1]
        thresholds = below.clamp(LEAST_SHARE, 1 - LEAST_SHARE).logit()
        steps = thresholds.diff(dim=-1).clamp(min=LEAST_SHARE)
        steps = steps + (-(-steps).expm1()).log()  # softplus, turned round
        return {
            "weight": torch.zeros(*self.shape, self.data.d_model),
            "first": thresholds[:, None, None, :, 0].expand(self.shape).to(self.mean).clone(),
            "steps": steps[:, None, None].expand(*self.shape, -1).to(self.mean).clone(),
        }

    def outputs(self, z: torch.Tensor) -> torch.Tensor:
        return self._product(z, self.parts["weight"])

    def losses(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        thresholds = _rising(self.parts["first"], self.parts["steps"])[:, None]
        return -(targets.to(outputs)[None, :, None, None] * log_probabilities(outputs, thresholds)).sum(-1)

    def tensors(self, fit: int) -> dict[str, torch.Tensor]:
        best = super().tensors(fit)
        thresholds = _rising(best["first"], best["steps"])
        values = torch.tensor(self.data.values, dtype=torch.float32).to(thresholds).expand(*thresholds.shape[:-1], -1)
        return {"weight": best["weight"], "thresholds": thresholds, "values": values}


def log_probabilities(score: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """The logarithm of `option_probabilities`, [..., V], where these are too small to be told from 0.

    Between thresholds a < b it is sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b)).
    """
    offset = thresholds - score[..., None]
    nothing = torch.zeros_like(offset[..., :1])
    gap = torch.diff(thresholds, dim=-1).clamp(min=torch.finfo(score.dtype).tiny)
    between = torch.cat([nothing, (-torch.expm1(-gap)).log().expand(*offset.shape[:-1], -1), nothing], dim=-1)
    below = torch.cat([logsigmoid(offset), nothing], dim=-1)
    above = torch.cat([nothing, logsigmoid(-offset)], dim=-1)
    return below + above + between


def _rising(first: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """[..., V - 1] thresholds from the first [...] and the steps [..., V - 2] before softplus."""
    return torch.cat([first[..., None], first[..., None] + softplus(steps).cumsum(-1)], dim=-1)
