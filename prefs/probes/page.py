"""A text's tokens, coloured by what a probe says at each: one HTML file that needs nothing else to be read."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefs.probes.apply import Applied
from prefs.results.html import page_environment
from prefs.results.terminal import number

# Shades on either side of the centre. Blue and orange: told apart by the colour-blind as well.
SHADES = 10
NEUTRAL, LOW, HIGH = (247, 247, 247), (74, 144, 210), (236, 138, 38)
# The darkest shade is of this quantile of distances from the centre: few tokens, often the first, lie far out.
DARKEST = 0.95


@dataclass(frozen=True)
class Token:
    """One token on the page.

    Attributes
    ----------
    text
        As it is written on the page; never empty.
    whose
        The role whose text it is of, or "template".
    score
        What the probe says, as printed.
    shade
        From -`SHADES` to `SHADES`; None where there is no score.
    control
        Whether it is a control token.
    site
        Whether it is (one of those) where the probe was trained to read.
    breaks
        Whether a line ends with it.
    """

    text: str
    whose: str
    score: str
    shade: int | None
    control: bool
    site: bool
    breaks: bool


def tokens(applied: Applied, position: str) -> tuple[list[Token], float]:
    """The tokens with their shades, and how far from the centre the darkest shade is."""
    stream, scores = applied.stream, applied.scores.numpy()
    shades, reach = shade(scores, applied.centre, [not control for control in stream.control])
    start, end = stream.ranges.get(position, (0, 0))
    made = [
        Token(
            text=_visible(text),
            whose=role or "template",
            score=number(float(score), 3),
            shade=each,
            control=control,
            site=start <= at < end,
            breaks="\n" in text,
        )
        for at, (text, role, score, each, control) in enumerate(
            zip(stream.tokens, stream.roles, scores, shades, stream.control, strict=True)
        )
    ]
    return made, reach


def shade(scores: np.ndarray, centre: float, counts: Sequence[bool]) -> tuple[list[int | None], float]:
    """Shades from -`SHADES` to `SHADES` around a centre, and the distance of the darkest from it.

    Parameters
    ----------
    scores
        [n]; those that are not finite have no shade.
    centre
        What is neutral.
    counts
        [n], whether a score has a say in how far the shades reach. Control tokens have none.
    """
    away = np.asarray(scores, dtype=np.float64) - centre
    known = np.isfinite(away)
    told = np.abs(away[known & np.asarray(counts, dtype=bool)])
    reach = float(np.quantile(told, DARKEST)) if len(told) else 0.0
    steps = np.clip(away / (reach or 1.0), -1, 1) * SHADES if reach else np.zeros_like(away)
    return [round(float(step)) if fine else None for step, fine in zip(steps, known, strict=True)], reach


def page(applied: Applied, *, title: str, position: str, facts: Mapping[str, str]) -> str:
    """The page as HTML. ``facts`` are printed as they are, a line each."""
    made, reach = tokens(applied, position)
    shades = range(-SHADES, SHADES + 1)
    return (
        page_environment("prefs.probes")
        .get_template("score.html.jinja")
        .render(
            nonce=secrets.token_urlsafe(16),
            title=title,
            facts=facts,
            tokens=made,
            position=position,
            colours={name(each): _colour(each) for each in shades},
            name=name,
            shades=shades,
            ends=[number(applied.centre + side * reach) for side in (-1, 0, 1)],
        )
    )


def name(shade: int | None) -> str:
    """The CSS class of a shade."""
    return "none" if shade is None else f"{'low' if shade < 0 else 'high'}{abs(shade)}"


def record(applied: Applied) -> dict[str, Any]:
    """What was found, as JSON: NaN and infinities are null."""
    stream = applied.stream
    return {
        "conversation": [message.as_dict() for message in applied.conversation],
        "completion_written_by_model": applied.written is not None,
        "thought": applied.thought,
        "prediction": _finite(applied.prediction),
        "centre": _finite(applied.centre),
        "positions": {position: list(spot) for position, spot in stream.ranges.items()},
        "tokens": [
            {"token": text, "score": _finite(float(score)), "role": role, "control": control}
            for text, score, role, control in zip(
                stream.tokens, applied.scores, stream.roles, stream.control, strict=True
            )
        ],
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _visible(text: str) -> str:
    """A token's text with line ends to be seen; a dot for part of a character that a later token completes."""
    return text.replace("\r", "␍").replace("\n", "↵") or "·"


def _colour(shade: int) -> str:
    end, share = (LOW if shade < 0 else HIGH), abs(shade) / SHADES
    mixed = (round(middle + (far - middle) * share) for middle, far in zip(NEUTRAL, end, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)
