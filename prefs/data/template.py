"""Rating templates: the question, the options, and how an answer is read. An answer is never guessed at."""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property

from omegaconf import MISSING

from prefs.errors import ConfigError


class Invalid(Enum):
    """Why an answer gives no rating."""

    empty = "empty"
    no_option = "no_option"
    out_of_range = "out_of_range"
    ambiguous = "ambiguous"
    refused_to_rate = "refused_to_rate"
    too_long = "too_long"
    thought_cut_off = "thought_cut_off"
    blocked = "blocked"
    no_answer = "no_answer"
    not_finite = "not_finite"


class Reading(Enum):
    """How an answer is read: as a number on the scale, or as one of the options' words."""

    number = "number"
    option = "option"


@dataclass
class Option:
    """One point of a scale: what is said for it, its value, and other words that are read the same."""

    say: str = MISSING
    value: float = MISSING
    also: list[str] = field(default_factory=list)


@dataclass
class Template:
    """A question about the task just done, its options, and how an answer is read: the schema of a config `template`.

    Attributes
    ----------
    question
        Without blanks around it.
    prefill
        Opens the assistant's answer (None: the model's own).
    """

    name: str = MISSING
    question: str = MISSING
    options: list[Option] = field(default_factory=list)
    reading: Reading = Reading.number
    prefill: str | None = None

    def __post_init__(self) -> None:
        self.question = self.question.strip() or self.question  # what is blank is told as it was given

    def check(self, key: str) -> None:
        """Refuse a scale on which an answer could not be read.

        Raises
        ------
        ConfigError
            If there is no question, an option has no value or the same as another, or two options share a word (words
            are compared without case and emphasis marks).
        """
        says = list(self.says)
        if not self.question.strip():
            raise ConfigError(f"{key}.question", self.question, "some text")
        if len(says) < 2:
            raise ConfigError(f"{key}.options", says, "two options or more")
        if not all(say.strip() for say in says):
            raise ConfigError(f"{key}.options", says, "options that say something")
        if len({say.casefold().strip() for say in says}) < len(says):
            raise ConfigError(f"{key}.options", says, "options that differ in more than case and blanks")
        for option in self.options:
            if not math.isfinite(option.value):
                raise ConfigError(f"{key}.options", option.value, "finite values")
            if self.reading is Reading.number and _number(option.say) != option.value:
                allowed = "numbers worth themselves, or reading: option"
                raise ConfigError(f"{key}.options", f"{option.say}: {option.value}", allowed)
        if len(set(self.values)) < len(says):
            raise ConfigError(
                f"{key}.options", list(self.values), "one value an option; more words for it go to `also`"
            )
        option_of_word: dict[str, str] = {}
        for option in self.options:
            for word in {_normalised(word) for word in (option.say, *option.also)}:
                if not word or word in option_of_word:
                    got = f"{option.say!r} like {option_of_word[word]!r}" if word else f"{option.say!r}"
                    raise ConfigError(f"template {self.name}", got, "words that can be told apart when read")
                option_of_word[word] = option.say

    @property
    def values(self) -> tuple[float, ...]:
        """The options' values, in the template's order."""
        return tuple(option.value for option in self.options)

    @property
    def says(self) -> tuple[str, ...]:
        """What the options say, in the template's order."""
        return tuple(option.say for option in self.options)

    def read(self, answer: str, *, finished: bool = True) -> float | Invalid:
        """The value that an answer gives, or the reason why it gives none.

        An answer counts when it names exactly one option, by its words or as a number of the scale. ``4/5`` and
        ``4 out of 5`` are 4; a mention of the whole scale (``from 1 to 5``) is not an answer; ``3 or 4``,
        ``not good`` and an answer that discusses two options are ambiguous; ``4.5`` and ``7`` are out of range on a
        scale of whole numbers from 1 to 5. In an answer that was cut off (not `finished`), "1" at the very end may be
        the beginning of "10", and is ambiguous where that is an option.
        """
        text = _normalised(answer)
        if not text:
            return Invalid.empty
        if not finished and self._may_go_on(text):
            return Invalid.ambiguous
        text = self._scale_mention.sub(" ", text)
        named = {self._by_word[match[0]] for match in self._word.finditer(text)}
        negated = any(_negated(text, match) for match in self._word.finditer(text))
        off_scale = False
        if self.reading is Reading.number:
            rest = self._word.sub(" ", self._out_of.sub(r"\1 ", text))
            for match in _NUMBER.finditer(rest):
                # A comma is a decimal point to some and a thousands separator to others: no value either way.
                if "," not in match[0] and (value := float(match[0])) in self.values:
                    named.add(value)
                    negated |= _negated(rest, match)
                else:
                    off_scale = True
        refuses = _REFUSES_TO_RATE.search(text) is not None
        if len(named) == 1 and not negated and not off_scale:
            return named.pop()
        if refuses:
            return Invalid.refused_to_rate
        if named:
            return Invalid.ambiguous
        return Invalid.out_of_range if off_scale else Invalid.no_option

    def _may_go_on(self, text: str) -> bool:
        """Whether a text ends with an option that opens another."""
        words = [_normalised(option.say) for option in self.options]
        openers = [word for word in words if any(other != word and other.startswith(word) for other in words)]
        return any(re.search(rf"(?<!\w){re.escape(word)}$", text) for word in openers)

    @cached_property
    def _by_word(self) -> dict[str, float]:
        words: dict[str, float] = {}
        for option in self.options:
            says = () if self.reading is Reading.number else (option.say,)
            for word in (*says, *option.also):
                words[_normalised(word)] = option.value
        return words

    @cached_property
    def _word(self) -> re.Pattern[str]:
        # Longest first, so that "very negative" is not read as "negative".
        words = sorted(self._by_word, key=len, reverse=True)
        return _whole_words(words) if words else _NOTHING

    @cached_property
    def _out_of(self) -> re.Pattern[str]:
        top = re.escape(f"{max(self.values):g}")
        return re.compile(rf"({_NUMBER.pattern})\s*(?:/|out of)\s*{top}(?![\w.]*\d)")

    @cached_property
    def _scale_mention(self) -> re.Pattern[str]:
        if self.reading is not Reading.number:
            return _NOTHING
        low, high = (re.escape(f"{value:g}") for value in (min(self.values), max(self.values)))
        opening = r"(?:\bon (?:a|the) scale (?:of|from) |\b(?:from|between) )"
        return re.compile(rf"{opening}{low}\s*(?:to|and|-|–|through)\s*{high}\b(?!\.\d)")


_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:[.,]\d+)?(?!\w)")
_NOTHING = re.compile(r"(?!)")
_NEGATION = re.compile(r"(?:\bnot|n't|n’t|\bnever|\bneither|\bnor|\bno|\bcannot)(?:\s+\w+){0,2}\s*$")
_REFUSES_TO_RATE = re.compile(
    r"\b(?:cannot|can't|can not|could not|couldn't|unable to|not able to|won't|will not|refuse to|decline to"
    r"|not possible to|impossible to)\s+(?:\w+\s+){0,3}?(?:rate|rating|assign|give|provide|answer|say|choose|express)\b"
    r"|\b(?:do not|don't|doesn't|does not) (?:actually |really )?(?:have|possess|experience|feel)\b"
    r"(?:\s+\w+){0,3}?\s+(?:feelings?|emotions?|experiences?|preferences?|opinions?|enjoyment)"
    r"|\bas an? (?:ai|language model)\b|\bi(?:'m| am) (?:just |only )?an? (?:ai|language model|machine)\b"
)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _negated(text: str, match: re.Match[str]) -> bool:
    """Whether one of the three words before a match denies it."""
    return _NEGATION.search(text[max(0, match.start() - 60) : match.start()]) is not None


def _normalised(text: str) -> str:
    """Lower case, one kind of blank and apostrophe, no Markdown emphasis; full-width digits become plain ones."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'").replace("−", "-")
    text = re.sub(r"[*_`#\"“”]", " ", text)
    return " ".join(text.split())


def _whole_words(words: list[str]) -> re.Pattern[str]:
    return re.compile(r"(?<!\w)(?:" + "|".join(re.escape(word) for word in words) + r")(?!\w)")
