"""The engine for any OpenAI-compatible server: one request a (conversation, question, seed), and one or more a score.

The server tokenizes and applies its chat template. Its seeds are hashed from the messages and the seed, since a server
that honours seeds would draw the same random numbers for every conversation. Scores are read from the likeliest tokens
where the answer begins (``top_logprobs``), as text.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from prefs.errors import ConfigError, UserError
from prefs.models.loading import ModelSpec
from prefs.models.openai.choices import CHOICE_TOKENS, chosen, one_of
from prefs.models.openai.control_text import control_texts
from prefs.models.openai.keys import key_of
from prefs.models.openai.replies import Malformed, Parted, Reply, first_of_answer, part
from prefs.models.openai.server import FormatRefused, Request, RowRefused, Server
from prefs.models.openai.text_options import (
    SharedToken,
    Top,
    first_token_masses,
    opened,
    seen_beginnings,
    whole_string_masses,
)
from prefs.models.sampling import row_seed
from prefs.models.tokens import Message, as_dicts
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
from prefs.store.table import digest

log = logging.getLogger(__name__)

# A server whose context is not known takes what it takes; it says where a prompt is too long.
NO_LIMIT = 2**31
# No tokenizer puts two words into one token, and few tokens are as long as this.
LONG_TOKEN = 16


@dataclass(frozen=True)
class _Place:
    """Where in a batch an answer belongs. ``seed`` None: the one score of a model that answers at once."""

    row: int
    at: int
    seed: int | None


@dataclass(frozen=True)
class _Brought:
    """What one job brought. ``top``: the likeliest first tokens, from which the score is still to be made."""

    sample: Sample | None = None
    score: Score | None = None
    top: Top | None = None


class OpenAIBackend:
    """A model on a server. See `prefs.models.types.Backend` for the protocol."""

    def __init__(self, server: Server, spec: ModelSpec, runner: asyncio.Runner):
        self.server = server
        self.spec = spec
        self.max_context = spec.max_context or NO_LIMIT
        self._runner = runner
        self._structured = True
        self._seen: dict[Question, set[str]] = {}
        self._warned: set[str] = set()
        self._suspect: set[str] = set()
        self._suspect_named = 0

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
        extra = dict(spec.api.extra_body)
        if template := json.loads(spec.chat_template_kwargs):
            extra["chat_template_kwargs"] = {**extra.get("chat_template_kwargs", {}), **template}
        server, runner = Server(spec.path, spec.api, key, extra), asyncio.Runner()
        try:
            runner.run(server.look())
        except UserError:
            runner.close()
            raise
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
        jobs = [partial(self._complete, conversation, seed, sampling) for conversation in batch]
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
        jobs = {
            _Place(row, at, seed): job
            for row, conversation in enumerate(batch)
            for at, each in enumerate(asks)
            for seed, job in self._jobs(conversation, each, sampling).items()
        }
        results, error = self._runner.run(self.server.answers(list(jobs.values())))
        brought = {place: result for place, result in zip(jobs, results, strict=True) if result is not None}
        try:
            brought = self._scored(brought, asks)
        except UserError as unscored:
            # A batch that was stopped early may not have shown yet how the options begin.
            error = error or unscored
            brought = {place: replace(each, score=None, top=None) for place, each in brought.items()}
        observations = _observations(brought, len(batch), len(asks))
        if error is not None:
            raise _interrupted(error, [each if any(map(_any, each.answers)) else None for each in observations])
        return observations

    def choose(self, batch: Sequence[Conversation], options: Sequence[str]) -> list[str | None]:
        self._warn_of_control_text()
        jobs = [partial(self._choose, conversation, options) for conversation in batch]
        texts, error = self._runner.run(self.server.answers(jobs))
        choices = [chosen(text or "", options) for text in texts]
        if error is not None:
            raise _interrupted(error, choices)
        return choices

    def usage(self) -> Usage:
        return self.server.usage()

    def close(self) -> None:
        self._runner.run(self.server.close())
        self._runner.close()

    def _estimate(self, conversation: Conversation) -> int:
        texts = [message.content for message in conversation]
        return self._thought_tokens + sum(max(len(text.split()), len(text) // LONG_TOKEN) for text in texts)

    @property
    def _thought_tokens(self) -> int:
        return 0 if self.spec.thinking is None else self.spec.thinking.max_tokens

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
        self, conversation: Conversation, each: Ask, sampling: Sampling
    ) -> Mapping[int | None, Callable[[], Awaitable[_Brought]]]:
        """What to do for one row and question, by seed; None is the score of a model that answers at once."""
        asked = (*conversation, Message("user", each.question.text))
        if self.spec.thinking is not None:
            # The answer of a seed and the score after its thought are read from the same reply.
            return {
                seed: partial(self._think, asked, seed, sampling, seed in each.seeds, seed in each.scores)
                for seed in dict.fromkeys((*each.scores, *each.seeds))
            }
        score = {None: partial(self._score, asked, each.question)} if each.scores else {}
        opening = opened(each.question)[0]
        return score | {seed: partial(self._sample, asked, seed, sampling, opening) for seed in each.seeds}

    async def _complete(self, conversation: Conversation, seed: int, sampling: Sampling) -> Sample:
        try:
            return self._read(await self.server.ask(self._request(conversation, seed, sampling)), sampling)
        except RowRefused as refused:
            return _no_sample(refused)

    async def _sample(self, asked: Conversation, seed: int, sampling: Sampling, opening: str) -> _Brought:
        try:
            reply = await self.server.ask(self._request(asked, seed, sampling, opening))
        except RowRefused as refused:
            return _Brought(_no_sample(refused))
        return _Brought(self._read(reply, sampling))

    async def _score(self, asked: Conversation, question: Question) -> _Brought:
        opening, says = opened(question)
        # At temperature 1 and top_p 1 a server's probabilities are the model's, whether it reports them before or after
        # it has applied the two (vLLM: before; OpenAI's documents do not say).
        neutral = Sampling(1.0, 1.0, 1)

        async def ask(beginning: str) -> Top:
            request = self._request(asked, 0, neutral, opening + beginning, self.spec.api.top_logprobs)
            reply = await self.server.ask(request)
            return reply.positions[0].top if reply.positions else {}

        try:
            if self.spec.api.prefill:
                return _Brought(score=Score(await whole_string_masses(says, ask)))
            return _Brought(score=Score(None), top=await ask(""))
        except RowRefused as refused:
            return _Brought(score=Score(None, invalid=refused.reason))

    async def _think(self, asked: Conversation, seed: int, sampling: Sampling, sampled: bool, scored: bool) -> _Brought:
        """One thought with its answer, and what else could have come where the answer begins.

        The probabilities there are the model's own on servers that report them so (vLLM), and those at ``sampling`` on
        others.
        """
        request = self._request(asked, seed, sampling, log_probs=self.spec.api.top_logprobs if scored else None)
        try:
            reply = await self.server.ask(request)
        except RowRefused as refused:
            score = Score(None, invalid=refused.reason) if scored else None
            return _Brought(_no_sample(refused) if sampled else None, score)
        sample = self._read(reply, sampling)
        if not scored:
            return _Brought(sample)
        kept, parted = sample if sampled else None, part(reply, self.spec.thinking)
        if not parted.closed:
            return _Brought(kept, Score(None, parted.thought, sample.invalid))
        try:
            top = first_of_answer(reply.positions or (), parted.text, self.spec.thinking)
        except Malformed as error:
            raise UserError(f"{self.server.address}: {error}; use rating.exact=false") from None
        return _Brought(kept, Score(None, parted.thought), top)

    async def _choose(self, conversation: Conversation, options: Sequence[str]) -> str:
        """What the model answers when held to the options, as far as its server can hold it."""
        request = Request(
            messages=as_dicts(conversation),
            max_tokens=CHOICE_TOKENS + self._thought_tokens,
            temperature=0.0,
            seed=row_seed(0, conversation),
            response_format=one_of(options) if self._structured else None,
            strict=False,
        )
        try:
            try:
                reply = await self.server.ask(request)
            except FormatRefused as refused:
                self._structured = False
                self._warn_once(
                    "structured output",
                    f"{self.server.address} offers no structured output ({refused}); an answer must be one of the"
                    " options as it stands",
                )
                reply = await self.server.ask(replace(request, response_format=None))
        except RowRefused:
            return ""
        return self._part(reply).text

    def _request(
        self,
        conversation: Conversation,
        seed: int,
        sampling: Sampling,
        opening: str = "",
        log_probs: int | None = None,
    ) -> Request:
        begun = (Message("assistant", opening),) if opening else ()
        return Request(
            messages=as_dicts((*conversation, *begun)),
            max_tokens=sampling.max_new_tokens + self._thought_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=row_seed(seed, conversation),
            log_probs=log_probs,
            begun=bool(opening),
        )

    def _read(self, reply: Reply, sampling: Sampling) -> Sample:
        parted = self._part(reply)
        finished = reply.finish != "length"
        shortened = not finished and reply.tokens < sampling.max_new_tokens + self._thought_tokens
        if shortened and reply.prompt_tokens + reply.tokens >= (self.server.context or NO_LIMIT):
            # vLLM shortens an answer to what its context has left. The engines on this machine do not ask then.
            return Sample(None, 0, True, parted.thought, "too_long")
        if not parted.closed:
            return Sample(None, reply.tokens, finished, parted.thought, "thought_cut_off")
        return Sample(parted.text, reply.tokens, finished, parted.thought)

    def _part(self, reply: Reply) -> Parted:
        parted = part(reply, self.spec.thinking)
        if not parted.closed and self.spec.thinking is None:
            self._warn_once(
                "thinking",
                f"{self.spec.path} thinks before it answers, and its thoughts use up the answer's tokens; set"
                " model.thinking.enabled=true, and model.thinking.max_tokens to as many as it needs",
            )
        return parted

    def _scored(self, brought: Mapping[_Place, _Brought], asks: Sequence[Ask]) -> dict[_Place, _Brought]:
        """What was brought with its scores, once the whole batch shows how the model's tokenizer begins the options.

        Raises
        ------
        UserError
            If options cannot be told apart by their first tokens.
        """
        questions = [each.question for each in asks]
        for at, question in enumerate(questions):
            tops = [each.top for place, each in brought.items() if place.at == at and each.top is not None]
            self._seen.setdefault(question, set()).update(seen_beginnings(opened(question)[1], tops))
        scored = dict(brought)
        for place, each in brought.items():
            if each.top is None or each.score is None:
                continue
            question = questions[place.at]
            try:
                masses = first_token_masses(opened(question)[1], each.top, self._seen[question])
            except SharedToken as shared:
                raise self._inseparable(shared) from None
            scored[place] = replace(each, score=replace(each.score, mass=masses))
        masses = [mass for each in scored.values() if each.score and each.score.mass for mass in each.score.mass]
        if 0.0 in masses:
            self._warn_once(
                "unlisted",
                f"{self.server.address}: {masses.count(0.0)} of {len(masses)} option probabilities are not among the"
                f" {self.spec.api.top_logprobs} likeliest tokens and count as 0; valid mass shows what is missing",
            )
        return scored

    def _inseparable(self, shared: SharedToken) -> UserError:
        options = ", ".join(repr(option) for option in shared.options)
        other = " or a server that can go on with an answer (model.api.prefill=true; vLLM can)"
        return UserError(
            f"exact ratings: {options} begin with the same token ({shared.token!r}) to {self.spec.path}, and its server"
            " shows only what comes first; use rating.exact=false, a template whose options begin differently,"
            + (other if self.spec.thinking is None else " or a model that answers at once")
        )

    def _suspect_control_text(self, conversation: Conversation) -> None:
        if control_texts(conversation):
            self._suspect.add(digest(as_dicts(conversation)))

    def _warn_of_control_text(self) -> None:
        """Say how many of a stage's conversations hold such text; all have been measured before its first batch."""
        new = len(self._suspect) - self._suspect_named
        if new:
            log.warning(
                "%d conversations hold text that looks like a control token (such as <|im_end|>); %s tokenizes, and may"
                " take it for the token",
                new,
                self.server.address,
            )
        self._suspect_named += new

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning("%s", message)


def _interrupted(error: UserError, done: Sequence[Any]) -> Interrupted:
    kept = sum(each is not None for each in done)
    return Interrupted(f"{error} ({kept} of {len(done)} rows of this batch were answered and are kept)", done)


def _no_sample(refused: RowRefused) -> Sample:
    return Sample(None, 0, True, invalid=refused.reason)


def _observations(brought: Mapping[_Place, _Brought], rows: int, asks: int) -> list[Observation]:
    samples: dict[tuple[int, int], dict[int, Sample]] = {}
    scores: dict[tuple[int, int], dict[int, Score]] = {}
    for place, each in brought.items():
        cell, seed = (place.row, place.at), place.seed or 0
        if each.sample is not None:
            samples.setdefault(cell, {})[seed] = each.sample
        if each.score is not None:
            scores.setdefault(cell, {})[seed] = each.score
    return [
        Observation(tuple(Answer(scores.get((row, at), {}), samples.get((row, at), {})) for at in range(asks)))
        for row in range(rows)
    ]


def _any(answer: Answer) -> bool:
    return bool(answer.scores or answer.samples)
