"""What the passes of a model may share without changing a row's numbers.

A row's numbers are those of one whole pass over it alone. Rows that are padded to stand side by side, and passes that
go on from kept keys and values, give the same for most families. A sliding window counts padding between a row's
tokens as tokens, a recurrent state takes it up, and a family may go on from its states for one token at a time only, or
not at all. What the config does not tell is tried out when the model is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import get_layer_types_and_kwargs

from prefs.models.local.memory import out_of_memory

if TYPE_CHECKING:
    from prefs.models.local.passes import Passes, State

log = logging.getLogger(__name__)

Tokens = Sequence[int]

# Of the trial: tokens of a row, of what then goes on, and how many more the row beside it has.
START, MORE, LONGER = 6, 3, 5
# The longest window that the trial passes; it would cost too much with others.
REACH = 64
# Steps of its dtype by which rounding may put a model's logits off, relative to their norm: about 5 for SmolLM2 in
# bfloat16, while what cannot be shared puts them off by half of it.
ROUNDING = 16


@dataclass(frozen=True)
class Sharing:
    """What does not change a row's numbers.

    Attributes
    ----------
    rows
        Rows of other lengths beside it, with padding before its first token.
    gaps
        Padding between its tokens.
    several, single
        Going on from kept keys and values for several tokens at once, and for one.
    switch
        Rows of more tokens than this have other positions (longrope): they are run alone, and no pass goes on across.
    """

    rows: bool = True
    gaps: bool = True
    several: bool = True
    single: bool = True
    switch: int | None = None

    @classmethod
    def of_config(cls, config: Any) -> Sharing:
        """What a model's config tells: of its windows and states, and where its positions change."""
        config = config.get_text_config(decoder=True)
        kinds = {*(getattr(config, "layer_types", None) or ()), *get_layer_types_and_kwargs(config)[0]}
        # GPT-Neo has windows under another name.
        full = kinds <= {"full_attention"} and "local" not in getattr(config, "attention_layers", ())
        rope = getattr(config, "rope_parameters", None) or {}
        by_kind = [rope, *(part for part in rope.values() if isinstance(part, dict))]
        switches = [part["original_max_position_embeddings"] for part in by_kind if part.get("rope_type") == "longrope"]
        return cls(gaps=full, switch=min(switches, default=None))

    def goes_on(self, done: Sequence[Tokens], rows: Sequence[Tokens]) -> bool:
        """Whether these tokens may be run after those that are `done`, by what was kept of these."""
        if not any(done):
            return True
        width = max(map(len, rows))
        gap = any(before and len(row) < width for before, row in zip(done, rows, strict=True))
        ends = [len(before) + len(row) for before, row in zip(done, rows, strict=True)]
        crosses = self.switch is not None and max(map(len, done)) <= self.switch < max(ends)
        return (self.several if width > 1 else self.single) and (self.gaps or not gap) and not crosses

    def note(self) -> str | None:
        """What is run in another way for it, in a line; None where everything is shared."""
        notes = []
        if not self.rows:
            notes.append("rows are run one at a time")
        elif self.switch is not None:
            notes.append(f"rows of over {self.switch:,} tokens are run one at a time")
        if not self.several:
            notes.append("questions are run with all that is before them")
        elif not self.gaps and self.rows:
            notes.append("rows that go on by unequal lengths, as after thoughts, are run again from their beginning")
        if not self.single:
            notes.append("so is every row for each token that is drawn")
        return "; ".join(notes) or None


def tried(passes: Passes, config: Any, text: Tokens) -> Sharing:
    """What may be shared, by the config and by a few short passes over the tokens of a text.

    What differs from a whole pass over the row alone by more than rounding does, or cannot be run, is not shared.
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
    return Sharing(rows, gaps, several, single, known.switch)


class _Trial:
    """Passes over rows, the first of which is held against a whole pass over it alone."""

    def __init__(self, passes: Passes, rows: Sequence[tuple[int, ...]]):
        self.rows = rows
        self._passes = passes
        self._whole = passes.start([rows[0]], cached=False, keep=len(rows[0]))[1][0]

    def holds(self, error: Callable[..., float], *lengths: int) -> bool:
        """Whether an error is one of rounding; it is not where the pass fails, being of a kind that a family lacks."""
        try:
            off = error(*lengths)
        except Exception as failure:
            if out_of_memory(failure):
                raise
            log.debug("%s%s fails: %s", error.__name__, lengths, failure)
            return False
        log.debug("%s%s is off by %.1e", error.__name__, lengths, off)
        # What is not finite says nothing of how it came about.
        return not off > max(1e-3, ROUNDING * torch.finfo(self._passes.dtype).eps)

    def side_by_side(self) -> float:
        """The error of rows beside each other."""
        return self._error(self._begun[1][0], -MORE - START)

    def going_on(self, *lengths: int) -> float:
        """The error of rows that go on by so many tokens, in another order than they began in."""
        more = [row[len(row) - MORE :][:length] for row, length in zip(self.rows, lengths, strict=True)]
        order = self._passes.tensor(range(len(more))[::-1])
        _, logits = self._passes.extend(self._begun[0].fork().select(order), more[::-1], keep=lengths[0])
        return self._error(logits[-1], -MORE)

    @cached_property
    def _begun(self) -> tuple[State, torch.Tensor]:
        return self._passes.start([row[:-MORE] for row in self.rows], keep=START)

    def _error(self, logits: torch.Tensor, first: int) -> float:
        """Of logits [tokens, vocabulary] of the first row from a token on: the norm of their error, relative to
        their own."""
        start = len(self._whole) + first
        whole = self._whole[start : start + len(logits)].float()
        return float((logits.float() - whole).norm() / (whole - whole.mean(dim=-1, keepdim=True)).norm())
