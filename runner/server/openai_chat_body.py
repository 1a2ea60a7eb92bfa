"""Requests to OpenAI's chat, as the one kind of request that all APIs make."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import msgspec

from runner.server import inert
from runner.server.errors import invalid
from runner.server.inert import Table
from runner.server.openai_fields import Common
from runner.server.request import MAX_TOOLS, MAX_TOP_LOGPROBS, Ask, Chat
from runner.server.structure import Format, StructuredOutputs, constraint_of


class TextPart(msgspec.Struct, tag_field="type", tag="text"):
    """A text."""

    text: str
    inert: ClassVar[Table] = inert.PART


class RefusalPart(msgspec.Struct, tag_field="type", tag="refusal"):
    """What an assistant refused with."""

    refusal: str
    inert: ClassVar[Table] = inert.PART


class CalledFunction(msgspec.Struct):
    """The name of a function, and the JSON text of its arguments."""

    name: str
    arguments: str | dict[str, Any] = "{}"
    inert: ClassVar[Table] = {}


class MadeCall(msgspec.Struct, omit_defaults=True):
    """A call of a function, by an assistant."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"
    inert: ClassVar[Table] = inert.CALL


class Message(msgspec.Struct, omit_defaults=True):
    """One message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart | RefusalPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[MadeCall] | None = None
    tool_call_id: str | None = None
    inert: ClassVar[Table] = inert.MESSAGE

    def plain(self) -> dict[str, Any]:
        """The message as a template gets it."""
        result: dict[str, Any] = {"role": self.role}
        if isinstance(self.content, list):
            texts = [part.text if isinstance(part, TextPart) else part.refusal for part in self.content]
            result["content"] = [{"type": "text", "text": text} for text in texts]
        elif self.content is not None:
            result["content"] = self.content
        for name in ("name", "reasoning_content", "reasoning", "tool_call_id"):
            if (value := getattr(self, name)) is not None:
                result[name] = value
        if self.tool_calls:
            result["tool_calls"] = [
                {
                    **({"id": call.id} if call.id is not None else {}),
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": call.function.arguments},
                }
                for call in self.tool_calls
            ]
        return result


class Function(msgspec.Struct):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    inert: ClassVar[Table] = inert.FUNCTION


class Tool(msgspec.Struct, tag_field="type", tag="function"):
    """A function, as one of the tools."""

    function: Function
    inert: ClassVar[Table] = inert.TOOL


class FunctionName(msgspec.Struct):
    """The name of a function."""

    name: str
    inert: ClassVar[Table] = {}


class NamedTool(msgspec.Struct, tag_field="type", tag="function"):
    """The one function that must be called."""

    function: FunctionName
    inert: ClassVar[Table] = {}


def plain_tool(name: str, description: str | None, parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """A tool as a template gets it.

    Raises:
        ApiError: the name is none that a function can have.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.:/-]{1,128}", name):
        raise invalid(f"tools: {name[:60]!r} is no name of a function (letters, digits, _ . : / -)", "tools")
    function: dict[str, Any] = {"name": name, "description": description or ""}
    function["parameters"] = dict(parameters) if parameters else {"type": "object", "properties": {}}
    return {"type": "function", "function": function}


def checked_tools(tools: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tools as a list.

    Raises:
        ApiError: there are too many, or two of one name.
    """
    result = list(tools)
    names = [tool["function"]["name"] for tool in result]
    if len(result) > MAX_TOOLS:
        raise invalid(f"tools: at most {MAX_TOOLS} in a request", "tools")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise invalid(f"tools: two functions are called {twice!r}", "tools")
    return result


class Body(Common, kw_only=True):
    """Body of a request."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    response_format: Format | None = None
    structured_outputs: StructuredOutputs | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    inert: ClassVar[Table] = inert.OPENAI

    def ask(self) -> Ask:
        """The request, as all APIs make it."""
        if not self.messages:
            raise invalid("messages must not be empty", "messages")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise invalid("max_tokens and max_completion_tokens differ: leave one out", "max_tokens")
        chat = Chat(
            messages=[message.plain() for message in self.messages],
            variables=self.chat_template_kwargs or {},
            effort=self.reasoning_effort,
            continues=self.continues(),
            tools=checked_tools(
                plain_tool(tool.function.name, tool.function.description, tool.function.parameters)
                for tool in self.tools or ()
            ),
            choice=self.tool_choice.function.name
            if isinstance(self.tool_choice, NamedTool)
            else self.tool_choice or "auto",
            strict=any(tool.function.strict for tool in self.tools or ()),
            parallel=self.parallel_tool_calls is not False,
        )
        return Ask(
            prompt=chat,
            sampling=self.sampling(self.asked_logprobs()),
            max_tokens=self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens,
            stop=self.stops(),
            choices=1 if self.n is None else self.n,
            constraint=constraint_of(self.response_format, self.structured_outputs),
            ignore_eos=bool(self.ignore_eos),
            priority=self.rank(),
            fields={} if self.max_completion_tokens is None else {"max_tokens": "max_completion_tokens"},
        )

    def continues(self) -> bool:
        """Whether the answer goes on with the last message; two fields say so, vLLM's, or else who wrote it."""
        last = self.messages[-1]
        may_continue = last.role == "assistant" and not last.tool_calls
        asked, new = self.continue_final_message, self.add_generation_prompt
        if asked and not may_continue:
            raise invalid("continue_final_message: the last message is not the assistant's", "continue_final_message")
        if asked and new:
            raise invalid(
                "add_generation_prompt and continue_final_message exclude each other", "add_generation_prompt"
            )
        continues = may_continue and asked is not False and not new
        if new is False and not continues:
            raise invalid(
                "add_generation_prompt: an answer that continues no message begins one", "add_generation_prompt"
            )
        return continues

    def asked_logprobs(self) -> int | None:
        """How many of the likeliest tokens are wanted beside each; None: no log-probabilities."""
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs needs logprobs to be true", "top_logprobs")
        if not 0 <= (self.top_logprobs or 0) <= MAX_TOP_LOGPROBS:
            raise invalid(f"top_logprobs must be from 0 to {MAX_TOP_LOGPROBS}", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None
