"""What every kind of probe is: a bank of them for all sites, folds, penalties and targets, trained together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import lightning
import torch
from torch.utils.data import DataLoader

from prefs.config import ProbeConfig
from prefs.probes.data import Moments, ProbeBatch, ProbeData
from prefs.probes.probe import FORMS, Probe


class ProbeBank(lightning.LightningModule):
    """Probes of S sites, F fits, P penalties and T targets, which share nothing but the passes over the data.

    Fit f holds out group f of the splits and the last fit holds out none. When training has ended, the bank has for
    each fit, site and target the probe of the penalty that did best by the fit's own training tasks: no task of the
    group held out has a say in it.

    A kind of probe is a subclass, which ``_target_`` in its YAML names.

    Attributes
    ----------
    form
        The name of a form of `prefs.probes.probe.FORMS`.
    validates
        Whether penalty and site are chosen by tasks held back from training.
    on_shares
        Whether it is trained on the shares of options, [n, T, V], and not on numbers.
    epochs
        Passes over the data; None: in batches of ``config.batch_size``, until it stops or ``config.max_epochs``.
    precision
        As Lightning spells it. Closed forms are solved in float64: small penalties are lost beside the rounding of
        float32 sums.
    mean, scale
        [F, S, d], what each fit standardises with.
    criterion
        [F, S, P, T], what chooses: an estimate of the loss on new tasks from the fit's training tasks. Lower is better.
    chosen
        [F, S, T], the index of the penalty chosen.
    """

    form: ClassVar[str] = "linear"
    validates: ClassVar[bool] = True
    on_shares: ClassVar[bool] = False
    epochs: ClassVar[int | None] = None
    precision: ClassVar[str] = "64-true"
    penalties: tuple[float, ...]
    mean: torch.Tensor
    scale: torch.Tensor
    criterion: torch.Tensor
    chosen: torch.Tensor
    group: torch.Tensor
    validation: torch.Tensor

    def __init__(self, data: ProbeData, config: ProbeConfig) -> None:
        super().__init__()
        self.data, self.settings = data, config
        self.splits, self.sites, self.targets = data.splits, data.sites, data.targets.shape[1]
        self.penalties = self.penalties_of(config)
        self.automatic_optimization = self.epochs is None
        # What a bank is made in. Several processes hand their results back to a bank that no Trainer has converted.
        self.number = torch.float64 if self.precision == "64-true" else torch.float32
        fits, count = self.splits.fits, len(self.sites)
        self._buffers_of(
            mean=torch.zeros(fits, count, data.d_model, dtype=self.number),
            scale=torch.ones(fits, count, data.d_model, dtype=self.number),
            criterion=torch.full(
                (fits, count, max(1, len(self.penalties)), self.targets), torch.inf, dtype=self.number
            ),
            chosen=torch.zeros(fits, count, self.targets, dtype=torch.long),
            group=torch.as_tensor(self.splits.group),
            validation=torch.as_tensor(self.splits.validation),
        )

    def _buffers_of(self, **tensors: torch.Tensor) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    @classmethod
    def penalties_of(cls, config: ProbeConfig) -> tuple[float, ...]:
        """P penalties to choose among; none: P is 1."""
        return ()

    @classmethod
    def numbers(cls, n: int, d_model: int, fits: int, targets: int, config: ProbeConfig) -> int:
        """About how many numbers training one site keeps in memory."""
        raise NotImplementedError

    def tensors(self, fit: int) -> Mapping[str, torch.Tensor]:
        """What the form has, of the chosen probes of one fit: each [S, T, ...]."""
        raise NotImplementedError

    def standardise(self, moments: Moments) -> None:
        """Use these moments from now on."""
        self.mean, self.scale = moments.mean.to(self.mean), moments.scale.to(self.scale)

    def train_dataloader(self) -> DataLoader[ProbeBatch]:
        """All tasks, each once; a bank leaves out for each fit what this holds out.

        Passes for sums are shared out here among devices: Lightning's own sampler repeats tasks to even out shares.
        """
        if self.epochs is None:
            return self.data.in_random_order()
        return self.data.in_order(self.data.features.order[self.trainer.global_rank :: self.trainer.world_size])

    @torch.no_grad()
    def predict_fit(self, features: torch.Tensor, fit: int) -> torch.Tensor:
        """Predictions [b, S, T] of one fit's chosen probes from features [b, S, d] as captured."""
        z = (features.to(self.mean) - self.mean[fit]) / self.scale[fit]
        over_targets = torch.vmap(FORMS[self.form], in_dims=(None, 0), out_dims=-1)
        return torch.vmap(over_targets, in_dims=(1, 0), out_dims=1)(z, dict(self.tensors(fit)))

    def held_out(self, batch: ProbeBatch) -> torch.Tensor:
        """Predictions [b, S, T]: of each task by the fit that holds out its group."""
        group = self.splits.group[batch.rows.numpy()]
        predictions = torch.empty(len(group), len(self.sites), self.targets, dtype=self.number)
        for fit in set(group.tolist()):
            predictions[group == fit] = self.predict_fit(batch.features[group == fit], fit).to(predictions)
        return predictions

    def probe(self, fit: int, site: int, target: int, name: str) -> Probe:
        """One of the chosen probes, by itself."""
        return Probe(
            kind=self.form,
            site=self.sites[site],
            target=name,
            mean=self.mean[fit, site].double().cpu(),
            scale=self.scale[fit, site].double().cpu(),
            tensors={key: part[site, target].detach().float().cpu().clone() for key, part in self.tensors(fit).items()},
        )

    def configure_optimizers(self) -> Any:
        """None: a bank with a closed form is not trained by steps."""
        return None
