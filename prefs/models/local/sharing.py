"""What the passes of a model may share without changing a row's numbers.

A row's numbers are those of one whole pass over it alone. Rows that are padded to stand side by side, and passes that
go on from kept keys and values, give the same for most families. A sliding window counts padding between a row's
tokens as tokens, a recurrent state takes it up, and a family may go on from its states for one token at a time only, or
not at all. What the config does not tell is tried out when the model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.cache_utils import get_layer_types_and_kwargs

Tokens = Sequence[int]


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
    tree
        Sequences that go on from the same tokens in one row, each with a mask that hides the others.
    switch
        Rows of more tokens than this have other positions (longrope): they are run alone, and no pass goes on across.
    indexed
        Whether they choose what they attend to instead (DeepSeek's sparse attention), where transformers 5.19 lets them
        see later tokens: they cannot be run.
    """

    rows: bool = True
    gaps: bool = True
    several: bool = True
    single: bool = True
    tree: bool = True
    switch: int | None = None
    indexed: bool = False

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
        indexed = "indexed_attention" in kinds
        switch = config.index_topk if indexed else min(switches, default=None)
        return cls(gaps=full, tree=full and switch is None, switch=switch, indexed=indexed)

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
