"""What operators ask: whether the server lives, and how it fares."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

from starlette.requests import Request
from starlette.responses import Response

from runner.server.serving import Serving
from runner.server.streaming import json

Handler = Callable[[Request], Awaitable[Response]]


def health(serving: Serving) -> Handler:
    """`GET /health`: 200 where every engine is alive and moves, else 503; no engine is waited for."""

    async def answer(_request: Request) -> Response:
        models, healthy = {}, True
        for served in serving.models.values():
            status = served.backend.status()
            healthy = healthy and status.healthy
            state = "ok" if status.healthy else "stuck" if status.alive else "dead"
            if not status.loaded:
                state = "not loaded"
            models[served.name] = {"status": state, "running": status.running, "waiting": status.waiting}
        return json({"status": "ok" if healthy else "error", "models": models}, status=200 if healthy else 503)

    return answer


def metrics(serving: Serving) -> Handler:
    """`GET /metrics`, in Prometheus's text form."""

    async def answer(_request: Request) -> Response:
        return Response(serving.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return answer


def version_of() -> str:
    """The version of this program; "0" where it was not installed."""
    try:
        return installed("mlx-runner")
    except PackageNotFoundError:
        return "0"


def version(_serving: Serving) -> Handler:
    """`GET /version`."""

    async def answer(_request: Request) -> Response:
        return json({"version": version_of()})

    return answer
