"""How a model is told of functions and calls them: by its template where that knows tools, else by a generic text."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from runner.errors import TemplateError
from runner.server.call_values import dumped
from runner.server.errors import invalid
from runner.server.roles import Message
from runner.server.tool_calls import SPECIAL, CallFinder, KeepMarks
from runner.server.tool_formats import GENERIC, HARMONY, INNER, Marks, bare_json, marks_in
from runner.text.chat_inputs import text_of
from runner.text.harmony import CHANNEL, MESSAGE, HarmonySeparator
from runner.text.separator import Separator
from runner.text.tokenizer import Tokenizer

_NAME = "f60174285"
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "d",
        "parameters": {"type": "object", "properties": {"a": {"type": "string", "description": "d"}}},
    },
}
_ASKED = [{"role": "user", "content": "hi"}]

ABOUT = """You may call functions to help with the answer. Each line between <tools> and </tools> describes one:
<tools>
{tools}
</tools>
To call a function, write its name and its arguments as a JSON object between <tool_call> and </tool_call>, like this:
<tool_call>
{{"name": "NAME", "arguments": {{"ARGUMENT": "VALUE"}}}}
</tool_call>
The results come back between <tool_response> and </tool_response>. Where no function helps, answer without a call."""
"""What a model is told whose template knows no tools."""


class Tooling:
    """What one model's template makes of tools."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def _source(self) -> str:
        sources = self._tokenizer.template_sources
        return sources.get("tool_use") or sources.get("default") or ""

    @cached_property
    def knows_tools(self) -> bool:
        """Whether the template shows the model a tool that it is given."""
        try:
            shown = self._tokenizer.apply_chat_template(
                _ASKED, tools=[_TOOL], add_generation_prompt=True, tokenize=False
            )
        except TemplateError:
            return False
        return _NAME in shown

    @cached_property
    def marks(self) -> tuple[Marks, ...]:
        """The marks around calls in this model's answers."""
        if not self.knows_tools:
            return (GENERIC,)
        if CHANNEL in self._source and MESSAGE in self._source:
            return (HARMONY,)
        found = marks_in(self._source)
        return found if found or self._bare else (GENERIC,)

    @cached_property
    def json_between_marks(self) -> bool:
        """Whether the form that the template has for calls is JSON between two marks: a grammar can lead such calls."""
        if not self.knows_tools:
            return True
        other = any(sign in self._source for sign in ("<function=", "<arg_key>", "<invoke", "<parameter"))
        named = '"name"' in self._source and '"arguments"' in self._source
        return named and not other and bool(self.marks) and self.marks[0] == GENERIC

    @property
    def marks_to_write(self) -> Marks:
        """The marks that a forced call is written between.

        Raises:
            ApiError: this model's calls are no JSON between marks.
        """
        written = [marks for marks in self.marks if not marks.kept]
        if self.marks and not written:
            raise invalid("this model's calls are messages of their own, and cannot be forced", "tool_choice")
        return written[0] if written else Marks("")

    @cached_property
    def _bare(self) -> bool:
        return self.knows_tools and bare_json(self._source)

    @cached_property
    def special(self) -> frozenset[str]:
        """The special tokens among the marks."""
        texts = {text for marks in self.marks for text in (marks.opening, marks.closing)}
        return frozenset((texts | set(INNER)) & set(self._tokenizer.special_tokens))

    def keeping(self, separator: Separator) -> Separator:
        """The separator of an answer, which leaves the marks of calls in its text, told from text that spells them."""
        if not isinstance(separator, HarmonySeparator):
            return KeepMarks(separator, self.special)
        if HARMONY.opening in self.special:  # it takes that mark itself, and writes it in front of calls
            separator.around = SPECIAL
        return KeepMarks(separator, self.special - {HARMONY.opening})

    @cached_property
    def _nine(self) -> bool:
        """Whether the template wants ids of nine letters and digits."""
        return "length != 9" in self._source or "length == 9" in self._source

    def finder(self, tools: Sequence[Mapping[str, Any]], *, led: bool) -> CallFinder:
        """What finds calls in one answer, which a grammar leads or not."""
        schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
        return CallFinder(self.marks, schemas, special=self.special, bare=self._bare, nine=self._nine, led=led)

    def fit(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
        """The messages with calls and results as the template knows them, and with the tools where it knows none."""
        if any(message.get("tool_calls") or message["role"] == "tool" for message in messages):
            messages = _named(messages)
            if not self.knows_tools:
                messages = [_spelled(message) for message in messages]
            elif self._nine:
                messages = [_renamed(message) for message in messages]
        if tools and not self.knows_tools:
            about = ABOUT.format(tools="\n".join(dumped(tool["function"]) for tool in tools))
            told = {"role": "system", "content": about}
            first = 0  # behind the instructions at the start
            while first < len(messages) and messages[first]["role"] in ("system", "developer"):
                first += 1
            return [*messages[:first], told, *messages[first:]]
        return list(messages)


def _named(messages: Sequence[Message]) -> list[Message]:
    """The messages, each result with the name of the function that gave it, which some templates write."""
    names: dict[str, str] = {}
    result: list[Message] = []
    for message in messages:
        for call in message.get("tool_calls") or ():
            if isinstance(call.get("id"), str):
                names[call["id"]] = call["function"]["name"]
        name = names.get(message.get("tool_call_id") or "")
        if message["role"] == "tool" and not message.get("name") and name is not None:
            message = {**message, "name": name}
        result.append(message)
    return result


def _spelled(message: Message) -> Message:
    """A message with its calls, or as a result, in the generic form."""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{text_of(message)}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not calls:
        return message
    lines = [text_of(message)] if text_of(message) else []
    for call in calls:
        arguments = call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else dumped(arguments)
        lines.append(f'<tool_call>\n{{"name": {dumped(call["function"]["name"])}, "arguments": {text}}}\n</tool_call>')
    kept = {key: value for key, value in message.items() if key not in ("tool_calls", "content")}
    return {**kept, "content": "\n".join(lines)}


def _renamed(message: Message) -> Message:
    """A message with ids of nine letters and digits, the same for the same id."""

    def nine(name: str) -> str:
        return name if len(name) == 9 and name.isalnum() else hashlib.sha256(name.encode()).hexdigest()[:9]

    result = dict(message)
    if isinstance(message.get("tool_call_id"), str):
        result["tool_call_id"] = nine(message["tool_call_id"])
    if message.get("tool_calls"):
        result["tool_calls"] = [
            {**call, "id": nine(call["id"])} if isinstance(call.get("id"), str) else call
            for call in message["tool_calls"]
        ]
    return result
