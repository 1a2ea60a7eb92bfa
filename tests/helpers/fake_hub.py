"""A hub of our own: a thread with the three endpoints that a download uses."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40


@dataclass
class FakeHub:
    """A hub in a thread, with repositories by id: revision -> commit, and the files of each commit."""

    refs: dict[str, dict[str, str]] = field(default_factory=dict)
    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    token: str | None = None
    cut: int | None = None  # the next long answer ends after so many bytes
    failing: str | None = None  # a file that the server fails to give
    resumable: bool = True  # whether it answers those who ask for the rest of a file
    wrong: str | None = None  # a file of which another one comes, of the same length
    pause: float = 0  # seconds between the pieces of a long answer, after a while
    requests: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    endpoint: str = ""

    def add(self, repo: str, files: dict[str, bytes], commit: str = COMMIT, revision: str = "main") -> None:
        self.refs.setdefault(repo, {}).update({revision: commit, commit: commit})
        self.files[repo, commit] = files


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {unquote(path)}")
        parts = [unquote(part) for part in path.strip("/").split("/")]  # a revision's own slashes come escaped
        api = parts[:2] == ["api", "models"]
        org, name, kind, *rest = parts[2:] if api else parts
        repo = f"{org}/{name}"
        if repo not in self.hub.refs:
            return self.send(404, {"X-Error-Code": "RepoNotFound"}, b"", body)
        if api:
            commit = self.hub.refs[repo].get(rest[0])
            if commit is None:
                return self.send(404, {"X-Error-Code": "RevisionNotFound"}, b"", body)
            return self.send_json(self.listing(repo, commit, tree=kind == "tree"), body)
        if repo in self.hub.gated and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.send(401, {"X-Error-Code": "GatedRepo"}, b"", body)
        commit, file = self.hub.refs[repo][rest[0]], "/".join(rest[1:])
        content = self.hub.files[repo, commit].get(file)
        if content is None:
            return self.send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b"", body)
        if file == self.hub.failing and body:
            return self.send(500, {}, b"", body)
        self.send_file(content, commit, body, wrong=file == self.hub.wrong)

    def listing(self, repo: str, commit: str, tree: bool) -> Any:
        files = self.hub.files[repo, commit]
        if not tree:
            return {"id": repo, "modelId": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
        return [
            {"type": "file", "path": name, "size": len(data), "oid": git_hash(data)} for name, data in files.items()
        ]

    def send_file(self, content: bytes, commit: str, body: bool, *, wrong: bool) -> None:
        # Files of weights go by SHA-256, as on the hub; the others by git's hash.
        name = hashlib.sha256(content).hexdigest() if len(content) > 500 else git_hash(content)
        headers = {"ETag": f'"{name}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if wrong:
            content = content[:-1] + bytes([content[-1] ^ 1])
        wanted = self.headers.get("Range")
        if wanted is None:
            cut = self.hub.cut if body and len(content) > 500 else None
            self.hub.cut = None if cut else self.hub.cut
            return self.send(200, headers, content, body, cut)
        if not self.hub.resumable:
            return self.send(503, {}, b"", body)
        self.hub.ranges.append(wanted)
        start = int(wanted.removeprefix("bytes=").split("-")[0])
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send(206, headers, content[start:], body)

    def send_json(self, value: Any, body: bool) -> None:
        self.send(200, {"Content-Type": "application/json"}, json.dumps(value).encode(), body)

    def send(self, status: int, headers: dict[str, str], data: bytes, body: bool, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        for start in range(0, len(data[:cut]), 1 << 20) if body else ():
            self.wfile.write(data[start : min(start + (1 << 20), cut or len(data))])
            time.sleep(self.hub.pause if start > 11 << 20 else 0)
        if body and cut is not None:
            self.close_connection = True


def git_hash(content: bytes) -> str:
    """What git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub without repositories yet, on a port of its own."""
    state = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": state}))
    state.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield state
    server.shutdown()
    server.server_close()


def environment_of(place: Path, endpoint: str) -> dict[str, str]:
    """Variables for a process that asks this hub, with a cache below `place`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    kept = {key: value for key, value in kept.items() if not key.lower().endswith("_proxy")}
    kept |= {"HF_HOME": str(place / "hf"), "HF_ENDPOINT": endpoint, "NO_PROXY": "*", "HF_HUB_ETAG_TIMEOUT": "3"}
    return kept | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "XDG_DATA_HOME": str(place / "data")}
