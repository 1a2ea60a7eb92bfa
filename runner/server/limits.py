"""Bounds on what one client can ask of the server, and who may ask at all."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request

from runner.server.errors import ApiError
from runner.server.fields import Policy

MAX_BODY = 32 << 20
"""Bytes of a request."""
BODY_SECONDS = 60.0
"""Seconds in which a request must have arrived."""
SEND_SECONDS = 60.0
"""Seconds for which a client may leave unread what it was sent."""
PING_SECONDS = 15.0
"""Seconds of silence in a stream after which a sign of life is sent."""
HEADER_SECONDS = 15.0
"""Seconds in which the headers of a request must have arrived."""
MAX_HEADERS = 64 << 10
"""Bytes of a request's headers."""
OPEN = ("/", "/health", "/ping")
"""Paths that need no key, with the files of the page: neither they nor whether the server lives are secrets."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to serve.

    Attributes:
        host: the address to listen on.
        uds: the path of a socket to listen on instead.
        api_key: what clients must show; None: nothing.
        allow_hosts: names, besides this machine's own, that a request may be addressed to.
        allow_origins: pages that a browser may send requests from, such as `https://chat.example.org`.
        max_queue: answers that may be under way or waiting; more are refused with 429.
        unknown_fields: whether a field that is not understood is refused, or left out and told.
        on_engine_failure: what to do once everybody who waited was told.
        shutdown_timeout: seconds that running answers have to end once the server is told to.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    uds: str | None = None
    root_path: str = ""
    api_key: str | None = None
    allow_hosts: Sequence[str] = ()
    allow_origins: Sequence[str] = ()
    max_queue: int = 256
    unknown_fields: Policy = "refuse"
    shutdown_timeout: float = 30.0
    on_engine_failure: Literal["exit", "restart"] = "exit"
    log_level: Literal["error", "warning", "info", "debug"] = "info"

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.uds is not None or is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether an address, or `localhost`, is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Door:
    """Decides whether a request may come in: by the host it is addressed to, the page it comes from, and its key.

    A page of a stranger's can make a browser on this machine send requests to it (DNS rebinding): such a request names
    the stranger's host.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._hosts = {host.lower() for host in options.allow_hosts}
        self._key = options.api_key.encode() if options.api_key is not None else None

    def check(self, path: str, headers: Headers) -> None:
        """Raise `ApiError` where the request may not come in."""
        host = host_of(headers.get("host"))
        if host is None:
            raise ApiError(400, "the request has no valid Host header")
        if not self._knows(host):
            raise ApiError(
                403,
                f"the request is addressed to the host {host[:100]!r}, which this server was not told of: "
                f"start it with --allow-host {host[:100]}",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is not None and not self.allows_origin(origin, headers.get("host", "")):
            raise ApiError(
                403,
                f"requests from pages of {origin[:100]!r} are not allowed: start the server with "
                f"--allow-origin {origin[:100]}",
                code="origin_not_allowed",
            )
        if self._key is not None and path not in OPEN and not path.startswith("/page/"):
            self._check_key(headers)

    def _knows(self, host: str) -> bool:
        if host in self._hosts or host == self._options.host.lower():
            return True
        if host == "localhost" or host.endswith(".localhost"):
            return True
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        # An address instead of a name: no name was rebound.
        return address.is_loopback or not self._options.loopback

    def allows_origin(self, origin: str, host: str) -> bool:
        """Whether a page of `origin` may send requests: the server's own, and those that it was told of."""
        if origin in self._options.allow_origins:
            return True
        try:
            parts = urlsplit(origin)
        except ValueError:  # `http://[`
            return False
        return parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower()

    def granted(self, origin: str) -> bool:
        """Whether a browser is told that pages of another `origin` may read the answers."""
        return origin in self._options.allow_origins

    def _check_key(self, headers: Headers) -> None:
        assert self._key is not None
        scheme, _, token = headers.get("authorization", "").partition(" ")
        shown = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if not hmac.compare_digest(shown.encode("utf-8", "surrogateescape"), self._key):
            told = "the API key is wrong" if shown else "an API key is needed: Authorization: Bearer KEY, or x-api-key"
            raise ApiError(401, told, "authentication_error", code="invalid_api_key")


def host_of(value: str | None) -> str | None:
    """The name in a Host header, without its port; None if it is no valid one."""
    if not value or any(letter in value for letter in "/\\@?# \t"):
        return None
    try:
        parts = urlsplit(f"//{value}")
        _ = parts.port
    except ValueError:
        return None
    return (parts.hostname or "").rstrip(".") or None


async def body_of(request: Request) -> bytes:
    """The body of a request, within its bounds on size and time.

    Raises:
        ApiError: it is too large or too slow, or compressed.
        ClientDisconnect: its sender has left.
    """
    if (coding := request.headers.get("content-encoding", "identity")) != "identity":
        raise ApiError(415, f"the request is compressed ({coding[:40]!r}), which is not read here: send it plainly")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > MAX_BODY:
        raise too_large()
    pieces, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                size += len(piece)
                if size > MAX_BODY:
                    raise too_large()
                pieces.append(piece)
    except TimeoutError:
        raise ApiError(408, f"the request did not arrive within {BODY_SECONDS:.0f} seconds", code="timeout") from None
    return b"".join(pieces)


def too_large() -> ApiError:
    """A body that is larger than any is read."""
    return ApiError(413, f"the request is larger than {MAX_BODY >> 20} MiB", code="request_too_large")


class Places:
    """Counts the answers that are under way, and refuses more than there are places for."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken = 0

    def take(self, count: int) -> None:
        """Take `count` places; `ApiError` 429 where there are too few, 400 where there never will be as many."""
        if count > self.most:
            raise ApiError(400, f"the request asks for {count} answers, and --max-queue allows {self.most} at a time")
        if self.taken + count > self.most:
            raise ApiError(
                429,
                f"{self.taken} answers are under way or waiting, and --max-queue allows {self.most}: try again later",
                "rate_limit_error",
                code="queue_full",
                retry_after=1 if self.taken < 8 else 5,
            )
        self.taken += count

    def leave(self, count: int) -> None:
        """Give `count` places back."""
        self.taken -= count


__all__ = ["ClientDisconnect", "Door", "Options", "Places", "body_of", "host_of", "is_loopback"]
