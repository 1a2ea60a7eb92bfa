"""OpenAI's `/v1/chat/completions`, and what becomes of its prompt (`/render`)."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from runner.engine.sampler import Token
from runner.server.answering import Answering
from runner.server.errors import openai_form
from runner.server.openai_chat_body import Body
from runner.server.openai_fields import usage_of
from runner.server.operations import Handler
from runner.server.serving import Running, Serving
from runner.server.streaming import Stream, data, json, while_there
from runner.server.token_texts import TokenTexts, entry
from runner.server.tool_calls import Call, CallPart, gathered


def chat(serving: Serving) -> Handler:
    """`POST /v1/chat/completions`."""

    async def answer(request: Request) -> Response:
        body = await serving.read(request, Body)
        usage_asked = body.usage_asked()
        served = serving.model(body.model)
        prepared = await serving.prepare(request, served, body.ask())
        running = await serving.begin(request, prepared)
        reply = Reply(served.name if body.model is None else body.model, running, bool(body.logprobs))
        if body.stream:
            return Stream(reply.stream(*usage_asked), done=running.close, cut=running.cut)
        with running:
            return json(await while_there(request, reply.whole()))

    return answer


def render(serving: Serving) -> Handler:
    """`POST /v1/chat/completions/render`: the prompt of a chat as text and ids; nothing is generated."""

    async def answer(request: Request) -> Response:
        body = await serving.read(request, Body)
        prepared = await serving.prepare(request, serving.model(body.model), body.ask())
        return json({"prompt": prepared.text, "token_ids": prepared.ids, "count": len(prepared.ids)})

    return answer


def called(calls: Sequence[Call | CallPart], *, streamed: bool) -> list[dict[str, Any]]:
    """Calls in OpenAI's form; in a stream each has its place among those of the message."""
    made: list[dict[str, Any]] = []
    for call in calls if streamed else gathered(calls):
        place = {"index": call.index} if streamed else {}
        if isinstance(call, CallPart):
            made.append({**place, "function": {"arguments": call.text}})
        else:
            function = {"name": call.name, "arguments": call.arguments}
            made.append({**place, "id": call.id, "type": "function", "function": function})
    return made


class Reply:
    """The answers to one request, in OpenAI's form."""

    def __init__(self, model: str, running: Running, logprobs: bool) -> None:
        self._running = running
        self._answering: Answering = running.answers[0]
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._model = model
        self._texts = TokenTexts(self._answering.prepared.served.facts.tokenizer) if logprobs else None

    def _frame(self, kind: str, choices: list[Any]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _usage(self) -> dict[str, Any]:
        usage = self._answering.usage
        return usage_of(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, usage.reasoning_tokens)

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        if self._texts is None:
            return None
        ends = self._answering.prepared.ends
        return {"content": [entry(self._texts, each) for each in tokens if each.id not in ends], "refusal": None}

    async def stream(self, usage: bool, usage_always: bool) -> AsyncGenerator[bytes, None]:
        """The events of a stream."""

        def chunk(choices: list[Any]) -> bytes:
            frame = self._frame("chat.completion.chunk", choices)
            if usage:
                frame["usage"] = self._usage() if usage_always or not choices else None
            return data(frame)

        def choice(index: int, delta: dict[str, Any], finish: str | None, tokens: list[Token]) -> dict[str, Any]:
            return {"index": index, "delta": delta, "logprobs": self._logprobs(tokens), "finish_reason": finish}

        try:
            for index in range(self._answering.prepared.ask.choices):
                yield chunk([choice(index, {"role": "assistant", "content": ""}, None, [])])
            # Tokens whose text is held back go with the next that has some.
            waiting: dict[int, list[Token]] = {}
            async for delta in self._answering.deltas():
                shown: dict[str, Any] = {}
                if delta.reasoning:
                    shown |= {"reasoning_content": delta.reasoning, "reasoning": delta.reasoning}
                if delta.text:
                    shown["content"] = delta.text
                if delta.calls:
                    shown["tool_calls"] = called(delta.calls, streamed=True)
                tokens = waiting.setdefault(delta.choice, [])
                if delta.token is not None and self._texts is not None:
                    tokens.append(delta.token)
                if shown or (tokens and delta.finish):
                    yield chunk([choice(delta.choice, shown, None, tokens)])
                    waiting[delta.choice] = []
                if delta.finish is not None:
                    yield chunk([choice(delta.choice, {}, delta.finish, [])])
            if usage:
                yield chunk([])
            yield b"data: [DONE]\n\n"
        except (Exception, asyncio.CancelledError) as error:
            yield data(openai_form(self._running.failed(error)))

    async def whole(self) -> dict[str, Any]:
        """The whole response."""
        count = self._answering.prepared.ask.choices
        texts: list[list[str]] = [[] for _ in range(count)]
        thoughts: list[list[str]] = [[] for _ in range(count)]
        tokens: list[list[Token]] = [[] for _ in range(count)]
        calls: list[list[Call | CallPart]] = [[] for _ in range(count)]
        reasons = [""] * count
        async for delta in self._answering.deltas():
            texts[delta.choice].append(delta.text)
            thoughts[delta.choice].append(delta.reasoning)
            calls[delta.choice] += delta.calls
            if delta.token is not None and self._texts is not None:
                tokens[delta.choice].append(delta.token)
            if delta.finish is not None:
                reasons[delta.choice] = delta.finish
        choices = []
        for index in range(count):
            message: dict[str, Any] = {"role": "assistant", "content": "".join(texts[index]), "refusal": None}
            if calls[index]:
                message["tool_calls"] = called(calls[index], streamed=False)
                message["content"] = message["content"] or None
            if thought := "".join(thoughts[index]):
                message |= {"reasoning_content": thought, "reasoning": thought}
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": self._logprobs(tokens[index]),
                    "finish_reason": reasons[index],
                }
            )
        return {**self._frame("chat.completion", choices), "usage": self._usage()}
