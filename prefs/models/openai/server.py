"""One OpenAI-compatible server: requests with bounded concurrency and retries, and what its refusals mean.

All retrying is done here and none by the client, which would not try again after a body that is cut off or is no
answer. A request is tried again after time-outs, lost connections, rate limits, the server's own errors and bodies
that are no answer, after the time that the server asks for or an exponential back-off. What cannot be mended by
waiting stops the batch: no new request is begun, those under way are finished and kept.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from openai import APIConnectionError, APIStatusError, APITimeoutError, AsyncOpenAI

from prefs.config import ApiConfig
from prefs.errors import UserError
from prefs.models.openai.refusals import Place, asked_wait, refusal_of_row, words
from prefs.models.openai.replies import (
    Listing,
    Malformed,
    Reply,
    Spent,
    read_listing,
    read_reply,
    read_spent,
)
from prefs.models.types import Usage

log = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_WAIT_S, LONGEST_BACKOFF_S = 0.5, 30.0
# A server that asks for more patience than this is left for later.
LONGEST_WAIT_S = 600.0
# Parameters that a server may refuse, and the values that say nothing: leaving those out changes nothing. A seed may
# always be left out: draws are then independent all the same, but not repeatable.
NEUTRAL: Mapping[str, Any] = {"temperature": 1.0, "top_p": 1.0}
# vLLM takes what is not given from the model's generation_config.json (Qwen's has top_k 20), unless it is told.
VLLM_NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class Request:
    """One chat completion to ask for.

    ``log_probs`` is the number of likeliest tokens wanted at each position. ``begun``: the last message is the
    assistant's, and is gone on with. ``strict``: temperature and top_p must be as given.
    """

    messages: Sequence[Mapping[str, str]]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    log_probs: int | None = None
    begun: bool = False
    response_format: Mapping[str, Any] | None = None
    strict: bool = True


class RowRefused(Exception):
    """The server will not answer this request, and would any other: ``reason`` is a value of `templates.Invalid`."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class FormatRefused(Exception):
    """The server does not offer the ``response_format`` asked for."""


class _Again(Exception):
    """A failure that may pass. ``after``: seconds the server asks for. ``busy``: it answers, but is at its limit."""

    def __init__(
        self, kind: str, reason: str, after: float | None = None, busy: bool = False, fallback: Reply | None = None
    ):
        super().__init__(reason)
        self.kind, self.after, self.busy, self.fallback = kind, after, busy, fallback


class _Changed(Exception):
    """The server refused a parameter that can be left out; without it, the request is another."""


class _Stopped(Exception):
    """Another request of the batch has failed for good."""


class Server:
    """A server and one model on it.

    Parameters
    ----------
    model
        The model's name on the server.
    api
        Address, limits and prices.
    key
        The key; it appears in no message.
    extra_body
        Goes into every request.
    """

    def __init__(self, model: str, api: ApiConfig, key: str | None, extra_body: Mapping[str, Any]):
        self.model = model
        self.address = _without_credentials(api.base_url)
        self._place = Place(model, self.address, api.key_env)
        self.listing = Listing({}, {})
        self._api = api
        self._key = key
        self._extra_body = dict(extra_body)
        # Without a key of its own the client would take OPENAI_API_KEY, which is not this server's to know.
        self._client = AsyncOpenAI(api_key=key or "none", base_url=api.base_url, max_retries=0, timeout=api.timeout_s)
        self._left_out: set[str] = set()
        self._noted: set[str] = set()
        self._stopping = asyncio.Event()
        self._not_before = 0.0
        self._answered = 0
        self._requests = 0
        self._spent = Spent()

    @property
    def context(self) -> int | None:
        """Tokens that the model's context holds, where the server says so."""
        return self.listing.contexts.get(self.model)

    def usage(self) -> Usage:
        """What has been spent, with retried requests."""
        prompt, completion = self._spent.prompt_tokens, self._spent.completion_tokens
        dollars = self._spent.dollars
        if self._api.price_prompt is not None and self._api.price_completion is not None:
            dollars = (prompt * self._api.price_prompt + completion * self._api.price_completion) / 1e6
        return Usage(self._requests, prompt, completion, dollars)

    async def close(self) -> None:
        await self._client.close()

    async def look(self) -> None:
        """Ask which models there are; a server need not say.

        Raises
        ------
        UserError
            If nobody answers at the address.
        """
        try:
            async with asyncio.timeout(self._api.timeout_s):
                raw = await self._client.models.with_raw_response.list()
            self.listing = read_listing(json.loads(raw.content))
        except (APIStatusError, TimeoutError, APITimeoutError, ValueError, RecursionError):
            return
        except APIConnectionError as error:
            raise self._place.nobody(self._reason(error)) from None
        if self.listing.owners and self.model not in self.listing.owners:
            there = self._place.among(list(self.listing.owners))
            log.warning(
                "%s does not list %s (there is %s); asking for it all the same", self.address, self.model, there
            )

    async def answers(self, jobs: Sequence[Callable[[], Awaitable[T]]]) -> tuple[list[T | None], UserError | None]:
        """Do jobs with at most ``api.concurrency`` at a time; each makes its requests one after another.

        Returns
        -------
        results
            In the order of the jobs, None for those that were not done.
        error
            What stopped the others.
        """
        results: list[T | None] = [None] * len(jobs)
        failures: list[UserError] = []
        queue = iter(range(len(jobs)))
        self._stopping = asyncio.Event()

        async def work() -> None:
            for at in queue:
                try:
                    results[at] = await jobs[at]()
                except _Stopped:
                    return
                except UserError as error:
                    failures.append(error)
                    self._stopping.set()

        async with asyncio.TaskGroup() as workers:
            for _ in range(min(self._api.concurrency, len(jobs))):
                workers.create_task(work())
        return results, failures[0] if failures else None

    async def ask(self, request: Request) -> Reply:
        """One request, tried until it is answered or ``api.max_retries`` further tries have failed.

        A rate limit counts as a failure only while nothing else gets through: a server that is at its limit and works
        is waited for.

        Raises
        ------
        RowRefused
            If the server will not answer this one (too long, blocked).
        FormatRefused
            If it does not offer the response format.
        UserError
            If it will not answer any, or does not get well again.
        """
        failures, answered = 0, self._answered
        while True:
            await self._wait_until(self._not_before)
            try:
                reply = await self._once(request)
            except _Changed:
                continue
            except _Again as failure:
                passing = failure.busy and self._answered > answered
                failures, answered = (0 if passing else failures) + 1, self._answered
                if failures > self._api.max_retries:
                    if failure.fallback is not None:
                        return failure.fallback
                    raise self._place.gave_up(str(failure), failures) from None
                wait = self._wait_for(failure, failures)
                self._note(failure)
                log.debug(
                    "%s: %s; again in %.1f s (%d of %d)", self.address, failure, wait, failures, self._api.max_retries
                )
                if failure.busy and failure.after is not None:
                    self._not_before = max(self._not_before, time.monotonic() + failure.after)
                await self._wait_until(time.monotonic() + wait)
            else:
                self._answered += 1
                return reply

    async def _once(self, request: Request) -> Reply:
        """Send a request once.

        Raises
        ------
        _Again, _Changed, RowRefused, FormatRefused, UserError
            See `ask`.
        """
        parameters = self._parameters(request)
        self._requests += 1
        try:
            # The client's time-out is for each read, so a server that drips bytes would never run into it.
            async with asyncio.timeout(self._api.timeout_s):
                raw = await self._client.chat.completions.with_raw_response.create(**parameters)
        except (TimeoutError, APITimeoutError):
            raise _Again("time-out", f"no answer within {self._api.timeout_s:g} s") from None
        except APIStatusError as error:
            raise self._meaning(error, request, parameters) from None
        except APIConnectionError as error:
            raise _Again("connection", f"no whole answer ({self._reason(error)})") from None
        try:
            body = json.loads(raw.content)
        except (ValueError, RecursionError):
            raise _Again("body", "an answer that is not JSON") from None
        spent = read_spent(body)
        self._spent = Spent(
            self._spent.prompt_tokens + spent.prompt_tokens,
            self._spent.completion_tokens + spent.completion_tokens,
            self._spent.dollars if spent.dollars is None else (self._spent.dollars or 0.0) + spent.dollars,
        )
        try:
            reply = read_reply(body)
        except Malformed as error:
            raise _Again("body", self._redacted(str(error)), fallback=error.fallback) from None
        if reply.finish == "content_filter":
            raise RowRefused("blocked")
        if request.log_probs and reply.positions is None:
            raise self._place.no_log_probs("it answers without them")
        if request.log_probs and not reply.positions and not reply.text:
            raise _Again("body", "log-probabilities of no token", fallback=reply)
        return reply

    def _parameters(self, request: Request) -> dict[str, Any]:
        own: dict[str, Any] = {}
        if self.listing.owners.get(self.model) == "vllm":
            own |= VLLM_NEUTRAL
        if request.begun:
            own |= {"add_generation_prompt": False, "continue_final_message": True}
        parameters: dict[str, Any] = {
            "model": self.model,
            "messages": [dict(message) for message in request.messages],
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
            "logprobs": True if request.log_probs else None,
            "top_logprobs": request.log_probs,
            "response_format": request.response_format,
            "extra_body": own | self._extra_body,
        }
        if "max_tokens" in self._left_out:
            parameters["max_completion_tokens"] = parameters.pop("max_tokens")
        for name in self._left_out - {"max_tokens"}:
            value = parameters.pop(name)
            if request.strict and name in NEUTRAL and value != NEUTRAL[name]:
                raise self._place.only(name, value, NEUTRAL[name], "only its default")
        return {name: value for name, value in parameters.items() if value is not None}

    def _meaning(self, error: APIStatusError, request: Request, parameters: Mapping[str, Any]) -> Exception:
        """What a status other than success says: try again, change the request, give the row up, or stop."""
        status, body = error.status_code, error.body
        code = str(body.get("code")) if isinstance(body, dict) else None
        said = self._redacted(words(body) or error.response.reason_phrase)
        if status == 429 and code == "insufficient_quota":
            return UserError(f"{self.address} gives no more: {said}")
        if status in (408, 409, 429) or status >= 500:
            after = asked_wait(error.response.headers)
            if after is not None and after > LONGEST_WAIT_S:
                return self._place.long_wait(after, f"{status} {said}")
            return _Again(str(status), f"{status} {said}", after, busy=status in (429, 503, 529))
        reason = refusal_of_row(status, code, said)
        if reason is not None:
            return RowRefused(reason)
        if status in (400, 403, 404, 422) and request.log_probs and re.search("log_?prob", said, re.IGNORECASE):
            return self._place.no_log_probs(said)
        if status in (400, 422):
            if request.response_format is not None and re.search(
                r"response_format|json_schema|structured|schema", said, re.IGNORECASE
            ):
                return FormatRefused(said)
            changed = self._leave_out(getattr(error, "param", None), said, request, parameters)
            if changed is not None:
                return changed
        return self._place.refused(status, said, list(self.listing.owners))

    def _leave_out(
        self, param: str | None, said: str, request: Request, parameters: Mapping[str, Any]
    ) -> Exception | None:
        """Remember a parameter that this server does not take, if a refusal names one."""
        if "max_tokens" in parameters and "max_completion_tokens" in said:
            self._leave("max_tokens", "max_completion_tokens is sent in its place", logging.INFO)
            return _Changed()
        named = [
            name
            for name in ("seed", *NEUTRAL)
            if name in parameters and (name == param or re.search(rf"\b{name}\b", said))
        ]
        for name in named:
            if name == "seed":
                self._leave(name, "its answers cannot be drawn again", logging.WARNING)
                return _Changed()
            if not request.strict or parameters[name] == NEUTRAL[name]:
                self._leave(name, "left out", logging.INFO)
                return _Changed()
        return self._place.only(named[0], parameters[named[0]], NEUTRAL[named[0]], said) if named else None

    def _leave(self, name: str, instead: str, level: int) -> None:
        if name not in self._left_out:
            self._left_out.add(name)
            log.log(level, "%s at %s takes no %s: %s", self._place.model, self.address, name, instead)

    def _wait_for(self, failure: _Again, failures: int) -> float:
        """Seconds to wait: what the server asks for, and never less; or twice as long each time. Both spread a bit."""
        if failure.after is not None:
            return failure.after + random.uniform(0.0, 0.1)
        return min(FIRST_WAIT_S * 2.0 ** (failures - 1), LONGEST_BACKOFF_S) * random.uniform(0.75, 1.0)

    async def _wait_until(self, moment: float) -> None:
        """Wait, unless the batch is stopped meanwhile."""
        while (left := moment - time.monotonic()) > 0 and not self._stopping.is_set():
            try:
                async with asyncio.timeout(left):
                    await self._stopping.wait()
            except TimeoutError:
                pass
        if self._stopping.is_set():
            raise _Stopped

    def _note(self, failure: _Again) -> None:
        """Warn of a kind of trouble once; it may come with every request."""
        if failure.kind not in self._noted:
            self._noted.add(failure.kind)
            log.warning("%s: %s; trying again", self.address, failure)

    def _redacted(self, text: str) -> str:
        text = text.replace(self._key, "…") if self._key else text
        return re.sub(r"\bsk-[\w*-]+", "…", text)

    def _reason(self, error: APIConnectionError) -> str:
        cause = error.__cause__ or error
        return self._redacted(" ".join(str(cause).split()) or type(cause).__name__)


def _without_credentials(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
