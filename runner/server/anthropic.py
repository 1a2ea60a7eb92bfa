"""Anthropic's `/v1/messages` and `/v1/messages/count_tokens`, as Claude Code and the official client use them."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from runner.server.answering import Answering, Delta, started
from runner.server.anthropic_body import Body, Counted, hidden
from runner.server.errors import anthropic_form
from runner.server.operations import Handler
from runner.server.serving import Running, Serving, note_of
from runner.server.streaming import Stream, event, json, while_there
from runner.server.tool_calls import CallPart, arguments_of

PING = event("ping", {"type": "ping"})
START_SECONDS = 5.0
"""Seconds for which the first event waits until it is known how much of the prompt was read before."""


def messages(serving: Serving) -> Handler:
    """`POST /v1/messages`."""

    async def answer(request: Request) -> Response:
        body = await serving.read(request, Body)
        served = serving.model(body.model)
        ask = body.ask(serving.options.unknown_fields, note_of(request).ignored)
        prepared = await serving.prepare(request, served, ask)
        running = await serving.begin(request, prepared)
        omitted = body.thinking is not None and body.thinking.display == "omitted"
        reply = Reply(body.model or served.name, running, omitted)
        if body.stream:
            return Stream(reply.stream(), ping=PING, done=running.close, cut=running.cut)
        with running:
            return json(await while_there(request, reply.whole()))

    return answer


def count_tokens(serving: Serving) -> Handler:
    """`POST /v1/messages/count_tokens`."""

    async def answer(request: Request) -> Response:
        body = await serving.read(request, Counted)
        served = serving.model(body.model)
        chat = body.chat(serving.options.unknown_fields, note_of(request).ignored)
        count = await while_there(request, asyncio.to_thread(served.count, chat))
        return json({"input_tokens": count})

    return answer


class Reply:
    """The answer to one request, in Anthropic's form."""

    def __init__(self, model: str, running: Running, omitted: bool) -> None:
        self._running = running
        self._answering: Answering = running.answers[0]
        self._model = model
        self._omitted = omitted
        self._id = f"msg_{secrets.token_hex(12)}"

    def _usage(self) -> dict[str, int]:
        usage = self._answering.usage
        return {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached_tokens,
            "output_tokens": usage.completion_tokens,
        }

    def _message(self, content: Sequence[Any], last: Delta | None) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": None if last is None else _reason(last),
            "stop_sequence": None if last is None else last.stopped_by,
            "usage": self._usage(),
        }

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The events of a stream."""
        try:
            async with started(self._answering.deltas(), START_SECONDS) as deltas:
                yield event("message_start", {"type": "message_start", "message": self._message([], None)})
                yield PING
                blocks = Blocks(self._omitted)
                async for delta in deltas:
                    for name, value in blocks.add(delta):
                        yield event(name, {"type": name, **value})
                    if delta.finish is not None:
                        for name, value in blocks.end():
                            yield event(name, {"type": name, **value})
                        ended = {"stop_reason": _reason(delta), "stop_sequence": delta.stopped_by}
                        yield event("message_delta", {"type": "message_delta", "delta": ended, "usage": self._usage()})
                yield event("message_stop", {"type": "message_stop"})
        except (Exception, asyncio.CancelledError) as error:
            yield event("error", anthropic_form(self._running.failed(error)))

    async def whole(self) -> dict[str, Any]:
        """The whole response."""
        made = await self._answering.whole()
        content: list[dict[str, Any]] = []
        if thought := made.reasoning:
            shown = {"thinking": "", "signature": hidden(thought)} if self._omitted else {"thinking": thought}
            content.append({"type": "thinking", "signature": "", **shown})
        if made.text:
            content.append({"type": "text", "text": made.text})
        content += [
            {"type": "tool_use", "id": call.id, "name": call.name, "input": arguments_of(call) or {}}
            for call in made.calls
        ]
        return self._message(content, made.last)


def _reason(last: Delta) -> str:
    if last.finish == "tool_calls":
        return "tool_use"
    if last.finish == "length":
        return "max_tokens"
    return "stop_sequence" if last.stopped_by is not None else "end_turn"


Event = tuple[str, dict[str, Any]]


class Blocks:
    """The blocks of a streamed message: one is open at a time."""

    def __init__(self, omitted: bool) -> None:
        self._omitted = omitted
        self._index = -1
        self._open: str | None = None
        self._thought: list[str] = []

    def add(self, delta: Delta) -> list[Event]:
        """Events of one token."""
        events: list[Event] = []
        if delta.reasoning:
            events += self._begin("thinking", {"thinking": "", "signature": ""})
            self._thought.append(delta.reasoning)
            if not self._omitted:
                events.append(self._delta({"type": "thinking_delta", "thinking": delta.reasoning}))
        if delta.text:
            events += self._begin("text", {"text": ""})
            events.append(self._delta({"type": "text_delta", "text": delta.text}))
        for call in delta.calls:
            if isinstance(call, CallPart):
                events.append(self._delta({"type": "input_json_delta", "partial_json": call.text}))
                continue
            events += self.end()
            events += self._begin("tool_use", {"id": call.id, "name": call.name, "input": {}})
            if call.arguments:
                events.append(self._delta({"type": "input_json_delta", "partial_json": call.arguments}))
        return events

    def end(self) -> list[Event]:
        """Close the open block."""
        if self._open is None:
            return []
        events = []
        if self._open == "thinking":
            signature = hidden("".join(self._thought)) if self._omitted else ""
            events.append(self._delta({"type": "signature_delta", "signature": signature}))
        self._open, self._thought = None, []
        return [*events, ("content_block_stop", {"index": self._index})]

    def _begin(self, kind: str, block: dict[str, Any]) -> list[Event]:
        if self._open == kind:
            return []
        events = self.end()
        self._open = kind
        self._index += 1
        start = {"index": self._index, "content_block": {"type": kind, **block}}
        return [*events, ("content_block_start", start)]

    def _delta(self, delta: dict[str, Any]) -> Event:
        return "content_block_delta", {"index": self._index, "delta": delta}
