"""The token positions at which residuals are captured, by name: to add one is to add an entry to `POSITIONS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Span = tuple[int, int]


class Spans(NamedTuple):
    """Where in a conversation's tokens the texts lie, as ranges [start, end).

    ``completion`` is the turn before the question, empty where the assistant's turn has only been opened. ``answer`` is
    where the answer to the question begins: the number of tokens.
    """

    turns: tuple[Span, ...]
    answer: int

    @property
    def question(self) -> Span:
        return self.turns[-1]

    @property
    def completion(self) -> Span:
        return self.turns[-2] if len(self.turns) > 1 else (self.question[0], self.question[0])


@dataclass(frozen=True)
class Position:
    """A token range whose mean vector is captured.

    Attributes
    ----------
    tokens
        From where the texts lie, the range [start, end); an empty one is no position.
    of_question
        Whether it lies in the question or after it, so that each question has its own.
    """

    tokens: Callable[[Spans], Span]
    of_question: bool = False


POSITIONS = {
    # The token just before the completion, where the assistant's turn has been opened.
    "last_prompt": Position(lambda spans: (spans.completion[0] - 1, spans.completion[0])),
    "first_completion": Position(
        lambda spans: (spans.completion[0], min(spans.completion[0] + 1, spans.completion[1]))
    ),
    "last_completion": Position(lambda spans: (max(spans.completion[1] - 1, spans.completion[0]), spans.completion[1])),
    "mean_completion": Position(lambda spans: spans.completion),
    # The token that the answer is predicted from; of a model that thinks, the one after its first thought.
    "rating": Position(lambda spans: (spans.answer - 1, spans.answer), of_question=True),
}


def token_ranges(spans: Spans, positions: Sequence[str], start: int = 0) -> dict[str, Span]:
    """Token ranges [first, end), counted from token `start`, of those of these positions that a conversation has."""
    ranges = {position: POSITIONS[position].tokens(spans) for position in positions}
    return {position: (first - start, end - start) for position, (first, end) in ranges.items() if end > first}
