"""OpenAI's `/v1/responses`, without a memory: each request holds the whole conversation, as Codex sends it."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from runner.server.answering import Answering, Delta
from runner.server.openai_responses_body import Body, NamedTool, functions_in, prepared
from runner.server.operations import Handler
from runner.server.serving import Running, Serving, note_of
from runner.server.streaming import Stream, event, json, while_there
from runner.server.tool_calls import Call, arguments_of


def responses(serving: Serving) -> Handler:
    """`POST /v1/responses`."""

    async def answer(request: Request) -> Response:
        ignored = note_of(request).ignored
        body = await serving.read(request, Body, lambda value: prepared(value, ignored))
        served = serving.model(body.model)
        functions = functions_in(body.tools or (), serving.options.unknown_fields, ignored)
        ready = await serving.prepare(request, served, body.ask(functions))
        running = await serving.begin(request, ready)
        reply = Reply(served.name, body, running)
        if body.stream:
            return Stream(reply.stream(), done=running.close, cut=running.cut)
        with running:
            return json(await while_there(request, reply.whole()))

    return answer


class Reply:
    """The answer to one request, in the form of responses."""

    def __init__(self, name: str, body: Body, running: Running) -> None:
        self._running = running
        self._answering: Answering = running.answers[0]
        self._body = body
        self._model = body.model or name
        self._id = f"resp_{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._sequence = 0

    def _response(self, status: str, output: Sequence[Any], error: dict[str, Any] | None = None) -> dict[str, Any]:
        body, params = self._body, self._answering.prepared.params
        choice = body.tool_choice
        ended = status in ("completed", "incomplete")
        text = msgspec.to_builtins(body.text.format) if body.text is not None and body.text.format else None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": {},
            "model": self._model,
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None if body.reasoning is None else body.reasoning.effort, "summary": None},
            "store": False,
            "temperature": params.temperature,
            "text": {"format": text or {"type": "text"}},
            "tool_choice": {"type": "function", "name": choice.name}
            if isinstance(choice, NamedTool)
            else choice or "auto",
            "tools": body.tools or [],
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": self._usage() if ended else None,
            "user": None,
        }

    def _usage(self) -> dict[str, Any]:
        usage = self._answering.usage
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }

    def _event(self, kind: str, value: dict[str, Any]) -> bytes:
        made = event(kind, {"type": kind, "sequence_number": self._sequence, **value})
        self._sequence += 1
        return made

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The events of a stream."""
        items = Items()
        try:
            yield self._event("response.created", {"response": self._response("in_progress", [])})
            yield self._event("response.in_progress", {"response": self._response("in_progress", [])})
            async for delta in self._answering.deltas():
                for kind, value in items.add(delta):
                    yield self._event(kind, value)
                if delta.finish is not None:
                    for kind, value in items.end(cut=delta.finish == "length"):
                        yield self._event(kind, value)
                    status = "incomplete" if delta.finish == "length" else "completed"
                    yield self._event(f"response.{status}", {"response": self._response(status, items.done)})
        except (Exception, asyncio.CancelledError) as error:
            told = self._running.failed(error)
            why = {"code": told.code or "server_error", "message": told.message}
            yield self._event("response.failed", {"response": self._response("failed", items.done, why)})

    async def whole(self) -> dict[str, Any]:
        """The whole response."""
        items, status = Items(), "completed"
        async for delta in self._answering.deltas():
            items.add(delta)
            if delta.finish == "length":
                status = "incomplete"
        items.end(cut=status == "incomplete")
        return self._response(status, items.done)


Event = tuple[str, dict[str, Any]]


class Items:
    """The items of an output: one is open at a time."""

    def __init__(self) -> None:
        self.done: list[dict[str, Any]] = []
        self._kind: str | None = None
        self._call: Call | None = None
        self._id = ""
        self._pieces: list[str] = []

    def add(self, delta: Delta) -> list[Event]:
        """Events of one token."""
        events: list[Event] = []
        if delta.reasoning:
            events += self._begin("reasoning")
            self._pieces.append(delta.reasoning)
            events.append(("response.reasoning_text.delta", {**self._place(), "delta": delta.reasoning}))
        if delta.text:
            events += self._begin("message")
            self._pieces.append(delta.text)
            events.append(("response.output_text.delta", {**self._place(), "delta": delta.text, "logprobs": []}))
        for call in delta.calls:
            if isinstance(call, Call):
                events += [*self.end(), *self._begin_call(call)]
            text = call.arguments if isinstance(call, Call) else call.text
            if text:
                self._pieces.append(text)
                place = {"item_id": self._id, "output_index": len(self.done)}
                events.append(("response.function_call_arguments.delta", {**place, "delta": text}))
        return events

    def end(self, *, cut: bool = False) -> list[Event]:
        """Close the open item, as one that the length may have cut."""
        if self._kind is None:
            return []
        status = "incomplete" if cut else "completed"
        if self._call is not None:
            return self._end_call(self._call, status)
        text, kind, place = "".join(self._pieces), self._kind, self._place()
        item = self._item(status, text)
        (part,) = item["content"]
        name = "response.output_text.done" if kind == "message" else "response.reasoning_text.done"
        events: list[Event] = [
            (name, {**place, "text": text, **({"logprobs": []} if kind == "message" else {})}),
            ("response.content_part.done", {**place, "part": part}),
            ("response.output_item.done", {"output_index": place["output_index"], "item": item}),
        ]
        self.done.append(item)
        self._kind, self._pieces = None, []
        return events

    def _begin(self, kind: str) -> list[Event]:
        if self._kind == kind:
            return []
        events = self.end()
        self._kind = kind
        self._id = f"{'msg' if kind == 'message' else 'rs'}_{secrets.token_hex(12)}"
        item = self._item("in_progress", "")
        part = item["content"][0]
        item["content"] = []
        return [
            *events,
            ("response.output_item.added", {"output_index": len(self.done), "item": item}),
            ("response.content_part.added", {**self._place(), "part": part}),
        ]

    def _item(self, status: str, text: str) -> dict[str, Any]:
        if self._kind == "message":
            content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
            return {"id": self._id, "type": "message", "role": "assistant", "status": status, "content": content}
        content = [{"type": "reasoning_text", "text": text}]
        return {"id": self._id, "type": "reasoning", "summary": [], "content": content, "status": status}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._id, "output_index": len(self.done), "content_index": 0}

    def _call_item(self, call: Call, status: str, arguments: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "function_call",
            "call_id": call.id,
            "name": call.name,
            "arguments": arguments,
            "status": status,
        }

    def _begin_call(self, call: Call) -> list[Event]:
        self._kind, self._call, self._id = "call", call, f"fc_{secrets.token_hex(12)}"
        item = self._call_item(call, "in_progress", "")
        return [("response.output_item.added", {"output_index": len(self.done), "item": item})]

    def _end_call(self, call: Call, status: str) -> list[Event]:
        arguments = "".join(self._pieces)
        if arguments_of(replace(call, arguments=arguments)) is not None:
            status = "completed"  # perhaps the last thing that there was room for
        item = self._call_item(call, status, arguments)
        place = {"item_id": self._id, "output_index": len(self.done)}
        self.done.append(item)
        self._kind, self._call, self._pieces = None, None, []
        named = {**place, "name": call.name, "arguments": arguments}
        return [
            ("response.function_call_arguments.done", named),
            ("response.output_item.done", {"output_index": place["output_index"], "item": item}),
        ]
