"""Which requests of a batch share passes: the engine runs them so, and a plan counts them so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from prefs.models.positions import POSITIONS, Span
from prefs.models.prompts import Prompt
from prefs.models.types import Capture, Conversation, Request, Steering

Steerings = tuple[Steering, ...]
# What `Steering.at` names, by where it begins: in this order in every row.
BEGINNINGS = ("all", "completion", "question", "last")
# The end of a range that also holds what is generated.
OPEN = 2**63 - 1


@dataclass(frozen=True, eq=False)
class Row:
    """A conversation and what is wanted of it, by the numbers of the requests."""

    messages: Conversation
    requests: dict[int, Request]

    @property
    def request(self) -> Request:
        """The first of them."""
        return next(iter(self.requests.values()))


@dataclass(frozen=True, eq=False)
class Group:
    """Rows that are run together, in the order in which their conversations first appear.

    ``complete``: generated, under one sampling and steering. ``choose``: the same options. ``open``: questions with the
    same options and wishes, which no turn of the user stands before. ``doses``: the same question under the same
    steerings. ``observe``: captured and asked, each row what its requests want.
    """

    kind: Literal["complete", "choose", "open", "doses", "observe"]
    rows: list[Row]

    @property
    def count(self) -> int:
        """How many requests they count as in `prefs.models.types.Usage`: one a completion, a dose or a conversation."""
        if self.kind == "complete":
            return sum(len(request.seeds) for row in self.rows for request in row.requests.values())
        return sum(len(row.requests) for row in self.rows) if self.kind == "doses" else len(self.rows)


@dataclass(frozen=True, eq=False)
class QuestionBatch:
    """Questions put to some conversations, of all of which the same is wanted.

    ``done`` are the tokens of each row's prompt that have been run.
    """

    requests: Sequence[Request]
    prompts: Sequence[Prompt]
    done: Sequence[int]

    @property
    def request(self) -> Request:
        """The first: what is wanted of all."""
        return self.requests[0]

    @property
    def turns(self) -> list[Conversation]:
        """The conversations, with the questions."""
        return [request.turns for request in self.requests]

    def wanting(self, **wanted: Any) -> QuestionBatch:
        """The same questions, of which something else is wanted."""
        return replace(self, requests=[replace(request, **wanted) for request in self.requests])

    @property
    def rest(self) -> list[tuple[int, ...]]:
        """What has not been run of each prompt."""
        return [prompt.ids[done:] for prompt, done in zip(self.prompts, self.done, strict=True)]


def grouped(requests: Sequence[Request]) -> list[Group]:
    """The requests of a batch in groups, each of which is run at once."""
    groups: dict[tuple, dict[Conversation, dict[int, Request]]] = {}
    for number, request in enumerate(requests):
        if request.choose:
            assert request.question is not None
            key = ("choose", request.question.options, request.question.prefill)
        elif request.question is None and request.seeds:
            key = ("complete", request.sampling, request.steering)
        elif request.question is not None and request.capture is None and (request.likelihood or request.steering):
            key = ("doses", request.question, request.sampling, request.seeds, request.scores, request.likelihood)
        elif request.question is not None and all(message.role == "system" for message in request.messages):
            asked = request.question
            wanted = (request.sampling, request.seeds, request.scores, request.capture, request.steering)
            key = ("open", asked.options, asked.also, asked.prefill, *wanted)
        else:
            key = ("observe", request.steering)
        messages = request.turns if key[0] in ("choose", "open") else request.messages
        groups.setdefault(key, {}).setdefault(messages, {})[number] = request
    split: dict[tuple, list[Row]] = {}
    for key, conversations in groups.items():
        for messages, members in conversations.items():
            doses = tuple(request.steering for request in members.values()) if key[0] == "doses" else ()
            split.setdefault((key, doses), []).append(Row(messages, members))
    return [Group(key[0], rows) for (key, _), rows in split.items()]


def at_question(request: Request) -> Capture | None:
    """What is captured in the pass over a request's question."""
    if request.capture is None or request.question is None:
        return None
    positions = tuple(name for name in request.capture.positions if POSITIONS[name].of_question)
    return Capture(request.capture.layers, positions) if positions else None


def before_question(request: Request) -> tuple[str, ...]:
    """The positions captured in the pass over the conversation."""
    positions = () if request.capture is None else request.capture.positions
    return tuple(name for name in positions if not POSITIONS[name].of_question)


def reads_logits(request: Request) -> bool:
    """Whether anything is wanted that only the model's output answers."""
    return bool(request.seeds or request.scores)


def questions(rows: Sequence[Row]) -> list[list[tuple[int, int]]]:
    """Requests with the same question and wishes, as (row, number): each list is one pass over its rows."""
    alike: dict[tuple, list[tuple[int, int]]] = {}
    for index, row in enumerate(rows):
        for number, request in row.requests.items():
            capture = at_question(request)
            if reads_logits(request) or capture is not None:
                key = (request.question, request.sampling, request.seeds, request.scores, capture)
                alike.setdefault(key, []).append((index, number))
    return list(alike.values())


def active(steering: Steerings) -> Steerings:
    """What of a steering changes anything; none of it is the unsteered model."""
    return tuple(change for change in steering if change.coefficient != 0)


def lowest(dose: Steerings) -> int:
    """The lowest layer that a dose steers at."""
    return min(change.layer for change in dose)


def by_beginning(doses: Sequence[Steerings]) -> dict[str, list[int]]:
    """The numbers of the doses by where they begin to steer, in the order of the tokens.

    The unsteered model can be run from anywhere: it goes with those that leave the least to be run.
    """
    beginnings = [min((BEGINNINGS.index(change.at) for change in dose), default=None) for dose in doses]
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(BEGINNINGS):
        if index in beginnings:
            groups[name] = [number for number, beginning in enumerate(beginnings) if beginning == index]
    unsteered = [number for number, beginning in enumerate(beginnings) if beginning is None]
    if unsteered:
        latest = next(reversed(groups), BEGINNINGS[-1])
        groups[latest] = [*groups.get(latest, []), *unsteered]
    return groups


def spans_of_answer(prompt: Prompt) -> dict[str, Span]:
    """Token ranges, as `Steering.at` names them, of a conversation with a question and of what comes after it."""
    return {
        "all": (0, OPEN),
        "last": (len(prompt.ids) - 1, OPEN),
        "completion": prompt.spans.completion,
        "question": prompt.spans.question,
    }


def spans_of_completion(ids: Sequence[int]) -> dict[str, Span]:
    """Token ranges of a prompt, and of the completion that is generated after it."""
    return {"all": (0, OPEN), "last": (len(ids) - 1, OPEN), "completion": (len(ids), OPEN)}


def cut(prompts: Sequence[Prompt], beginning: str) -> list[int]:
    """The first token of each row that is run for every dose: none that is steered lies before it.

    Rows end in the same column, and are cut in the same one: padding between a row's tokens would take up room in a
    sliding window.
    """
    width = max(len(row.ids) - min(spans_of_answer(row)[beginning][0], len(row.ids) - 1) for row in prompts)
    return [max(len(row.ids) - width, 0) for row in prompts]
