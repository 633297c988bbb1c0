"""What an answer may begin with: how an option can be spelled, where spellings part, and the options' masses.

An answer is a rating's option when it begins with one of the option's spellings, with no longer spelling that this one
opens ("1" opens "10") and, behind a number, with no further digit: `prefs.data.reading` reads sampled answers so, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

# In place of an option's number: an answer that begins so is none of them.
NO_OPTION = -1

# Part of the keys of exact records: what their masses are of.
MASS = "spellings; no further digit"

Path = tuple[int, ...]


def spellings(words: Sequence[Sequence[str]], blanks: Sequence[str] = ("", " ")) -> Iterator[tuple[str, int]]:
    """How the options can be written at the beginning of an answer, and the number of the option that it then is.

    With or without a blank before it; as it stands, in lower case or with a capital. A single letter is a label, and in
    another case it may be a word ("a").

    Parameters
    ----------
    words
        Of each option, the words that are read as it.
    """
    for number, of_option in enumerate(words):
        for word in of_option:
            cases = [word] if len(word) == 1 else dict.fromkeys([word, word.lower(), word[:1].upper() + word[1:]])
            for case in cases:
                for blank in blanks:
                    yield blank + case, number


def branchings(beginnings: Sequence[Path] | Mapping[Path, int]) -> dict[Path, Path]:
    """Where token sequences part: every beginning of one (also the empty one) → the tokens that go on from it.

    The probability of each follows from one look at the model after each of these beginnings. Options of one token that
    differ there need a single look.
    """
    following: dict[Path, dict[int, None]] = {}
    for path in beginnings:
        for length, token in enumerate(path):
            following.setdefault(path[:length], {})[token] = None
    return {beginning: tuple(tokens) for beginning, tokens in following.items()}


def runs(looks: Mapping[Path, Path]) -> list[Path]:
    """The tokens to run so that all `branchings` can be looked at: each is a beginning that opens no other."""
    parts = [path for path in looks if path]
    opening = {path[:length] for path in parts for length in range(1, len(path))}
    return [path for path in parts if path not in opening]


def option_masses(
    log_probs: Mapping[Path, float] | Mapping[Path, np.ndarray], beginnings: Mapping[Path, int], options: int
) -> np.ndarray:
    """Disjoint probabilities of options.

    What begins an answer belongs to the longest of the beginnings that the answer has: mass("1") = P("1") - P("10") -
    P("11") - ... The masses therefore add up to P(the answer begins with an option).

    Parameters
    ----------
    log_probs
        Log P of each token after those before it, by the tokens up to and with it; of one row, or arrays [rows].
    beginnings
        Token sequences, and the option's number or `NO_OPTION`.
    options
        How many there are.

    Returns
    -------
    numpy.ndarray
        [options] or [options, rows], non-negative.
    """
    masses: list = [0.0] * options
    for path, owner in beginnings.items():
        p = np.exp(sum(log_probs[path[:length]] for length in range(1, len(path) + 1)))
        shorter = next((path[:n] for n in range(len(path) - 1, 0, -1) if path[:n] in beginnings), None)
        if owner != NO_OPTION:
            masses[owner] = masses[owner] + p
        if shorter is not None and beginnings[shorter] != NO_OPTION:
            masses[beginnings[shorter]] = masses[beginnings[shorter]] - p
    return np.clip(np.array(masses, dtype=np.float64), 0.0, None)
