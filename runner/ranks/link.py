"""A connection between rank 0 and another rank: messages both ways, and signs of life.

A message is a line of JSON. Peers are as trusted as the addresses of the hostfile; what they send is bounded all the
same, and is data: nothing in it is executed.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

Message = dict[str, Any]

LONGEST = 1 << 20
"""Bytes of a message at most."""

BEAT = 1.0
"""Seconds between two signs of life."""

LIMIT = 8.0
"""Seconds without one after which the other end is taken for dead."""


ENDED = "the run is over"
"""Why rank 0 ends a connection when all is done."""

GONE = "its process has ended"
"""Why a connection is lost to a rank that said nothing."""


QUIET = "it has given no sign of life"
"""How the reason begins why a connection is lost to a process that is stopped."""

SILENT = 3
"""The exit code of a rank to which rank 0 has given no sign of life."""


class Lost(Exception):
    """The other end has gone, is silent, or sent something else than messages; the text says which."""


class Link:
    """One end of a connection. A thread of its own reads; another sends signs of life.

    Messages are read by `receive`. Where the connection is lost, or the other end says that it is at its end (`do` is
    `end`, and `why` says the reason), `on_lost` is called with the reason, once and on another thread than those that
    compute: they may be waiting for a peer that will never send.
    """

    def __init__(self, connection: socket.socket, on_lost: Callable[[str], None]) -> None:
        self._connection = connection
        self._on_lost = on_lost
        self._inbox: SimpleQueue[Message] = SimpleQueue()
        self._sending = threading.Lock()
        self._heard = time.monotonic()
        self._closed = False
        with contextlib.suppress(OSError):  # a socket of another kind has no such delay
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(None)

    def start(self) -> None:
        """Begin to listen, and to give signs of life."""
        for work in (self._read, self._beat):
            threading.Thread(target=work, name="runner-link", daemon=True).start()

    def send(self, **message: Any) -> None:
        """Send a message; where the other end has gone, `on_lost` says so."""
        data = json.dumps(message).encode() + b"\n"
        with self._sending, contextlib.suppress(OSError):
            self._connection.sendall(data)

    def receive(self) -> Message:
        """Wait for the next message."""
        return self._inbox.get()

    def close(self) -> None:
        """End the connection without a word to `on_lost`."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _read(self) -> None:
        try:
            with self._connection.makefile("rb") as lines:
                while True:
                    message = read_message(lines)
                    self._heard = time.monotonic()
                    if message.get("do") == "end":
                        raise Lost(str(message.get("why", ENDED)))
                    if message.get("do") != "beat":
                        self._inbox.put(message)
        except Lost as lost:
            self._lose(str(lost))
        except (ConnectionResetError, BrokenPipeError):
            self._lose(GONE)
        except (OSError, ValueError) as error:
            self._lose(f"the connection to it broke ({error})")

    def _beat(self) -> None:
        looked = time.monotonic()
        while not self._closed:
            self.send(do="beat")
            now = time.monotonic()
            # This process was stopped itself, or the machine slept: what came meanwhile has still to be read.
            if now - looked > 3 * BEAT:
                self._heard = now
            looked, silent = now, now - self._heard
            if silent > LIMIT:
                self._lose(f"{QUIET} for {silent:.0f} seconds")
                return
            time.sleep(BEAT)

    def _lose(self, reason: str) -> None:
        if not self._closed:
            self._closed = True
            self._on_lost(reason)


def read_message(lines: Any) -> Message:
    """The next message of a binary file of lines.

    Raises:
        Lost: the file has ended, or the line is too long or no object of JSON.
    """
    line = lines.readline(LONGEST)
    if not line:
        raise Lost(GONE)
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Lost(f"it sent {len(line)} bytes that are no message") from error
    if not isinstance(message, dict):
        raise Lost("it sent JSON that is no message")
    return message
