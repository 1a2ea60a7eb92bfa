"""Ollama's `/api/chat` and `/api/generate`, whole and as lines of JSON."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from runner.server.answering import Answering, Delta
from runner.server.errors import invalid, ollama_form
from runner.server.model import Served
from runner.server.ollama_body import ChatBody, Common, GenerateBody
from runner.server.ollama_models import found, written
from runner.server.operations import Handler
from runner.server.pool import Lease
from runner.server.request import Ask, Chat, Text
from runner.server.serving import Running, Serving, note_of
from runner.server.streaming import LINES, Stream, json, line, while_there
from runner.server.tool_calls import Call, CallPart, arguments_of, gathered


def chat(serving: Serving) -> Handler:
    """`POST /api/chat`."""

    async def answer(request: Request) -> Response:
        body = await serving.read(request, ChatBody)
        served = found(serving, body.model)
        if not body.messages:  # Ollama's way to have a model loaded
            return await _loaded(serving, request, served, body, chat=True)
        return await _answer(serving, request, served, body, body.ask(body.chat()), chat=True)

    return answer


def generate(serving: Serving) -> Handler:
    """`POST /api/generate`."""

    async def answer(request: Request) -> Response:
        body = await serving.read(request, GenerateBody)
        served = found(serving, body.model)
        if not body.prompt and not body.suffix:
            return await _loaded(serving, request, served, body, chat=False)
        if body.suffix:
            if body.system or body.raw or body.think is not None:
                raise invalid("suffix: such a prompt has no place for system, raw and think", "suffix")
            prompt: Chat | Text = Text(prompt=body.prompt, suffix=body.suffix)
        elif body.raw:
            if body.system or body.think is not None:
                raise invalid("raw: the text goes to the model as it is, without system and think", "raw")
            prompt = Text(prompt=body.prompt)
        else:
            system = [{"role": "system", "content": body.system}] if body.system else []
            asked = {"role": "user", "content": body.prompt}
            prompt = Chat(messages=[*system, asked], effort=body.effort())
        return await _answer(serving, request, served, body, body.ask(prompt), chat=False)

    return answer


async def _answer(
    serving: Serving, request: Request, served: Served, body: Common, ask: Ask, *, chat: bool
) -> Response:
    keep = _keep(request, served, body)
    prepared = await serving.prepare(request, served, ask)
    running = await serving.begin(request, prepared, keep=keep)
    reply = Reply(body.model or served.name, running, chat=chat)
    if body.stream is not False:
        return Stream(reply.stream(), LINES, ping=b"", done=running.close, cut=running.cut)
    with running:
        return json(await while_there(request, reply.whole()))


def _now() -> str:
    return written(datetime.now(UTC))


def _keep(request: Request, served: Served, body: Common) -> float | None:
    """For how long the model is to stay; a pinned one stays anyway, which is said where it was to go."""
    keep = body.keep()
    if keep is not None and math.isfinite(keep) and served.backend.status().pinned:
        note_of(request).ignored.append("keep_alive")
    return keep


async def _loaded(serving: Serving, request: Request, served: Served, body: Common, *, chat: bool) -> Response:
    """Ollama's way to have a model loaded, or unloaded."""
    keep = _keep(request, served, body)
    serving.check_alive(served)
    status = served.backend.status()
    if keep == 0 and status.pinned:
        raise invalid(f"keep_alive: {served.name} is pinned, and stays loaded", "keep_alive")
    if keep == 0 and not status.loaded:
        lease = Lease()
    else:
        lease = await while_there(request, served.backend.hold(keep))
    lease.release()
    said: dict[str, Any] = {"message": {"role": "assistant", "content": ""}} if chat else {"response": ""}
    reason = "unload" if keep == 0 else "load"
    return json(
        {"model": body.model or served.name, "created_at": _now(), **said, "done": True, "done_reason": reason},
        {"content-type": LINES},
    )


class Reply:
    """The answer to one request, in Ollama's form."""

    def __init__(self, model: str, running: Running, *, chat: bool) -> None:
        self._running = running
        self._answering: Answering = running.answers[0]
        self._model = model
        self._chat = chat
        self._began = time.perf_counter()

    def _frame(self, text: str, thinking: str, calls: list[Call]) -> dict[str, Any]:
        frame: dict[str, Any] = {"model": self._model, "created_at": _now()}
        thought = {"thinking": thinking} if thinking else {}
        if not self._chat:
            return {**frame, "response": text, **thought, "done": False}
        message: dict[str, Any] = {"role": "assistant", "content": text, **thought}
        # One that the length has cut is no call: with what it has of arguments, nobody should make it.
        calls = [call for call in calls if arguments_of(call) is not None]
        if calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "function": {
                        "index": call.index, "name": call.name, "arguments": arguments_of(call)
                    },
                }
                for call in calls
            ]  # fmt: skip
        return {**frame, "message": message, "done": False}

    def _end(self, last: Delta) -> dict[str, Any]:
        answering, usage = self._answering, self._answering.usage
        first = answering.first if answering.first is not None else answering.last
        return {
            "done": True,
            "done_reason": "length" if last.finish == "length" else "stop",
            "total_duration": round((time.perf_counter() - self._began) * 1e9),
            "load_duration": round(self._running.lease.seconds * 1e9),
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": round((first - answering.started) * 1e9),
            "eval_count": usage.completion_tokens,
            "eval_duration": round((answering.last - first) * 1e9),
        }

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The lines of a stream."""
        try:
            calls: list[Call | CallPart] = []  # arguments are an object here: calls are passed on whole, at the end
            async for delta in self._answering.deltas():
                calls += delta.calls
                whole = gathered(calls) if delta.finish is not None else []
                if delta.text or delta.reasoning or whole:
                    yield line(self._frame(delta.text, delta.reasoning, whole))
                if delta.finish is not None:
                    yield line({**self._frame("", "", []), **self._end(delta)})
        except (Exception, asyncio.CancelledError) as error:
            yield line(ollama_form(self._running.failed(error)))

    async def whole(self) -> dict[str, Any]:
        """The whole response."""
        made = await self._answering.whole()
        return {**self._frame(made.text, made.reasoning, list(made.calls)), **self._end(made.last)}
