"""What a server's refusals mean: its words, the rows they concern, and the one line that tells the user."""

from __future__ import annotations

import difflib
import email.utils
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prefs.errors import UserError

# Names of models shown where the one asked for is not among them.
SHOWN = 8

_WORDED = ("error", "message", "detail", "msg")


def words(body: object) -> str:
    """What a server says in an error's body, on one line."""
    while isinstance(body, dict | list) and body:
        inner = body[0] if isinstance(body, list) else next(filter(None, map(body.get, _WORDED)), None)
        if inner is None:
            break
        body = inner
    text = re.sub(r"<[^<>]+>", " ", body) if isinstance(body, str) else "" if body is None else str(body)
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:299] + "…"


_TOO_LONG = re.compile(
    r"context[ _-]?(?:length|size|window|limit)|prompt is too long|too large for model with|too many (?:input )?tokens"
    r"|input token count .* exceeds|reduce the length of|string too long|longer than the model|max_new_tokens` must be",
    re.IGNORECASE | re.DOTALL,
)
_TOO_LONG_CODES = ("context_length_exceeded", "string_above_max_length")
_BLOCKED = re.compile(
    r"content[ _]?(?:filter|management policy|policy violation)|(?:prompt|input|request|message) (?:was|has been|is) "
    r"(?:flagged|blocked)|input was flagged|requires moderation|responsible ?ai ?policy",
    re.IGNORECASE,
)
# Python's words for a NaN, which vLLM's and SGLang's servers cannot send: log-probabilities of logits that are none.
_NOT_FINITE = "Out of range float values are not JSON compliant"
_BLOCKED_CODES = ("content_filter", "content_policy_violation", "invalid_prompt")


def refusal_of_row(status: int, code: str, message: str) -> str | None:
    """The reason (a `prefs.data.template.Invalid`) for which a server refuses one request, None if it is not the row's.

    There is no one way to say that a prompt is too long, or that a filter stops it.
    """
    code = code.lower()
    if status == 413 and "rate_limit" not in code:
        return "too_long"
    if status in (400, 413, 422) and (code in _TOO_LONG_CODES or _TOO_LONG.search(message)):
        return "too_long"
    if _NOT_FINITE in message:
        return "not_finite"
    if status in (400, 403, 422) and (code in _BLOCKED_CODES or _BLOCKED.search(message)):
        return "blocked"
    return None


_ENDED = ("stop", "stop_sequence", "end_turn", "eos", "eos_token", "complete", "completed", "unspecified")
_CUT_OFF = ("length", "max_tokens", "max_output_tokens", "max_new_tokens", "max_length", "model_length", "token_limit")
_FAILED = ("error", "abort", "aborted", "cancelled", "insufficient_system_resource")
_FILTERED = re.compile(
    r"content_?filter|safety|recitation|prohibited|blocklist|spii|sensitive|refusal|guardrail|toxic|moderat|flagged"
    r"|blocked|policy|model_armor"
)


def ending(*reasons: str | None) -> str | None:
    """How an answer ended, by a server's reasons (``finish_reason``, ``native_finish_reason``): ``stop``, ``length``,
    ``blocked`` by a filter, ``error``, or what the first one says; None where none says anything.

    Providers have names of their own, in any case and with a prefix: SAFETY, FINISH_REASON_MAX_TOKENS,
    ``content_filter: PROHIBITED_CONTENT``. A filter that only the second names has stopped the answer all the same.
    """
    said = [re.sub(r"[^a-z0-9]+", "_", reason.lower()).strip("_") for reason in reasons if reason and reason.strip()]
    if any(_FILTERED.search(reason) for reason in said):
        return "blocked"
    if not said:
        return None
    name = re.sub(r"^finish_?reason_", "", said[0])
    kinds = {"stop": _ENDED, "length": _CUT_OFF, "error": _FAILED}
    return next((kind for kind, names in kinds.items() if name in names), name)


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait for: ``Retry-After-Ms``, or ``Retry-After`` in seconds or as a date."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            wait = float(headers.get(name, "")) / unit
        except ValueError:
            continue
        if math.isfinite(wait) and wait > 0:
            return wait
    try:
        wait = email.utils.parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError, OSError):
        return None
    return wait if wait > 0 else None


@dataclass(frozen=True)
class Target:
    """Which model of which server is asked, with a key from which environment variable; says what is wrong with it."""

    model: str
    address: str
    key_env: str | None

    def nobody(self, reason: str) -> UserError:
        return UserError(
            f"nobody answers at {self.address} ({reason}); is the server running, and model.api.base_url its address?"
        )

    def gave_up(self, failure: object, tries: int) -> UserError:
        counted = f"{tries} tries" if tries > 1 else "one try"
        return UserError(
            f"{self.address} did not answer after {counted} ({failure}); give the same command again: it goes on from"
            " what is stored"
        )

    def long_wait(self, seconds: float, failure: str) -> UserError:
        return UserError(
            f"{self.address} asks to wait {seconds / 60:.0f} minutes ({failure}); give the same command then: it goes"
            " on from what is stored"
        )

    def no_logprobs(self, reason: str) -> UserError:
        return UserError(
            f"{self.address} gives no log-probabilities of {self.model} ({reason}); use rating.exact=false, fewer of"
            " them (model.api.top_logprobs), or a server that gives them"
        )

    def only(self, name: str, value: object, neutral: object, reason: str) -> UserError:
        return UserError(
            f"{self.model} at {self.address} does not take {name}={value} ({reason}); set rating.{name} and"
            f" completer.{name} to {neutral}"
        )

    def refused(self, status: int, message: str, listed: Sequence[str]) -> UserError:
        """The error for a refusal of whatever is asked; `listed` are the models that the server lists, if it does."""
        if status == 401:
            # Servers repeat parts of a wrong key; none of their words are passed on.
            key = "an absent key (model.api.key_env=null)" if self.key_env is None else f"the key in {self.key_env}"
            return UserError(f"{self.address} does not accept {key} (401)")
        if listed and self.model not in listed and status in (400, 403, 404, 422):
            return UserError(
                f"model.path: {self.model!r} is not on {self.address} ({status}, {message}); there is"
                f" {self.among(listed)}"
            )
        if status == 404 and not listed and not re.search("model|endpoints found", message, re.IGNORECASE):
            return UserError(
                f"model.api.base_url: {self.address} has no chat completions (404, {message}); such an address usually"
                " ends in /v1"
            )
        key = "model.path: " if status == 404 else ""
        return UserError(f"{key}{self.address} refuses to answer as {self.model} ({status}): {message}")

    def among(self, names: Sequence[str]) -> str:
        """Some of a server's models, those first whose names are close to the one asked for."""
        folded = {name.casefold(): name for name in names}
        close = [folded[name] for name in difflib.get_close_matches(self.model.casefold(), folded, SHOWN, 0.5)]
        shown = [*close, *(name for name in names if name not in close)][:SHOWN]
        more = len(names) - len(shown)
        return ", ".join(shown) + (f" and {more} more" if more else "")
