"""Rating templates: the question, the options, and how an answer is read. An answer is never guessed at."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property

from omegaconf import MISSING

from prefs.data.reading import Invalid, Reader, as_number, key
from prefs.errors import ConfigError


class Reading(Enum):
    """How an answer is read: as a number on the scale, or as one of the options' words."""

    number = "number"
    option = "option"


# On a scale in its short form: the cost of exact ratings grows with them.
MOST_OPTIONS = 1001


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
    scale
        ``[lowest, highest]``, in place of options: the whole numbers from one to the other.
    """

    name: str = MISSING
    question: str = MISSING
    options: list[Option] = field(default_factory=list)
    reading: Reading = Reading.number
    prefill: str | None = None
    scale: list[int] | None = None

    def __post_init__(self) -> None:
        self.question = self.question.strip() or self.question  # what is blank is told as it was given
        self.options = self.options or [Option(str(number), float(number)) for number in whole_numbers(self.scale)]

    def check(self, at: str) -> None:
        """Refuse a scale on which an answer could not be read.

        Raises
        ------
        ConfigError
            If there is no question, an option has no value or the same as another, or two options share a word (words
            are compared without case and emphasis marks).
        """
        says = list(self.says)
        if self.scale is not None and (says != [str(number) for number in whole_numbers(self.scale)] or not says):
            allowed = f"[lowest, highest], two whole numbers of at most {MOST_OPTIONS} on the scale, and no options"
            raise ConfigError(f"{at}.scale", self.scale, allowed)
        if not self.question.strip():
            raise ConfigError(f"{at}.question", self.question, "some text")
        if len(says) < 2:
            raise ConfigError(f"{at}.options", says, "two options or more")
        if not all(say.strip() for say in says):
            raise ConfigError(f"{at}.options", says, "options that say something")
        if len({say.casefold().strip() for say in says}) < len(says):
            raise ConfigError(f"{at}.options", says, "options that differ in more than case and blanks")
        for option in self.options:
            if not math.isfinite(option.value):
                raise ConfigError(f"{at}.options", option.value, "finite values")
            if self.reading is Reading.number and as_number(option.say) != option.value:
                allowed = "numbers worth themselves, or reading: option"
                raise ConfigError(f"{at}.options", f"{option.say}: {option.value}", allowed)
        if len(set(self.values)) < len(says):
            raise ConfigError(f"{at}.options", list(self.values), "one value an option; more words for it go to `also`")
        option_of_word: dict[str, str] = {}
        for option in self.options:
            for word in {key(word) for word in (option.say, *option.also)}:
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

    @property
    def also(self) -> tuple[tuple[str, ...], ...]:
        """The other words that are read as each option; none where no option has any."""
        return tuple(tuple(option.also) for option in self.options)

    def read(self, answer: str, *, finished: bool = True) -> float | Invalid:
        """The value that an answer gives, or the reason why it gives none; see `prefs.data.reading.Reader.read`."""
        return self._reader.read(answer, finished=finished)

    @cached_property
    def _reader(self) -> Reader:
        return Reader.of([(word, option.value) for option in self.options for word in (option.say, *option.also)])


def whole_numbers(scale: object) -> range:
    """The numbers on a scale in its short form; none where that is no scale."""
    if not isinstance(scale, list) or len(scale) != 2 or not all(type(end) is int for end in scale):
        return range(0)
    return range(scale[0], scale[1] + 1) if 0 < scale[1] - scale[0] < MOST_OPTIONS else range(0)
