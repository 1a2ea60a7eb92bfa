"""Finds out in which shape a template understands content and tool calls, and brings a chat into that shape.

Clients send OpenAI's shapes: content as text or as a list of parts, the arguments of a tool call as JSON text. Each
template was written for one shape and prints another as Python's `repr`, fails, or drops it. Which shapes it reads
cannot be told from its source for certain, so small chats with words that nobody writes are rendered, once for each
template and role, and their text shows which shapes arrive.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

from runner.errors import TemplateError
from runner.text.chat_inputs import ChatInputs
from runner.text.template_limits import OverBudgetError

Chat = list[dict[str, Any]]
Render = Callable[[ChatInputs], str]

# Digits: no change of case and no trimming alters them.
_FIRST, _SECOND = "73190428", "58260917"
_ARGUMENTS = {f"k{_FIRST}": _SECOND}
_HELLO = {"role": "user", "content": "hi"}
_TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}},
}
_CALL_ID = "abcdefghi"  # some templates want nine letters and digits
_MAX_KNOWN = 64


@dataclasses.dataclass(frozen=True)
class _Content:
    """Whether content arrives as text, as a list of any number of parts, and as a list of a single part."""

    text: bool
    parts: bool
    one_part: bool


@dataclasses.dataclass(frozen=True)
class _Arguments:
    """Whether a call's arguments arrive as an object, and as JSON text; and what stands beside calls for no content."""

    as_object: bool
    as_text: bool
    no_content: str | None = ""


class TemplateShapes:
    """What is known about one template; each question is put to the template once."""

    def __init__(self, render: Render) -> None:
        self._render = render
        self._contents: dict[str, _Content] = {}
        self._arguments: dict[bool, _Arguments] = {}

    def fit(self, inputs: ChatInputs) -> ChatInputs:
        """Return the inputs with contents and arguments in the shapes that the template understands.

        A list of parts stays one where the template goes through it, and is joined to one text otherwise; text becomes
        a part where the template reads parts alone. Arguments become an object where the template takes objects, JSON
        text where it takes only that. No content beside calls becomes None where the template drops them otherwise.

        Raises:
            TemplateError: arguments are not the JSON text of an object, which the template needs; or the template
                exceeds the limits.
        """
        messages = []
        for index, message in enumerate(inputs.messages):
            fitted = {**message, "content": self._content(message["content"], message["role"], inputs)}
            if message.get("tool_calls"):
                calls = enumerate(message["tool_calls"])
                fitted["tool_calls"] = [
                    self._call(call, f"messages[{index}].tool_calls[{place}]", inputs) for place, call in calls
                ]
                if fitted["content"] == "":
                    fitted["content"] = self._takes(inputs).no_content
            messages.append(fitted)
        return dataclasses.replace(inputs, messages=messages)

    def _content(self, content: Any, role: str, inputs: ChatInputs) -> Any:
        if content == "":
            return content
        if role not in self._contents:
            if len(self._contents) >= _MAX_KNOWN:
                self._contents.pop(next(iter(self._contents)))
            self._contents[role] = self._probe_content(role, inputs)
        takes = self._contents[role]
        if not isinstance(content, str):
            if takes.parts:
                return content
            content = "".join(part["text"] for part in content)
        return [{"type": "text", "text": content}] if takes.one_part and not takes.text else content

    def _probe_content(self, role: str, inputs: ChatInputs) -> _Content:
        def arrives(content: Any, *words: str) -> bool:
            text = next((text for chat in _chats(role, content) if (text := self._try(chat, inputs)) is not None), "")
            printed = re.search(rf"""["']text["']\s*:\s*["']{words[0]}""", text)  # as Python or JSON
            return printed is None and all(word in text for word in words)

        first, second = {"type": "text", "text": _FIRST}, {"type": "text", "text": _SECOND}
        return _Content(
            arrives(_FIRST, _FIRST), arrives([first, second], _FIRST, _SECOND), arrives([first], _FIRST)
        )  # fmt: skip

    def _call(self, call: dict[str, Any], where: str, inputs: ChatInputs) -> dict[str, Any]:
        """Copy of a tool call, its arguments in the shape that the template takes."""
        if "function" in call:
            return {**call, "function": self._call(call["function"], f"{where}.function", inputs)}
        if "name" not in call and "arguments" not in call:
            return call
        takes, arguments = self._takes(inputs), call.get("arguments")
        if arguments is None:
            arguments = {}
        if isinstance(arguments, str):
            return {**call, "arguments": _parsed(arguments, takes, f"{where}.arguments")}
        if takes.as_text and not takes.as_object:
            arguments = json.dumps(arguments, ensure_ascii=False)
        return {**call, "arguments": arguments}

    def _takes(self, inputs: ChatInputs) -> _Arguments:
        """In which shape calls arrive."""
        has_tools = bool(inputs.tools)
        if has_tools not in self._arguments:
            self._arguments[has_tools] = self._probe_arguments(inputs)
        return self._arguments[has_tools]

    def _probe_arguments(self, inputs: ChatInputs) -> _Arguments:
        def render(arguments: Any, content: str | None) -> str:
            called = [_HELLO, _calling(arguments, content)]
            tools = [_TOOL] if inputs.tools else None
            for chat in ([*called, _result("5")], called):
                if (text := self._try(chat, inputs, tools)) is not None:
                    return text
            return ""

        for content in ("", None):  # DeepSeek V3's template looks for calls only where the content is null
            text = render(dict(_ARGUMENTS), content)
            as_object = all(word in text for pair in _ARGUMENTS.items() for word in pair) and (
                str(_ARGUMENTS) not in text
            )
            as_text = json.dumps(_ARGUMENTS) in render(json.dumps(_ARGUMENTS), content)
            if as_object or as_text:
                return _Arguments(as_object, as_text, content)
        return _Arguments(as_object=False, as_text=False)

    def _try(self, chat: Chat, inputs: ChatInputs, tools: list[Any] | None = None) -> str | None:
        """Text of a small chat with the variables of `inputs`; None if the template refuses it or fails."""
        probe = dataclasses.replace(
            inputs, messages=chat, tools=tools, add_generation_prompt=False, continue_final_message=None
        )
        try:
            return self._render(probe)
        except OverBudgetError:
            raise
        except TemplateError:
            return None


def _chats(role: str, content: Any) -> list[Chat]:
    """Chats that have the content in a message of the role, likeliest first."""
    message = {"role": role, "content": content}
    if role == "user":
        return [[message]]
    if role == "assistant":
        return [[_HELLO, message, _HELLO], [_HELLO, message]]
    if role == "tool":
        arguments = (dict(_ARGUMENTS), json.dumps(_ARGUMENTS))
        return [[_HELLO, _calling(shape), _result(content)] for shape in arguments] + [[_HELLO, message]]
    return [[message, _HELLO], [_HELLO, message]]


def _calling(arguments: Any, content: str | None = "") -> dict[str, Any]:
    call = {"id": _CALL_ID, "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def _result(content: Any) -> dict[str, Any]:
    return {"role": "tool", "name": "f", "tool_call_id": _CALL_ID, "content": content}


def _parsed(arguments: str, takes: _Arguments, where: str) -> Any:
    """The arguments as an object where the template takes one; no text at all is an object without keys."""
    if not takes.as_object:
        return arguments
    try:
        value = json.loads(arguments) if arguments.strip() else {}
        if not isinstance(value, dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as error:
        if takes.as_text:
            return arguments
        raise TemplateError(
            f"{where} is not the JSON text of an object ({error}), which the chat template needs: {arguments!r:.80}"
        ) from error
    return value
