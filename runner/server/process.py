"""The server as a process: sockets, signals, and a protocol that bounds slow and broken senders."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from types import FrameType
from typing import Any

import h11
import msgspec
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from runner.errors import UsageError
from runner.server.app import App
from runner.server.errors import ApiError, openai_form
from runner.server.limits import HEADER_SECONDS, MAX_HEADERS, Options
from runner.server.log import say
from runner.server.model import Served
from runner.server.serving import Serving

TELL_SECONDS = 2.0
"""Seconds in which clients are told that their answers will not end."""


STALL_SECONDS = 65.0
"""Seconds after which a client that reads nothing of what it was sent is left; a stream's next piece waits for less."""


class Protocol(H11Protocol):
    """uvicorn's, with limits on the time that headers take, and reading, and errors in the APIs' form."""

    _timer: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None
    _unread = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended."""
        super().connection_lost(exc)
        self._unwatch()
        self._flows()

    def pause_writing(self) -> None:
        """There is much that the client has not read."""
        super().pause_writing()
        self._unread = self.transport.get_write_buffer_size()
        self._stall = self._stall or self.loop.call_later(STALL_SECONDS, self._stalled)

    def resume_writing(self) -> None:
        """It has read most of that."""
        super().resume_writing()
        self._flows()

    def _flows(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _stalled(self) -> None:
        """Leave a client that has read nothing: to close would wait until it has read all."""
        self._stall, before = None, self._unread
        self._unread = self.transport.get_write_buffer_size()
        if self._unread < before:
            self._stall = self.loop.call_later(STALL_SECONDS, self._stalled)
        else:
            self.transport.abort()

    def _watch(self) -> None:
        """Bound the time from a request's first byte, or the connection, to the end of its headers."""
        fresh = self.cycle is None or bool(self.conn.trailing_data[0])
        if self.conn.their_state is h11.IDLE and fresh:
            if self._timer is None:
                self._timer = self.loop.call_later(HEADER_SECONDS, self._late)
        else:
            self._unwatch()

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._refuse(ApiError(408, f"the headers did not arrive within {HEADER_SECONDS:.0f} seconds"))

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        self._refuse(ApiError(400, "the request is not valid HTTP"))

    def _refuse(self, error: ApiError) -> None:
        body = msgspec.json.encode(openai_form(error))
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        headers.append((b"content-length", str(len(body)).encode()))
        with contextlib.suppress(h11.LocalProtocolError):
            reason = b"Bad Request" if error.status == 400 else b"Request Timeout"
            for event in (
                h11.Response(status_code=error.status, headers=headers, reason=reason),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's, but a server that is told to end by a signal has not failed; and it says when it listens."""

    def __init__(self, config: uvicorn.Config, started: Callable[[Callable[[], None]], None]) -> None:
        super().__init__(config)
        self._started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        loop = asyncio.get_running_loop()

        def end() -> None:
            loop.call_soon_threadsafe(self.handle_exit, signal.SIGTERM, None)

        self._started(end)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let answers end that are under way, for as long as they may, and tell the others that they do not."""
        await super().shutdown(sockets)
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=TELL_SECONDS)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Let the loop hand over SIGTERM and Ctrl-C; a second one ends answers that are under way."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        # Where SIGTERM is somebody's already, it stays theirs: rank 0 of several processes has more to say of it.
        theirs = signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        numbers = [signal.SIGINT] if theirs else [signal.SIGTERM, signal.SIGINT]
        for number in numbers:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take no more work."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True


def listening(options: Options) -> socket.socket:
    """The socket to listen on.

    Raises:
        UsageError: the address cannot be had.
    """
    if options.uds is not None:
        path = Path(options.uds)
        if path.is_socket():
            with contextlib.closing(socket.socket(socket.AF_UNIX)) as probe, contextlib.suppress(OSError):
                probe.connect(str(path))
                raise UsageError(f"--uds {path}: another server listens there")
            path.unlink()
        try:
            made = socket.socket(socket.AF_UNIX)
            made.bind(str(path))
            path.chmod(0o600)
        except OSError as error:
            raise UsageError(f"--uds {path}: {error.strerror or error}") from error
        return made
    try:
        family, kind, number, _name, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, number)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        raise UsageError(f"cannot listen on {options.host}:{options.port}: {error.strerror or error}") from error
    return made


def serve_on(made: socket.socket, serving: Serving, started: Callable[[str, Callable[[], None]], None]) -> int:
    """Serve until SIGTERM or Ctrl-C, or until an engine fails for good; returns the exit code.

    Args:
        made: a socket of `listening`.
        started: called once the server listens, with its address and what ends it, from any thread.
    """
    options = serving.options
    config = uvicorn.Config(
        App(serving),
        http=Protocol,
        ws="none",
        loop="auto",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=MAX_HEADERS,
        # asyncio.wait_for gets it as it is: parts of a second are fine.
        timeout_graceful_shutdown=options.shutdown_timeout,  # type: ignore[arg-type]
        timeout_keep_alive=75,
    )
    server = Server(config, lambda end: started(address_of(made, options), end))

    failures: list[str] = []

    def failed(served: Served) -> None:
        if failures and options.on_engine_failure == "exit":
            return
        failures.append(served.name)
        say(logging.ERROR, event="engine failed", model=served.name, then=options.on_engine_failure)
        if options.on_engine_failure == "restart":
            served.backend.restart()
        else:  # a supervisor starts the process anew; those who wait are told first
            server.handle_exit(signal.SIGTERM, None)

    serving.on_failure = failed
    try:
        asyncio.run(server.serve(sockets=[made]))
        return 1 if failures and options.on_engine_failure == "exit" else 0
    finally:
        for served in serving.models.values():
            served.backend.close()
        if options.uds is not None:
            Path(options.uds).unlink(missing_ok=True)


def address_of(made: socket.socket, options: Options) -> str:
    """The address for people and clients; port 0 has become a real one."""
    if options.uds is not None:
        return f"unix:{options.uds}"
    name: Any = made.getsockname()
    host = f"[{name[0]}]" if ":" in name[0] else name[0]
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else '[::1]' if host == '[::]' else host}:{name[1]}"
