"""The page at `/`: files of this package alone, under a policy that lets nothing else in."""

from __future__ import annotations

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from runner.server.errors import ApiError
from runner.server.operations import Handler
from runner.server.serving import Serving

TYPES = {
    "index.html": "text/html",
    "page.css": "text/css",
    "page.js": "text/javascript",
    "markdown.js": "text/javascript",
}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


def _file(name: str) -> Response:
    data = (files("runner.server") / "page" / name).read_bytes()
    return Response(data, 200, HEADERS, f"{TYPES[name]}; charset=utf-8")


def root(_serving: Serving) -> Handler:
    """`GET /`: the page for browsers; Ollama's clients find out by the text whether a server of theirs is there."""

    async def answer(request: Request) -> Response:
        if "text/html" in request.headers.get("accept", ""):
            return _file("index.html")
        return PlainTextResponse("Ollama is running")

    return answer


def asset(_serving: Serving) -> Handler:
    """`GET /page/{name}`: what the page is made of."""

    async def answer(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in TYPES or name == "index.html":
            raise ApiError(404, f"there is nothing at /page/{name[:100]}", code="not_found")
        return _file(name)

    return answer
