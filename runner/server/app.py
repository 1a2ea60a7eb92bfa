"""The application: routes of all APIs, the door in front of them, and errors in the form of the API they belong to."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send

from runner.server import (
    anthropic,
    ollama,
    ollama_models,
    ollama_pull,
    openai_chat,
    openai_completions,
    openai_models,
    openai_responses,
    operations,
    page_files,
)
from runner.server.errors import ApiError, ending, form_for
from runner.server.limits import MAX_HEADERS, ClientDisconnect, Door
from runner.server.log import say
from runner.server.operations import Handler
from runner.server.serving import Note, Serving
from runner.server.streaming import Gone, json


def routes(serving: Serving) -> list[Route]:
    """Every path, and what answers there."""

    def get(path: str, handler: Handler) -> Route:
        return Route(path, handler, methods=["GET"])

    def post(path: str, handler: Handler) -> Route:
        return Route(path, handler, methods=["POST"])

    return [
        get("/health", operations.health(serving)),
        get("/ping", operations.health(serving)),
        get("/metrics", operations.metrics(serving)),
        get("/version", operations.version(serving)),
        get("/v1/models", openai_models.models(serving)),
        get("/v1/models/{id:path}", openai_models.model(serving)),
        post("/v1/chat/completions", openai_chat.chat(serving)),
        post("/v1/chat/completions/render", openai_chat.render(serving)),
        post("/v1/responses", openai_responses.responses(serving)),
        post("/v1/messages", anthropic.messages(serving)),
        post("/v1/messages/count_tokens", anthropic.count_tokens(serving)),
        get("/", page_files.root(serving)),
        get("/page/{name}", page_files.asset(serving)),
        post("/api/chat", ollama.chat(serving)),
        post("/api/generate", ollama.generate(serving)),
        get("/api/tags", ollama_models.tags(serving)),
        get("/api/ps", ollama_models.ps(serving)),
        post("/api/show", ollama_models.show(serving)),
        get("/api/version", ollama_models.version(serving)),
        post("/api/embed", ollama_models.embeddings(serving)),
        post("/api/embeddings", ollama_models.embeddings(serving)),
        post("/api/pull", ollama_pull.pull(serving)),
        post("/api/push", ollama_pull.forbidden(serving)),
        post("/api/create", ollama_pull.forbidden(serving)),
        post("/api/copy", ollama_pull.forbidden(serving)),
        Route("/api/delete", ollama_pull.forbidden(serving), methods=["DELETE"]),
        post("/v1/completions", openai_completions.completions(serving)),
        post("/v1/embeddings", openai_models.embeddings(serving)),
        post("/tokenize", openai_models.tokenize(serving)),
        post("/detokenize", openai_models.detokenize(serving)),
    ]


class App:
    """The ASGI application of one server."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving
        self._door = Door(serving.options)
        self._router = Router(routes(serving), redirect_slashes=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, and log it."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError("only HTTP is spoken here")
        headers = Headers(scope=scope)
        note = Note(secrets.token_hex(8))
        scope["runner.note"] = note
        started = time.perf_counter()
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._finish_headers(MutableHeaders(raw=message["headers"]), note, headers)
            await send(message)

        scope["path"] = path = self._path(scope)
        try:
            try:
                if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADERS:
                    raise ApiError(431, f"the headers are longer than {MAX_HEADERS} bytes")
                # Two lengths of one body: a proxy may go by the other one.
                if "transfer-encoding" in headers and "content-length" in headers:
                    raise ApiError(400, "the request has both Content-Length and Transfer-Encoding")
                response = self._preflight(scope, headers)
                if response is None:
                    self._door.check(path, headers)
                    await self._routed(scope, receive, sending)
                else:
                    await response(scope, receive, sending)
            except (Gone, ClientDisconnect):
                status = status or 499
            except asyncio.CancelledError:  # the server ends, and has waited for as long as it may
                told = ending()
                note.values["error"] = told.message
                if not status:  # a stream has said so itself
                    await self._refusal(path, told)(scope, receive, sending)
            except Exception as error:
                told = self.serving.told(error)
                note.values["error"] = told.message
                if status:
                    raise
                await self._refusal(path, told)(scope, receive, sending)
        finally:
            self._log(scope, note, status, time.perf_counter() - started)

    def _path(self, scope: Scope) -> str:
        """The path below the root path, which a proxy may or may not have taken off."""
        path: str = scope["path"]
        root = self.serving.options.root_path
        return path.removeprefix(root) or "/" if root and path.startswith(root + "/") else path

    async def _routed(self, scope: Scope, receive: Receive, send: Send) -> None:
        for route, values in self._at(scope["path"]):
            if scope["method"] in (route.methods or ()):
                scope["path_params"] = values
                response = await route.endpoint(Request(scope, receive))
                await response(scope, receive, send)
                return
        if methods := self._methods(scope["path"]):
            message = f"{scope['path'][:200]} takes {' and '.join(methods)}, not {scope['method']}"
            raise ApiError(405, message, methods=methods)
        raise ApiError(404, f"there is nothing at {scope['path'][:200]!r}", code="not_found")

    def _at(self, path: str) -> Iterator[tuple[Route, dict[str, str]]]:
        """The routes of a path, each with the values of the path's variables."""
        for route in self._router.routes:
            assert isinstance(route, Route)
            if found := route.path_regex.match(path):
                yield route, found.groupdict()

    def _methods(self, path: str) -> tuple[str, ...]:
        """The methods that a path takes, in the alphabet's order."""
        return tuple(sorted({method for route, _ in self._at(path) for method in route.methods or ()}))

    def _preflight(self, scope: Scope, headers: Headers) -> Response | None:
        """The answer to a browser that asks whether a page of another origin may send a request; None for others."""
        asked = headers.get("access-control-request-method")
        if scope["method"] != "OPTIONS" or asked is None:
            return None
        if not self._door.granted(headers.get("origin", "")):
            raise ApiError(403, "requests from pages of this origin are not allowed", code="origin_not_allowed")
        allowed = {
            "access-control-allow-methods": ", ".join(self._methods(scope["path"])) or "GET, POST",
            "access-control-allow-headers": headers.get("access-control-request-headers", "*"),
            "access-control-max-age": "600",
        }
        return Response(None, 204, allowed)

    def _finish_headers(self, given: MutableHeaders, note: Note, headers: Headers) -> None:
        given["x-request-id"] = given["request-id"] = note.request_id
        if note.ignored:
            names = ", ".join(dict.fromkeys(note.ignored))
            shown = "".join(each if each.isprintable() else " " for each in names[:1000])
            given["x-runner-ignored"] = shown.encode("ascii", "replace").decode()
        origin = headers.get("origin")
        if origin is not None and self._door.granted(origin):
            given["access-control-allow-origin"] = origin
            given["access-control-expose-headers"] = "x-request-id, x-runner-ignored"
            given["vary"] = "origin"

    @staticmethod
    def _refusal(path: str, error: ApiError) -> Response:
        headers = error.headers
        if error.status == 401:
            headers["www-authenticate"] = "Bearer"
        if error.status in (400, 408, 413, 415, 431):  # what is left of the body is not read
            headers["connection"] = "close"
        return json(form_for(path, error), headers, error.status)

    def _log(self, scope: Scope, note: Note, status: int, seconds: float) -> None:
        line: dict[str, Any] = {
            "request_id": note.request_id,
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": status,
            "seconds": round(seconds, 4),
            **note.values,
        }
        if note.ignored:
            line["ignored"] = note.ignored
        quiet = scope["path"] in ("/health", "/ping", "/metrics")
        level = logging.DEBUG if quiet else logging.INFO if status < 500 else logging.ERROR
        say(level, **line)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return


def paths(serving: Serving) -> Sequence[str]:
    """Every path that is answered, for documentation."""
    return [route.path for route in routes(serving)]
