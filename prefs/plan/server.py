"""What a server would be asked, and about how many tokens that is."""

from __future__ import annotations

import json
from collections.abc import Sequence

from prefs.models.loading import ModelSpec
from prefs.models.openai.choices import CHOICE_TOKENS
from prefs.models.openai.engine import NO_LIMIT
from prefs.models.tokens import Message
from prefs.models.types import (
    Answer,
    Ask,
    CaptureRequest,
    Conversation,
    Observation,
    Question,
    Sample,
    Sampling,
    Usage,
)
from prefs.plan.book import COMPLETER, JUDGE, RATER, THOUGHTS, Book, uniform
from prefs.plan.lengths import Lengths, Prose

# A server's tokens are not known here: about so many characters are one, and so many mark a message.
CHARACTERS_A_TOKEN, MARKS = 4, 4


class PlannedServer:
    """Counts the requests to a server, and guesses at their tokens from the lengths of texts."""

    def __init__(self, spec: ModelSpec, lengths: Lengths, book: Book):
        self.max_context = spec.max_context or NO_LIMIT
        self._thinking, self._lengths, self._book, self._prose = spec.thinking, lengths, book, Prose(None)

    def prompt_tokens(self, conversation: Conversation) -> int:
        return sum(MARKS + len(message.content) // CHARACTERS_A_TOKEN for message in conversation)

    def conversation_tokens(self, conversation: Conversation) -> int:
        return self.prompt_tokens(conversation)

    def question_tokens(self, conversation: Conversation, question: Question) -> int:
        return self.prompt_tokens((*conversation, Message("user", question.text)))

    def complete(self, batch: Sequence[Conversation], seed: int, sampling: Sampling) -> list[Sample]:
        samples = [self._sample(COMPLETER, row, seed, sampling) for row in batch]
        self._book.made_up = True
        return samples

    def observe(
        self,
        batch: Sequence[Conversation],
        asks: Sequence[Ask],
        sampling: Sampling,
        capture: CaptureRequest | None = None,
    ) -> list[Observation]:
        return [Observation(tuple(self._answer(row, each, sampling) for each in asks)) for row in batch]

    def choose(self, batch: Sequence[Conversation], options: Sequence[str]) -> list[str | None]:
        said = max(len(json.dumps({"answer": option})) for option in options) / CHARACTERS_A_TOKEN
        for row in batch:
            self._request(JUDGE, row, CHOICE_TOKENS if self._lengths.bound else said, think=True)
        return [options[0]] * len(batch)

    def usage(self) -> Usage:
        return Usage()

    def close(self) -> None:
        pass

    def _request(self, role: str, conversation: Conversation, drawn: float, *, think: bool) -> None:
        """One request; the tokens of an answer are all billed."""
        tally = self._book.of(role)
        tally.requests += 1
        tally.prompt_tokens += self.prompt_tokens(conversation)
        if think and self._thinking is not None:
            tally.thoughts += 1
            drawn += self._lengths.thought(THOUGHTS[role], self._thinking.max_tokens, None).drawn
        tally.drawn_tokens += drawn

    def _sample(self, role: str, conversation: Conversation, seed: int, sampling: Sampling) -> Sample:
        kind = "completions" if role == COMPLETER else "answers"
        length = self._lengths.answer(kind, sampling.max_new_tokens).drawn
        self._request(role, conversation, length, think=True)
        return Sample(self._prose.text(length, conversation, seed), round(length), False)

    def _answer(self, row: Conversation, each: Ask, sampling: Sampling) -> Answer:
        asked = (*row, Message("user", each.question.text))
        scores = dict.fromkeys(each.scores, uniform(each.question))
        if self._thinking is not None:
            # The answer of a seed and the score after its thought are read from the same reply.
            seeds = dict.fromkeys((*each.scores, *each.seeds))
            samples = {seed: self._sample(RATER, asked, seed, sampling) for seed in seeds}
            return Answer(scores, {seed: samples[seed] for seed in each.seeds})
        if each.scores:
            self._request(RATER, asked, 1, think=False)
        return Answer(scores, {seed: self._sample(RATER, asked, seed, sampling) for seed in each.seeds})
