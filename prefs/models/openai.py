"""The engine for any OpenAI-compatible server: one request a (conversation, question, seed), and one or more a score.

The server tokenizes and applies its chat template. Its seeds are hashed from the messages and the seed, since a server
that honours seeds would draw the same random numbers for every conversation. Scores are read from the likeliest tokens
where the answer begins (``top_logprobs``), as text.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from prefs.chat import Message, as_dicts
from prefs.errors import ConfigError, UserError
from prefs.models.backend import (
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
from prefs.models.choices import CHOICE_TOKENS, chosen, one_of
from prefs.models.control_text import control_texts
from prefs.models.keys import key_of
from prefs.models.loading import ModelSpec
from prefs.models.replies import Malformed, Reply, first_of_answer, part
from prefs.models.served import FormatRefused, Request, RowRefused, Server
from prefs.models.text_options import SharedToken, Top, first_token_masses, opened, seen_beginnings, whole_string_masses
from prefs.sampling import row_seed
from prefs.store import digest

log = logging.getLogger(__name__)

T = TypeVar("T")

# A server whose context is not known takes what it takes; it says where a prompt is too long.
NO_LIMIT = 2**31
# No tokenizer puts two words into one token, and few tokens are as long as this.
LONG_TOKEN = 16


@dataclass(frozen=True)
class _Part:
    """What one job of a batch brought for one row and question: an answer of a seed, a score, or both."""

    row: int
    at: int
    seed: int
    sample: Sample | None = None
    score: Score | None = None
    # The likeliest first tokens, from which a score is made when those of the whole batch are there.
    top: Top | None = None


class OpenAIBackend:
    """A model on a server. See `prefs.models.backend.Backend` for the protocol."""

    def __init__(self, server: Server, spec: ModelSpec, runner: asyncio.Runner):
        self.server = server
        self.spec = spec
        self.max_context = spec.max_context or NO_LIMIT
        self._runner = runner
        self._seen: dict[Question, set[str]] = {}
        self._structured = True
        self._suspect: set[str] = set()
        self._warned_of = 0
        self._warned_unlisted = False

    @classmethod
    def load(cls, spec: ModelSpec) -> OpenAIBackend:
        """Look for the key and the server.

        Raises
        ------
        UserError
            If the key is missing or nobody answers at the address.
        """
        if spec.thinking is not None and spec.thinking.force_close:
            raise ConfigError("model.thinking.force_close", True, "false, since a server ends its model's thoughts")
        key = key_of(spec.api)
        template = json.loads(spec.chat_template_kwargs)
        extra = dict(spec.api.extra_body)
        if template:
            extra["chat_template_kwargs"] = {**extra.get("chat_template_kwargs", {}), **template}
        runner = asyncio.Runner()
        server = Server(spec.path, spec.api, key, extra)
        runner.run(server.look())
        return cls(server, spec, runner)

    def prompt_tokens(self, conversation: Conversation) -> int:
        self._suspect_control_text(conversation)
        return self._estimate(conversation)

    def conversation_tokens(self, conversation: Conversation) -> int:
        self._suspect_control_text(conversation)
        return self._estimate(conversation)

    def question_tokens(self, conversation: Conversation, question: Question) -> int:
        return self._estimate((*conversation, Message("user", question.text)))

    def complete(self, batch: Sequence[Conversation], seed: int, sampling: Sampling) -> list[Sample]:
        self._warn_of_control_text()
        jobs = [partial(self._completion, conversation, seed, sampling) for conversation in batch]
        samples, error = self._runner.run(self.server.answers(jobs))
        if error is not None:
            raise _interrupted(error, samples)
        return [sample for sample in samples if sample is not None]

    def observe(
        self,
        batch: Sequence[Conversation],
        asks: Sequence[Ask],
        sampling: Sampling,
        capture: CaptureRequest | None = None,
    ) -> list[Observation]:
        if capture is not None:
            raise ConfigError("capture", "residuals of a served model", "capture=none probe=none, or another backend")
        for each in asks:
            self._check(each)
        self._warn_of_control_text()
        jobs = [
            job
            for row, conversation in enumerate(batch)
            for at, each in enumerate(asks)
            for job in self._jobs(row, at, conversation, each, sampling)
        ]
        parts, error = self._runner.run(self.server.answers(jobs))
        parts = [each for each in parts if each is not None]
        try:
            parts = self._scored(parts, asks)
        except UserError as unscored:
            error, parts = unscored, [each for each in parts if each.top is None]
        observations = _observations(parts, len(batch), len(asks))
        if error is not None:
            begun = {each.row for each in parts}
            raise _interrupted(error, [each if row in begun else None for row, each in enumerate(observations)])
        return observations

    def choose(self, batch: Sequence[Conversation], question: Question) -> list[str | None]:
        self._warn_of_control_text()
        jobs = [partial(self._choice, conversation, question) for conversation in batch]
        choices, error = self._runner.run(self.server.answers(jobs))
        if error is not None:
            raise error
        return [None if choice is None else choice[0] for choice in choices]

    def usage(self) -> Usage:
        return self.server.usage()

    def close(self) -> None:
        self._runner.run(self.server.close())
        self._runner.close()

    def _estimate(self, conversation: Conversation) -> int:
        thought = 0 if self.spec.thinking is None else self.spec.thinking.max_tokens
        texts = [message.content for message in conversation]
        return sum(max(len(text.split()), len(text) // LONG_TOKEN) for text in texts) + thought

    def _check(self, each: Ask) -> None:
        """Refuse what this server cannot be asked."""
        prefill = each.question.prefill
        if prefill and self.spec.thinking is not None:
            raise ConfigError("template.prefill", prefill, "'' for a model that thinks on a server before it answers")
        if prefill and not self.spec.api.prefill:
            raise ConfigError(
                "template.prefill", prefill, "'' unless the server can go on with an answer (model.api.prefill=true)"
            )
        if each.scores and not self.spec.api.top_logprobs:
            raise ConfigError("model.api.top_logprobs", 0, "1 or more for exact ratings, or rating.exact=false")

    def _jobs(
        self, row: int, at: int, conversation: Conversation, each: Ask, sampling: Sampling
    ) -> Sequence[Callable[[], Awaitable[_Part]]]:
        """The jobs of one row and question, each of which brings one part of the answer."""
        if self.spec.thinking is None:
            score = [partial(self._score, row, at, conversation, each.question)] if each.scores else []
            return score + [
                partial(self._sample, row, at, conversation, each.question, seed, sampling) for seed in each.seeds
            ]
        # The answer of a seed and the score after its thought are read from the same reply.
        return [
            partial(
                self._thoughtful,
                row,
                at,
                conversation,
                each.question,
                seed,
                sampling,
                seed in each.seeds,
                seed in each.scores,
            )
            for seed in dict.fromkeys((*each.scores, *each.seeds))
        ]

    async def _completion(self, conversation: Conversation, seed: int, sampling: Sampling) -> Sample:
        try:
            return self._read(await self.server.ask(self._drawn(conversation, seed, sampling)), sampling)
        except RowRefused as refused:
            return _no_sample(refused.reason)

    async def _sample(
        self, row: int, at: int, conversation: Conversation, question: Question, seed: int, sampling: Sampling
    ) -> _Part:
        asked = (*conversation, Message("user", question.text))
        try:
            reply = await self.server.ask(self._drawn(asked, seed, sampling, opened(question)[0]))
        except RowRefused as refused:
            return _Part(row, at, seed, _no_sample(refused.reason))
        return _Part(row, at, seed, self._read(reply, sampling))

    async def _thoughtful(
        self,
        row: int,
        at: int,
        conversation: Conversation,
        question: Question,
        seed: int,
        sampling: Sampling,
        sampled: bool,
        scored: bool,
    ) -> _Part:
        """One thought with its answer; scored, the probabilities where the answer begins.

        They are the model's own on servers that report them so (vLLM does), and those at ``sampling`` on others.
        """
        asked = (*conversation, Message("user", question.text))
        request = self._drawn(asked, seed, sampling, log_probs=self.spec.api.top_logprobs if scored else None)
        try:
            reply = await self.server.ask(request)
        except RowRefused as refused:
            sample, score = _no_sample(refused.reason), Score(None, invalid=refused.reason)
            return _Part(row, at, seed, sample if sampled else None, score if scored else None)
        sample = self._read(reply, sampling) if sampled else None
        if not scored:
            return _Part(row, at, seed, sample)
        parted = part(reply, self.spec.thinking)
        if not parted.closed:
            return _Part(row, at, seed, sample, Score(None, parted.thought, "thought_cut_off"))
        try:
            top = first_of_answer(reply.positions or (), parted.text, self.spec.thinking)
        except Malformed as error:
            raise UserError(f"{self.server.address}: {error}; use rating.exact=false") from None
        return _Part(row, at, seed, sample, Score(None, parted.thought), top)

    async def _score(self, row: int, at: int, conversation: Conversation, question: Question) -> _Part:
        opening, says = opened(question)
        asked = (*conversation, Message("user", question.text))

        async def ask(beginning: str) -> Top:
            # At temperature 1 and top_p 1 a server's probabilities are the model's, whether it reports them before or
            # after it has applied the two (vLLM: before; OpenAI's documents do not say).
            request = self._request(
                asked, Sampling(1.0, 1.0, 1), row_seed(0, asked), opening + beginning, self.spec.api.top_logprobs
            )
            reply = await self.server.ask(request)
            return reply.positions[0].top if reply.positions else {}

        try:
            if self.spec.api.prefill:
                return _Part(row, at, 0, score=Score(await whole_string_masses(says, ask)))
            return _Part(row, at, 0, score=Score(None), top=await ask(""))
        except RowRefused as refused:
            return _Part(row, at, 0, score=Score(None, invalid=refused.reason))

    async def _choice(self, conversation: Conversation, question: Question) -> tuple[str | None]:
        asked = (*conversation, Message("user", question.text))
        room = CHOICE_TOKENS + (self.spec.thinking.max_tokens if self.spec.thinking else 0)
        for response_format in (one_of(question.says), None) if self._structured else (None,):
            request = Request(
                as_dicts(asked),
                room,
                temperature=0.0,
                seed=row_seed(0, asked),
                response_format=response_format,
                strict=False,
            )
            try:
                reply = await self.server.ask(request)
            except FormatRefused as refused:
                if self._structured:
                    log.warning(
                        "%s offers no structured output (%s); an answer must be one of the options as it stands",
                        self.server.address,
                        refused,
                    )
                self._structured = False
            except RowRefused:
                return (None,)
            else:
                return (chosen(part(reply, self.spec.thinking).text, question.says),)
        return (None,)

    def _drawn(
        self,
        conversation: Conversation,
        seed: int,
        sampling: Sampling,
        opening: str = "",
        log_probs: int | None = None,
    ) -> Request:
        return self._request(conversation, sampling, row_seed(seed, conversation), opening, log_probs)

    def _request(
        self, conversation: Conversation, sampling: Sampling, seed: int, opening: str, log_probs: int | None
    ) -> Request:
        begun = (Message("assistant", opening),) if opening else ()
        return Request(
            messages=as_dicts((*conversation, *begun)),
            max_tokens=self._room(sampling),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=seed,
            log_probs=log_probs,
            begun=bool(opening),
        )

    def _room(self, sampling: Sampling) -> int:
        return sampling.max_new_tokens + (self.spec.thinking.max_tokens if self.spec.thinking else 0)

    def _read(self, reply: Reply, sampling: Sampling) -> Sample:
        parted = part(reply, self.spec.thinking)
        finished = reply.finish != "length"
        context = self.server.context or NO_LIMIT
        if not finished and reply.tokens < self._room(sampling) and reply.prompt_tokens + reply.tokens >= context:
            # vLLM shortens an answer to what its context has left; what is answered on this machine is not asked then.
            return Sample(None, 0, True, parted.thought, "too_long")
        if not parted.closed:
            return Sample(None, reply.tokens, finished, parted.thought, "thought_cut_off")
        return Sample(parted.text, reply.tokens, finished, parted.thought)

    def _scored(self, parts: Sequence[_Part], asks: Sequence[Ask]) -> list[_Part]:
        """The parts with their scores, once all of the batch show how the model's tokenizer begins the options.

        Raises
        ------
        UserError
            If options cannot be told apart by their first tokens.
        """
        for at, each in enumerate(asks):
            tops = [one.top for one in parts if one.at == at and one.top is not None]
            self._seen.setdefault(each.question, set()).update(seen_beginnings(opened(each.question)[1], tops))
        scored = []
        for each in parts:
            if each.top is not None and each.score is not None:
                question = asks[each.at].question
                try:
                    masses = first_token_masses(opened(question)[1], each.top, self._seen[question])
                except SharedToken as shared:
                    raise self._inseparable(shared) from None
                each = _Part(each.row, each.at, each.seed, each.sample, Score(masses, each.score.thought))
            scored.append(each)
        masses = [mass for each in scored if each.score and each.score.mass for mass in each.score.mass]
        if 0.0 in masses and not self._warned_unlisted:
            self._warned_unlisted = True
            log.warning(
                "%s: %d of %d option probabilities are not among the %d likeliest tokens and count as 0; valid mass"
                " shows what is missing",
                self.server.address,
                masses.count(0.0),
                len(masses),
                self.spec.api.top_logprobs,
            )
        return scored

    def _inseparable(self, shared: SharedToken) -> UserError:
        options = ", ".join(repr(option) for option in shared.options)
        way = (
            "rating.exact=false, or a template whose options begin differently"
            if self.spec.thinking is not None
            else "rating.exact=false, a template whose options begin differently, or a server that can go on with an"
            " answer (model.api.prefill=true; vLLM can)"
        )
        return UserError(
            f"exact ratings: {options} begin with the same token ({shared.token!r}) to {self.spec.path}, and its server"
            f" shows only which token comes first; use {way}"
        )

    def _suspect_control_text(self, conversation: Conversation) -> None:
        if control_texts(conversation):
            self._suspect.add(digest(as_dicts(conversation)))

    def _warn_of_control_text(self) -> None:
        """Say how many of a stage's conversations hold such text; all have been measured before its first batch."""
        if len(self._suspect) > self._warned_of:
            log.warning(
                "%d conversations hold text that looks like a control token (such as <|im_end|>); %s tokenizes, and"
                " may take it for the token",
                len(self._suspect) - self._warned_of,
                self.server.address,
            )
            self._warned_of = len(self._suspect)


def _interrupted(error: UserError, done: Sequence[Any]) -> Interrupted:
    kept = sum(each is not None for each in done)
    return Interrupted(f"{error} ({kept} of {len(done)} rows of this batch were answered and are kept)", done)


def _no_sample(reason: str) -> Sample:
    return Sample(None, 0, True, invalid=reason)


def _observations(parts: Sequence[_Part], rows: int, asks: int) -> list[Observation]:
    samples: dict[tuple[int, int], dict[int, Sample]] = {}
    scores: dict[tuple[int, int], dict[int, Score]] = {}
    for each in parts:
        if each.sample is not None:
            samples.setdefault((each.row, each.at), {})[each.seed] = each.sample
        if each.score is not None:
            scores.setdefault((each.row, each.at), {})[each.seed] = each.score
    return [
        Observation(tuple(Answer(scores.get((row, at), {}), samples.get((row, at), {})) for at in range(asks)))
        for row in range(rows)
    ]
