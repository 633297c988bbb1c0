"""The engine for any OpenAI-compatible server: one call a (conversation, question, seed), and one or more a score.

The server tokenizes and applies its chat template. Its seeds are hashed from the messages and the seed, since a server
that honours seeds would draw the same random numbers for every conversation. Scores are read from the likeliest tokens
where the answer begins (``top_logprobs``), as text.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from prefs.errors import ConfigError, UserError
from prefs.models.openai.keys import key_of
from prefs.models.openai.replies import Answer, Malformed, first_of_answer, part
from prefs.models.openai.server import FormatRefused, RowRefused, Server
from prefs.models.openai.text_options import (
    SharedToken,
    Top,
    chosen,
    first_token_masses,
    one_of,
    opened,
    seen_beginnings,
    spelled,
    whole_string_masses,
)
from prefs.models.sampling import row_seed
from prefs.models.thoughts import Parted, without_thought
from prefs.models.types import (
    NO_LIMIT,
    Conversation,
    Message,
    Question,
    Reply,
    Request,
    Sample,
    Sampling,
    Score,
    Usage,
    as_dicts,
)

if TYPE_CHECKING:
    from prefs.models.loading import ModelSpec

log = logging.getLogger(__name__)

# No tokenizer puts two words into one token, and few tokens are as long as this.
LONG_TOKEN = 16
# Room for a choice as JSON.
CHOICE_TOKENS = 256
# At temperature 1 and top_p 1 a server's probabilities are the model's, whether it reports them before or after it has
# applied the two (vLLM: before; OpenAI's documents do not say).
NEUTRAL = Sampling(1.0, 1.0, 1)
# <|im_end|>, <｜User｜>, <start_of_turn>, </s>, <think>, [INST], <<SYS>>: the marks of the families that are rated.
_CONTROL = re.compile(
    r"<[|｜][^\s|｜<>]{1,40}[|｜]>|</?(?:start_of_turn|end_of_turn|think|s|bos|eos)>|\[/?INST\]|<</?SYS>>"
)


def control_texts(conversation: Conversation) -> list[str]:
    """What in a conversation looks like a control token, in order. Elsewhere it stays text; a server may take it for
    the token."""
    return [match[0] for message in conversation for match in _CONTROL.finditer(message.content)]


@dataclass(frozen=True)
class _Part:
    """What one call brought to a reply. ``top``: the likeliest first tokens, from which the score is still to be made.

    ``seed`` is that of the sample and of the thought that is scored after.
    """

    seed: int
    sample: Sample | None = None
    score: Score | None = None
    top: Top | None = None
    choice: str | None = None
    invalid: str | None = None


class OpenAIEngine:
    """A model on a server. See `prefs.models.types.Engine` for the protocol."""

    rows_apart = True

    def __init__(self, server: Server, spec: ModelSpec):
        self.server = server
        self.spec = spec
        self.max_context = spec.max_context or NO_LIMIT
        self._structured = True
        self._seen: dict[Question, set[str]] = {}
        self._warned: set[str] = set()
        self._suspect: set[Conversation] = set()
        self._suspects_named = 0

    @classmethod
    def load(cls, spec: ModelSpec, folder: str | None = None) -> OpenAIEngine:
        """Look for the key and the server; a served model has no folder.

        Raises
        ------
        UserError
            If the key is missing or nobody answers at the address.
        """
        if spec.thinking is not None and spec.thinking.force_close:
            raise ConfigError("model.thinking.force_close", True, "false, since a server ends its model's thoughts")
        extra = dict(spec.api.extra_body)
        if template := spec.chat_template_kwargs:
            extra["chat_template_kwargs"] = {**extra.get("chat_template_kwargs", {}), **template}
        server = Server(spec.path, spec.api, key_of(spec.api), extra)
        try:
            server.look()
        except UserError:
            server.close()
            raise
        return cls(server, spec)

    def tokens(self, request: Request) -> int:
        conversation = request.messages or request.turns
        if control_texts(conversation):
            self._suspect.add(conversation)
        texts = [message.content for message in request.turns]
        return self._thought_tokens + sum(max(len(text.split()), len(text) // LONG_TOKEN) for text in texts)

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        for request in requests:
            self._check(request)
        self._warn_of_control_text()
        jobs = [(number, job) for number, request in enumerate(requests) for job in self._jobs(request)]
        left = Counter(number for number, _ in jobs)
        parts: dict[int, list[_Part]] = {}
        replies: list[Reply] = []
        stopped: UserError | None = None
        try:
            for job, result in self.server.answers([job for _, job in jobs]):
                number, _ = jobs[job]
                parts.setdefault(number, []).append(result)
                left[number] -= 1
                if not left[number] and not any(one.top is not None for one in parts[number]):
                    replies.append(_reply(parts.pop(number)))
                    yield number, replies[-1]
        except UserError as error:
            stopped = error
        # Only the whole batch shows how the model's tokenizer begins the options. A row half answered keeps its half.
        try:
            parts = self._scored(requests, parts)
        except UserError as unscored:
            stopped = stopped or unscored
            parts = {number: [replace(one, score=None, top=None) for one in parts[number]] for number in parts}
        for number in sorted(parts):
            if any(one.sample or one.score for one in parts[number]):
                replies.append(_reply(parts[number]))
                yield number, replies[-1]
        self._warn_of_unlisted([p for reply in replies for score in reply.scores.values() for p in score.mass or ()])
        if stopped is not None:
            kept = f"{len(replies)} of {len(requests)} rows of this batch were answered and are kept"
            raise UserError(f"{stopped} ({kept})")

    def usage(self) -> Usage:
        return self.server.usage()

    def close(self) -> None:
        self.server.close()

    @property
    def _thought_tokens(self) -> int:
        return 0 if self.spec.thinking is None else self.spec.thinking.max_tokens

    def _check(self, request: Request) -> None:
        """Refuse what this server cannot be asked."""
        prefill = "" if request.question is None else request.question.prefill
        if request.capture is not None:
            raise ConfigError("capture", "residuals of a served model", "capture=none probe=none, or another backend")
        if prefill and self.spec.thinking is not None:
            raise ConfigError("template.prefill", prefill, "'' for a model that thinks on a server before it answers")
        if prefill and not self.spec.api.prefill:
            raise ConfigError(
                "template.prefill", prefill, "'' unless the server can go on with an answer (model.api.prefill=true)"
            )
        if request.scores and not self.spec.api.top_logprobs:
            raise ConfigError("model.api.top_logprobs", 0, "1 or more for exact ratings, or rating.exact=false")

    def _jobs(self, request: Request) -> list[Callable[[], Awaitable[_Part]]]:
        """What to do for one request."""
        if request.choose:
            return [partial(self._choose, request)]
        if self.spec.thinking is not None:
            # The answer of a seed and the score after its thought are read from the same reply.
            return [partial(self._sample, request, seed) for seed in dict.fromkeys((*request.scores, *request.seeds))]
        score = [partial(self._score, request)] if request.scores else []
        return [*score, *(partial(self._sample, request, seed) for seed in request.seeds)]

    async def _sample(self, request: Request, seed: int) -> _Part:
        """One answer; of a model that thinks, with what else could have come where it begins.

        The probabilities there are the model's own on servers that report them so (vLLM), and those at the request's
        sampling on others.
        """
        assert request.sampling is not None
        scored = self.spec.thinking is not None and seed in request.scores
        opening = "" if request.question is None else opened(request.question)[0]
        top_logprobs = self.spec.api.top_logprobs if scored else None
        try:
            answer = await self._ask(request, seed, request.sampling, opening, top_logprobs)
        except RowRefused as refused:
            sample = Sample(None, 0, True, invalid=refused.reason)
            score = Score(None, invalid=refused.reason) if scored else None
            return _Part(seed, sample if seed in request.seeds else None, score)
        sample, parted = self._read(answer, request.sampling), part(answer, self.spec.thinking)
        kept = sample if seed in request.seeds else None
        if not scored:
            return _Part(seed, kept)
        if not parted.closed:
            return _Part(seed, kept, Score(None, parted.thought, sample.invalid))
        try:
            top = first_of_answer(answer.positions or (), parted.text, self.spec.thinking)
        except Malformed as error:
            raise UserError(f"{self.server.address}: {error}; use rating.exact=false") from None
        return _Part(seed, kept, Score(None, parted.thought), top)

    async def _score(self, request: Request) -> _Part:
        """The score of a model that answers at once."""
        assert request.question is not None
        (seed, *_), opening = request.scores, opened(request.question)[0]

        async def likeliest(beginning: str) -> Top:
            answer = await self._ask(request, 0, NEUTRAL, opening + beginning, self.spec.api.top_logprobs)
            return answer.positions[0].top if answer.positions else {}

        try:
            if self.spec.api.prefill:
                return _Part(seed, score=Score(await whole_string_masses(spelled(request.question), likeliest)))
            return _Part(seed, score=Score(None), top=await likeliest(""))
        except RowRefused as refused:
            return _Part(seed, score=Score(None, invalid=refused.reason))

    async def _choose(self, request: Request) -> _Part:
        """What the model answers when held to the options, as far as its server can hold it."""
        assert request.question is not None
        options = request.question.options
        asked: dict[str, Any] = {
            "messages": as_dicts(request.turns),
            "max_tokens": CHOICE_TOKENS + self._thought_tokens,
            "temperature": 0.0,
            "top_p": 1.0,
            "seed": row_seed(0, request.turns),
        }
        form = {"response_format": one_of(options)} if self._structured else {}
        try:
            try:
                answer = await self.server.ask(strict=False, **asked, **form)
            except FormatRefused as refused:
                self._structured = False
                self._warn_once(
                    "structured output",
                    f"{self.server.address} offers no structured output ({refused}); an answer must be one of the"
                    " options as it stands",
                )
                answer = await self.server.ask(strict=False, **asked)
        except RowRefused as refused:
            return _Part(0, invalid=refused.reason)
        return _Part(0, choice=chosen(without_thought(self._part(answer).text).text, options))

    async def _ask(
        self, request: Request, seed: int, sampling: Sampling, opening: str, top_logprobs: int | None
    ) -> Answer:
        messages: Conversation = request.turns
        asked: dict[str, Any] = {}
        if opening:
            messages = (*messages, Message("assistant", opening))
            asked = {"extra_body": {"add_generation_prompt": False, "continue_final_message": True}}
        if top_logprobs:
            asked |= {"logprobs": True, "top_logprobs": top_logprobs}
        return await self.server.ask(
            messages=as_dicts(messages),
            max_tokens=sampling.max_new_tokens + self._thought_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=row_seed(seed, request.turns),
            **asked,
        )

    def _read(self, answer: Answer, sampling: Sampling) -> Sample:
        parted = self._part(answer)
        finished = answer.finish != "length"
        shortened = not finished and answer.tokens < sampling.max_new_tokens + self._thought_tokens
        if shortened and answer.prompt_tokens + answer.tokens >= (self.server.context or NO_LIMIT):
            # vLLM shortens an answer to what its context has left. The engines on this machine do not ask then.
            return Sample(None, 0, True, parted.thought, "too_long")
        if not parted.closed:
            return Sample(None, answer.tokens, finished, parted.thought, "thought_cut_off")
        return Sample(parted.text, answer.tokens, finished, parted.thought)

    def _part(self, answer: Answer) -> Parted:
        parted = part(answer, self.spec.thinking)
        if not parted.closed and self.spec.thinking is None:
            self._warn_once(
                "thinking",
                f"{self.spec.path} thinks before it answers, and its thoughts use up the answer's tokens; set"
                " model.thinking.enabled=true, and model.thinking.max_tokens to as many as it needs",
            )
        return parted

    def _scored(self, requests: Sequence[Request], parts: Mapping[int, list[_Part]]) -> dict[int, list[_Part]]:
        """The parts with their scores.

        Raises
        ------
        UserError
            If options cannot be told apart by their first tokens.
        """
        questions = {number: requests[number].question for number in parts}
        for number, question in questions.items():
            if question is not None:
                tops = [one.top for one in parts[number] if one.top is not None]
                self._seen.setdefault(question, set()).update(seen_beginnings(opened(question)[1], tops))

        def scored(number: int, one: _Part) -> _Part:
            question = questions[number]
            if question is None or one.top is None or one.score is None:
                return one
            masses = first_token_masses(opened(question)[1], one.top, self._seen[question], spelled(question))
            return replace(one, score=replace(one.score, mass=masses))

        try:
            return {number: [scored(number, one) for one in brought] for number, brought in parts.items()}
        except SharedToken as shared:
            raise self._inseparable(shared) from None

    def _inseparable(self, shared: SharedToken) -> UserError:
        options = ", ".join(repr(option) for option in shared.options)
        other = " or a server that can go on with an answer (model.api.prefill=true; vLLM can)"
        return UserError(
            f"exact ratings: {options} begin with the same token ({shared.token!r}) to {self.spec.path}, and its server"
            " shows only what comes first; use rating.exact=false, a template whose options begin differently,"
            + (other if self.spec.thinking is None else " or a model that answers at once")
        )

    def _warn_of_unlisted(self, masses: Sequence[float]) -> None:
        if 0.0 in masses:
            self._warn_once(
                "unlisted",
                f"{self.server.address}: {masses.count(0.0)} of {len(masses)} option probabilities are not among the"
                f" {self.spec.api.top_logprobs} likeliest tokens and count as 0; valid mass shows what is missing",
            )

    def _warn_of_control_text(self) -> None:
        """Say how many of a stage's conversations hold such text; all have been measured before its first batch."""
        new = len(self._suspect) - self._suspects_named
        if new:
            log.warning(
                "%d conversations hold text that looks like a control token (such as <|im_end|>); %s tokenizes, and may"
                " take it for the token",
                new,
                self.server.address,
            )
        self._suspects_named += new

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning("%s", message)


def _reply(parts: Sequence[_Part]) -> Reply:
    parts = sorted(parts, key=lambda one: one.seed)
    return Reply(
        samples={one.seed: one.sample for one in parts if one.sample is not None},
        scores={one.seed: one.score for one in parts if one.score is not None},
        choice=next((one.choice for one in parts), None),
        invalid=next((one.invalid for one in parts), None),
    )
