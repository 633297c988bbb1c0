"""A model hub on loopback that serves data sets and models from a folder, as much of one as their libraries ask for.

Each is ``ROOT/owner/name``, with one folder a commit. ``gated`` names those that want a token; ``asked`` records
the requests.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse


@dataclass
class FakeHub:
    root: Path
    url: str = ""
    gated: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)


@contextmanager
def serve(root: Path) -> Iterator[FakeHub]:
    """Serve the data sets under a folder until left."""
    hub = FakeHub(root)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.asked.append(f"{self.command} {self.path}")
            status, content, headers = respond(hub, unquote(urlparse(self.path).path), body)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = answer

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


Response = tuple[int, bytes, dict[str, str]]


def respond(hub: FakeHub, path: str, body: bytes) -> Response:
    """Status, content and headers of the answer to a request."""
    match path.strip("/").split("/"):
        case ["files", *rest]:  # no hub at all: a file behind a URL
            file = hub.root.joinpath("files", *rest)
            return (200, file.read_bytes(), {}) if file.is_file() else (404, b"", {})
        case ["datasets", owner, name, "resolve", revision, *rest]:
            return _checked(hub, f"{owner}/{name}", revision, "resolve", rest, body)
        case ["api", "datasets", owner, name, what, revision, *rest]:
            return _checked(hub, f"{owner}/{name}", revision, what, rest, body)
        case ["api", "models", owner, name, what, revision, *rest]:
            return _checked(hub, f"{owner}/{name}", revision, what, rest, body)
        case ["api", "models" | "datasets", owner, name]:
            return _checked(hub, f"{owner}/{name}", "main", "revision", [], body)
        case ["broken"]:
            return 500, b"", {}
        case [owner, name, "resolve", revision, *rest]:
            return _checked(hub, f"{owner}/{name}", revision, "resolve", rest, body)
        case [""]:
            return 200, b"", {}
    return 404, b"", {}


def _checked(hub: FakeHub, repo: str, revision: str, what: str, rest: list[str], body: bytes) -> Response:
    commits = sorted((hub.root / repo).glob("*"))
    if not commits:
        return 401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
    if repo in hub.gated:
        return 401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}
    folder = commits[-1] if revision == "main" else hub.root / repo / revision
    if not folder.is_dir():
        return 404, b"", {"X-Error-Code": "RevisionNotFound"}
    commit = {"X-Repo-Commit": folder.name}
    path = folder.joinpath(*rest)
    if what == "resolve" and path.is_file():
        content = path.read_bytes()
        return 200, content, {**commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
    if what == "revision":
        siblings = [{"rfilename": str(file.relative_to(folder))} for file in folder.rglob("*") if file.is_file()]
        return 200, json.dumps({"id": repo, "sha": folder.name, "siblings": siblings}).encode(), {}
    if what == "tree" and path.is_dir():
        return 200, json.dumps([_entry(folder, entry) for entry in sorted(path.iterdir())]).encode(), {}
    if what == "paths-info":
        wanted = [folder / name for name in parse_qs(body.decode()).get("paths", [])]
        return 200, json.dumps([_entry(folder, entry) for entry in wanted if entry.exists()]).encode(), {}
    return 404, b"", {**commit, "X-Error-Code": "EntryNotFound"}


def _entry(folder: Path, entry: Path) -> dict[str, Any]:
    path = str(entry.relative_to(folder))
    if entry.is_dir():
        return {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
    return {"type": "file", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": entry.stat().st_size}
