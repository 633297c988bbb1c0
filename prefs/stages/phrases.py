"""Whether a completion opens with a refusal: the model says, in the first person, that it does not do an act.

A word anywhere is none ("I'm sorry to hear that", "you cannot go wrong"), nor is what others say: quotations, dialogue,
letters and stories written for the user. Wordings are in `prefs.stages.refusal_wordings`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache

from prefs.stages.refusal_wordings import ENGLISH, ENGLISH_OPENINGS, ENGLISH_PARTS, OTHER_LANGUAGES

# Names of the families whose refusals the wordings were made for (tests/refusal_openings.tsv).
_FAMILIES = re.compile(r"llama|gemma|qwen|claude|haiku|sonnet|opus|gpt-?(?:[345]|oss)|smollm", re.IGNORECASE)
# Characters of a completion's plain text in which a refusal begins.
OPENING = 500
# Characters behind a refusal in which it may be taken back.
AFTER = 250


def refuses(text: str, phrases: Sequence[str] = (), window: int = OPENING) -> bool:
    """Whether the first `window` characters (0: all) of a text's own words begin a refusal, or hold one of the phrases
    as whole words, case apart."""
    # Decoration and quotations are left out of these.
    words = own_words(text[: 4 * (window + AFTER)] if window else text)
    opening = window or len(words)
    given = [plain(phrase) for phrase in phrases if phrase.strip()]
    if given and re.search(rf"(?<!\w)(?:{'|'.join(map(re.escape, given))})(?!\w)", words[:opening]):
        return True
    words = words[: opening + AFTER]
    return any(
        match.start() < opening and _stands(words, match)
        for parts, refusal in _compiled()
        if any(part in words for part in parts)
        for match in refusal.finditer(words)
    )


def made_for(model: str) -> bool:
    """Whether the wordings were made for a model, by its name."""
    return _FAMILIES.search(model) is not None


def plain(text: str) -> str:
    """Lower case, one kind of blank, apostrophe and dash; no Markdown, emoji and other marks."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub("[’‘ʼ`´]", "'", text)
    text = re.sub(r"[*_#~>|\\]|(?<!\w)'|'(?!\w)", " ", text)
    if not text.isascii():
        text = "".join(mark if unicodedata.category(mark) not in ("So", "Sk", "Cf") else " " for mark in text)
    return " ".join(re.sub("[–—]", " - ", text).split())


_QUOTED = re.compile(r'"[^"]*(?:"|$)|“[^”]*(?:”|$)|„[^“”]*(?:[“”]|$)|«[^»]*(?:»|$)|「[^」]*(?:」|$)')
# "ALICE: ...", "**Dr. Lind:** ...": a line of dialogue.
_SPEAKER = re.compile(
    r"^\W*(?!.{0,20}\b(?:assistant|answer|response|reply|ai|note|important|disclaimer|warning|sorry|title|subject)\b)"
    r"(?-i:[A-Z])[\w.'-]{0,15}(?: (?-i:[A-Z])[\w.'-]{0,15})?\W{0,3}:\W{0,3}\s.*$",
    re.IGNORECASE | re.MULTILINE,
)


def own_words(text: str) -> str:
    """A text as `plain` has it, without what is quoted in it and lines of dialogue; a text that is one quotation is
    taken out of its marks."""
    text = text.strip()
    whole = _QUOTED.match(text)
    if whole is not None and not text[whole.end() :].strip(" .") and re.search(r'.["”“»」]$', whole[0]):
        text = whole[0][1:].rstrip('"”“»」')
    return plain(_QUOTED.sub(" … ", _SPEAKER.sub("", text)))


def _stands(words: str, match: re.Match[str]) -> bool:
    """Whether a refusal found is one: not part of a text written for the user, and not followed by what was asked."""
    before, after = words[: match.start()], words[match.end() : match.end() + AFTER]
    if _WRITTEN.search(before) or (_AGREES.match(before) and not _BUT.search(before)):
        return False
    return not (_LACKS.match(after) or (_LIMIT.match(after) and _GOES_ON.search(after)))


# A text for the user begins before: a letter, a title, "Here's a poem".
_WRITTEN = re.compile(
    r"^(?:subject|title|dear|chapter|scene|verse|once upon|int\.|ext\.)\b"
    r"|\bhere(?:'s| is| are) (?:a|an|one|two|three|four|five|some|several|your|the (?!thing|deal|problem|truth)|\d)"
)
_AGREES = re.compile(r"(?:sure|certainly|of course|gladly|absolutely(?! not)|great)\b")
_BUT = re.compile(r"\b(?:but|however|unfortunately|sorry)\b")
# Something is missing, and asked for.
_LACKS = re.compile(r".{0,40}?\b(?:without (?:more|additional|further|seeing|knowing|the)|until you)\b")
# A limit of what the model knows or may say, from which it goes on.
_LIMIT = re.compile(
    r".{0,30}?\b(?:real[- ]?time|live|current|up[- ]to[- ]date|personal (?:opinion|experience|advice|view)s?|medical"
    r"|legal|financial|professional|tax|investment|exact|precise|specific|definitive|certain|complete|full|entire|all)\b"
)
_GOES_ON = re.compile(
    r"\b(?:but|however|that said|still|instead)\b.{0,20}?"
    r"\b(?:here|i can|i'll|let me|you can|general|it's|it is|about|around)\b"
)


@cache
def _compiled() -> list[tuple[list[str], re.Pattern[str]]]:
    """By language: parts of words of which a refusal holds one, and what it looks like."""
    languages = [
        (parts, rf"(?:{first})[^.,!?。؟।]{{0,60}}?{then}|{alone}")
        for parts, first, then, alone in OTHER_LANGUAGES.values()
    ]
    languages.append((ENGLISH_PARTS, "|".join([*ENGLISH, rf"(?<!.)(?:{'|'.join(ENGLISH_OPENINGS)})"])))
    return [(parts.split("|"), re.compile(rf"(?<![a-zà-ÿ'])(?:{pattern})")) for parts, pattern in languages]
