"""A small OpenAI-compatible server that does whatever a test scripts: it fails, hangs, cuts off, lies and drags."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Say:
    """What to send back: status, headers, body (JSON, or bytes as they are); late, cut off, in drips, or never."""

    body: Any = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    after_s: float = 0.0
    cut_off: bool = False
    hang: bool = False
    drip: bool = False


@dataclass(frozen=True)
class Asked:
    """One request that came in: when, what, and for the how-manieth time."""

    when: float
    body: dict[str, Any]
    attempt: int
    headers: Mapping[str, str]

    @property
    def prompt(self) -> str:
        return next(turn["content"] for turn in self.body["messages"][::-1] if turn["role"] == "user")


@dataclass
class FaultServer:
    """What came in and how much of it at once; ``answer`` decides what goes out."""

    answer: Callable[[Asked], Say]
    models: Say = field(default_factory=lambda: Say({"detail": "Not Found"}, status=404))
    port: int = 0
    asked: list[Asked] = field(default_factory=list)
    most_at_once: int = 0

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def attempts(self, prompt: str) -> list[Asked]:
        return [asked for asked in self.asked if asked.prompt == prompt]

    def prompts(self) -> list[str]:
        return [asked.prompt for asked in self.asked]


def chat(text: str | None, *, finish: str = "stop", usage: Mapping[str, Any] | None = None, **message: Any) -> dict:
    """The body of a chat completion."""
    choice = {"index": 0, "finish_reason": finish, "logprobs": message.pop("logprobs", None)}
    choice["message"] = {"role": "assistant", "content": text, **message}
    usage = usage or {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
    return {"id": "1", "object": "chat.completion", "model": "something-else", "choices": [choice], "usage": usage}


def error(message: str, status: int = 400, after_s: float = 0.0, **more: Any) -> Say:
    body = {"error": {"message": message, "type": "invalid_request_error", **more}}
    return Say(body, status=status, after_s=after_s)


def likeliest(*positions: tuple[str, Mapping[str, float]]) -> dict:
    """Log-probabilities as servers send them, from (token, probabilities of tokens) at each position."""
    return {
        "content": [
            {
                "token": token,
                "logprob": math.log(top.get(token, 1e-9)),
                "top_logprobs": [{"token": other, "logprob": math.log(p)} for other, p in top.items()],
            }
            for token, top in positions
        ]
    }


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128


@contextmanager
def serving(answer: Callable[[Asked], Say], models: Say | None = None) -> Iterator[FaultServer]:
    """A fault server on a free port of this machine."""
    state = FaultServer(answer)
    if models is not None:
        state.models = models
    lock, closing = threading.Lock(), threading.Event()
    under_way = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send(state.models)

        def do_POST(self) -> None:
            nonlocal under_way
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self.path.endswith("/v1/chat/completions"):
                self.send(Say({"detail": "Not Found"}, status=404))
                return
            with lock:
                same = [before for before in state.asked if before.body == body]
                asked = Asked(
                    time.monotonic(), body, len(same) + 1, {name.lower(): value for name, value in self.headers.items()}
                )
                state.asked.append(asked)
                under_way += 1
                state.most_at_once = max(state.most_at_once, under_way)
            try:
                say = state.answer(asked)
                closing.wait(say.after_s)
                if say.hang:
                    closing.wait(600)
            finally:
                # Before the answer is out: whoever has it may ask again at once.
                with lock:
                    under_way -= 1
            self.send(say)

        def send(self, say: Say) -> None:
            content = say.body if isinstance(say.body, bytes) else json.dumps(say.body).encode()
            try:
                self.send_response(say.status)
                for name, value in {"Content-Type": "application/json", **say.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content) + 100 * say.cut_off))
                self.end_headers()
                if say.drip:
                    for start in range(len(content)):
                        self.wfile.write(content[start : start + 1])
                        closing.wait(0.1)
                else:
                    self.wfile.write(content[: len(content) // 2] if say.cut_off else content)
            except OSError:  # whoever asked has gone
                pass
            self.close_connection = self.close_connection or say.cut_off or say.hang

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = _Server(("127.0.0.1", 0), Handler)
    state.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        closing.set()
        server.shutdown()
        server.server_close()
