"""The vLLM engine: sampling and option scoring at scale, in batches that vLLM schedules itself.

Conversations are tokenized here, so that text stays text, and handed over as token ids; vLLM's own chat templating is
never used. An exact score asks for the log-probabilities of single tokens after each point at which the options part;
the prefix cache makes the points after the first cheap.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from prefs.data.template import Invalid
from prefs.errors import UserError, first_line
from prefs.models.encoded import Encoded
from prefs.models.loading import ModelSpec
from prefs.models.options import ask, branchings, option_masses
from prefs.models.sampling import row_seed
from prefs.models.stops import stop_tokens
from prefs.models.thoughts import THOUGHT, Thought
from prefs.models.tokens import ChatEncoder, Message
from prefs.models.types import (
    Answer,
    Ask,
    CaptureRequest,
    Conversation,
    Interrupted,
    Observation,
    Question,
    Sample,
    Sampling,
    Score,
    Usage,
)
from prefs.models.vllm.workers import Engines, EnginesDied, Output, Request

log = logging.getLogger(__name__)

# How many tokens' log-probabilities vLLM gives a request (0.32: `MAX_LOGPROB_TOKEN_IDS`).
LOOKED_AT_ONCE = 128
LIKELIEST = Sampling(0.0, 1.0, 1)

# What a request is for: a seed to draw with, or a beginning of options to look behind.
Use = int | tuple[int, ...]
_Row = TypeVar("_Row", Sample, Observation)


@dataclass(frozen=True)
class _Opening:
    """Where an answer begins: of one row, to one ask, after one thought (or none), with what is wanted there.

    ``seeds`` are to be sampled with, ``scores`` the seeds under which the options' score is wanted. No ``ids``: nothing
    can be asked there, since the thought has not ended, or all is too long.
    """

    row: int
    at: int
    messages: Conversation
    ids: tuple[int, ...] | None
    tails: tuple[tuple[int, ...], ...] = ()
    seeds: tuple[int, ...] = ()
    scores: tuple[int, ...] = ()
    thought: Thought | None = None


class VllmBackend(Encoded):
    """A chat model in vLLM. See `prefs.models.types.Backend` for the protocol."""

    def __init__(self, start: Callable[[], Engines], tokenizer: Any, stops: frozenset[int], spec: ModelSpec):
        self.spec = spec
        self.encoder = ChatEncoder(tokenizer, json.loads(spec.chat_template_kwargs), spec.thinking)
        self._stops = stops
        self._start = start
        self._engines = start()
        self._used = Usage()
        self.max_context = self._engines.max_context

    @classmethod
    def load(cls, spec: ModelSpec, path: str) -> VllmBackend:
        """Start vLLM with a model (safetensors only, no remote code).

        Raises
        ------
        UserError
            If vLLM, the model, its tokenizer or the device are not there, or vLLM refuses them.
        """
        options: dict[str, Any] = {"revision": spec.revision, "trust_remote_code": False}
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, **options)
            try:
                generation = GenerationConfig.from_pretrained(path, revision=spec.revision or "main")
            except OSError:  # none: then the model's config says it
                generation = GenerationConfig.from_model_config(AutoConfig.from_pretrained(path, **options))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"cannot load {spec.name} from {path}: {first_line(error)}") from None
        backend = cls(lambda: Engines(spec, path), tokenizer, stop_tokens(tokenizer, generation), spec)
        for note in backend.encoder.notes(spec.name):
            log.info("%s", note)
        return backend

    def complete(self, batch: Sequence[Conversation], seed: int, sampling: Sampling) -> list[Sample]:
        thoughts: Sequence[Thought | None] = [None] * len(batch)
        if self.encoder.thinking is not None:
            thoughts = self._think([(row, messages, seed) for row, messages in enumerate(batch)], len(batch), sampling)
        openings = [
            self._opening(row, 0, messages, None, (seed,), (), sampling, thought)
            for row, (messages, thought) in enumerate(zip(batch, thoughts, strict=True))
        ]
        answers, died = self._answer(openings, sampling)
        return _all_or(died, [None if answer is None else answer.samples[seed] for answer in answers])

    def observe(
        self,
        batch: Sequence[Conversation],
        asks: Sequence[Ask],
        sampling: Sampling,
        capture: CaptureRequest | None = None,
    ) -> list[Observation]:
        if capture is not None:
            raise UserError("vLLM gives no residual vectors; use model.backend=transformer_lens, or capture=none")
        openings = self._openings(batch, asks, sampling)
        answers, died = self._answer(openings, sampling)
        parts: dict[tuple[int, int], list[Answer | None]] = {
            (row, at): [] for row in range(len(batch)) for at in range(len(asks))
        }
        for opening, answer in zip(openings, answers, strict=True):
            parts[opening.row, opening.at].append(answer)
        observations: list[Observation | None] = []
        for row in range(len(batch)):
            merged = [_merged(parts[row, at]) for at in range(len(asks))]
            answered = tuple(answer for answer in merged if answer is not None)
            observations.append(Observation(answered) if len(answered) == len(asks) else None)
        return _all_or(died, observations)

    def choose(self, batch: Sequence[Conversation], options: Sequence[str]) -> list[str | None]:
        thoughts: Sequence[Thought | None] = [None] * len(batch)
        if self.encoder.thinking is not None:
            thoughts = self._think([(row, messages, 0) for row, messages in enumerate(batch)], len(batch), LIKELIEST)
        openings = [
            self._opening(
                row, 0, messages, Question(messages[-1].content, tuple(options)), (), (0,), LIKELIEST, thought
            )
            for row, (messages, thought) in enumerate(zip(batch, thoughts, strict=True))
        ]
        answers, died = self._answer(openings, LIKELIEST)
        if died is not None:
            raise died
        masses = [None if answer is None else answer.scores[0].mass for answer in answers]
        return [None if mass is None else options[int(np.argmax(mass))] for mass in masses]

    def usage(self) -> Usage:
        return self._used

    def close(self) -> None:
        self._engines.close()

    def _openings(self, batch: Sequence[Conversation], asks: Sequence[Ask], sampling: Sampling) -> list[_Opening]:
        """Where answers are wanted: one a row and ask, or, of a model that thinks, one a thought."""
        put = [
            (row, at, each, (*conversation, Message("user", each.question.text)))
            for row, conversation in enumerate(batch)
            for at, each in enumerate(asks)
        ]
        if self.encoder.thinking is None:
            return [
                self._opening(row, at, messages, each.question, each.seeds, each.scores, sampling)
                for row, at, each, messages in put
            ]
        wanted = [
            (row, at, each, messages, seed)
            for row, at, each, messages in put
            for seed in dict.fromkeys((*each.seeds, *each.scores))
        ]
        thoughts = self._think([(row, messages, seed) for row, _, _, messages, seed in wanted], len(batch), sampling)
        openings = []
        for (row, at, each, messages, seed), thought in zip(wanted, thoughts, strict=True):
            seeds, scores = ((seed,) * (seed in of) for of in (each.seeds, each.scores))
            openings.append(self._opening(row, at, messages, each.question, seeds, scores, sampling, thought))
        return openings

    def _opening(
        self,
        row: int,
        at: int,
        messages: Conversation,
        question: Question | None,
        seeds: tuple[int, ...],
        scores: tuple[int, ...],
        sampling: Sampling,
        thought: Thought | None = None,
    ) -> _Opening:
        """Encode an answer's beginning."""
        if thought is not None and not thought.ended:
            return _Opening(row, at, messages, None, (), seeds, scores, thought)
        text = None if thought is None else thought.text
        if question is None:
            ids, tails = self.encoder.encode(messages, answer="", thought=text).ids, ()
        else:
            asked = ask(self.encoder, messages[:-1], question, thought=text)
            ids, tails = asked.ids, asked.tails
        # Callers see to that, but the text of a thought can have more tokens than were drawn for it.
        longest = max([len(tail) for tail in tails] + [sampling.max_new_tokens] * bool(seeds), default=0)
        fits = len(ids) + longest <= self.max_context
        return _Opening(row, at, messages, ids if fits else None, tails, seeds, scores, thought)

    def _think(self, wanted: Sequence[tuple[int, Conversation, int]], rows: int, sampling: Sampling) -> list[Thought]:
        """Draw one thought for each (row, messages, seed)."""
        thinking, end = self.encoder.thinking, self.encoder.thought_end
        assert thinking is not None
        assert end is not None
        budget = replace(sampling, max_new_tokens=thinking.max_tokens)
        # Other random numbers than the answer's.
        requests = [
            Request(
                row,
                self.encoder.open_thought(messages),
                budget,
                row_seed(seed, (*messages, THOUGHT)),
                self._stops | {end},
            )
            for row, messages, seed in wanted
        ]
        outputs, died = self._generate(requests)
        if died is not None:
            raise Interrupted(str(died), [None] * rows) from None
        thoughts = []
        for output in outputs:
            assert output is not None
            ids = output.ids[:-1] if output.stopped else output.ids
            ended = output.stopped and output.ids[-1] == end
            thoughts.append(Thought(self._text(ids), len(ids), ended or thinking.force_close))
        return thoughts

    def _answer(
        self, openings: Sequence[_Opening], sampling: Sampling
    ) -> tuple[list[Answer | None], EnginesDied | None]:
        """Scores and samples of every opening; None where the engines died before it was answered."""
        planned = [(at, *plan) for at, opening in enumerate(openings) for plan in self._plan(opening, sampling)]
        outputs, died = self._generate([request for _, _, request in planned])
        brought: list[dict[Use, list[Output | None]]] = [{} for _ in openings]
        for (at, use, _), output in zip(planned, outputs, strict=True):
            brought[at].setdefault(use, []).append(output)
        return [self._read(opening, of) for opening, of in zip(openings, brought, strict=True)], died

    def _plan(self, opening: _Opening, sampling: Sampling) -> Iterator[tuple[Use, Request]]:
        """The requests that answer one opening."""
        if opening.ids is None:
            return
        if opening.scores:
            for beginning, tokens in branchings(opening.tails).items():
                for start in range(0, len(tokens), LOOKED_AT_ONCE):
                    looked = tokens[start : start + LOOKED_AT_ONCE]
                    yield beginning, Request(opening.row, opening.ids + beginning, LIKELIEST, looked=looked)
        for seed in opening.seeds:
            drawn = row_seed(seed, opening.messages)
            yield seed, Request(opening.row, opening.ids, sampling, drawn, self._stops)

    def _read(self, opening: _Opening, brought: Mapping[Use, Sequence[Output | None]]) -> Answer | None:
        """Put together what the requests of an opening brought; None if something is missing."""
        if opening.ids is None:
            reason = Invalid.too_long.value
            answer = Answer(
                {seed: Score(None, invalid=reason) for seed in opening.scores},
                {seed: Sample(None, 0, False, invalid=reason) for seed in opening.seeds},
            )
            return answer if opening.thought is None else opening.thought.of(answer)
        there: dict[Use, list[Output]] = {}
        for use, outputs in brought.items():
            there[use] = [output for output in outputs if output is not None]
            if len(there[use]) < len(outputs):
                return None
        scores: dict[int, Score] = {}
        if opening.scores:
            log_probs = [
                sum(_log_prob(there[tail[:at]], token) for at, token in enumerate(tail)) for tail in opening.tails
            ]
            (mass,) = option_masses(np.array([log_probs]), opening.tails).tolist()
            scores = dict.fromkeys(opening.scores, Score(tuple(mass)))
        answer = Answer(scores, {seed: self._sample(there[seed][0]) for seed in opening.seeds})
        return answer if opening.thought is None else opening.thought.of(answer)

    def _sample(self, output: Output) -> Sample:
        ids = output.ids[:-1] if output.stopped else output.ids
        return Sample(self._text(ids), len(ids), output.stopped)

    def _text(self, ids: Sequence[int]) -> str:
        (text,) = self.encoder.tokenizer.batch_decode([list(ids)], skip_special_tokens=True)
        return text

    def _generate(self, requests: Sequence[Request]) -> tuple[list[Output | None], EnginesDied | None]:
        """What the engines make of requests; with the error if they died, after which new ones are started."""
        if not self._engines.running:
            self._engines = self._start()
        outputs: list[Output | None] = []
        died = None
        try:
            outputs += self._engines.run(requests)
        except EnginesDied as error:
            outputs += error.outputs
            died = error
        answered = [(request, output) for request, output in zip(requests, outputs, strict=True) if output is not None]
        self._used = Usage(
            self._used.requests + len(answered),
            self._used.prompt_tokens + sum(len(request.ids) - output.cached for request, output in answered),
            # The last is drawn and not run.
            self._used.completion_tokens + sum(len(output.ids) - 1 for _, output in answered),
        )
        return outputs, died


def _log_prob(outputs: Sequence[Output], token: int) -> float:
    return next(output.log_probs[token] for output in outputs if token in output.log_probs)


def _merged(parts: Sequence[Answer | None]) -> Answer | None:
    """One answer out of those after each thought; None if one is missing."""
    there = [part for part in parts if part is not None]
    if len(there) < len(parts):
        return None
    return Answer(
        {seed: score for part in there for seed, score in part.scores.items()},
        {seed: sample for part in there for seed, sample in part.samples.items()},
    )


def _all_or(died: EnginesDied | None, rows: Sequence[_Row | None]) -> list[_Row]:
    """All rows; if the engines died, an error that brings those which are done."""
    if died is not None:
        raise Interrupted(str(died), rows) from None
    return [row for row in rows if row is not None]
