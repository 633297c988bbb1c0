"""What is asked of an engine and what it answers: messages, questions, requests, replies; and the engine itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch

    from prefs.config import CompleterConfig, RatingConfig


# The context of a model that has no limit of its own, or whose limit only a server knows.
NO_LIMIT = 2**31


@dataclass(frozen=True)
class Message:
    """One turn: ``role`` is ``system``, ``user`` or ``assistant``."""

    role: str
    content: str


Conversation = tuple[Message, ...]


def as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as chat templates, servers and store keys take them."""
    return [asdict(message) for message in messages]


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
class Question:
    """What is asked after a conversation: the user turn, the options scored, and the opening of the answer.

    ``also`` are other words that are read as each option; none of any where it is empty.
    """

    text: str
    options: tuple[str, ...]
    prefill: str = ""
    also: tuple[tuple[str, ...], ...] = ()

    @property
    def words(self) -> list[tuple[str, ...]]:
        """The words that are read as each option, first those that it says."""
        also = self.also or ((),) * len(self.options)
        return [(option, *words) for option, words in zip(self.options, also, strict=True)]


@dataclass(frozen=True)
class Capture:
    """Residual-stream vectors wanted: layers (0-based, after the block) and positions (``prefs.config.POSITIONS``).

    ``rating`` is the token before the answer to a request's question; of a thinking model, after its first thought.
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
        the text of the turn before the question; where there is no question, what is generated, thoughts among it;
    ``question``
        the text of the question.
    """

    layer: int
    vector: torch.Tensor
    coefficient: float = 1.0
    at: Literal["all", "last", "completion", "question"] = "all"
    kind: Literal["add", "project_out"] = "add"


@dataclass(frozen=True, eq=False)
class Request:
    """A conversation and what is wanted of it.

    Attributes
    ----------
    messages
        The conversation, without the question.
    question
        What is asked behind it; None: the assistant's next turn is generated (a completion), or it is only captured.
    sampling
        How answers and thoughts are drawn; needed wherever anything is.
    seeds
        One sampled answer (or completion) a seed. The random numbers of a row depend on its messages and the seed.
    scores
        Seeds of the thoughts after which the question's options are scored. A model that answers at once has one
        distribution: (0,), or () where it is not wanted.
    choose
        Whether the likeliest of the question's options is wanted, and no other answer (structured output).
    capture
        Residuals wanted along the way.
    steering
        Changes of the residual stream while it runs; only of engines that can.
    likelihood
        Whether the mean negative log-likelihood of the last assistant turn's tokens is wanted, under the steering.
    """

    messages: Conversation
    question: Question | None = None
    sampling: Sampling | None = None
    seeds: tuple[int, ...] = ()
    scores: tuple[int, ...] = ()
    choose: bool = False
    capture: Capture | None = None
    steering: tuple[Steering, ...] = ()
    likelihood: bool = False

    @property
    def turns(self) -> Conversation:
        """The conversation with its question as the last user turn."""
        return self.messages if self.question is None else (*self.messages, Message("user", self.question.text))


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
class Score:
    """The options' probabilities, or the reason why there are none (a value of `prefs.data.template.Invalid`).

    ``mass[v]`` is the probability that the answer begins with option v, with no longer option that v opens and with no
    further digit; see `prefs.models.options`. The masses are disjoint, and their sum is the valid mass. ``thought`` is
    what a thinking model wrote before.
    """

    mass: tuple[float, ...] | None
    thought: str | None = None
    invalid: str | None = None


@dataclass(frozen=True, eq=False)
class Reply:
    """What a request brought.

    Attributes
    ----------
    samples, scores
        By seed, and by the seed of the thought.
    choice
        The option chosen; None where none was wanted or the model could not be brought to choose.
    invalid
        Why no option was chosen (a value of `prefs.data.template.Invalid`), where that is known.
    residuals
        [layers, d_model] by position, in the order of `Capture.layers`. A position that the conversation does not have
        (``first_completion`` of an empty completion) is absent.
    nll
        Mean negative log-likelihood, in nats a token; None where it was not wanted, the completion is empty, or it is
        not finite.
    """

    samples: Mapping[int, Sample] = field(default_factory=dict)
    scores: Mapping[int, Score] = field(default_factory=dict)
    choice: str | None = None
    invalid: str | None = None
    residuals: Mapping[str, torch.Tensor] = field(default_factory=dict)
    nll: float | None = None


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


class Engine(Protocol):
    """An engine with a model in it.

    Attributes
    ----------
    max_context
        The longest sequence that it takes, in tokens.
    rows_apart
        Whether a reply does not depend, bit for bit, on the requests beside it, so that only what is missing needs to
        be asked for. Where it does, a batch is always run as it was first cut.
    """

    max_context: int
    rows_apart: bool

    def tokens(self, request: Request) -> int:
        """Number of tokens of a request's prompt: of the conversation alone where it is only captured; with the
        assistant's turn opened for a completion or a choice; with the question and its longest option where there is
        one. With those of a whole thought, for a model that thinks; without those of the answer.

        Where only a server tokenizes, a low estimate: it is the server that finds a prompt too long.
        """
        ...

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """Answer a batch, and give each request's number and reply as soon as it is done, in any order.

        Requests whose messages begin alike share passes: a conversation is run once for all questions about it, and
        what several steerings of one question do not touch is computed once for all of them. A row that cannot be
        answered comes back with the reason (``invalid``).

        Raises
        ------
        UserError
            For what stops the batch; replies that were done (and paid for) before it have been given already.
        """
        ...

    def usage(self) -> Usage:
        """What has been spent so far."""
        ...

    def close(self) -> None:
        """Let go of the model, its processes and connections."""
        ...
