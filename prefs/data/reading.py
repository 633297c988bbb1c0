"""How an answer is read: a small grammar, from what a text is made of to the option that it states. Never a guess.

An answer names options, and denies some. Numbers and the options' words are read wherever they stand. What also means
something else is read only where nothing else stands beside it: single letters ("a", "I") and words of denial ("no") in
a clause, number words ("one") in the first line.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


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


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(text, re.IGNORECASE)


NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
# Adds nothing to an option: a line or clause of this and an option states it.
FILLER = _pattern(
    r"(?:[\W_]|\b(?:i|i'd|i'll|i'm|would|will|could|have to|to|my|me|you|you'd|your|for|of|as|at|in|on|with|and|so|or"
    r"|the|a|an|this|that|it|it's|its|is|was|be|been|feel|felt|think|guess|believe|say|said|go|going|give|gave|rate|rated"
    r"|rating|score|scored|scale|grade|level|choose|chose|pick|picked|select|selected|answer|answered|option|choice"
    r"|number|value|response|result|task|experience|overall|final|finally|here|here's|about|around|probably|perhaps"
    r"|maybe|definitely|just|really|solid|wait|actually|rather|boxed|text|stars?|points?)\b)*"
)
# Ends what a denial reaches. A comma does so to a number; to a word ("not a great, or even good, experience") only
# where another subject follows.
STOP = _pattern(
    r"[.:;!?()\[\]\n—]|,(?= (?:i|i'd|it|it's|this|that|the|so|and|but|my|overall)\b)|(?<!\w)-(?= )"
    r"|\b(?:(?<!anything )but|because|since|although|though|however|yet|whereas)\b"
)
STOP_OR_COMMA = _pattern(STOP.pattern + "|,")
DENIES = _pattern(
    r"(?:\b(?:not|cannot|never|neither|nor|no|none|nothing|nobody|without|non|hardly|barely|scarcely|far from"
    r"|anything but|dont|isnt|wasnt|cant)\b|n't\b)(?!,)(?:[ -]\S+){0,5}[ -]?$"
)
HEDGES = _pattern(
    r"\b(?:than|below|above|under|over|beyond|almost|nearly|at least|at most|up to|close to|instead of|short of)"
    r"(?: (?:a|an|the|solid|just))* ?$"
)
DENIED_AFTER = _pattern(
    r" (?:\w+ )?(?:(?:is|was|does|did|would|do|were)(?: not|n't)|(?:is|was|would be|seems|feels) (?:too|inaccurate"
    r"|incorrect|wrong))\b"
)
REFUSES = _pattern(
    r"\b(?:cannot|can't|can not|could not|couldn't|unable to|not able to|won't|will not|refuse to|decline to"
    r"|not possible to|impossible to)\s+(?:\w+\s+){0,3}?(?:rate|rating|assign|give|provide|answer|choose|express"
    r"|say(?! (?:it|that|this)\b))\b"
    r"|\b(?:do not|don't|doesn't|does not) (?:actually |really )?(?:have|possess|experience|feel)\b"
    r"(?:\s+\w+){0,3}?\s+(?:feelings?|emotions?|experiences?|preferences?|opinions?|enjoyment)"
    r"|\bas an? (?:ai|language model)\b|\bi(?:'m| am) (?:just |only )?an? (?:ai|language model|machine)\b"
)
RATING_IS = _pattern(r"\b(?:rating|score|answer|choice)(?: (?:is|was|would be))?[: -]*$")
# Numbers that count or name something else.
COUNT = (
    r"(?:words?|sentences?|paragraphs?|lines?|parts?|steps?|times|things|reasons|people|minutes?|hours?|seconds?|days?"
    r"|years?)\b"
)
NAME = r"\b(?:gpt|claude|gemini|gemma|llama|qwen|mistral|phi|version|step|part)[ -]?\d+(?:\.\d+)*"
SIGN = r"(?:(?P<{0}minus>-|minus |negative )|(?P<{0}dash>[-—] |—)|\+|plus )?"
# A dash behind a word or a digit is no sign.
NUMBER = rf"(?<![\w.])(?<![^\W\d]-){SIGN.format('')}(?P<digits>\d+(?:[.,]\d+)*)(?!\w|[.,]\d|-[^\W\d])"
STARS = r"(?<!\d)(?<!\d )(?P<lit>(?:[★⭐🌟]\ufe0f? ?)+)(?P<unlit>(?:[☆✩] ?)*)"
# Options that are read only where they stand alone.
WORDS_OF_DENIAL = ("no", "none", "neither", "never", "not", "nothing")


class Place(NamedTuple):
    """Where a text names an option; with the value None, a number that is no option; with no value, the scale."""

    start: int
    end: int
    values: tuple[float | None, ...] = ()
    number: bool = False
    weak: bool = False
    """Read only where nothing else stands beside it."""


States = Callable[[int, int], set[float | None]]


@dataclass(frozen=True)
class Reader:
    """Reads the answers to one template.

    ``words`` and ``numbers`` are what says each value, ``grammar`` what of a text is looked at, and ``openers`` end a
    text that may go on to another option.
    """

    words: Mapping[str, float]
    numbers: Mapping[float, float]
    grammar: re.Pattern[str]
    openers: re.Pattern[str]

    @classmethod
    def of(cls, options: Sequence[tuple[str, float]]) -> Reader:
        """A reader of options by what is said for them, a word or a number, and the value that this has."""
        numbers = {number: value for said, value in options if (number := as_number(said)) is not None}
        words = {key(said): value for said, value in options if as_number(said) is None}
        said = [*words, *(f"{number:g}" for number in numbers)]
        openers = [re.escape(word) for word in said if any(o != word and o.startswith(word) for o in said)]
        ends = _pattern(rf"(?<!\w)(?:{'|'.join(openers) or '(?!)'})$")
        return cls(words, numbers, re.compile("|".join(_grammar(words, numbers)), re.IGNORECASE), ends)

    def read(self, answer: str, *, finished: bool = True) -> float | Invalid:
        """The value that an answer gives, or the reason why it gives none.

        If the first line is an option alone, that is the answer, whatever explanation follows. Otherwise exactly one
        option must be named and not denied, and no number that is none. A mention of the scale ("from 1 to 5", "(1-5)")
        names nothing. In an answer that was cut off (not `finished`), "1" at the very end may be the beginning of "10",
        and is ambiguous where that is an option.
        """
        text = normalised(answer)
        if not text:
            return Invalid.empty
        if not finished and self.openers.search(text):
            return Invalid.ambiguous
        places = list(self._places(text))
        starts = [place.start for place in places]

        def states(start: int, end: int) -> set[float | None]:
            """What a stretch states that holds an option and nothing else; empty if it holds anything else."""
            within = places[bisect_left(starts, start) : bisect_left(starts, end)]
            values = {value for place in within for value in place.values}
            return values if len(values) == 1 and FILLER.fullmatch(_without(text, start, end, within)) else set()

        lines = _cut(text, re.compile("\n"))
        # A line such as "My rating:" belongs to the one after it.
        while len(lines) > 1 and FILLER.fullmatch(text, *lines[0]):
            del lines[0]
        first = states(*lines[0])
        if not first:
            return self._read_clauses(text, places, states)
        others = [states(*line) for line in lines[1:]]
        others += [set(p.values) for p in places if p.values and RATING_IS.search(text[max(p.start - 40, 0) : p.start])]
        if any(other and other != first for other in others):
            return Invalid.ambiguous
        (value,) = first
        return Invalid.out_of_range if value is None else value

    def _read_clauses(self, text: str, places: Sequence[Place], states: States) -> float | Invalid:
        """As `read`, of an answer that does not begin with an option alone."""
        named = [place for place in places if place.values and not place.weak]
        # An option's own words ("neither agree nor disagree") deny no other.
        masked = _without(text, 0, len(text), named, "¤")
        stops = [start for start, _ in _cut(masked, STOP)]
        clauses = _cut(masked, STOP_OR_COMMA)
        starts = [start for start, _ in clauses]
        asserted: set[float | None] = set()
        asserted_in: set[int] = set()
        denied: set[float | None] = set()
        denied_in: set[int] = set()
        for place in named:
            since = starts if place.number else stops
            start = since[bisect_right(since, place.start) - 1]
            clause = bisect_right(starts, place.start) - 1
            if _denied(masked[max(start, place.start - 120) : place.start], masked[place.end : place.end + 60]):
                denied.update(place.values)
                denied_in.add(clause)
            else:
                asserted.update(place.values)
                asserted_in.add(clause)
            if len(asserted) > 1:
                break
        for place in places:
            if place.weak and not place.number:
                asserted |= states(*clauses[bisect_right(starts, place.start) - 1])
        off_scale = None in asserted
        asserted.discard(None)
        if len(asserted) == 1 and not off_scale and not denied & asserted and not denied_in & asserted_in:
            (value,) = asserted
            assert value is not None
            return value
        if REFUSES.search(text):
            return Invalid.refused_to_rate
        if asserted or denied:
            return Invalid.ambiguous
        return Invalid.out_of_range if off_scale else Invalid.no_option

    def _places(self, text: str) -> Iterator[Place]:
        for match in self.grammar.finditer(text):
            kind, (start, end) = match.lastgroup, match.span()
            if kind == "scale":
                yield Place(start, end)
            elif kind == "word":
                word = key(match[0])
                value = self.words[word] if word in self.words else self.words[" ".join(word.split()[::-1])]
                yield Place(start, end, (value,), weak=len(word) == 1 or word in WORDS_OF_DENIAL)
            elif kind == "stars":
                lit, unlit = (len(re.findall("[★⭐🌟☆✩]", match[part])) for part in ("lit", "unlit"))
                whole = not unlit or lit + unlit == max(self.numbers)
                yield Place(start, end, (self.numbers.get(lit) if whole else None,), number=True)
            elif kind == "spoken":
                number = float(NUMBER_WORDS.index(match["spoken_word"].casefold()))
                number = -number if match["spoken_minus"] else number
                alone = not match["spoken_minus"] and match["spoken_of"] is None
                yield Place(start, end, (self.numbers.get(number),), number=True, weak=alone)
            elif kind == "number":
                yield Place(start, end, self._values(match, text), number=True)

    def _values(self, match: re.Match[str], text: str) -> tuple[float | None, ...]:
        """What a number says. A comma in it is a decimal point to some and parts thousands to others: nothing either
        way. A dash and a blank before it are a minus at a line's beginning, on a scale that has one."""
        number = as_number(match["digits"])
        if number is None:
            return (None,)
        plus, minus = self.numbers.get(number), self.numbers.get(-number)
        if match["dash"] and minus is not None and number:
            return (minus,) if text[match.start() - 1 : match.start()] in ("", "\n") else (plus, minus)
        return (minus if match["minus"] else plus,)


def _grammar(words: Mapping[str, float], numbers: Mapping[float, float]) -> Iterator[str]:
    """What of a text is looked at, in the order in which it is tried at each place."""
    if numbers:
        low, high = min(numbers), max(numbers)
        top = "|".join([f"{high:g}", *([NUMBER_WORDS[int(high)]] if high in range(len(NUMBER_WORDS)) else [])])
        of_top = rf"(?:a (?:possible |maximum of |total of )?)?(?:{top})\b(?! ?/|[.,]\d)"
        first, last = (rf"{'(?:-|minus |negative )' if end < 0 else '[+]?'}{abs(end):g}" for end in (low, high))
        aside = r"(?: ?\([^()\n]{0,60}\))?"
        yield (
            rf"(?P<scale>(?:\b(?:(?:on )?(?:a|the) scale (?:of|from)|from|between) )?(?<![\w.]){first}{aside}"
            rf" ?(?:to|through|-|—|\.\.+|(?<=\d )and) ?{last}{aside}(?!\w|[.,/]\d)|\bscale (?:of|from) (?:{top})\b"
            rf"|\b(?:{top})[ -]points?\b(?= scale)|(?<=\d)(?: ?-?stars?)? ?(?:/|of) ?{of_top}|\bout of {of_top})"
        )
        yield rf"(?P<other>{NAME}|(?<![\w.,/])\d+ (?:of\b(?! (?:{top})\b)|{COUNT}))"
        yield rf"(?P<stars>{STARS})"
    if words:
        # Longest first, so that "very negative" is not read as "negative".
        yield rf"(?P<word>{'|'.join(map(_word, sorted(words, key=len, reverse=True)))})"
    if numbers:
        yield rf"(?P<number>{NUMBER})"
        yield (
            rf"(?P<spoken>(?<![\w'])(?P<spoken_minus>minus |negative )?(?P<spoken_word>{'|'.join(NUMBER_WORDS)})\b"
            rf"(?P<spoken_of>(?= (?:stars?|out of (?:{top}))\b| ?/))?)"
        )


def _word(word: str) -> str:
    """An option's word; its parts may be joined by blanks, hyphens and commas, and two of them stand the other way
    round ("agree strongly"). A single letter is none in small ("a"), nor is "A" or "I" with a word behind it."""
    if len(word) == 1 and word.isalpha():
        upper, lower = re.escape(word.upper()), re.escape(word)
        behind = "(?! ?[a-z'])(?!,)" if word in "ai" else ""
        begins = r"(?:(?<=\n)|(?<=\n\()|(?<![\s\S])|(?<=\A\())"
        return rf"(?-i:(?<![\w']){upper}(?![\w']){behind}|{begins}{lower}(?=\W*(?:\n|\Z)|[).:]))"
    parts = [re.escape(part) for part in word.split()]
    orders = [parts, parts[::-1]] if len(parts) == 2 else [parts]
    return "|".join(rf"(?<!\w){'(?: ?[,-] ?| )'.join(order)}(?!\w)" for order in orders)


def _denied(before: str, after: str) -> bool:
    """Whether what stands around a place denies or hedges it."""
    return bool(DENIES.search(before) or HEDGES.search(before) or DENIED_AFTER.match(after))


def _without(text: str, start: int, end: int, places: Sequence[Place], filled: str = " ") -> str:
    """A stretch of a text with these places in it filled."""
    parts, done = [], start
    for place in places:
        parts += [text[done : place.start], filled * (place.end - place.start)]
        done = place.end
    return "".join([*parts, text[done:end]])


def _cut(text: str, at: re.Pattern[str]) -> list[tuple[int, int]]:
    ends = [(match.start(), match.end()) for match in at.finditer(text)]
    return list(zip([0, *(end for _, end in ends)], [*(start for start, _ in ends), len(text)], strict=True))


def as_number(text: str) -> float | None:
    """A text as a number; None if it is none."""
    try:
        return float(text)
    except ValueError:
        return None


def key(word: str) -> str:
    """By which words are told apart: without case, emphasis, hyphens and commas."""
    return re.sub("[ ,-]+", " ", normalised(word)).strip().casefold()


def normalised(text: str) -> str:
    """A text with one kind of blank, hyphen and apostrophe, plain digits, no Markdown emphasis and no empty lines."""
    text = unicodedata.normalize("NFKC", text.replace("½", ".5"))
    text = re.sub("[‐‑‒–−]", "-", text).replace("―", "—").replace("’", "'")
    lines = (" ".join(line.split()) for line in re.sub(r"[*_`#\"“”]", " ", text).splitlines())
    return "\n".join(line for line in lines if line)
