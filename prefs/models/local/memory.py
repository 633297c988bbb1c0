"""Out of memory: a batch that does not fit is run in halves."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from prefs.errors import UserError

log = logging.getLogger(__name__)

Row = TypeVar("Row")
Answer = TypeVar("Answer")

# What allocators say that raise a plain RuntimeError: those of CPUs, Apple's GPUs, and cuBLAS.
SAYINGS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


class Halving:
    """Runs batches of one model, in halves where memory runs out. The first time is logged."""

    def __init__(self, name: str):
        self._name = name
        self._logged = False

    def run(
        self, run: Callable[[Sequence[Row]], list[Answer]], rows: Sequence[Row], tokens: Callable[[Row], int]
    ) -> Iterator[Answer]:
        """One answer a row, in order; `tokens` is asked for the length of a row that does not fit.

        Raises
        ------
        UserError
            If a row does not fit even alone.
        """
        answers = None
        try:
            answers = run(rows)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        if answers is not None:
            yield from answers
            return
        # Here the error is gone, and with it what its traceback held.
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        if len(rows) == 1:
            raise UserError(
                f"{self._name}: memory runs out with a single conversation of {tokens(rows[0]):,} tokens; set"
                " model.max_context lower, so that such conversations are left out as too long, or spread the model"
                " over more devices (model.device_map=auto)"
            )
        if not self._logged:
            log.warning(
                "%s: memory ran out with %d conversations at a time; they and others that do not fit are run in"
                " halves. A lower model.batch_tokens saves the failed attempts",
                self._name,
                len(rows),
            )
            self._logged = True
        half = len(rows) // 2
        yield from self.run(run, rows[:half], tokens)
        yield from self.run(run, rows[half:], tokens)


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocator found no more memory, on whatever device."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in SAYINGS)
