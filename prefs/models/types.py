"""What every engine offers: complete, and observe (score options, sample answers, capture residuals in one pass)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from prefs.errors import UserError
from prefs.models.tokens import Message

if TYPE_CHECKING:
    import torch

    from prefs.config import CompleterConfig, RatingConfig

Conversation = tuple[Message, ...]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. ``temperature`` 0 takes the likeliest token."""

    temperature: float
    top_p: float
    max_new_tokens: int

    @classmethod
    def from_config(cls, config: CompleterConfig | RatingConfig) -> Sampling:
        """That of a completer or a rater."""
        return cls(config.temperature, config.top_p, config.max_new_tokens)


@dataclass(frozen=True)
class Sample:
    """One generated text; ``finished`` is False where ``max_new_tokens`` cut it off.

    ``thought`` is what a thinking model wrote before it. There is no text where ``invalid`` gives the reason (a value
    of `prefs.data.template.Invalid`).
    """

    text: str | None
    tokens: int
    finished: bool
    thought: str | None = None
    invalid: str | None = None


@dataclass(frozen=True)
class Question:
    """What is asked after a conversation: the user turn, the options scored, and the opening of the answer."""

    text: str
    says: tuple[str, ...]
    prefill: str = ""


@dataclass(frozen=True)
class Ask:
    """One question with what is wanted of it: one sampled answer a seed, option probabilities, or both.

    A thinking model draws one thought a seed and answers after it; ``scores`` are the seeds of the thoughts after which
    options are scored. A model that answers at once has one distribution, and ``scores`` is (0,) or empty.
    """

    question: Question
    seeds: tuple[int, ...] = ()
    scores: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class CaptureRequest:
    """Residual-stream vectors wanted: layers (0-based, after the block) and positions (``prefs.config.POSITIONS``).

    ``rating`` is taken at every question asked, and comes with its `Answer`; the others come with the `Observation`.
    """

    layers: tuple[int, ...]
    positions: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Steering:
    """A change of the residual stream after block `layer`, where it is captured; captured vectors are those after it.

    ``add`` adds `coefficient` times the `vector` [d_model]. ``project_out`` takes away `coefficient` times the part
    along the vector, x - coefficient (x·u) u with u of norm 1, so that 1 leaves none of it. Of several at one layer,
    each changes what the one before it left. The tokens changed are, by `at`:

    ``all``
        every token that is run, those generated among them;
    ``last``
        in each forward pass of a generation the newest token, which the next one is predicted from: the last of the
        prompt, with the opening of the answer, and then every generated token (of a thought, or a scored option, too);
    ``completion``
        the text of the turn before the question; for `Backend.complete`, what is generated, thoughts among it;
    ``question``
        the text of the question.
    """

    layer: int
    vector: torch.Tensor
    coefficient: float = 1.0
    at: Literal["all", "last", "completion", "question"] = "all"
    kind: Literal["add", "project_out"] = "add"


@dataclass(frozen=True)
class Score:
    """The options' probabilities, or the reason why there are none (a value of `prefs.data.template.Invalid`).

    ``mass[v]`` is the probability that the answer begins with option v and with no longer option that v opens; the
    masses are disjoint, and their sum is the valid mass. ``thought`` is what a thinking model wrote before.
    """

    mass: tuple[float, ...] | None
    thought: str | None = None
    invalid: str | None = None


@dataclass(frozen=True)
class Answer:
    """What one question brought: scores by thought seed, sampled answers by seed, residuals.

    ``residual`` is [layers, d_model] at position ``rating``; of a thinking model, after the thought of the first seed.
    """

    scores: Mapping[int, Score] = field(default_factory=dict)
    samples: Mapping[int, Sample] = field(default_factory=dict)
    residual: torch.Tensor | None = None


@dataclass(frozen=True)
class Dosed:
    """What a steered model made of one conversation.

    Attributes
    ----------
    answer
        To the question. Where the steered model's logits are not finite, every score and sample has the reason
        ``not_finite`` in place of numbers.
    nll
        Mean negative log-likelihood, in nats a token, of the completion's tokens under the steered model; None where
        it was not wanted, the completion is empty, or it is not finite.
    """

    answer: Answer
    nll: float | None = None


@dataclass(frozen=True)
class Observation:
    """What one conversation brought: an answer for each question, and residuals [layers, d_model] by position.

    A position that the conversation does not have (``first_completion`` of an empty completion) is absent.
    """

    answers: tuple[Answer, ...]
    residuals: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Usage:
    """What an engine has spent: requests, tokens, and US dollars where prices are known (None: not known).

    Of an engine that runs here, tokens are those that went through the model, without padding: of prompts those whose
    keys and values were not there yet, of answers those that more was drawn after. A token that only part of the
    blocks ran counts as that part. Of a server, they are those that it bills.
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    dollars: float | None = None

    def since(self, before: Usage) -> Usage:
        """What was spent after `before`."""
        return Usage(
            self.requests - before.requests,
            self.prompt_tokens - before.prompt_tokens,
            self.completion_tokens - before.completion_tokens,
            None if self.dollars is None else self.dollars - (before.dollars or 0.0),
        )


class Interrupted(UserError):
    """A batch that could not be finished. ``done`` has the rows that were, None for the others."""

    def __init__(self, message: str, done: Sequence[Sample | Observation | str | None]):
        super().__init__(message)
        self.done = done


class Backend(Protocol):
    """An engine with a model in it. Lists in and out run over the rows of one batch, in the same order.

    Sampled texts come without the thought that a thinking model wrote before them. A row that cannot be answered
    comes back with the reason (``invalid``); what stops the whole batch is an error. Where rows were answered (and
    paid for) before it, the error is `Interrupted` and brings them along.
    """

    max_context: int

    def prompt_tokens(self, conversation: Conversation) -> int:
        """Number of tokens of a conversation with the assistant's turn opened, as `complete` would run it.

        With those of a whole thought, for a model that thinks. Where only a server tokenizes, a low estimate: it is
        the server that finds a prompt too long.
        """
        ...

    def conversation_tokens(self, conversation: Conversation) -> int:
        """Number of tokens of a conversation before any question, as `observe` would run it."""
        ...

    def question_tokens(self, conversation: Conversation, question: Question) -> int:
        """Number of tokens of a conversation with a question and the opened answer, as `observe` would run it.

        With those of a whole thought, for a model that thinks.
        """
        ...

    def complete(self, batch: Sequence[Conversation], seed: int, sampling: Sampling) -> list[Sample]:
        """Generate the assistant's next turn. The random numbers of a row depend on its messages and the seed alone."""
        ...

    def observe(
        self,
        batch: Sequence[Conversation],
        asks: Sequence[Ask],
        sampling: Sampling,
        capture: CaptureRequest | None = None,
    ) -> list[Observation]:
        """Ask questions after conversations and/or capture residuals, all from one pass over each conversation."""
        ...

    def choose(self, batch: Sequence[Conversation], options: Sequence[str]) -> list[str | None]:
        """The likeliest of some answers to each conversation, and no other answer (structured output).

        None where the model could not be brought to choose. A model that thinks does so first.
        """
        ...

    def usage(self) -> Usage:
        """What has been spent so far."""
        ...

    def close(self) -> None:
        """Let go of the model, its processes and connections."""
        ...


class SteerableBackend(Backend, Protocol):
    """An engine that can also change the residual stream while it runs. What is steered is the same with and without
    cached keys and values."""

    def complete(
        self, batch: Sequence[Conversation], seed: int, sampling: Sampling, steering: Sequence[Steering] = ()
    ) -> list[Sample]:
        """As `Backend.complete`, of the steered model."""
        ...

    def observe(
        self,
        batch: Sequence[Conversation],
        asks: Sequence[Ask],
        sampling: Sampling,
        capture: CaptureRequest | None = None,
        steering: Sequence[Steering] = (),
    ) -> list[Observation]:
        """As `Backend.observe`, of the steered model."""
        ...

    def observe_doses(
        self,
        batch: Sequence[Conversation],
        question: Ask,
        sampling: Sampling,
        doses: Sequence[Sequence[Steering]],
        *,
        likelihood: bool = True,
    ) -> list[list[Dosed]]:
        """One question to each conversation under each of several steerings, the same as one `observe` for each.

        What the steerings do not touch is computed once for all of them: the keys and values of tokens before the
        first that any of them steers, and what lies below the lowest steered layer.

        Returns
        -------
        list
            [doses][rows].
        """
        ...
