"""Train a bank of probes with Lightning's Trainer, some sites at a time, and hand back held-out predictions."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import lightning
import numpy as np
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy
from threadpoolctl import threadpool_limits

from prefs.errors import ConfigError, UserError
from prefs.probes.bank import ProbeBank
from prefs.probes.data import ProbeData
from prefs.probes.descent import Descent, DescentBank, EachStopsAlone, LinearBank, LogisticBank, MlpBank, OrdinalBank
from prefs.probes.features import Features
from prefs.probes.folds import Splits
from prefs.probes.mean_difference import MeanDifferenceBank
from prefs.probes.probe import Probe
from prefs.probes.ridge import RidgeBank
from prefs.progress import progress

log = logging.getLogger(__name__)

Kind = Literal["ridge", "linear", "logistic", "ordinal", "mlp", "mean_difference"]
DESCENDING = {"linear": LinearBank, "logistic": LogisticBank, "ordinal": OrdinalBank, "mlp": MlpBank}
# Kinds that choose penalty and site by tasks held back from training.
VALIDATED = (*DESCENDING, "mean_difference")

# How the processes of several devices begin. Lightning's other ways begin the whole command again for each.
START_METHODS: Mapping[str, Literal["spawn", "fork"]] = {"auto": "spawn", "ddp_spawn": "spawn", "ddp_fork": "fork"}
# Sites are independent, so they are trained in groups whose parameters and sums take at most about this.
GROUP_BYTES = 2**31
# Up to this width a second thread gains little, and on a busy machine threads spend their time waiting for each other.
ONE_THREAD_WIDTH = 1024


@dataclass(frozen=True)
class Training:
    """How a bank is trained.

    ``trainer`` are further arguments of Lightning's ``Trainer``, as Lightning spells them: ``accelerator``,
    ``devices``, ``strategy``, ``precision``, ``callbacks``, ``logger`` ... A logger is told
    ``probe/loss``, ``probe/validation_loss`` and ``probe/stopped``, by epoch.
    """

    kind: Kind = "ridge"
    penalties: Sequence[float] = (1.0,)
    batch_size: int = 64
    max_epochs: int = 200
    descent: Descent = field(default_factory=Descent)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Trained:
    """What banks over all sites brought.

    Attributes
    ----------
    out_of_fold
        [n, S, T] float32, each task's prediction by the fit that held out its group.
    criterion
        [F, S, T], the criterion of each fit's chosen penalty: it compares sites.
    chosen
        [F, S, T], the index of the penalty.
    probe
        A function of fit, site and target (by index) and a name: that probe by itself. Targets beyond ``kept`` have
        none.
    """

    out_of_fold: np.ndarray
    criterion: np.ndarray
    chosen: np.ndarray
    probe: Callable[[int, int, int, str], Probe]

    def best_sites(self) -> np.ndarray:
        """[F, T], the site that each fit would choose by its own training tasks."""
        return self.criterion.argmin(axis=1)


def train(
    features: Features,
    targets: torch.Tensor,
    splits: Splits,
    training: Training,
    *,
    kept: int,
    values: Sequence[float] = (),
    show_progress: bool = False,
) -> Trained:
    """Train probes of all sites for all targets, folds and penalties.

    Parameters
    ----------
    features
        Of n tasks, at S sites.
    targets
        [n, T] finite numbers; [n, T, V] shares of V options for ``ordinal``.
    splits
        Of the n tasks.
    training
        The kind of probe and how it is trained.
    kept
        How many of the targets, from the first, probes are kept of; of the others there are predictions alone.
    values
        [V] what the options are worth, rising; for ``ordinal``.
    show_progress
        Whether to show a bar over the sites.

    Raises
    ------
    ValueError
        If shapes do not agree, or a target is not finite.
    NotFinite
        If a vector is not.
    UserError
        If Lightning refuses the arguments of its Trainer.
    """
    count = len(features.sites)
    width = _width(features, targets, splits, training)
    groups = [slice(start, min(start + width, count)) for start in range(0, count, width)]
    probes = splits.fits * count * len(training.penalties) * targets.shape[1]
    heads: list[dict[tuple[int, int, int], Probe]] = []
    diverged = unfinished = 0
    out_of_fold = np.empty((features.n, count, targets.shape[1]), dtype=np.float32)
    criterion, chosen = [], []
    bar = progress(f"training {probes:,} probes ({training.kind})", count) if show_progress else nullcontext(_ignore)
    with bar as advance:
        for sites in groups:
            data, bank = _prepare(features, sites, targets, splits, training, values)
            _fit(bank, data, training)
            if isinstance(bank, DescentBank):
                diverged += int(bank.diverged.sum())
                unfinished += int((~bank.stopped()).sum())
            for rows, predictions in _predict(bank, data, training):
                out_of_fold[rows.numpy(), sites] = predictions.float().numpy()
            criterion.append(bank.criterion.gather(2, bank.chosen[:, :, None]).squeeze(2).double().cpu().numpy())
            chosen.append(bank.chosen.cpu().numpy())
            heads.append(_heads(bank, sites.start, kept))
            advance(len(bank.sites))
    if diverged:
        log.warning(
            "%d of %d probes diverged (%s): each keeps its best epoch before that; lower probe.learning_rate (%g)",
            diverged,
            probes,
            training.kind,
            training.descent.learning_rate,
        )
    if unfinished:
        log.warning(
            "%d of %d probes (%s) had not stopped after %d epochs: raise probe.max_epochs or probe.learning_rate",
            unfinished,
            probes,
            training.kind,
            training.max_epochs,
        )
    every = {key: probe for part in heads for key, probe in part.items()}

    def probe(fit: int, site: int, target: int, name: str) -> Probe:
        return replace(every[fit, site, target], target=name)

    return Trained(out_of_fold, np.concatenate(criterion, axis=1), np.concatenate(chosen, axis=1), probe)


def _heads(bank: ProbeBank, start: int, kept: int) -> dict[tuple[int, int, int], Probe]:
    return {
        (fit, start + site, target): bank.probe(fit, site, target, "")
        for fit in range(bank.splits.fits)
        for site in range(len(bank.sites))
        for target in range(kept)
    }


def _width(features: Features, targets: torch.Tensor, splits: Splits, training: Training) -> int:
    """How many sites are trained together."""
    d, fits, t = features.d_model, splits.fits, targets.shape[1]
    if training.kind == "ridge":
        numbers = features.n * d if features.n <= d else (splits.k + 4) * d * d
        numbers += fits * t * d
    elif training.kind == "mean_difference":
        numbers = 4 * fits * t * d
    else:
        inputs = training.descent.hidden * (d + 2) if training.kind == "mlp" else d + 8
        # The parameters, their gradients, the optimiser's two moments, and the best.
        numbers = 6 * fits * len(training.penalties) * t * inputs + 2 * training.batch_size * d
    return max(1, min(len(features.sites), GROUP_BYTES // (8 * numbers)))


def _prepare(
    features: Features,
    sites: slice,
    targets: torch.Tensor,
    splits: Splits,
    training: Training,
    values: Sequence[float],
) -> tuple[ProbeData, ProbeBank]:
    names, d = features.sites[sites], features.d_model
    descends = training.kind in DESCENDING
    batch_size = training.batch_size if descends else None
    data = ProbeData(features, sites, targets, splits, batch_size=batch_size, seed=training.seed)
    if training.kind == "ridge":
        return data, RidgeBank(names, d, targets.shape[1], splits, training.penalties, data.reference())
    moments = data.moments(without_validation=True)
    if training.kind == "mean_difference":
        return data, MeanDifferenceBank(names, d, targets, splits, moments)
    extra = {"values": torch.tensor(values, dtype=torch.float32)} if training.kind == "ordinal" else {}
    bank = DESCENDING[training.kind](names, d, targets, splits, training.penalties, moments, training.descent, **extra)
    return data, bank


def _fit(bank: ProbeBank, data: ProbeData, training: Training) -> None:
    epochs = {"ridge": 1, "mean_difference": 2}.get(training.kind, training.max_epochs)
    descends = isinstance(bank, DescentBank)
    with _quiet(), torch.random.fork_rng(devices=[]), _threads(data.d_model):
        trainer = _trainer(
            training,
            max_epochs=epochs,
            callbacks=[EachStopsAlone()] if descends else [],
            # Sums need each task once: the sampler of several devices would repeat some to even out their shares.
            use_distributed_sampler=descends,
            limit_val_batches=None if descends else 0,
            # Validated before the first step too: a probe that only gets worse stays where it began, at the mean.
            num_sanity_val_steps=-1 if descends else 0,
        )
        trainer.fit(bank, datamodule=data)


def _predict(bank: ProbeBank, data: ProbeData, training: Training) -> list[tuple[torch.Tensor, torch.Tensor]]:
    alone = {"strategy": "auto", "devices": 1, "callbacks": [], "logger": False}
    one = {**training.trainer, **alone}
    with _quiet(), torch.random.fork_rng(devices=[]), _threads(data.d_model):
        trainer = _trainer(Training(kind=training.kind, trainer=one))
        found: Any = trainer.predict(bank, dataloaders=data.predict_dataloader())
    return found


def _trainer(training: Training, **arguments: Any) -> lightning.Trainer:
    if taken := sorted(arguments.keys() & training.trainer.keys() - {"callbacks"}):
        raise UserError(f"probe.trainer: probes set {', '.join(taken)} themselves: leave it out")
    settings: dict[str, Any] = {
        # Not Lightning's own "auto", which on a Mac is MPS: that has no float64.
        "accelerator": "cuda" if torch.cuda.is_available() else "cpu",
        "devices": 1,
        "logger": False,
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        # Closed forms are solved in float64: small penalties are lost beside the rounding of float32 sums.
        "precision": "32-true" if training.kind in DESCENDING else "64-true",
        **arguments,
        **training.trainer,
    }
    settings["callbacks"] = [*arguments.get("callbacks", []), *training.trainer.get("callbacks", [])]
    if settings["devices"] == 1:
        settings["plugins"] = [LightningEnvironment()]  # one process, also inside a Slurm job of several tasks
    elif isinstance(strategy := settings.get("strategy", "auto"), str):
        if strategy not in START_METHODS:
            raise ConfigError("probe.trainer.strategy", strategy, list(START_METHODS))
        # The buffers of a bank are each device's own until they are added up.
        settings["strategy"] = DDPStrategy(start_method=START_METHODS[strategy], broadcast_buffers=False)
    try:
        return lightning.Trainer(**settings)
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise UserError(f"probe.trainer: {' '.join(str(error).split())}") from None


def _ignore(count: int) -> None:
    """Advance no bar."""


@contextmanager
def _threads(width: int) -> Iterator[None]:
    """One CPU thread for narrow problems, around one call only."""
    if width > ONE_THREAD_WIDTH:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's remarks on devices, loggers and data loaders to itself, around one call only."""
    talkers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")]
    levels = [talker.level for talker in talkers]
    try:
        for talker in talkers:
            talker.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            yield
    finally:
        for talker, level in zip(talkers, levels, strict=True):
            talker.setLevel(level)
