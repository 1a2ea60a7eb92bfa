"""Requests to OpenAI's `/v1/responses`, as the one kind of request that all APIs make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import msgspec

from runner.constraints import Constraint, JsonObject, JsonSchema
from runner.server import inert
from runner.server.errors import invalid
from runner.server.fields import Policy, read
from runner.server.inert import Table
from runner.server.openai_chat_body import checked_tools, plain_tool
from runner.server.request import Ask, Chat


class InputText(msgspec.Struct, tag_field="type", tag="input_text"):
    """A text of the user's."""

    text: str
    inert: ClassVar[Table] = inert.RESPONSE_PART


class OutputText(msgspec.Struct, tag_field="type", tag="output_text"):
    """A text of the model's."""

    text: str
    inert: ClassVar[Table] = inert.RESPONSE_PART


class PlainText(msgspec.Struct, tag_field="type", tag="text"):
    """A text."""

    text: str
    inert: ClassVar[Table] = inert.RESPONSE_PART


class Refusal(msgspec.Struct, tag_field="type", tag="refusal"):
    """What an assistant refused with."""

    refusal: str
    inert: ClassVar[Table] = inert.RESPONSE_PART


class ReasoningText(msgspec.Struct, tag_field="type", tag="reasoning_text"):
    """What the model wrote to itself."""

    text: str
    inert: ClassVar[Table] = inert.RESPONSE_PART


class SummaryText(msgspec.Struct, tag_field="type", tag="summary_text"):
    """A summary of that."""

    text: str
    inert: ClassVar[Table] = inert.RESPONSE_PART


class MessageItem(msgspec.Struct, tag_field="type", tag="message"):
    """A message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputText | OutputText | PlainText | Refusal]
    inert: ClassVar[Table] = inert.ITEM


class CallItem(msgspec.Struct, tag_field="type", tag="function_call"):
    """A call of a function."""

    call_id: str
    name: str
    arguments: str
    inert: ClassVar[Table] = inert.ITEM


class OutputItem(msgspec.Struct, tag_field="type", tag="function_call_output"):
    """What a call gave."""

    call_id: str
    output: str | list[InputText | OutputText | PlainText]
    inert: ClassVar[Table] = inert.ITEM


class ReasoningItem(msgspec.Struct, tag_field="type", tag="reasoning"):
    """What the model wrote to itself before what follows."""

    summary: list[SummaryText] = []
    content: list[ReasoningText | PlainText] | None = None
    inert: ClassVar[Table] = {**inert.ITEM, "encrypted_content": inert.REASONING["encrypted_content"]}


Item = MessageItem | CallItem | OutputItem | ReasoningItem


class Function(msgspec.Struct):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    type: str = "function"
    inert: ClassVar[Table] = inert.RESPONSE_TOOL


class NamedTool(msgspec.Struct, tag_field="type", tag="function"):
    """The one function that must be called."""

    name: str
    inert: ClassVar[Table] = {}


class Reasoning(msgspec.Struct):
    """How much to reason."""

    effort: str | None = None
    inert: ClassVar[Table] = inert.REASONING


class TextFormat(msgspec.Struct, tag_field="type", tag="text"):
    """Any text."""

    inert: ClassVar[Table] = {}


class ObjectFormat(msgspec.Struct, tag_field="type", tag="json_object"):
    """A JSON object."""

    inert: ClassVar[Table] = {}


class SchemaFormat(msgspec.Struct, tag_field="type", tag="json_schema"):
    """JSON of a schema."""

    schema: dict[str, Any]
    inert: ClassVar[Table] = inert.SCHEMA


class TextConfig(msgspec.Struct):
    """What the answer must be."""

    format: TextFormat | ObjectFormat | SchemaFormat | None = None
    inert: ClassVar[Table] = inert.TEXT

    def constraint(self) -> Constraint | None:
        """The constraint; None: any text."""
        if isinstance(self.format, SchemaFormat):
            return JsonSchema(self.format.schema)
        return JsonObject() if isinstance(self.format, ObjectFormat) else None


class Body(msgspec.Struct, kw_only=True):
    """Body of a request."""

    input: str | list[Item]
    model: str | None = None
    instructions: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_output_tokens: int | None = None
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    inert: ClassVar[Table] = inert.RESPONSES

    def ask(self, functions: Sequence[Function]) -> Ask:
        """The request, as all APIs make it."""
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        messages += _messages(self.input)
        if not messages:
            raise invalid("input must not be empty", "input")
        choice = self.tool_choice
        chat = Chat(
            messages=messages,
            effort=None if self.reasoning is None else self.reasoning.effort,
            tools=checked_tools(plain_tool(each.name, each.description, each.parameters) for each in functions),
            choice=choice.name if isinstance(choice, NamedTool) else choice or "auto",
            strict=any(each.strict for each in functions),
            parallel=self.parallel_tool_calls is not False,
        )
        return Ask(
            prompt=chat,
            sampling={"temperature": self.temperature, "top_p": self.top_p},
            max_tokens=self.max_output_tokens,
            constraint=None if self.text is None else self.text.constraint(),
            fields={"max_tokens": "max_output_tokens"},
        )


def prepared(value: Any, ignored: list[str]) -> Any:
    """A body whose messages all name their type, without items that record what a service did."""
    if not isinstance(value, dict) or not isinstance(value.get("input"), list):
        return value
    items = []
    for index, item in enumerate(value["input"]):
        if isinstance(item, dict):
            if "type" not in item and "role" in item:
                item = {"type": "message", **item}
            if item.get("type") in inert.RESPONSES_DROPPED:
                ignored.append(f"input[{index}] ({item['type']})")
                continue
        items.append(item)
    return {**value, "input": items}


def _messages(given: str | list[Item]) -> list[dict[str, Any]]:
    """Items as OpenAI's messages: reasoning, text and calls that follow each other are one of the assistant's."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    result: list[dict[str, Any]] = []
    thought = ""

    def assistant() -> dict[str, Any]:
        """The assistant's message that goes on, or a new one."""
        nonlocal thought
        if not result or result[-1]["role"] != "assistant" or thought:
            result.append({"role": "assistant", "content": ""})
        if thought:
            result[-1]["reasoning_content"], thought = thought, ""
        return result[-1]

    for item in given:
        if isinstance(item, ReasoningItem):
            said = "".join(part.text for part in item.content or item.summary)
            thought = f"{thought}\n{said}" if thought else said
        elif isinstance(item, CallItem):
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            assistant().setdefault("tool_calls", []).append(call)
        elif isinstance(item, OutputItem):
            text = item.output if isinstance(item.output, str) else "".join(part.text for part in item.output)
            result.append({"role": "tool", "tool_call_id": item.call_id, "content": text})
        else:
            content = item.content
            if not isinstance(content, str):
                content = "".join(part.refusal if isinstance(part, Refusal) else part.text for part in content)
            if item.role == "assistant" and (thought or not result or "tool_calls" not in result[-1]):
                message = assistant()
                message["content"] += content
            else:
                if thought:  # of a turn that came to nothing else
                    assistant()
                result.append({"role": item.role, "content": content})
    return result


def functions_in(tools: Sequence[dict[str, Any]], policy: Policy, ignored: list[str]) -> list[Function]:
    """The functions among the tools and in their namespaces; tools of a service are added to `ignored`."""
    result: list[Function] = []
    for index, tool in enumerate(tools):
        kind, where = tool.get("type"), f"tools[{index}]"
        if kind == "namespace" and isinstance(tool.get("tools"), list):
            inner = [each for each in tool["tools"] if isinstance(each, dict)]
            result += functions_in(inner, policy, ignored)
        elif kind == "function":
            found, left_out = read(tool, Function, policy, where)
            ignored += left_out
            result.append(found)
        elif isinstance(kind, str) and kind.startswith(inert.RESPONSES_HOSTED):
            ignored.append(f"{where} ({kind[:40]})")
        else:
            raise invalid(f"{where}.type: {kind!r:.60} is no kind of tool that is known here", f"{where}.type")
    return result
