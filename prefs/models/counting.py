"""Engines that count what the real ones would run, for a plan: what they have in common. What would be drawn is made
up, so long as it can be at most or as such texts were so far."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from prefs.errors import explained
from prefs.models.loading import ModelSpec, model_folder
from prefs.models.sampling import row_seed
from prefs.models.tokens import ChatEncoder
from prefs.models.types import Conversation, Request, Sample, Sampling

COMPLETER, RATER, JUDGE = ROLES = ("completer", "rater", "judge")
# Tables whose rows come after a thought, by who thinks.
THOUGHTS = {COMPLETER: ("completions",), RATER: ("answers", "scores"), JUDGE: ()}
# Thoughts that are measured; the store keeps their texts and not their lengths.
THOUGHTS_MEASURED = 200
# Words that made-up texts are of.
WORDS = 512
FALLBACK_WORDS = (" the", " of", " and", " to", " in", " is", " that", " for")


def role_of(request: Request) -> str:
    """Whose request it is."""
    if request.choose:
        return JUDGE
    return COMPLETER if request.question is None and request.seeds else RATER


@dataclass
class Tally:
    """What a role would have its model do: requests, tokens run (or, of a server, billed), and thoughts."""

    requests: int = 0
    prompt_tokens: float = 0.0
    drawn_tokens: float = 0.0
    thoughts: int = 0


@dataclass(frozen=True)
class Length:
    """Tokens of an answer: ``drawn`` with it, and ``run`` through the model to draw those after them."""

    drawn: float
    run: float


@dataclass
class Counts:
    """What all roles would have done, and how long they expect what is not there yet to be.

    Attributes
    ----------
    bound
        Whether answers are as long as the config allows; otherwise they are as long as those on average that the store
        has of the same model and settings, where it has any.
    stored
        By kind of table, the rows that the store has, by key.
    tallies
        By role.
    made_up
        Whether some prompts held texts that were made up.
    role
        Whose requests are being counted.
    """

    bound: bool
    stored: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    tallies: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    made_up: bool = False
    role: str = RATER
    _known: dict[tuple[object, ...], Length] = field(default_factory=dict)

    @property
    def tally(self) -> Tally:
        """The role's."""
        return self.tallies[self.role]

    def rows(self, kind: str, column: str = "text") -> list[Mapping[str, Any]]:
        """Rows of the store that hold a text, or a thought."""
        return [row for row in self.stored.get(kind, {}).values() if row[column] is not None]

    def answer(self, most: int) -> Length:
        """Of a completion or an answer."""
        kind = "completions" if self.role == COMPLETER else "answers"
        return self._length((kind,), most, lambda: [int(row["tokens"]) for row in self.rows(kind)])

    def thought(self, most: int, encoder: ChatEncoder | None) -> Length:
        """Of a thought; a server's are not measured."""

        def measured() -> list[int]:
            texts = [str(row["thought"]) for kind in THOUGHTS[self.role] for row in self.rows(kind, "thought")]
            some = texts[:: max(1, len(texts) // THOUGHTS_MEASURED)]
            return [tokens_of(encoder, text) for text in some] if encoder is not None else []

        return self._length(("thought", *THOUGHTS[self.role]), most, measured)

    def _length(self, what: tuple[str, ...], most: int, measured: Callable[[], list[int]]) -> Length:
        # Tables are opened one after another; what was known before may lack rows.
        key = (*what, most, *(len(self.stored.get(kind, {})) for kind in what))
        if key not in self._known:
            # The last token is drawn and not run; where a stop token ended the answer, that one is the last.
            known = [] if self.bound else [min(length, most) for length in measured()]
            mean = [float(np.mean([min(length, top) for length in known or [most]])) for top in (most, most - 1)]
            self._known[key] = Length(*mean)
        return self._known[key]


@dataclass(frozen=True)
class MadeUp:
    """What stands in the place of what a model would write. ``encoder`` is None where only a server tokenizes."""

    counts: Counts
    encoder: ChatEncoder | None

    def text(self, tokens: float, conversation: Conversation, seed: int) -> str:
        """A text of a number of tokens, rounded, at least one; other conversations have other ones."""
        random = np.random.default_rng(row_seed(seed, conversation))
        chosen = random.integers(len(self._words), size=max(1, round(tokens)))
        return "".join(self._words[word] for word in chosen.tolist()).strip()

    def sample(self, conversation: Conversation, seed: int, sampling: Sampling) -> Sample:
        """An answer or a completion."""
        drawn = self.counts.answer(sampling.max_new_tokens).drawn
        return Sample(self.text(drawn, conversation, seed), round(drawn), False)

    @cached_property
    def _words(self) -> tuple[str, ...]:
        """Words of the tokenizer's that are one token after a blank, and by themselves."""
        words: list[str] = []
        if self.encoder is not None:
            tokenizer = self.encoder.tokenizer
            for token in np.random.default_rng(0).permutation(len(tokenizer)).tolist():
                word = str(tokenizer.decode([token])).strip()
                if re.fullmatch(r"[a-z]{2,12}", word) and tokens_of(self.encoder, f"{word} {word}") == 2:
                    words.append(f" {word}")
                if len(words) == WORDS:
                    break
        return tuple(words) or FALLBACK_WORDS


def tokens_of(encoder: ChatEncoder, text: str) -> int:
    """Tokens of a text by itself."""
    return len(encoder.tokenizer(text, add_special_tokens=False)["input_ids"])  # pyright: ignore[reportArgumentType]


def tokenizer_of(spec: ModelSpec) -> Any:
    """A model's tokenizer.

    Raises
    ------
    UserError
        If it is not there.
    """
    from transformers import AutoTokenizer

    path = model_folder(spec)
    with explained(f"cannot load the tokenizer of {spec.name} from {path}"):
        return AutoTokenizer.from_pretrained(path, revision=spec.revision, trust_remote_code=False)
