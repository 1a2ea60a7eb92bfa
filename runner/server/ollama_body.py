"""Requests to Ollama's `/api/chat` and `/api/generate`, as the one kind of request that all APIs make."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import msgspec

from runner.constraints import Constraint, JsonObject, JsonSchema
from runner.server import inert
from runner.server.durations import seconds_of
from runner.server.errors import invalid
from runner.server.inert import Table
from runner.server.openai_chat_body import Tool, checked_tools, plain_tool
from runner.server.request import Ask, Chat, Text


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
            given["penalty_window"] = min(max(self.repeat_last_n, 0), 1 << 24)  # as much as all there ever is
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
        if count is not None and (count < -2 or count == 0):
            raise invalid("options.num_predict must be at least 1, or -1 for no limit", "options.num_predict")
        if options.num_ctx is not None and options.num_ctx < 1:
            raise invalid("options.num_ctx must be at least 1", "options.num_ctx")
        return Ask(
            prompt=prompt,
            sampling=options.sampling(),
            max_tokens=None if count in (None, -1, -2) else count,
            stop=[options.stop] if isinstance(options.stop, str) else options.stop,
            constraint=self._constraint(),
            context=options.num_ctx,
            fields={name: f"options.{name}" for name in Options.__struct_fields__}
            | {"repetition_penalty": "options.repeat_penalty"},
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
    suffix: str | None = None
    system: str | None = None
    raw: bool | None = None
