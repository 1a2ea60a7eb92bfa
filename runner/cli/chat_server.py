"""`runner chat --url`: a model behind a server that speaks OpenAI's API."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import urlsplit

from runner.answer import Chunk, Timings
from runner.cli import terminal
from runner.cli.conversation import Message
from runner.errors import BackendError, UsageError

SECONDS = 600.0
"""Seconds without a sign of life from the server after which an answer is given up."""

LONGEST = 16 << 20
"""Bytes of a line or a whole answer of the server's."""

FIELDS = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
    "max_tokens", "stop",
)  # fmt: skip
"""Settings that go into a request, under the same names."""

UNTOLD = "the server's own"


class ServerModel:
    """A model behind a server; each request holds the whole conversation."""

    def __init__(self, url: str, key: str | None, model: str | None = None) -> None:
        """Ask the server what models it has, and take the first where none is named.

        Raises:
            UsageError: the address is none, the server cannot be reached, or has no such model.
        """
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"--url must be an address such as http://127.0.0.1:8080, not {url!r}")
        self._parts = parts
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        self._key = key
        self.url = url
        self.models = self._listed()
        if model is not None and model not in self.models:
            raise UsageError(f"{url} has no model {model!r}: there is {', '.join(self.models)}")
        self.name = model or self.models[0]

    @property
    def reasoning_key(self) -> str | None:
        """The server's template decides what becomes of it."""
        return "reasoning_content"

    @property
    def template(self) -> str:
        """Only the server knows it."""
        return "(the server has it)"

    def variables(self, given: Mapping[str, Any], thinking: str | None) -> dict[str, Any]:
        """Variables for the template, which the server checks; reasoning is turned off by a field of its own."""
        return {**given, **({"reasoning_effort": "none"} if thinking == "off" else {})}

    def checked_system(self, text: str, variables: Mapping[str, Any], name: str) -> str:
        """A system message, which the server checks."""
        return terminal.checked_utf8(text, name)

    def keywords(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
        """What is asked for; the rest is as the server has it.

        Raises:
            UsageError: OpenAI's API has no such setting.
        """
        from runner.engine.sampling import SamplingParams

        usual = vars(SamplingParams())
        for name, value in given.items():
            if name not in FIELDS and value != usual.get(name):
                raise UsageError(f"a server is not asked for {name}: OpenAI's API has no such field")
        return {name: value for name, value in given.items() if name in FIELDS}, None

    def shown(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What is asked for."""
        from runner.engine.sampling import SamplingParams

        return {**dict.fromkeys([*vars(SamplingParams()), "max_tokens"], UNTOLD), "stop": (), **given}

    def length_note(self, last: Chunk, max_tokens: int | None) -> str:
        """What ended the answer."""
        return "--max-tokens reached" if max_tokens is not None else "the server's limit, or its context, is reached"

    def info(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> dict[str, str]:
        """Where it is."""
        return {"model": self.name, "server": self.url, "messages": str(len(messages))}

    def stream(
        self,
        messages: Sequence[Message],
        keywords: Mapping[str, Any],
        variables: Mapping[str, Any],
        on_prefill: Callable[[int, int], None],
        cancelled: Callable[[], bool],
    ) -> Iterator[Chunk]:
        """The answer as it comes.

        Raises:
            UsageError: the server refuses the request.
            BackendError: it fails, or the connection ends before the answer does.
        """
        more = dict(variables)
        effort = {"reasoning_effort": more.pop("reasoning_effort")} if "reasoning_effort" in more else {}
        body = {
            "model": self.name,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"chat_template_kwargs": more} if more else {}),
            **effort,
            **{name: value for name, value in keywords.items() if value is not None},
        }
        began = time.perf_counter()
        connection = self._connection()
        try:
            connection.connect()
            sock = connection.sock
        except OSError as error:
            raise BackendError(f"{self.url} cannot be reached: {error}") from error
        try:
            response = self._sent(connection, "POST", "/v1/chat/completions", body)
            yield from self._chunks(_lines(response, cancelled), began)
        finally:
            with contextlib.suppress(OSError):  # what waits for more on the other thread ends, and lets go of it
                sock.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _chunks(self, lines: Iterator[bytes | None], began: float) -> Iterator[Chunk]:
        """The chunks of an answer's lines; None among them: it was broken off."""
        first, finish = 0.0, ""
        usage: dict[str, Any] = {}
        for line in lines:
            if line is None:
                finish = "cancelled"
                break
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                break
            event = _json(data)
            if "error" in event:
                raise BackendError(f"{self.url}: {_message(event)}")
            usage = event.get("usage") or usage
            for choice in event.get("choices") or ():
                delta = choice.get("delta") or {}
                text = delta.get("content") or ""
                reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
                if text or reasoning:
                    first = first or time.perf_counter()
                    yield Chunk(text, -1, reasoning=reasoning)
                finish = choice.get("finish_reason") or finish
        if not finish:
            raise BackendError(f"{self.url}: the connection ended before the answer did")
        yield Chunk("", -1, finish_reason=finish, timings=_timings(usage, began, first or time.perf_counter()))

    def _listed(self) -> list[str]:
        connection = self._connection()
        try:
            found = _json(self._sent(connection, "GET", "/v1/models").read(LONGEST))
        except (OSError, http.client.HTTPException) as error:
            raise UsageError(f"{self.url} cannot be reached: {error}") from error
        finally:
            connection.close()
        data = found.get("data")
        names = [each.get("id") for each in data if isinstance(each, dict)] if isinstance(data, list) else []
        if not names or not all(isinstance(name, str) for name in names):
            raise UsageError(f"{self.url} lists no models: is it a server that speaks OpenAI's API?")
        return [str(name) for name in names]

    def _connection(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        return kind(str(self._parts.hostname), self._parts.port, timeout=SECONDS)

    def _sent(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: Any = None
    ) -> http.client.HTTPResponse:
        """The answer to a request, whose body is still to be read; raises UsageError and BackendError."""
        headers = {"content-type": "application/json"}
        if self._key is not None:
            headers["authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            connection.request(method, f"{self._base}{path}", data, headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise BackendError(f"{self.url} cannot be reached: {error}") from error
        if response.status != 200:
            told = f"{self.url}: {_message(_json(response.read(LONGEST))) or f'status {response.status}'}"
            raise UsageError(told) if response.status < 500 else BackendError(told)
        return response


def _lines(response: http.client.HTTPResponse, cancelled: Callable[[], bool]) -> Iterator[bytes | None]:
    """The lines of an answer as they come, read on a thread so that Ctrl-C is heard; None where it was broken off."""
    queue: SimpleQueue[bytes | Exception] = SimpleQueue()

    def read() -> None:
        try:
            while line := response.readline(LONGEST):
                queue.put(line)
            queue.put(b"")
        except Exception as error:  # the connection was closed, here or there
            queue.put(error)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = queue.get(timeout=0.1)
        except Empty:
            if cancelled():
                yield None
                return
            continue
        if isinstance(line, Exception):
            raise BackendError(f"the connection to the server has ended: {line}") from line
        if not line:
            return
        yield None if cancelled() else line


def _json(data: bytes) -> dict[str, Any]:
    """An object, empty where the bytes are none."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _message(answer: Mapping[str, Any]) -> str:
    """What an answer says of an error, in the forms that servers have for it."""
    error = answer.get("error", answer.get("detail", ""))
    message = error.get("message", "") if isinstance(error, dict) else error
    return " ".join(str(message).split())


def _timings(usage: Mapping[str, Any], began: float, first: float) -> Timings | None:
    """Timings by this clock, of tokens as the server has counted them; None where it did not."""
    prompt, made = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not isinstance(prompt, int) or not isinstance(made, int):
        return None
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Timings(prompt - cached, first - began, made, time.perf_counter() - first, 0, cached)
