"""What the local engine would run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from prefs.models.architecture import architecture
from prefs.models.counting import COMPLETER, JUDGE, RATER, CountingEngine, Counts, Tally, encoder_of, uniform
from prefs.models.loading import ModelSpec, model_folder
from prefs.models.local.grouping import (
    Row,
    active,
    at_question,
    before_question,
    by_beginning,
    cut,
    grouped,
    lowest,
    reads_logits,
)
from prefs.models.positions import token_ranges
from prefs.models.prompts import Prompt, Thought, encode_prompt, request_tokens, shared_prefix
from prefs.models.tokens import ChatEncoder
from prefs.models.types import Capture, Conversation, Reply, Request, Sample

ROLES = {"complete": COMPLETER, "choose": JUDGE, "doses": RATER, "observe": RATER}


class CountingLocal(CountingEngine):
    """Counts the tokens that `prefs.models.local.engine` would run, a conversation at a time.

    Steered passes are counted as those of a family that `shares_blocks`.
    """

    rows_apart = False
    encoder: ChatEncoder

    def __init__(self, spec: ModelSpec, counts: Counts):
        super().__init__(spec, counts, encoder_of(spec))
        self.shape = architecture(model_folder(spec), spec.revision)
        self.max_context = spec.max_context or self.shape.context
        self._role = RATER

    def tokens(self, request: Request) -> int:
        return request_tokens(self.encoder, request)

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        for group in grouped(requests):
            self._role = ROLES[group.kind]
            self._tally.requests += group.count
            if group.kind == "doses":
                yield from self._doses(group.rows)
                continue
            count = {"complete": self._complete, "choose": self._choose, "observe": self._observe}[group.kind]
            for row in group.rows:
                yield from count(row).items()

    @property
    def _tally(self) -> Tally:
        return self.counts.tallies[self._role]

    def _complete(self, row: Row) -> dict[int, Reply]:
        self.counts.made_up = True
        replies = {}
        for number, request in row.requests.items():
            thoughts = self._think(row.messages, request.seeds)
            prompts = {self.encoder.encode(row.messages, answer="", thought=text).ids for text in thoughts.values()}
            self._tally.prompt_tokens += sum(map(len, prompts))
            replies[number] = Reply({seed: self._sample(request, seed, text) for seed, text in thoughts.items()})
        return replies

    def _choose(self, row: Row) -> dict[int, Reply]:
        question = row.request.question
        assert question is not None
        thought = self._think(row.messages, (0,))[0]
        prompt = encode_prompt(self.encoder, row.request.messages, question, thought)
        self._tally.prompt_tokens += len(prompt.ids) + _scoring(prompt)
        return dict.fromkeys(row.requests, Reply(choice=question.options[0]))

    def _observe(self, row: Row) -> dict[int, Reply]:
        requests = row.requests.values()
        questions = [request.question for request in requests if request.question is not None]
        prompts = {question: encode_prompt(self.encoder, row.messages, question) for question in questions or [None]}
        prefix = len(shared_prefix(list(prompts.values())))
        layers = [layer for request in requests if request.capture for layer in request.capture.layers]
        self._tally.prompt_tokens += prefix * self._share(layers, any(map(reads_logits, requests)))
        first = next(iter(prompts.values()))
        replies = {}
        for number, request in row.requests.items():
            reply = Reply()
            if request.question is not None:
                reply = self._ask(request, prompts[request.question], prefix)
            positions = token_ranges(first.spans, before_question(request))
            captured = {name: self._vectors(request.capture) for name in positions}
            replies[number] = replace(reply, residuals={**captured, **reply.residuals})
        return replies

    def _ask(self, request: Request, prompt: Prompt, prefix: int) -> Reply:
        """A question to a conversation of which so many tokens have been run."""
        if self.encoder.thinking is None:
            return self._answer(request, prompt, prefix)
        seeds = tuple(dict.fromkeys((*request.scores, *request.seeds)))
        reply = Reply()
        for seed, text in self._think(request.turns, seeds, prefix).items():
            assert text is not None
            once = replace(
                request,
                seeds=(seed,) * (seed in request.seeds),
                scores=(seed,) * (seed in request.scores),
                capture=request.capture if seed == seeds[0] else None,
            )
            prompt = encode_prompt(self.encoder, request.messages, request.question, text)
            own = Thought(text, 0, True).reply(self._answer(once, prompt, prefix))
            residuals = {**reply.residuals, **own.residuals}
            reply = Reply({**reply.samples, **own.samples}, {**reply.scores, **own.scores}, residuals=residuals)
        return reply

    def _answer(self, request: Request, prompt: Prompt, prefix: int) -> Reply:
        capture = at_question(request)
        if capture is None and not reads_logits(request):
            return Reply()
        share = self._share(() if capture is None else capture.layers, reads_logits(request))
        self._tally.prompt_tokens += (len(prompt.ids) - prefix) * share
        positions = () if capture is None else capture.positions
        return replace(self._read(request, prompt), residuals={name: self._vectors(capture) for name in positions})

    def _read(self, request: Request, prompt: Prompt) -> Reply:
        """What is scored and drawn where the answer begins."""
        if request.scores:
            self._tally.prompt_tokens += _scoring(prompt)
        assert request.question is not None
        samples = {seed: self._sample(request, seed) for seed in request.seeds}
        return Reply(samples, dict.fromkeys(request.scores, uniform(request.question)))

    def _doses(self, rows: Sequence[Row]) -> Iterator[tuple[int, Reply]]:
        """What `prefs.models.local.doses` runs; of a model that thinks, each dose by passes of its own."""
        request, layers = rows[0].request, self.shape.layers
        doses = list(dict.fromkeys(active(dosed.steering) for dosed in rows[0].requests.values()))
        prompts = [encode_prompt(self.encoder, row.messages, request.question) for row in rows]
        if self.encoder.thinking is not None:
            for row, prompt in zip(rows, prompts, strict=True):
                # Run to see whether the logits are finite, for the completion's likelihood, and then to be answered.
                finite = len(self.encoder.open_thought(row.request.turns))
                self._tally.prompt_tokens += len(doses) * (finite + request.likelihood * prompt.spans.completion[1])
        else:
            run = 0
            for beginning, group in by_beginning(doses).items():
                starts = sum(cut(prompts, beginning))
                rest = sum(len(prompt.ids) for prompt in prompts) - starts
                steered = [lowest(doses[number]) for number in group if doses[number]]
                blocks = layers if len(steered) < len(group) else 1 + max(steered)
                blocks += sum(layers - 1 - layer for layer in steered)
                self._tally.prompt_tokens += starts - run + rest * blocks / layers
                run = starts
        for row, prompt in zip(rows, prompts, strict=True):
            reply = Reply()
            for _ in doses:
                if self.encoder.thinking is not None:
                    reply = self._observe(Row(row.messages, {0: row.request}))[0]
                else:
                    reply = self._read(row.request, prompt)
            yield from dict.fromkeys(row.requests, replace(reply, nll=0.0)).items()

    def _think(self, conversation: Conversation, seeds: Sequence[int], shared: int = 0) -> Mapping[int, str | None]:
        """The thoughts that answers come after, by seed; `shared` tokens of their prompt have been run."""
        thinking, tally = self.encoder.thinking, self._tally
        if thinking is None:
            return dict.fromkeys(seeds)
        length = self.counts.thought(self._role, thinking.max_tokens, self.encoder)
        tally.prompt_tokens += len(self.encoder.open_thought(conversation)) - shared
        tally.drawn_tokens += length.run * len(seeds)
        tally.thoughts += len(seeds)
        self.counts.made_up = True
        return {seed: self.text(length.drawn, conversation, seed) for seed in seeds}

    def _sample(self, request: Request, seed: int, thought: str | None = None) -> Sample:
        assert request.sampling is not None
        self._tally.drawn_tokens += self.counts.answer(self._role, request.sampling.max_new_tokens).run
        return self.sample(request, seed, thought)

    def _share(self, layers: Sequence[int], logits: bool) -> float:
        """The share of the blocks that a pass runs: it stops where nobody reads what comes after."""
        return 1.0 if logits or not layers else (1 + max(layers)) / self.shape.layers

    def _vectors(self, capture: Capture | None) -> torch.Tensor:
        layers = () if capture is None else capture.layers
        return torch.empty(len(layers), self.shape.d_model, device="meta")


def _scoring(prompt: Prompt) -> int:
    """Tokens that are run to score options as whole strings: all but each option's last."""
    return sum(len(tail) - 1 for tail in prompt.tails)
