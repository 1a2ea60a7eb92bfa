"""Ollama's `/api/pull`, for servers that were told to allow it; and what is refused of its ways to change models."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator
from typing import Any, ClassVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from runner.checkpoint.hub_ids import parse
from runner.errors import HubError, RunnerError
from runner.server import inert
from runner.server.errors import ApiError, invalid, ollama_form
from runner.server.inert import Table
from runner.server.model import Served
from runner.server.operations import Handler
from runner.server.serving import Serving, note_of
from runner.server.streaming import LINES, Stream, json, line, while_there

NOT_PULLED = (
    "models are given to this server when it is started, and nothing is fetched because a client says so: "
    "start it with --allow-pull to allow that"
)
NOT_DONE = "models are given to this server when it is started: its clients cannot make, copy, send or delete them"

EVERY = 0.1
"""Seconds between two lines that tell how much has come."""


class PullBody(msgspec.Struct):
    """Body of `/api/pull`."""

    model: str | None = None
    name: str | None = None
    stream: bool | None = None
    inert: ClassVar[Table] = inert.OLLAMA_PULL


class Left(RunnerError):
    """The client has left: what has come is kept for the next time."""


def forbidden(_serving: Serving) -> Handler:
    """What would change the models that are here."""

    async def answer(_request: Request) -> Response:
        raise ApiError(403, NOT_DONE)

    return answer


def pull(serving: Serving) -> Handler:
    """`POST /api/pull`: a model of the hub is fetched, and served from then on."""
    one_by_one = asyncio.Lock()

    async def answer(request: Request) -> Response:
        if serving.pull is None:
            raise ApiError(403, NOT_PULLED)
        body = await serving.read(request, PullBody)
        wanted = body.model or body.name
        if not wanted:
            raise invalid("model is missing: the hub id of what to fetch, such as org/name", "model")
        try:
            parse(wanted)
        except RunnerError as error:
            raise invalid(str(error), "model") from error
        pulling = Pulling(serving, request, wanted, one_by_one)
        if body.stream is not False:
            return Stream(pulling.lines(), LINES, ping=b"")
        return json(await while_there(request, pulling.whole()))

    return answer


class Pulling:
    """One model that is fetched for a client, until it is there or the client leaves."""

    def __init__(self, serving: Serving, request: Request, wanted: str, one_by_one: asyncio.Lock) -> None:
        self._serving = serving
        self._note = note_of(request)
        self._wanted = wanted
        self._one_by_one = one_by_one
        self._left = threading.Event()

    async def lines(self) -> AsyncGenerator[bytes, None]:
        """What a stream tells."""
        try:
            async for step in self._steps():
                yield line(step)
        except Exception as error:
            told = self._told(error)
            self._note.values["error"] = told.message
            yield line(ollama_form(told))

    async def whole(self) -> dict[str, Any]:
        """The last of it, for who waits for all."""
        last: dict[str, Any] = {}
        try:
            async for step in self._steps():
                last = step
        except Exception as error:
            raise self._told(error) from error
        return last

    def _told(self, error: Exception) -> ApiError:
        return ApiError(404, str(error)) if isinstance(error, HubError) else self._serving.told(error)

    async def _steps(self) -> AsyncGenerator[dict[str, Any], None]:
        if self._one_by_one.locked():
            yield {"status": "waiting for another model"}
        async with self._one_by_one:
            yield {"status": "pulling manifest"}
            loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, int] | None]()
            before = 0.0

            def told(done: int, total: int) -> None:
                nonlocal before
                if self._left.is_set():
                    raise Left("the client has left")
                if done == total or time.monotonic() - before > EVERY:
                    before = time.monotonic()
                    loop.call_soon_threadsafe(queue.put_nowait, (done, total))

            assert self._serving.pull is not None
            task = asyncio.ensure_future(asyncio.to_thread(self._serving.pull, self._wanted, told))

            def ended(done: asyncio.Future[Served]) -> None:
                if not done.cancelled():
                    done.exception()  # told below, or to nobody where the client has left
                queue.put_nowait(None)

            task.add_done_callback(ended)
            try:
                while (found := await queue.get()) is not None:
                    yield {"status": f"pulling {self._wanted}", "total": found[1], "completed": found[0]}
                served = task.result()
            finally:
                self._left.set()
            self._serving.models[served.name] = served
            if self._wanted not in self._serving.models:
                self._serving.aliases[self._wanted] = served.name
            yield {"status": "success"}
