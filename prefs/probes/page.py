"""A text's tokens, coloured by what a probe says at each: one HTML file that needs nothing else to be read."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict
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


def page(applied: Applied, *, title: str, position: str, facts: Mapping[str, str]) -> str:
    """The page as HTML. ``facts`` are printed as they are, a line each; tokens at ``position`` are framed."""
    stream = applied.stream
    shades, reach = shade(applied.scores.numpy(), applied.centre, [not control for control in stream.control])
    start, end = stream.ranges.get(position, (0, 0))
    tokens = [
        {
            # Line ends to be seen; a dot for part of a character that a later token completes.
            "text": text.replace("\r", "␍").replace("\n", "↵") or "·",
            "breaks": "\n" in text,
            "whose": ", ".join(
                [role or "template", *["control token"] * control, *[position] * (start <= place < end)]
            ),
            "score": number(float(score), 3),
            "classes": " ".join([_class(step), *["control"] * control, *["site"] * (start <= place < end)]),
        }
        for place, (text, role, score, step, control) in enumerate(
            zip(stream.tokens, stream.roles, applied.scores, shades, stream.control, strict=True)
        )
    ]
    return (
        page_environment("prefs.probes")
        .get_template("score.html.jinja")
        .render(
            nonce=secrets.token_urlsafe(16),
            title=title,
            facts=facts,
            tokens=tokens,
            position=position,
            colours={_class(step): _colour(step) for step in range(-SHADES, SHADES + 1)},
            ends=[number(applied.centre + side * reach) for side in (-1, 0, 1)],
        )
    )


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
    counted = np.abs(away[known & np.asarray(counts, dtype=bool)])
    reach = float(np.quantile(counted, DARKEST)) if len(counted) else 0.0
    steps = np.clip(away / (reach or 1.0), -1, 1) * SHADES if reach else np.zeros_like(away)
    return [round(float(step)) if finite else None for step, finite in zip(steps, known, strict=True)], reach


def record(applied: Applied) -> dict[str, Any]:
    """What was found, as JSON: NaN and infinities are null."""
    stream = applied.stream
    return {
        "conversation": [asdict(message) for message in applied.conversation],
        "completion_written_by_model": applied.written is not None,
        "thought": applied.thought,
        "prediction": _finite(applied.prediction),
        "centre": _finite(applied.centre),
        "positions": {position: list(span) for position, span in stream.ranges.items()},
        "tokens": [
            {"token": text, "score": _finite(float(score)), "role": role, "control": control}
            for text, score, role, control in zip(
                stream.tokens, applied.scores, stream.roles, stream.control, strict=True
            )
        ],
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _class(step: int | None) -> str:
    """The CSS class of a shade."""
    return "none" if step is None else f"{'low' if step < 0 else 'high'}{abs(step)}"


def _colour(step: int) -> str:
    end, share = (LOW if step < 0 else HIGH), abs(step) / SHADES
    mixed = (round(middle + (far - middle) * share) for middle, far in zip(NEUTRAL, end, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)
