"""What a server would be asked, and about how many tokens that is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from prefs.models.counting import COMPLETER, Counts, MadeUp, role_of
from prefs.models.loading import ModelSpec
from prefs.models.openai.engine import CHOICE_TOKENS
from prefs.models.types import NO_LIMIT, Reply, Request, Score, Usage

# A server's tokens are not known here: about so many characters are one, and so many mark a message.
CHARACTERS_A_TOKEN, MARKS = 4, 4


class CountingServer:
    """Counts the requests to a server, and guesses at their tokens from the lengths of texts."""

    rows_apart = True

    def __init__(self, spec: ModelSpec, counts: Counts):
        self.spec, self.counts, self._made_up = spec, counts, MadeUp(counts, None)
        self.max_context = spec.max_context or NO_LIMIT

    def tokens(self, request: Request) -> int:
        return sum(MARKS + len(message.content) // CHARACTERS_A_TOKEN for message in request.turns)

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        for number, request in enumerate(requests):
            self.counts.role = role_of(request)
            yield number, self._reply(request)

    def usage(self) -> Usage:
        return Usage()

    def close(self) -> None:
        pass

    def _reply(self, request: Request) -> Reply:
        options, thinks = () if request.question is None else request.question.options, self.spec.thinking is not None
        if request.choose:
            assert options
            answer = max(len(json.dumps({"answer": option})) for option in options) / CHARACTERS_A_TOKEN
            self._ask(request, CHOICE_TOKENS if self.counts.bound else answer, think=thinks)
            return Reply(choice=options[0])
        assert request.sampling is not None
        drawn = self.counts.answer(request.sampling.max_new_tokens).drawn
        if request.scores and not thinks:
            self._ask(request, 1, think=False)
        # Of a model that thinks, the answer of a seed and the score after its thought are read from the same reply.
        for _ in dict.fromkeys((*request.scores, *request.seeds) if thinks else request.seeds):
            self._ask(request, drawn, think=thinks)
        self.counts.made_up |= self.counts.role == COMPLETER
        return Reply(
            {seed: self._made_up.sample(request.turns, seed, request.sampling) for seed in request.seeds},
            {seed: Score((1 / len(options),) * len(options)) for seed in request.scores},
        )

    def _ask(self, request: Request, drawn: float, *, think: bool) -> None:
        """One request; the tokens of an answer are all billed."""
        tally = self.counts.tally
        tally.requests += 1
        tally.prompt_tokens += self.tokens(request)
        if think and self.spec.thinking is not None:
            tally.thoughts += 1
            drawn += self.counts.thought(self.spec.thinking.max_tokens, None).drawn
        tally.drawn_tokens += drawn
