"""One OpenAI-compatible server: requests with bounded concurrency and retries, and what its refusals mean.

All retrying is done here and none by the SDK, which would send a request again while the server asks for a rest, try a
spent quota, and not try again after a body that is no answer. A request is tried again after time-outs, lost
connections, rate limits, the server's own errors and bodies that are no answer, after the time that the server asks for
or an exponential back-off. What cannot be mended by waiting stops the batch: no new request is begun, those under way
are finished and kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import random
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

from openai import APIConnectionError, APIStatusError, APITimeoutError, AsyncOpenAI

from prefs.config import ApiConfig
from prefs.errors import UserError
from prefs.models.openai.refusals import Target, asked_wait, refusal_of_row, words
from prefs.models.openai.replies import Answer, Malformed, read_answer, read_listing, read_usage
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


class RowRefused(Exception):
    """The server will not answer this request, and would any other: ``reason`` is a value of `template.Invalid`."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class FormatRefused(Exception):
    """The server does not offer the ``response_format`` asked for."""


class _Again(Exception):
    """A failure that may pass. ``after``: seconds the server asks for. ``busy``: it answers, but is at its limit."""

    def __init__(
        self, kind: str, reason: str, after: float | None = None, busy: bool = False, fallback: Answer | None = None
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
        self.model, self.address = model, _without_credentials(api.base_url)
        self.listing: Mapping[str, Mapping[str, Any]] = {}
        self._target = Target(model, self.address, api.key_env)
        self._api, self._key, self._extra_body = api, key, dict(extra_body)
        # Without a key of its own the SDK would take OPENAI_API_KEY, which is not this server's to know.
        self._client = AsyncOpenAI(api_key=key or "none", base_url=api.base_url, max_retries=0, timeout=api.timeout_s)
        self._runner = asyncio.Runner()
        self._left_out: set[str] = set()
        self._noted: set[str] = set()
        self._stopping = asyncio.Event()
        self._not_before = 0.0
        self._answered = 0
        self._usage = Usage()

    @property
    def context(self) -> int | None:
        """Tokens that the model's context holds, where the server says so."""
        context = self.listing.get(self.model, {}).get("max_model_len")
        return context if isinstance(context, int) and context > 0 else None

    def usage(self) -> Usage:
        """What has been spent, with retried requests."""
        used, dollars = self._usage, self._usage.dollars
        if self._api.price_prompt is not None and self._api.price_completion is not None:
            paid = used.prompt_tokens * self._api.price_prompt + used.completion_tokens * self._api.price_completion
            dollars = paid / 1e6
        return Usage(used.requests, used.prompt_tokens, used.completion_tokens, dollars)

    def close(self) -> None:
        """Close the connections."""
        self._runner.run(self._client.close())
        self._runner.close()

    def look(self) -> None:
        """Ask which models there are; a server need not say.

        Raises
        ------
        UserError
            If nobody answers at the address.
        """
        try:
            self.listing = read_listing(json.loads(self._runner.run(self._models())))
        except (APIStatusError, TimeoutError, APITimeoutError, ValueError, RecursionError):
            return
        except APIConnectionError as error:
            raise self._target.nobody(self._reason(error)) from None
        if self.listing and self.model not in self.listing:
            listed = self._target.among(list(self.listing))
            log.warning(
                "%s does not list %s (there is %s); asking for it all the same", self.address, self.model, listed
            )

    async def _models(self) -> bytes:
        async with asyncio.timeout(self._api.timeout_s):
            return (await self._client.models.with_raw_response.list()).content

    def answers(self, jobs: Sequence[Callable[[], Awaitable[T]]]) -> Iterator[tuple[int, T]]:
        """Do jobs, at most ``api.concurrency`` at a time; each makes its requests one after another.

        Yields
        ------
        number, result
            Of each job, as soon as it is done.

        Raises
        ------
        UserError
            What stopped the others, once those under way are done.
        """
        outcomes: asyncio.Queue[tuple[int, T | Exception] | None] = asyncio.Queue()
        numbers = iter(range(len(jobs)))
        self._stopping = asyncio.Event()

        async def work() -> None:
            for number in numbers:
                try:
                    outcomes.put_nowait((number, await jobs[number]()))
                except Exception as error:
                    outcomes.put_nowait((number, error))
                    self._stopping.set()
                if self._stopping.is_set():
                    break
            outcomes.put_nowait(None)

        async def begin() -> list[asyncio.Task[None]]:
            return [asyncio.create_task(work()) for _ in range(min(self._api.concurrency, len(jobs)))]

        failure: Exception | None = None
        workers = self._runner.run(begin())
        left = len(workers)
        try:
            while left:
                outcome = self._runner.run(outcomes.get())
                if outcome is None:
                    left -= 1
                elif not isinstance(outcome[1], Exception):
                    yield outcome[0], outcome[1]
                elif failure is None and not isinstance(outcome[1], _Stopped):
                    failure = outcome[1]
        finally:
            for worker in workers:
                worker.cancel()
        if failure is not None:
            raise failure

    async def ask(self, *, strict: bool = True, **asked: Any) -> Answer:
        """One request, tried until it is answered or ``api.max_retries`` further tries have failed.

        A rate limit counts as a failure only while nothing else gets through: a server that is at its limit and works
        is waited for.

        Parameters
        ----------
        strict
            Whether temperature and top_p must be as given.
        asked
            What the SDK takes for a chat completion.

        Raises
        ------
        RowRefused
            If the server will not answer this one (too long, blocked, ended without a text).
        FormatRefused
            If it does not offer the response format.
        UserError
            If it will not answer any, or does not get well again.
        """
        failures, answered = 0, self._answered
        while True:
            await self._wait_until(self._not_before)
            try:
                answer = await self._once(asked, strict)
            except _Changed:
                continue
            except _Again as failure:
                passing = failure.busy and self._answered > answered
                failures, answered = (0 if passing else failures) + 1, self._answered
                if failures > self._api.max_retries:
                    if failure.fallback is not None:
                        return failure.fallback
                    raise self._target.gave_up(failure, failures) from None
                if failure.kind not in self._noted:  # it may come with every request
                    self._noted.add(failure.kind)
                    log.warning("%s: %s; trying again", self.address, failure)
                wait = min(FIRST_WAIT_S * 2.0 ** (failures - 1), LONGEST_BACKOFF_S) * random.uniform(0.75, 1.0)
                if failure.after is not None:  # never less than the server asks for
                    wait = failure.after + random.uniform(0.0, 0.1)
                    if failure.busy:
                        self._not_before = max(self._not_before, time.monotonic() + failure.after)
                await self._wait_until(time.monotonic() + wait)
            else:
                self._answered += 1
                return answer

    async def _once(self, asked: Mapping[str, Any], strict: bool) -> Answer:
        """Send a request once; raises what `ask` does, `_Again` and `_Changed`."""
        parameters = self._parameters(asked, strict)
        self._spend(Usage(1))
        try:
            # The SDK's time-out is for each read, so a server that drips bytes would never run into it.
            async with asyncio.timeout(self._api.timeout_s):
                body = await self._client.chat.completions.create(**parameters)
        except (TimeoutError, APITimeoutError):
            raise _Again("time-out", f"no answer within {self._api.timeout_s:g} s") from None
        except APIStatusError as error:
            raise self._meaning(error, strict, parameters) from None
        except APIConnectionError as error:
            raise _Again("connection", f"no whole answer ({self._reason(error)})") from None
        except (ValueError, RecursionError):
            raise _Again("body", "an answer that is not JSON") from None
        self._spend(read_usage(body))
        try:
            answer = read_answer(body)
        except Malformed as error:
            raise _Again("body", self._redacted(str(error)), fallback=error.fallback) from None
        if answer.finish == "blocked":
            raise RowRefused("blocked")
        if any(math.isnan(p) for position in answer.positions or () for p in position.top.values()):
            raise RowRefused("not_finite")
        if answer.finish not in (None, "stop", "length") and not answer.text.strip():
            raise RowRefused("no_answer")
        if "logprobs" in parameters and answer.positions is None:
            raise self._target.no_logprobs("it answers without them")
        if "logprobs" in parameters and not answer.positions and not answer.text:
            raise _Again("body", "log-probabilities of no token", fallback=answer)
        return answer

    def _spend(self, more: Usage) -> None:
        used = self._usage
        dollars = used.dollars if more.dollars is None else (used.dollars or 0.0) + more.dollars
        prompt, completion = used.prompt_tokens + more.prompt_tokens, used.completion_tokens + more.completion_tokens
        self._usage = Usage(used.requests + more.requests, prompt, completion, dollars)

    def _parameters(self, asked: Mapping[str, Any], strict: bool) -> dict[str, Any]:
        vllm = self.listing.get(self.model, {}).get("owned_by") == "vllm"
        body = {**(VLLM_NEUTRAL if vllm else {}), **asked.get("extra_body", {}), **self._extra_body}
        parameters = {"model": self.model, **asked, "extra_body": body}
        if "max_tokens" in self._left_out:
            parameters["max_completion_tokens"] = parameters.pop("max_tokens")
        for name in self._left_out & set(parameters):
            value = parameters.pop(name)
            if strict and value != NEUTRAL.get(name, value):
                raise self._target.only(name, value, NEUTRAL[name], "only its default")
        return parameters

    def _meaning(self, error: APIStatusError, strict: bool, parameters: Mapping[str, Any]) -> Exception:
        """What a status other than success says: try again, change the request, give the row up, or stop."""
        status, code = error.status_code, error.code or ""
        message = self._redacted(words(error.body) or error.response.reason_phrase)
        if status == 429 and code == "insufficient_quota":
            return UserError(f"{self.address} gives no more: {message}")
        if reason := refusal_of_row(status, str(code), message):
            return RowRefused(reason)
        if status in (408, 409, 429) or status >= 500:
            after = asked_wait(error.response.headers)
            if after is not None and after > LONGEST_WAIT_S:
                return self._target.long_wait(after, f"{status} {message}")
            return _Again(str(status), f"{status} {message}", after, busy=status in (429, 503, 529))
        if status in (400, 403, 404, 422) and "logprobs" in parameters and re.search("log_?prob", message, re.I):
            return self._target.no_logprobs(message)
        if status in (400, 422):
            form = r"response_format|json_schema|structured|schema"
            if "response_format" in parameters and re.search(form, message, re.I):
                return FormatRefused(message)
            if changed := self._leave_out(error.param, message, strict, parameters):
                return changed
        return self._target.refused(status, message, list(self.listing))

    def _leave_out(
        self, param: str | None, message: str, strict: bool, parameters: Mapping[str, Any]
    ) -> Exception | None:
        """Remember a parameter that this server does not take, if a refusal names one."""
        if "max_tokens" in parameters and "max_completion_tokens" in message:
            return self._leave("max_tokens", "max_completion_tokens is sent in its place", logging.INFO)
        names = [name for name in ("seed", *NEUTRAL) if name in parameters]
        names = [name for name in names if name == param or re.search(rf"\b{name}\b", message)]
        for name in names:
            if name == "seed":
                return self._leave(name, "its answers cannot be drawn again", logging.WARNING)
            if not strict or parameters[name] == NEUTRAL[name]:
                return self._leave(name, "left out", logging.INFO)
        return self._target.only(names[0], parameters[names[0]], NEUTRAL[names[0]], message) if names else None

    def _leave(self, name: str, instead: str, level: int) -> _Changed:
        if name not in self._left_out:
            self._left_out.add(name)
            log.log(level, "%s at %s takes no %s: %s", self.model, self.address, name, instead)
        return _Changed()

    async def _wait_until(self, moment: float) -> None:
        """Wait, unless the batch is stopped meanwhile."""
        while (left := moment - time.monotonic()) > 0 and not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), left)
        if self._stopping.is_set():
            raise _Stopped

    def _redacted(self, text: str) -> str:
        text = text.replace(self._key, "…") if self._key else text
        return re.sub(r"\bsk-[\w*-]+", "…", text)

    def _reason(self, error: APIConnectionError) -> str:
        cause = error.__cause__ or error
        return self._redacted(" ".join(str(cause).split()) or type(cause).__name__)


def _without_credentials(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
