"""Train a bank of linear probes with Lightning, quietly, and hand back plain weights and held-out predictions."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import lightning
import numpy as np
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.loggers import Logger

from prefs.probes.data import ProbeData
from prefs.probes.linear import LinearProbes
from prefs.progress import progress

log = logging.getLogger(__name__)

# Layers are independent, so they are trained in groups of at most this many float64 numbers (2 GiB) at a time.
GROUP_NUMBERS = 2**28
# Up to this many numbers a second thread gains little, and on a busy machine the threads spend their time waiting for
# each other: measured on 2 shared cores, 0.4 s with one thread and 8 s with two.
ONE_THREAD_NUMBERS = 2**25


@dataclass(frozen=True, eq=False)
class FittedProbes:
    """Probes for the vectors as they were captured: rating = weight[t, l] . vector + bias[t, l].

    ``weight`` [T, L, d] and ``bias`` [T, L], float32, are of the fit on all tasks. ``out_of_fold`` [T, L, n], float64,
    has for each task the prediction of the fit that held it out, also where the task has no target; it is NaN, like the
    bias, for a target with no training task. ``converged`` tells whether all of T x L x F probes did.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    out_of_fold: np.ndarray
    converged: bool


def fit_linear(
    features: torch.Tensor,
    targets: torch.Tensor | np.ndarray,
    folds: torch.Tensor | np.ndarray,
    *,
    penalty: float,
    max_epochs: int = 100,
    seed: int = 0,
    logger: Logger | None = None,
    accelerator: str = "auto",
    show_progress: bool = False,
) -> FittedProbes:
    """Train linear probes for all targets, layers and folds together; see `LinearProbes` for the objective.

    Parameters
    ----------
    features
        [n, L, d] captured vectors, bfloat16 or float32, in the computer's own memory.
    targets
        [n, T], NaN where a task has no such target.
    folds
        [n], from `assign_folds`.
    penalty
        Of the squared norm of the weights on standardised features; scikit-learn's ``alpha`` over the number of tasks.
    max_epochs
        Of 20 iterations each. Training ends sooner when all probes have converged; where they have not, a warning is
        logged.
    seed
        Of everything drawn at random; a linear probe draws nothing, so its result is the same for all.
    logger
        A Lightning logger for ``probe/objective`` and ``probe/converged``, by epoch.
    accelerator
        As Lightning's; ``auto`` is the CUDA device if there is one and else the CPU.
    show_progress
        Whether to show a bar of probes converged.

    Raises
    ------
    ValueError
        If shapes do not agree, a fold is empty, the penalty is negative, or a feature (named by row and layer index)
        or a target is not finite.
    """
    targets, folds = _tensor(targets), _tensor(folds)
    whole = ProbeData(features, targets, folds, seed=seed)
    tasks, layers, d = features.shape
    probes = whole.train.shape[0] * whole.train.shape[1] * layers
    width = max(1, GROUP_NUMBERS // (tasks * d))

    parts: list[FittedProbes] = []
    bar = progress(f"training {probes} probes", probes) if show_progress else nullcontext(_ignore)
    with bar as advance, _threads(1 if features.numel() <= ONE_THREAD_NUMBERS else torch.get_num_threads()):
        for start in range(0, layers, width):
            data = whole
            if width < layers:
                data = ProbeData(features[:, start : start + width], targets, folds, seed=seed)
            parts.append(_train(data, penalty, max_epochs, logger, accelerator, advance))

    converged = all(part.converged for part in parts)
    if not converged:
        log.warning("some probes have not converged in max_epochs=%d: raise it, or penalty=%g", max_epochs, penalty)
    return FittedProbes(
        weight=torch.cat([part.weight for part in parts], dim=1),
        bias=torch.cat([part.bias for part in parts], dim=1),
        out_of_fold=np.concatenate([part.out_of_fold for part in parts], axis=1),
        converged=converged,
    )


def _train(
    data: ProbeData,
    penalty: float,
    max_epochs: int,
    logger: Logger | None,
    accelerator: str,
    advance: Callable[[int], None],
) -> FittedProbes:
    probes = LinearProbes(data.moments(), penalty)
    if accelerator == "auto":
        # Not Lightning's own "auto", which on a Mac is MPS: that has no float64.
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    with _quiet(), torch.random.fork_rng(devices=[]):
        trainer = lightning.Trainer(
            accelerator=accelerator,
            devices=1,
            max_epochs=max_epochs,
            logger=False if logger is None else logger,
            log_every_n_steps=1,
            callbacks=[_Advance(advance)],
            plugins=[LightningEnvironment()],  # one process, also inside a Slurm job of several tasks
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(probes, datamodule=data)

    with torch.no_grad():
        weight, bias = (part[:, :, -1] for part in probes.raw())
        out_of_fold = np.empty((*bias.shape, len(data.folds)))
        for fold in range(data.k):
            held_out = data.folds == fold
            out_of_fold[:, :, held_out.numpy()] = probes.predict(data.features[held_out].double(), fold).numpy()
    return FittedProbes(weight.float(), bias.float(), out_of_fold, bool(probes.converged.all()))


class _Advance(lightning.Callback):
    """Tells a progress bar how many more probes have converged."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance
        self._seen = 0

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, LinearProbes)
        seen = int(pl_module.converged.sum())
        self._advance(seen - self._seen)
        self._seen = seen


def _tensor(values: torch.Tensor | np.ndarray) -> torch.Tensor:
    # A copy, as pandas hands out read-only arrays, which PyTorch does not like to share.
    return torch.tensor(values) if isinstance(values, np.ndarray) else values


def _ignore(count: int) -> None:
    """Advance no bar."""


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let PyTorch use this many CPU threads, around one call only."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
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
