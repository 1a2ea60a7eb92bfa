"""Responses that end when their client leaves, written piece by piece or whole."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from runner.server.limits import PING_SECONDS, SEND_SECONDS

T = TypeVar("T")

SSE = "text/event-stream; charset=utf-8"
LINES = "application/x-ndjson"


class Gone(Exception):
    """The client has left."""


def data(value: Any) -> bytes:
    """One event of a stream of server-sent events."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def event(name: str, value: Any) -> bytes:
    """One event with a name."""
    return b"event: " + name.encode() + b"\ndata: " + msgspec.json.encode(value) + b"\n\n"


def line(value: Any) -> bytes:
    """One line of JSON."""
    return msgspec.json.encode(value) + b"\n"


def json(value: Any, headers: Mapping[str, str] | None = None, status: int = 200) -> Response:
    """A whole response in JSON."""
    return Response(msgspec.json.encode(value), status, headers, "application/json")


async def while_there(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do `work` for a client that waits for all of it; `Gone` once it has left, and the work is cancelled."""
    return await _first(work, _gone(request.receive))


async def _gone(receive: Receive) -> Any:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise Gone


async def _first(
    work: Coroutine[Any, Any, T], *others: Coroutine[Any, Any, Any], cut: Callable[[], None] = lambda: None
) -> T:
    """The result of `work`, unless one of the others fails before; none of them outlives the call.

    `cut` is called where the call itself is cancelled, before they are.
    """
    main = asyncio.ensure_future(work)
    tasks: list[asyncio.Future[Any]] = [main, *map(asyncio.ensure_future, others)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if main not in done:
            for task in done:
                task.result()
        return await main
    except asyncio.CancelledError:
        cut()
        raise
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(BaseException):
                await task


class Stream(Response):
    """A response whose pieces are sent as they come, with a sign of life where none comes for long."""

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        media_type: str = SSE,
        headers: Mapping[str, str] | None = None,
        ping: bytes = b": still at it\n\n",
        done: Callable[[], None] = lambda: None,
        cut: Callable[[], None] = lambda: None,
    ) -> None:
        """Send `pieces`, and call `done` at the end, even where sending never began.

        Where the server ends, `cut` is called and `pieces` are cancelled; what they still yield then is sent.
        """
        # No proxy is to keep pieces back.
        usual = {"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})}
        super().__init__(None, 200, usual, media_type)
        del self.headers["content-length"]
        self._pieces = pieces
        self._ping = ping
        self._done = done
        self._cut = cut
        self._sent = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all, unless the client leaves."""
        try:
            with contextlib.suppress(Gone, TimeoutError):
                pinging = [self._pinging(send)] if self._ping else []
                await _first(self._write(send), _gone(receive), *pinging, cut=self._cut)
        finally:
            self._done()

    async def _write(self, send: Send) -> None:
        async with contextlib.aclosing(self._pieces):
            await self._put(send({"type": "http.response.start", "status": 200, "headers": self.raw_headers}))
            async for piece in self._pieces:
                await self._put(send({"type": "http.response.body", "body": piece, "more_body": True}))
            await self._put(send({"type": "http.response.body", "body": b"", "more_body": False}))

    async def _put(self, sending: Awaitable[None]) -> None:
        async with asyncio.timeout(SEND_SECONDS):
            await sending
        self._sent = asyncio.get_running_loop().time()

    async def _pinging(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        self._sent = loop.time()
        while True:
            quiet = loop.time() - self._sent
            if quiet >= PING_SECONDS:
                await self._put(send({"type": "http.response.body", "body": self._ping, "more_body": True}))
                quiet = 0.0
            await asyncio.sleep(PING_SECONDS - quiet)
