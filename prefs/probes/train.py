"""Train a bank of probes with Lightning's Trainer, some sites at a time, and hand back held-out predictions."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import lightning
import numpy as np
import torch
from hydra.utils import get_class
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from threadpoolctl import threadpool_limits

from prefs.config import TRAINER, ProbeConfig
from prefs.errors import ConfigError, UserError
from prefs.probes.bank import ProbeBank
from prefs.probes.data import ProbeData
from prefs.probes.descent import DescentBank
from prefs.probes.features import Features
from prefs.probes.folds import Splits
from prefs.probes.probe import Probe
from prefs.progress import progress

log = logging.getLogger(__name__)

# How the processes of several devices begin. Lightning's other ways begin the whole command again for each.
START_METHODS: Mapping[str, Literal["spawn", "fork"]] = {"auto": "spawn", "ddp_spawn": "spawn", "ddp_fork": "fork"}
# Sites are independent, so they are trained in groups whose parameters and sums take at most about this.
GROUP_BYTES = 2**31
# Up to this width a second thread gains little, and on a busy machine threads spend their time waiting for each other.
ONE_THREAD_WIDTH = 1024


@dataclass(frozen=True, eq=False)
class Trained:
    """What banks over all sites brought.

    Attributes
    ----------
    out_of_fold
        [n, S, T] float32, each task's prediction by the fit that held out its group.
    criterion
        [F, S, T], the criterion of each fit's chosen penalty: it compares sites.
    penalty
        [F, S, T], the penalty itself; NaN of a kind that has none.
    probe
        A function of fit, site and target (by index) and a name: that probe by itself. Targets beyond ``kept`` have
        none.
    """

    out_of_fold: np.ndarray
    criterion: np.ndarray
    penalty: np.ndarray
    probe: Callable[[int, int, int, str], Probe]

    def best_sites(self) -> np.ndarray:
        """[F, T], the site that each fit would choose by its own training tasks."""
        return self.criterion.argmin(axis=1)


def bank_class(config: ProbeConfig) -> type[ProbeBank]:
    """The kind of probe that a config names."""
    return get_class(config._target_)


def train(
    features: Features,
    targets: torch.Tensor,
    splits: Splits,
    config: ProbeConfig,
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
        [n, T] finite numbers; [n, T, V] shares of V options for a kind that is trained on these.
    splits
        Of the n tasks.
    config
        The kind of probe and how it is trained. What of ``trainer`` is an object (a logger, callbacks) is made.
        A logger is told ``probe/loss``, ``probe/validation_loss`` and ``probe/stopped``, by epoch.
    kept
        How many of the targets, from the first, probes are kept of; of the others there are predictions alone.
    values
        [V] what the options are worth, rising.
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
    kind = bank_class(config)
    count, batch_size = len(features.sites), config.batch_size if kind.epochs is None else None
    width = group_width(features, targets, splits, config)
    total = splits.fits * count * max(1, len(kind.penalties_of(config))) * targets.shape[1]
    out_of_fold = np.empty((features.n, count, targets.shape[1]), dtype=np.float32)
    probes: dict[tuple[int, int, int], Probe] = {}
    criterion, penalty = [], []
    diverged = unfinished = 0
    bar = progress(f"training {total:,} probes ({config.kind})", count) if show_progress else nullcontext(_ignore)
    with bar as advance:
        for start in range(0, count, width):
            columns = slice(start, min(start + width, count))
            data = ProbeData(features, columns, targets, splits, values=values, batch_size=batch_size, seed=config.seed)
            bank = kind(data, config)
            for rows, predictions in fit(bank):
                out_of_fold[rows, columns] = predictions
            if isinstance(bank, DescentBank):
                diverged += int(bank.diverged.sum())
                unfinished += int((~bank.stopped()).sum())
            criterion.append(bank.criterion.gather(2, bank.chosen[:, :, None]).squeeze(2).double().cpu().numpy())
            penalty.append(np.array(bank.penalties or (np.nan,))[bank.chosen.cpu().numpy()])
            for number, site, target in np.ndindex(splits.fits, len(bank.sites), kept):
                probes[number, start + site, target] = bank.probe(number, site, target, "")
            advance(len(bank.sites))
    if diverged:
        log.warning(
            "%d of %d probes diverged (%s): each keeps its best epoch before that; lower probe.learning_rate (%g)",
            diverged,
            total,
            config.kind,
            config.learning_rate,
        )
    if unfinished:
        log.warning(
            "%d of %d probes (%s) had not stopped after %d epochs: raise probe.max_epochs or probe.learning_rate",
            unfinished,
            total,
            config.kind,
            config.max_epochs,
        )

    def probe(fit: int, site: int, target: int, name: str) -> Probe:
        return replace(probes[fit, site, target], target=name)

    return Trained(out_of_fold, np.concatenate(criterion, axis=1), np.concatenate(penalty, axis=1), probe)


def group_width(features: Features, targets: torch.Tensor, splits: Splits, config: ProbeConfig) -> int:
    """How many sites are trained together."""
    numbers = bank_class(config).numbers(features.n, features.d_model, splits.fits, targets.shape[1], config)
    return max(1, min(len(features.sites), int(GROUP_BYTES // (8 * numbers))))


def fit(bank: ProbeBank) -> list[tuple[np.ndarray, np.ndarray]]:
    """Train a bank; returns its held-out predictions, rows [b] and [b, S, T] a batch."""
    steps = bank.epochs is None
    threads = threadpool_limits(1 if bank.data.d_model <= ONE_THREAD_WIDTH else None)
    with _quiet(), torch.random.fork_rng(devices=[]), threads:
        trainer = _trainer(
            bank,
            max_epochs=bank.epochs or bank.settings.max_epochs,
            # Sums need each task once: the sampler of several devices would repeat some to even out their shares.
            use_distributed_sampler=steps,
            limit_val_batches=None if steps else 0,
            # Validated before the first step too: a probe that only gets worse stays where it began, at the mean.
            num_sanity_val_steps=-1 if steps else 0,
        )
        with _one_line():
            trainer.fit(bank)
        device = trainer.strategy.root_device
        bank.to(device)
        predictions = [
            (batch.rows.numpy(), bank.held_out(batch._replace(features=batch.features.to(device))).numpy())
            for batch in bank.data.in_order()
        ]
        bank.cpu()
        return predictions


def _trainer(bank: ProbeBank, **arguments: Any) -> lightning.Trainer:
    given = bank.settings.trainer
    if refused := sorted(given.keys() - {*TRAINER, "default_root_dir"}):
        raise ConfigError("probe.trainer", refused[0], TRAINER)
    settings: dict[str, Any] = {
        # Not Lightning's own "auto", which on a Mac is MPS: that has no float64.
        "accelerator": "cuda" if torch.cuda.is_available() else "cpu",
        "devices": 1,
        "logger": False,
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "precision": bank.precision,
        **arguments,
        **given,
    }
    if settings["devices"] == 1:
        settings["plugins"] = [LightningEnvironment()]  # one process, also inside a Slurm job of several tasks
    elif isinstance(strategy := settings.get("strategy", "auto"), str):
        if strategy not in START_METHODS:
            raise ConfigError("probe.trainer.strategy", strategy, list(START_METHODS))
        # The buffers of a bank are each device's own until they are added up.
        settings["strategy"] = DDPStrategy(start_method=START_METHODS[strategy], broadcast_buffers=False)
    with _one_line(TypeError, ValueError, AttributeError, ImportError):
        trainer = lightning.Trainer(**settings)
    made = (("callbacks", trainer.callbacks, lightning.Callback), ("logger", trainer.loggers, Logger))  # type: ignore[attr-defined]
    for name, parts, kind in made:
        for part in parts:
            if not isinstance(part, kind):
                raise ConfigError(f"probe.trainer.{name}", part, "Lightning's, by _target_")
    return trainer


@contextmanager
def _one_line(*errors: type[Exception]) -> Iterator[None]:
    """What Lightning says of arguments that it does not take."""
    try:
        yield
    except (MisconfigurationException, *errors) as error:
        raise UserError(f"probe.trainer: {error}") from None


def _ignore(count: int) -> None:
    """Advance no bar."""


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
