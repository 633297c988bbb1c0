"""What of a model's `Sharing` holds: tried out in a few short passes when it is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from transformers.cache_utils import get_layer_types_and_kwargs

from prefs.errors import UserError
from prefs.models.local.memory import out_of_memory
from prefs.models.local.passes import Kept, Passes, State
from prefs.models.local.sharing import Sharing

log = logging.getLogger(__name__)

# Of the trial: tokens of a row, of what then goes on, and how many more the row beside it has.
START, MORE, LONGER = 6, 3, 5
# The longest window that the trial passes; it would cost too much with others.
REACH = 64
# Steps of its dtype by which rounding in one block may put the residual stream off, relative to its norm.
ROUNDING = 3


def tried(passes: Passes, config: Any, text: Sequence[int]) -> Sharing:
    """What may be shared, by the config and by a few short passes over the tokens of a text.

    What differs from a whole pass over the row alone by more than rounding does, or cannot be run, is not shared.

    Raises
    ------
    UserError
        If the residual stream is not seen after each block.
    """
    known, passes.sharing = passes.sharing, Sharing()
    _, options = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    windows = [option["sliding_window"] for option in options if option.get("sliding_window", REACH + 1) <= REACH]
    length = max(START, *windows, 0) + MORE
    row, beside = tuple(text[:length]), (text[0], *text[1 - length - LONGER :])
    trial = _Trial(passes, (row, beside))
    rows = trial.holds(trial.side_by_side)
    if not rows:
        trial = _Trial(passes, (row,))
    gaps = known.gaps and rows and trial.holds(trial.going_on, MORE - 1, MORE)
    several = gaps or trial.holds(trial.going_on, *[MORE] * len(trial.rows))
    single = trial.holds(trial.going_on, *[1] * len(trial.rows))
    tree = known.tree and gaps and trial.holds(trial.in_a_tree)
    return replace(known, rows=rows, gaps=gaps, several=several, single=single, tree=tree)


class _Trial:
    """Passes over rows, the first of which is held against a whole pass over it alone."""

    def __init__(self, passes: Passes, rows: Sequence[tuple[int, ...]]):
        self.rows = rows
        self._passes = passes
        self._whole = Kept(range(passes.n_layers), stops=False)
        passes.start([rows[0]], watchers=[self._whole], cached=False)
        unseen = [layer for layer in range(passes.n_layers) if layer not in self._whole.after]
        if unseen:
            raise UserError(f"{passes.name}: TransformerLens shows no residual stream after block {unseen[0]}")

    def holds(self, error: Callable[..., float], *lengths: int) -> bool:
        """Whether an error is one of rounding; it is not where the pass fails, being of a kind that a family lacks."""
        try:
            off = error(*lengths)
        except Exception as failure:
            if out_of_memory(failure):
                raise
            log.debug("%s%s fails: %s", error.__name__, lengths, failure)
            return False
        log.debug("%s%s is off by %.2g of rounding", error.__name__, lengths, off)
        # What is not finite says nothing of how it came about.
        return not off > 1

    def side_by_side(self) -> float:
        """The error of rows beside each other."""
        _, kept = self._begun
        return self._error(kept, 0, START, -MORE - START)

    def going_on(self, *lengths: int) -> float:
        """The error of rows that go on by so many tokens, in another order than they began in."""
        more = [row[len(row) - MORE :][:length] for row, length in zip(self.rows, lengths, strict=True)]
        order, kept = self._passes.tensor(range(len(more))[::-1]), Kept(range(self._passes.n_layers), stops=False)
        self._passes.extend(self._begun[0].fork().select(order), more[::-1], watchers=[kept])
        return self._error(kept, -1, lengths[0], -MORE)

    def in_a_tree(self) -> float:
        """The error of tokens that go on among others, in a tree, of which the row beside it has fewer."""
        (row, beside), kept = self.rows, Kept(range(self._passes.n_layers), stops=False)
        more, others = row[-MORE:], beside[-MORE:]
        trunk = [more[: length + 1] for length in range(MORE)]
        tree = [others[:1], others[:2], (*more[:1], others[1]), *trunk]
        self._passes.extend_tree(self._begun[0].fork(), [tree, [others[:1]]], watchers=[kept])
        return self._error(kept, 0, MORE, -MORE)

    @cached_property
    def _begun(self) -> tuple[State, Kept]:
        kept = Kept(range(self._passes.n_layers), stops=False)
        state, _ = self._passes.start([row[:-MORE] for row in self.rows], watchers=[kept])
        return state, kept

    def _error(self, kept: Kept, row: int, tokens: int, first: int) -> float:
        """How far the last `tokens` of a row are off, over what rounding may do to them: the most of all blocks."""
        start, most = len(self.rows[0]) + first, 0.0
        for layer, whole in self._whole.after.items():
            expected = whole[0, start : start + tokens].float()
            off = (kept.after[layer][row, -tokens:].float() - expected).norm() / expected.norm()
            # It adds up from block to block, as random steps do.
            rounding = ROUNDING * torch.finfo(whole.dtype).eps * (layer + 1) ** 0.5
            most = max(most, float(off) / max(1e-3, rounding))
        return most
