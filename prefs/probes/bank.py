"""What every kind of probe is: a bank of them for all sites, folds, penalties and targets, trained together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning
import torch

from prefs.probes.data import Moments, ProbeBatch
from prefs.probes.folds import Splits
from prefs.probes.probe import FORMS, Probe, Site


class ProbeBank(lightning.LightningModule):
    """Probes of S sites, F fits, P penalties and T targets, which share nothing but the passes over the data.

    Fit f holds out group f of the splits and the last fit holds out none. When training has ended, the bank has for
    each fit, site and target the probe of the penalty that did best by the fit's own training tasks: no task of the
    group held out has a say in it.

    Attributes
    ----------
    form
        The name of a form of `prefs.probes.probe.FORMS`.
    mean, scale
        [F, S, d], what each fit standardises with.
    criterion
        [F, S, P, T], what chooses: an estimate of the loss on new tasks from the fit's training tasks. Lower is better.
    chosen
        [F, S, T], the index of the penalty chosen.
    """

    form: str
    mean: torch.Tensor
    scale: torch.Tensor
    criterion: torch.Tensor
    chosen: torch.Tensor
    group: torch.Tensor
    validation: torch.Tensor
    # What a bank is made in. Several processes hand their results back to a bank that was never given to a Trainer.
    number: torch.dtype = torch.float32

    def __init__(self, sites: Sequence[Site], d_model: int, targets: int, splits: Splits, penalties: int) -> None:
        super().__init__()
        self.sites = tuple(sites)
        self.splits = splits
        self.targets = targets
        fits, count = splits.fits, len(sites)
        self.register_buffer("mean", torch.zeros(fits, count, d_model, dtype=self.number))
        self.register_buffer("scale", torch.ones(fits, count, d_model, dtype=self.number))
        nothing = torch.full((fits, count, penalties, targets), torch.inf, dtype=self.number)
        self.register_buffer("criterion", nothing)
        self.register_buffer("chosen", torch.zeros(fits, count, targets, dtype=torch.long))
        self.register_buffer("group", torch.as_tensor(splits.group))
        self.register_buffer("validation", torch.as_tensor(splits.validation))

    def standardise(self, moments: Moments) -> None:
        """Use these moments from now on."""
        self.mean = moments.mean.to(self.mean)
        self.scale = moments.scale.to(self.scale)

    def tensors(self, fit: int) -> Mapping[str, torch.Tensor]:
        """What the form has, of the chosen probes of one fit: each [S, T, ...]."""
        raise NotImplementedError

    @torch.no_grad()
    def predict_fit(self, features: torch.Tensor, fit: int) -> torch.Tensor:
        """Predictions [b, S, T] of one fit's chosen probes from features [b, S, d] as captured."""
        z = (features.to(self.mean) - self.mean[fit]) / self.scale[fit]
        tensors = self.tensors(fit)
        over_targets = torch.vmap(FORMS[self.form], in_dims=(None, 0), out_dims=-1)
        return torch.vmap(over_targets, in_dims=(1, 0), out_dims=1)(z, dict(tensors))

    def predict_step(self, batch: ProbeBatch, batch_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [b] and their held-out predictions [b, S, T]: of the fit that holds out each row's group."""
        group = self.group[batch.rows]
        out = batch.features.new_empty((len(batch.rows), len(self.sites), self.targets), dtype=self.mean.dtype)
        for fit in group.unique().tolist():
            mine = group == fit
            out[mine] = self.predict_fit(batch.features[mine], fit)
        return batch.rows, out

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
