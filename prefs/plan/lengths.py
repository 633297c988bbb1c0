"""How long answers will be that are not there yet: at most, or as those were that the store has; and texts so long."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from prefs.models.sampling import row_seed
from prefs.models.tokens import ChatEncoder
from prefs.models.types import Conversation
from prefs.plan.store import Planned

# Thoughts that are measured; the store keeps their texts and not their lengths.
THOUGHTS_MEASURED = 200
# Words that made-up texts are of.
WORDS = 512
FALLBACK_WORDS = (" the", " of", " and", " to", " in", " is", " that", " for")


@dataclass(frozen=True)
class Length:
    """Tokens of an answer: ``drawn`` with it, and ``run`` through the model to draw those after them."""

    drawn: float
    run: float


@dataclass(frozen=True)
class Lengths:
    """Lengths of what is not there yet.

    ``bound`` takes the most that the config allows; otherwise it is the mean of those that the store has of the same
    model and settings, where it has any.
    """

    planned: Planned
    bound: bool
    _found: dict[tuple[object, ...], Length] = field(default_factory=dict)

    def answer(self, kind: str, most: int) -> Length:
        """Of a row of this kind of table ("completions", "answers")."""

        def find() -> Length | None:
            known = [min(int(row["tokens"]), most) for row in self.planned.texts(kind)]
            if not known:
                return None
            # The last token is drawn and not run; where a stop token ended the answer, that one is the last.
            return Length(float(np.mean(known)), float(np.mean([min(length, most - 1) for length in known])))

        return self._length((kind,), most, find)

    def thought(self, kinds: tuple[str, ...], most: int, encoder: ChatEncoder | None) -> Length:
        """Of a thought that comes before rows of these kinds."""

        def find() -> Length | None:
            texts = [str(row["thought"]) for kind in kinds for row in self.planned.thoughts(kind)]
            if not texts or encoder is None:
                return None
            some = texts[:: max(1, len(texts) // THOUGHTS_MEASURED)]
            tokens = float(np.mean([min(tokens_of(encoder, text), most) for text in some]))
            return Length(tokens, min(tokens, most - 1))

        return self._length(("thought", *kinds), most, find)

    def _length(self, what: tuple[str, ...], most: int, find: Callable[[], Length | None]) -> Length:
        longest = Length(most, most - 1)
        if self.bound:
            return longest
        # Tables are opened one after another; what was found before may lack rows.
        at = (*what, most, *(len(self.planned.drawn.get(kind, {})) for kind in what))
        if at not in self._found:
            self._found[at] = find() or longest
        return self._found[at]


def tokens_of(encoder: ChatEncoder, text: str) -> int:
    """Tokens of a text by itself."""
    return len(encoder.tokenizer(text, add_special_tokens=False)["input_ids"])  # pyright: ignore[reportArgumentType]


class Prose:
    """Made-up texts of so many tokens, other ones for other conversations: words that are a token each."""

    def __init__(self, encoder: ChatEncoder | None):
        self.words = FALLBACK_WORDS if encoder is None else _words(encoder)

    def text(self, tokens: float, conversation: Conversation, seed: int) -> str:
        """A text of a number of tokens, rounded, at least one."""
        random = np.random.default_rng(row_seed(seed, conversation))
        chosen = random.integers(len(self.words), size=max(1, round(tokens)))
        return "".join(self.words[at] for at in chosen.tolist()).strip()


def _words(encoder: ChatEncoder) -> tuple[str, ...]:
    """Words of the tokenizer's that are one token after a blank, and by themselves."""
    tokenizer, found = encoder.tokenizer, []
    for token in np.random.default_rng(0).permutation(len(tokenizer)).tolist():
        word = str(tokenizer.decode([token])).strip()
        if re.fullmatch(r"[a-z]{2,12}", word) and tokens_of(encoder, f"{word} {word}") == 2:
            found.append(f" {word}")
        if len(found) == WORDS:
            break
    return tuple(found) or FALLBACK_WORDS
