"""Ollama's API: `/api/chat`, `/api/generate`, and what its clients ask about models."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncGenerator, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from runner.constraints import Constraint, JsonObject, JsonSchema
from runner.server import inert
from runner.server.answering import Answering, Delta
from runner.server.durations import seconds_of
from runner.server.errors import ApiError, invalid, ollama_form
from runner.server.inert import Table
from runner.server.model import Served
from runner.server.openai_chat import Tool, checked_tools, plain_tool
from runner.server.operations import Handler, version_of
from runner.server.pool import Lease
from runner.server.request import Ask, Chat, Text
from runner.server.serving import Running, Serving
from runner.server.streaming import LINES, Stream, json, line, while_there
from runner.server.tool_calls import Call, CallPart, arguments_of, gathered

NEVER = 36500 * 86400.0
"""Seconds until a model goes that stays: a hundred years."""


class CalledFunction(msgspec.Struct):
    """A function's name, and its arguments as an object."""

    name: str
    arguments: dict[str, Any] = {}
    inert: ClassVar[Table] = {"index": inert.CALL["index"]}


class MadeCall(msgspec.Struct):
    """A call of a function, by an assistant."""

    function: CalledFunction
    id: str | None = None
    inert: ClassVar[Table] = {"type": inert.TOOL["type"], "index": inert.CALL["index"]}


class Message(msgspec.Struct):
    """One message; one of the role "thinking" is what the assistant thought before its next one (Continue's form)."""

    role: Literal["system", "user", "assistant", "tool", "thinking"]
    content: str = ""
    thinking: str | None = None
    tool_calls: list[MadeCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    inert: ClassVar[Table] = inert.OLLAMA_MESSAGE


class Options(msgspec.Struct):
    """How the answer is drawn, and how long it may be."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    num_predict: int | None = None
    num_ctx: int | None = None
    stop: str | list[str] | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    inert: ClassVar[Table] = inert.OLLAMA_OPTIONS

    def sampling(self) -> dict[str, Any]:
        """The fields of `SamplingParams` that are set."""
        names = ("temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty")
        given: dict[str, Any] = {name: getattr(self, name) for name in names}
        given["repetition_penalty"] = self.repeat_penalty
        if self.seed is not None:
            given["seed"] = self.seed % (1 << 63)
        if self.repeat_last_n == 0:  # looks back at nothing
            given |= {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
        elif self.repeat_last_n is not None:
            given["penalty_window"] = max(self.repeat_last_n, 0)
        return {name: value for name, value in given.items() if value is not None}


class Common(msgspec.Struct, kw_only=True):
    """Fields of both."""

    model: str | None = None
    format: str | dict[str, Any] | None = None
    options: Options | None = None
    stream: bool | None = None
    think: bool | str | None = None
    keep_alive: float | str | None = None
    inert: ClassVar[Table] = inert.OLLAMA

    def keep(self) -> float | None:
        """Seconds for which the model stays loaded afterwards; None: the request does not say.

        Raises:
            ApiError: it is no duration.
        """
        try:
            return None if self.keep_alive is None else seconds_of(self.keep_alive)
        except ValueError as error:
            raise invalid(f"keep_alive: {error}", "keep_alive") from error

    def ask(self, prompt: Chat | Text) -> Ask:
        """The request, as all APIs make it."""
        options = self.options or Options()
        count = options.num_predict
        if count is not None and count < -2:
            raise invalid("options.num_predict must be at least 1, or -1 for no limit", "options.num_predict")
        return Ask(
            prompt=prompt,
            sampling=options.sampling(),
            max_tokens=None if count in (None, -1, -2) else count,
            stop=[options.stop] if isinstance(options.stop, str) else options.stop,
            constraint=self._constraint(),
            context=options.num_ctx,
        )

    def _constraint(self) -> Constraint | None:
        if isinstance(self.format, dict):
            return JsonSchema(self.format)
        if self.format not in (None, "", "json"):
            raise invalid('format must be "json" or a JSON schema', "format")
        return JsonObject() if self.format == "json" else None

    def effort(self) -> str | None:
        """How much to reason, in OpenAI's words."""
        if isinstance(self.think, str):
            return self.think
        return None if self.think is None else "medium" if self.think else "none"


class ChatBody(Common, kw_only=True):
    """Body of `/api/chat`."""

    messages: list[Message] = []
    tools: list[Tool] | None = None

    def chat(self) -> Chat:
        """The conversation in OpenAI's shapes."""
        messages = []
        for message in _with_thoughts(self.messages):
            made: dict[str, Any] = {"role": message.role, "content": message.content}
            if message.thinking:
                made["reasoning_content"] = message.thinking
            if message.tool_calls:
                made["tool_calls"] = [
                    {
                        **({} if call.id is None else {"id": call.id}),
                        "type": "function",
                        "function": {"name": call.function.name, "arguments": call.function.arguments},
                    }
                    for call in message.tool_calls
                ]
            for key, value in (("name", message.tool_name), ("tool_call_id", message.tool_call_id)):
                if value is not None:
                    made[key] = value
            messages.append(made)
        tools = checked_tools(
            plain_tool(tool.function.name, tool.function.description, tool.function.parameters)
            for tool in self.tools or ()
        )
        last = self.messages[-1]
        return Chat(
            messages=messages,
            effort=self.effort(),
            continues=last.role == "assistant" and not last.tool_calls,
            tools=tools,
            strict=any(tool.function.strict for tool in self.tools or ()),
        )


def _with_thoughts(messages: Iterable[Message]) -> list[Message]:
    """The messages, those of the role "thinking" joined to the answer that follows, or empty answers of their own."""
    result: list[Message] = []
    before = ""
    for message in messages:
        if message.role == "thinking":
            result.append(Message(role="assistant", thinking=message.content))
        elif message.role == "assistant" and before == "thinking":
            thoughts = result.pop().thinking
            result.append(msgspec.structs.replace(message, thinking=message.thinking or thoughts))
        else:
            result.append(message)
        before = message.role
    return result


class GenerateBody(Common, kw_only=True):
    """Body of `/api/generate`."""

    prompt: str = ""
    system: str | None = None
    raw: bool | None = None


class ShowBody(msgspec.Struct):
    """Body of `/api/show`."""

    model: str | None = None
    name: str | None = None
    inert: ClassVar[Table] = {"verbose": inert.OLLAMA["verbose"], "system": inert.OLLAMA["template"]}


def found(serving: Serving, name: str | None) -> Served:
    """The model of a name, which may have Ollama's tag behind it."""
    if name is None or name in serving.models or name in serving.aliases:
        return serving.model(name)
    return serving.model(name.removesuffix(":latest"))


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
        if not body.prompt:
            return await _loaded(serving, request, served, body, chat=False)
        if body.raw:
            if body.system or body.think is not None:
                raise invalid("raw: the text goes to the model as it is, without system and think", "raw")
            prompt: Chat | Text = Text(prompt=body.prompt)
        else:
            system = [{"role": "system", "content": body.system}] if body.system else []
            asked = {"role": "user", "content": body.prompt}
            prompt = Chat(messages=[*system, asked], effort=body.effort())
        return await _answer(serving, request, served, body, body.ask(prompt), chat=False)

    return answer


async def _answer(
    serving: Serving, request: Request, served: Served, body: Common, ask: Ask, *, chat: bool
) -> Response:
    keep = body.keep()
    prepared = await serving.prepare(request, served, ask)
    running = await serving.begin(request, prepared, keep=keep)
    reply = Reply(body.model or served.name, running, chat=chat)
    if body.stream is not False:
        return Stream(reply.stream(), LINES, ping=b"", done=running.close)
    with running:
        return json(await while_there(request, reply.whole()))


def _told(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


def _now() -> str:
    return _told(datetime.now(UTC))


async def _loaded(serving: Serving, request: Request, served: Served, body: Common, *, chat: bool) -> Response:
    """Ollama's way to have a model loaded, or unloaded."""
    keep = body.keep()
    serving.check_alive(served)
    if keep == 0 and not served.backend.status().loaded:
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
        except Exception as error:
            yield line(ollama_form(self._running.failed(error)))

    async def whole(self) -> dict[str, Any]:
        """The whole response."""
        made = await self._answering.whole()
        return {**self._frame(made.text, made.reasoning, list(made.calls)), **self._end(made.last)}


def _card(served: Served, name: str) -> dict[str, Any]:
    facts = served.backend.facts
    return {
        "name": name,
        "model": name,
        "modified_at": _told(datetime.fromtimestamp(served.created, UTC)),
        "size": facts.nbytes,
        "digest": hashlib.sha256(f"{served.name}\n{facts.family}\n{facts.nbytes}".encode()).hexdigest(),
        "details": _details(served),
    }


def _details(served: Served) -> dict[str, Any]:
    facts = served.backend.facts
    return {
        "parent_model": facts.parent or "",
        "format": "mlx",
        "family": facts.family,
        "families": [facts.family],
        "parameter_size": f"{facts.parameters / 1e6:.1f}M" if facts.parameters else "",
        "quantization_level": facts.quantization,
    }


def _names(serving: Serving) -> list[tuple[str, Served]]:
    return [*serving.models.items(), *((name, serving.model(name)) for name in serving.aliases)]


def tags(serving: Serving) -> Handler:
    """`GET /api/tags`."""

    async def answer(_request: Request) -> Response:
        return json({"models": [_card(served, name) for name, served in _names(serving)]})

    return answer


def ps(serving: Serving) -> Handler:
    """`GET /api/ps`: the models that are loaded, and until when."""

    async def answer(_request: Request) -> Response:
        loaded = []
        for name, served in serving.models.items():
            status = served.backend.status()
            if status.loaded:
                until = datetime.now(UTC) + timedelta(seconds=min(max(status.expires_in, 0.0), NEVER))
                loaded.append(
                    {
                        **_card(served, name),
                        "size_vram": served.backend.facts.nbytes,
                        "expires_at": _told(until),
                        "context_length": served.backend.facts.context_length,
                    }
                )
        return json({"models": loaded})

    return answer


def show(serving: Serving) -> Handler:
    """`POST /api/show`."""

    async def answer(request: Request) -> Response:
        body = await serving.read(request, ShowBody)
        served = found(serving, body.model or body.name)
        facts = served.backend.facts
        capabilities = ["completion", "tools"]
        if served.reasons:
            capabilities.append("thinking")
        sources = facts.tokenizer.template_sources
        return json(
            {
                "modelfile": f"FROM {served.name}",
                "parameters": "\n".join(
                    f"{name} {value}"
                    for name, value in served.sampling({}).to_dict().items()
                    if value not in (None, {})
                ),
                "template": sources.get("default", ""),
                "license": "",
                "details": _details(served),
                "model_info": {
                    "general.architecture": facts.family,
                    "general.basename": served.name,
                    "general.parameter_count": facts.parameters,
                    f"{facts.family}.context_length": facts.context_length,
                    f"{facts.family}.vocab_size": facts.vocab_size,
                },
                "capabilities": capabilities,
                "modified_at": _card(served, served.name)["modified_at"],
            }
        )

    return answer


def version(_serving: Serving) -> Handler:
    """`GET /api/version`."""

    async def answer(_request: Request) -> Response:
        return json({"version": version_of()})

    return answer


def embeddings(_serving: Serving) -> Handler:
    """`POST /api/embed`: there is no model for it."""

    async def answer(_request: Request) -> Response:
        raise ApiError(400, "models here generate text and were not made to embed it")

    return answer
