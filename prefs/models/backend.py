"""What every engine offers: complete, and observe (score options, sample answers, capture residuals in one pass)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from prefs.chat import Message

if TYPE_CHECKING:
    import torch

Conversation = tuple[Message, ...]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. ``temperature`` 0 takes the likeliest token."""

    temperature: float
    top_p: float
    max_new_tokens: int


@dataclass(frozen=True)
class Sample:
    """One generated text; ``finished`` is False where ``max_new_tokens`` cut it off."""

    text: str
    tokens: int
    finished: bool


@dataclass(frozen=True)
class Question:
    """What is asked after a conversation: the user turn, the options scored, and the opening of the answer."""

    text: str
    says: tuple[str, ...]
    prefill: str = ""


@dataclass(frozen=True)
class Ask:
    """One question with what is wanted of it: option probabilities, one sampled answer a seed, or both."""

    question: Question
    seeds: tuple[int, ...] = ()
    score: bool = True


@dataclass(frozen=True)
class CaptureRequest:
    """Residual-stream vectors wanted: layers (0-based, after the block) and positions (``prefs.config.POSITIONS``).

    ``rating`` is taken at every question asked, and comes with its `Answer`; the others come with the `Observation`.
    """

    layers: tuple[int, ...]
    positions: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """What one question brought: probability of each whole option string, sampled answers by seed, residuals.

    ``option_mass[v]`` is the probability that the answer begins with option v and with no longer option that v opens;
    the masses are disjoint, and their sum is the valid mass. ``residual`` is [layers, d_model] at position ``rating``.
    """

    option_mass: tuple[float, ...] | None = None
    samples: Mapping[int, Sample] = field(default_factory=dict)
    residual: torch.Tensor | None = None


@dataclass(frozen=True)
class Observation:
    """What one conversation brought: an answer for each question, and residuals [layers, d_model] by position.

    A position that the conversation does not have (``first_completion`` of an empty completion) is absent.
    """

    answers: tuple[Answer, ...]
    residuals: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Backend(Protocol):
    """An engine with a model in it. Lists in and out run over the rows of one batch, in the same order."""

    n_layers: int
    d_model: int
    max_context: int

    def prompt_tokens(self, conversation: Conversation) -> int:
        """Number of tokens of a conversation with the assistant's turn opened, as `complete` would run it."""
        ...

    def conversation_tokens(self, conversation: Conversation) -> int:
        """Number of tokens of a conversation before any question, as `observe` would run it."""
        ...

    def question_tokens(self, conversation: Conversation, question: Question) -> int:
        """Number of tokens of a conversation with a question and the opened answer, as `observe` would run it."""
        ...

    def complete(self, batch: Sequence[Conversation], seed: int, sampling: Sampling) -> list[Sample]:
        """Generate the assistant's next turn. The random numbers of a row depend on its messages and the seed alone."""
        ...

    def observe(
        self, batch: Sequence[Conversation], asks: Sequence[Ask], sampling: Sampling, capture: CaptureRequest | None
    ) -> list[Observation]:
        """Ask questions after conversations and/or capture residuals, all from one pass over each conversation."""
        ...
