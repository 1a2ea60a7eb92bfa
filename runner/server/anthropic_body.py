"""Requests to Anthropic's API, as the one kind of request that all APIs make."""

from __future__ import annotations

import base64
import binascii
import zlib
from typing import Any, ClassVar, Literal

import msgspec

from runner.constraints import JsonSchema
from runner.server import inert
from runner.server.errors import invalid
from runner.server.fields import Policy, read
from runner.server.inert import Table
from runner.server.openai_chat_body import checked_tools, plain_tool
from runner.server.request import Ask, Chat

BILLING = "x-anthropic-billing-header:"
"""How a system block of Claude Code's begins that is for Anthropic's bills: it changes with each prompt, and would keep
prompts from sharing what they have in common."""
HIDDEN = "runner1."
"""How a signature begins that holds the text of reasoning which the client asked not to see, to be played back."""
MAX_HIDDEN = 1 << 22


class TextBlock(msgspec.Struct, tag_field="type", tag="text"):
    """A text."""

    text: str
    inert: ClassVar[Table] = inert.ANTHROPIC_BLOCK


class ThinkingBlock(msgspec.Struct, tag_field="type", tag="thinking"):
    """What the model wrote to itself."""

    thinking: str
    signature: str = ""
    inert: ClassVar[Table] = inert.ANTHROPIC_BLOCK


class RedactedBlock(msgspec.Struct, tag_field="type", tag="redacted_thinking"):
    """Reasoning that only Anthropic's service can read."""

    data: str
    inert: ClassVar[Table] = inert.ANTHROPIC_BLOCK


class ToolUseBlock(msgspec.Struct, tag_field="type", tag="tool_use"):
    """A call."""

    id: str
    name: str
    input: dict[str, Any]
    inert: ClassVar[Table] = inert.ANTHROPIC_BLOCK


class ToolResultBlock(msgspec.Struct, tag_field="type", tag="tool_result"):
    """What a call gave."""

    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None
    inert: ClassVar[Table] = inert.ANTHROPIC_BLOCK


Block = TextBlock | ThinkingBlock | RedactedBlock | ToolUseBlock | ToolResultBlock


class Message(msgspec.Struct):
    """One message."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]
    inert: ClassVar[Table] = inert.ANTHROPIC_MESSAGE


class Tool(msgspec.Struct):
    """A function of the client's."""

    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None
    inert: ClassVar[Table] = inert.ANTHROPIC_TOOL


class ToolChoice(msgspec.Struct):
    """Whether functions may be called."""

    type: Literal["auto", "none", "any", "tool"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None
    inert: ClassVar[Table] = {}


class Thinking(msgspec.Struct):
    """Whether the model reasons, and whether its reasoning is shown."""

    type: Literal["enabled", "adaptive", "disabled"]
    display: Literal["summarized", "omitted", "updates"] | None = None
    inert: ClassVar[Table] = inert.ANTHROPIC_THINKING


class SchemaFormat(msgspec.Struct, tag_field="type", tag="json_schema"):
    """JSON of a schema."""

    schema: dict[str, Any]
    inert: ClassVar[Table] = {}


class OutputConfig(msgspec.Struct):
    """How the answer is made."""

    effort: str | None = None
    format: SchemaFormat | None = None
    inert: ClassVar[Table] = {}


class Counted(msgspec.Struct, kw_only=True):
    """Body of a request whose tokens are counted, and most of one that is answered."""

    messages: list[Message]
    model: str | None = None
    system: str | list[TextBlock] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    inert: ClassVar[Table] = inert.ANTHROPIC

    def chat(self, policy: Policy, ignored: list[str]) -> Chat:
        """The conversation in OpenAI's shapes; what of it has no effect is added to `ignored`."""
        if not self.messages:
            raise invalid("messages must not be empty", "messages")
        messages = self._system(ignored)
        for index, message in enumerate(self.messages):
            messages += _plain(message, f"messages[{index}]", ignored)
        last = self.messages[-1]
        choice = self.tool_choice
        return Chat(
            messages=messages,
            effort=self._effort(),
            continues=last.role == "assistant" and not messages[-1].get("tool_calls"),
            tools=checked_tools(self._tools(policy, ignored)),
            choice=_choice(choice),
            strict=any(tool.get("strict") is True for tool in self.tools or ()),
            parallel=not (choice is not None and choice.disable_parallel_tool_use),
        )

    def _system(self, ignored: list[str]) -> list[dict[str, Any]]:
        """The system message, without the block for bills."""
        blocks = [TextBlock(self.system)] if isinstance(self.system, str) else self.system or []
        texts = []
        for index, block in enumerate(blocks):
            if block.text.startswith(BILLING):
                ignored.append(f"system[{index}]")
            elif block.text:
                texts.append(block.text)
        return [{"role": "system", "content": "\n\n".join(texts)}] if texts else []

    def _tools(self, policy: Policy, ignored: list[str]) -> list[dict[str, Any]]:
        result = []
        for index, tool in enumerate(self.tools or ()):
            kind = tool.get("type")
            if isinstance(kind, str) and kind.startswith(inert.ANTHROPIC_HOSTED):
                ignored.append(f"tools[{index}] ({kind[:40]})")
                continue
            found, left_out = read(tool, Tool, policy, f"tools[{index}]")
            ignored += left_out
            result.append(plain_tool(found.name, found.description, found.input_schema))
        return result

    def _effort(self) -> str | None:
        if self.thinking is not None and self.thinking.type == "disabled":
            return "none"
        if self.output_config is not None and self.output_config.effort is not None:
            return self.output_config.effort
        return "medium" if self.thinking is not None else None


class Body(Counted, kw_only=True):
    """Body of a request that is answered."""

    max_tokens: int
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None

    def ask(self, policy: Policy, ignored: list[str]) -> Ask:
        """The request, as all APIs make it."""
        form = None if self.output_config is None else self.output_config.format
        sampling = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k")}
        return Ask(
            prompt=self.chat(policy, ignored),
            sampling=sampling,
            max_tokens=self.max_tokens,
            stop=self.stop_sequences or None,
            constraint=None if form is None else JsonSchema(form.schema),
            fields={"stop": "stop_sequences"},
        )


def _choice(choice: ToolChoice | None) -> str:
    """A choice of tools in OpenAI's words."""
    if choice is None:
        return "auto"
    if choice.type == "tool":
        if choice.name is None or choice.name in ("auto", "none", "required"):
            raise invalid("tool_choice: the name of the tool is missing", "tool_choice.name")
        return choice.name
    return "required" if choice.type == "any" else choice.type


def _plain(message: Message, path: str, ignored: list[str]) -> list[dict[str, Any]]:
    """A message of Anthropic's as one or several of OpenAI's."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    result: list[dict[str, Any]] = []
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for index, block in enumerate(message.content):
        where = f"{path}.content[{index}]"
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ToolResultBlock):
            if message.role != "user":
                raise invalid(f"{where}: results of tools are the user's", where)
            if texts:
                result.append({"role": "user", "content": "\n\n".join(texts)})
                texts = []
            result.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": _result(block)})
        elif message.role != "assistant":
            raise invalid(f"{where}: only an assistant thinks and calls tools", where)
        elif isinstance(block, ThinkingBlock):
            thoughts.append(block.thinking or revealed(block.signature))
        elif isinstance(block, ToolUseBlock):
            function = {"name": block.name, "arguments": block.input}
            calls.append({"id": block.id, "type": "function", "function": function})
        else:
            ignored.append(f"{where} (redacted_thinking)")
    if message.role == "assistant":
        made: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
        if any(thoughts):
            made["reasoning_content"] = "\n\n".join(filter(None, thoughts))
        if calls:
            made["tool_calls"] = calls
        return [made]
    if texts or not result:
        result.append({"role": message.role, "content": "\n\n".join(texts)})
    return result


def _result(block: ToolResultBlock) -> str:
    content = block.content
    text = content if isinstance(content, str) else "\n".join(each.text for each in content or ())
    return f"Error: {text}" if block.is_error and "error" not in text[:40].lower() else text


def hidden(text: str) -> str:
    """Reasoning that the client is not shown, as a signature."""
    return HIDDEN + base64.urlsafe_b64encode(zlib.compress(text.encode())).decode()


def revealed(signature: str) -> str:
    """The reasoning in a signature of ours; "" in any other."""
    if not signature.startswith(HIDDEN):
        return ""
    try:
        data = base64.urlsafe_b64decode(signature.removeprefix(HIDDEN))
        return zlib.decompressobj().decompress(data, MAX_HIDDEN).decode()
    except (binascii.Error, zlib.error, ValueError):
        return ""
