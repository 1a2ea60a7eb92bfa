"""What all APIs share: the models by name, the places for answers, the log; and the way of a request through them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from starlette.requests import Request

from runner.server.answering import Answering
from runner.server.errors import ApiError, ending, of_exception
from runner.server.fields import parse, read
from runner.server.limits import Options, Places, body_of
from runner.server.log import LOG
from runner.server.metrics import Metrics
from runner.server.model import Prepared, Served
from runner.server.pool import Lease
from runner.server.request import Ask
from runner.server.streaming import while_there

T = TypeVar("T")

LONG_LOAD = 0.01
"""Seconds of waiting for a model from which on the log tells of them."""


class Note:
    """What is to be said of one request, in its response's headers and in the log."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.ignored: list[str] = []
        self.values: dict[str, Any] = {}


def note_of(request: Request) -> Note:
    """The note on a request."""
    note: Note = request.scope["runner.note"]
    return note


class Running:
    """A request's answers while they are under way: they hold places and the model, which `close` gives back.

    Attributes:
        lease: the hold on the model, once it is loaded.
    """

    def __init__(self, serving: Serving, note: Note, answers: Sequence[Answering]) -> None:
        self._serving = serving
        self._note = note
        self.answers = answers
        self.lease = Lease()
        self._count = sum(each.prepared.ask.choices for each in answers)
        serving.places.take(self._count)
        self._open = True
        self._cut = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def cut(self) -> None:
        """Have the answers end, which are cancelled next, with an error that says that the server ends."""
        self._cut = True

    def failed(self, error: BaseException) -> ApiError:
        """The error to tell of where the answers broke off, after the response had begun; the log has it in full.

        Raises:
            BaseException: `error`, where it is no failure: the client has left.
        """
        if self._cut:
            told = ending()
        elif isinstance(error, Exception):
            told = self._serving.told(error)
        else:
            raise error
        self._note.values["error"] = told.message
        return told

    def close(self) -> None:
        """The end, by whatever reason."""
        if not self._open:
            return
        self._open = False
        self.lease.release()
        self._serving.places.leave(self._count)
        for answer in self.answers:
            self._serving.metrics.finished(answer)
        usage = [answer.usage for answer in self.answers]
        first = [answer.first - answer.started for answer in self.answers if answer.first is not None]
        self._note.values |= {
            "model": self.answers[0].prepared.served.name,
            "prompt_tokens": sum(each.prompt_tokens for each in usage),
            "cached_tokens": sum(each.cached_tokens for each in usage),
            "completion_tokens": sum(each.completion_tokens for each in usage),
            "finish": [reason for answer in self.answers for _, reason in sorted(answer.finished.items())],
            "ttft": round(min(first), 4) if first else None,
        }
        if self.lease.seconds >= LONG_LOAD:
            self._note.values["load_seconds"] = round(self.lease.seconds, 3)


Pull = Callable[[str, Callable[[int, int], None]], Served]
"""Fetches a model of the hub, and serves it from then on: told its id, and what is to hear how many bytes have come."""


class Serving:
    """The state of a server.

    Attributes:
        models: what is served, by name.
        aliases: further names of theirs.
        pull: fetches a model that a client asks for; None: clients may not have models fetched.
    """

    def __init__(
        self,
        models: Sequence[Served],
        options: Options,
        aliases: Mapping[str, str] | None = None,
        pull: Pull | None = None,
    ) -> None:
        self.pull = pull
        self.models = {served.name: served for served in models}
        self.aliases = dict(aliases or {})
        self.options = options
        self.places = Places(options.max_queue)
        self.metrics = Metrics(self)
        self.log = logging.getLogger(LOG)
        self.on_failure: Callable[[Served], None] = lambda served: None

    def model(self, name: str | None) -> Served:
        """The model that a request names; without a name the first.

        Raises:
            ApiError: no model has the name. Nothing is fetched because a client says so.
        """
        if name is None:
            return next(iter(self.models.values()))
        found = self.models.get(self.aliases.get(name, name))
        if found is None:
            there = ", ".join([*self.models, *self.aliases])
            raise ApiError(
                404, f"no model is called {name[:200]!r} here; there is: {there}", param="model", code="model_not_found"
            )
        return found

    async def read(self, request: Request, kind: type[T], change: Callable[[Any], Any] = lambda value: value) -> T:
        """The body of a request as a `kind`, after a `change` of its plain value; its inert fields are noted."""
        body = await body_of(request)
        value = await asyncio.to_thread(parse, body) if len(body) > 100_000 else parse(body)
        if self.log.isEnabledFor(logging.DEBUG):
            note_of(request).values["request"] = value
        result, ignored = read(change(value), kind, self.options.unknown_fields)
        note_of(request).ignored += ignored
        return result

    async def prepare(self, request: Request, served: Served, ask: Ask) -> Prepared:
        """Check a request and make its prompt, on a thread; `Gone` where the client leaves meanwhile."""
        self.check_alive(served)
        prepared = await while_there(request, asyncio.to_thread(served.prepare, ask))
        note_of(request).ignored += prepared.ignored
        return prepared

    def check_alive(self, served: Served) -> None:
        """Refuse a request that no engine would answer."""
        status = served.backend.status()
        if not status.alive:
            raise ApiError(503, f"the engine of {served.name} has failed", "server_error", code="engine_failed")

    def told(self, error: Exception) -> ApiError:
        """What a client hears of an exception; one that nobody foresaw goes to the log with its traceback."""
        told = of_exception(error)
        if told.status == 500 and not isinstance(error, ApiError):
            self.log.error("a request failed", exc_info=error)
        if told.status >= 500:
            for served in self.models.values():
                if not served.backend.status().alive:
                    self.on_failure(served)
        return told

    async def begin(self, request: Request, *prepared: Prepared, keep: float | None = None) -> Running:
        """Take places for the answers to prepared prompts of one model, and have it loaded.

        Args:
            keep: seconds for which the model stays loaded afterwards; None: as the server's options say.

        Raises:
            ApiError: there are too few places, or the model cannot be loaded.
            Gone: the client has left.
        """
        running = Running(self, note_of(request), [Answering(each) for each in prepared])
        try:
            backend = prepared[0].served.backend
            running.lease = await while_there(request, backend.hold(keep))
            for answer in running.answers:
                answer.started = time.perf_counter()
        except BaseException:
            running.close()
            raise
        return running
