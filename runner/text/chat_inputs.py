"""Inputs of a chat template: checked, copied, and in one canonical shape whichever of OpenAI's shapes they came in."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from runner.errors import TemplateError, UsageError
from runner.text.template_limits import seconds_for

Message = Mapping[str, Any]
REASONING = ("reasoning_content", "thinking", "reasoning")
_MAX_DEPTH = 100
RESERVED = frozenset([
    "messages", "tools", "template", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message",
    "on_rendered",
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
    "range", "dict", "namespace", "cycler", "joiner", "raise_exception", "strftime_now",
    "self", "loop", "caller", "varargs", "kwargs",
])  # fmt: skip
"""Names in a template that no variable of a caller's can have."""

_KINDS: Mapping[type, str] = {
    str: "text", bool: "a boolean", int: "a number", float: "a number", list: "a list", tuple: "a list",
    dict: "a mapping", type(None): "null",
}  # fmt: skip


@dataclass(frozen=True)
class ChatInputs:
    """Inputs of one rendering: plain JSON-like copies, so that a template gets no object of the caller's.

    Every message has a `role` and a `content`, which is text or a list of parts `{"type": "text", "text": ...}`.
    `continue_final_message` is the key of the last message that the model is to go on writing; None: a new message.
    `deadline` is the time of `time.thread_time` at which everything that is rendered of these inputs must be done.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    extra: dict[str, Any]
    add_generation_prompt: bool = False
    continue_final_message: str | None = None
    now: datetime = field(default_factory=datetime.now)
    deadline: float = field(default_factory=lambda: time.thread_time() + seconds_for(0))


def chat_inputs(
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    continue_final_message: bool | str = False,
    **extra: Any,
) -> ChatInputs:
    """Check and copy the inputs of a template, as transformers does.

    Keys of a message that are None are left out; a message without `content` gets an empty one, as an assistant's tool
    call has in OpenAI's shape. The reasoning of a message gets the names `thinking` and `reasoning_content`, whichever
    of its names it came under, since templates read either.

    Args:
        continue_final_message: True to let the model go on writing the `content` of the last message, or another key of
            that message.
        extra: variables for the template.

    Raises:
        TemplateError: the chat is empty, a message has another shape (the error begins with its path, such as
            `messages[2].content[0].type`), a value is not JSON-like, or both a generation prompt and a message to
            continue are asked for.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise TemplateError('messages must be a list of at least one {"role": ..., "content": ...}')
    if add_generation_prompt and continue_final_message:
        raise TemplateError("add_generation_prompt and continue_final_message exclude each other: choose one")
    if tools is not None and not (isinstance(tools, Sequence) and all(isinstance(tool, Mapping) for tool in tools)):
        raise TemplateError("tools must be a list of JSON schemas (mappings); describe a function by its schema")
    copied = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    plain_tools, plain_extra = _plain(tools, "tools"), _plain(extra, "template arguments")
    key = "content" if continue_final_message is True else continue_final_message or None
    deadline = time.thread_time() + seconds_for(size_of([copied, plain_tools, plain_extra]))
    return ChatInputs(copied, plain_tools, plain_extra, add_generation_prompt, key, deadline=deadline)


def checked_variables(given: Mapping[str, Any] | None, taken: Collection[str] = ()) -> dict[str, Any]:
    """Return a caller's variables for a template as a dict; None gives an empty one.

    Args:
        taken: names besides the usual ones that the template gets from elsewhere.

    Raises:
        UsageError: `given` is no mapping, or a name cannot be given: it is no name, or the template gets that variable
            from the chat, the tokenizer or Jinja.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise UsageError(f'template_kwargs must be a mapping such as {{"enable_thinking": False}}, not {given!r:.80}')
    for name in given:
        if not isinstance(name, str) or not name.isidentifier():
            raise UsageError(f"template_kwargs: {name!r:.80} is not the name of a variable that a template could read")
        if name in RESERVED or name in taken:
            raise UsageError(
                f"template_kwargs cannot set {name!r:.80}: the template gets it from the chat, the tokenizer or Jinja. "
                "Leave it out; messages, tools and template are arguments of their own"
            )
    return dict(given)


def size_of(value: Any) -> int:
    """Number of characters and items in a plain value."""
    if isinstance(value, str):
        return len(value) + 1
    if isinstance(value, Mapping):
        return 1 + sum(size_of(key) + size_of(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return 1 + sum(size_of(item) for item in value)
    return 1


def system_texts(messages: Sequence[Message]) -> list[str]:
    """Texts of the messages that tell the model how to answer."""
    return [text_of(message) for message in messages if message.get("role") in ("system", "developer")]


def text_of(message: Message) -> str:
    """Text of a message, whose content may come in parts."""
    content = message.get("content")
    parts = content if isinstance(content, (list, tuple)) else [content]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    return "".join(text for text in texts if isinstance(text, str))


def _message(message: Any, where: str) -> dict[str, Any]:
    """Checked copy of one message."""
    if not isinstance(message, Mapping):
        raise TemplateError(f"{where} is a {type(message).__name__}, expected a mapping with a role")
    plain: dict[str, Any] = _plain({key: value for key, value in message.items() if value is not None}, where)
    if not isinstance(plain.get("role"), str) or not plain["role"]:
        raise TemplateError(f'{where}.role is {_shown(plain.get("role"))}, expected text such as "user"')
    plain["content"] = _content(plain.get("content", ""), f"{where}.content")
    if "tool_calls" in plain:
        _check_calls(plain["tool_calls"], f"{where}.tool_calls")
    reasoning = next((plain[key] for key in REASONING if plain.get(key) is not None), None)
    # The first of the names that is set gives the text; a `thinking` of the message's own stays.
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _content(content: Any, where: str) -> str | list[dict[str, Any]]:
    """Return content as text or parts with text; a part that is a string becomes one. No model here sees or hears."""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise TemplateError(f"{where} is {_shown(content)}, expected text or a list of parts with text")
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    for index, part in enumerate(parts):
        if not isinstance(part, dict):
            raise TemplateError(f'{where}[{index}] is {_shown(part)}, expected {{"type": "text", "text": ...}}')
        kind = part.get("type")
        if kind != "text":
            told = f"{kind!r:.40}" if isinstance(kind, str) else f'{_shown(kind)}, expected "text"'
            raise TemplateError(f"{where}[{index}].type is {told}: models here read text only")
        if not isinstance(part.get("text"), str):
            raise TemplateError(f"{where}[{index}].text is {_shown(part.get('text'))}, expected text")
    return parts


def _check_calls(calls: Any, where: str) -> None:
    """Refuse tool calls of another shape; a call's function may be described in the call itself."""
    if not isinstance(calls, (list, tuple)):
        raise TemplateError(f"{where} is {_shown(calls)}, expected a list of calls")
    for index, call in enumerate(calls):
        path = f"{where}[{index}]"
        if not isinstance(call, dict):
            raise TemplateError(f'{path} is {_shown(call)}, expected {{"type": "function", "function": ...}}')
        if "function" in call:
            path, call = f"{path}.function", call["function"]
        if not isinstance(call, dict):
            raise TemplateError(f'{path} is {_shown(call)}, expected {{"name": ..., "arguments": ...}}')
        arguments = call.get("arguments")
        if arguments is not None and not isinstance(arguments, (str, dict)):
            raise TemplateError(f"{path}.arguments is {_shown(arguments)}, expected an object or the JSON text of one")


def _shown(value: Any) -> str:
    """A plain value for a message: its kind, and itself where that is short."""
    if value is None:
        return "missing"
    return f"{_KINDS[type(value)]} ({value!r:.40})" if isinstance(value, (str, int, float)) else _KINDS[type(value)]


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """Deep copy of a JSON-like value; `where` names the value in an error."""
    if depth > _MAX_DEPTH:
        raise TemplateError(f"{where} is nested more than {_MAX_DEPTH} deep")
    if value is None or type(value) in (str, int, float, bool):
        return value
    # A subclass of str could have methods of its own, which a template would call.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {
            _plain(key, where, depth + 1): _plain(item, f"{where}[{key!r:.40}]", depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, tuple):
        return tuple(_plain(item, where, depth + 1) for item in value)
    if isinstance(value, list):
        return [_plain(item, where, depth + 1) for item in value]
    raise TemplateError(f"{where} is a {type(value).__name__}; templates take text, numbers, lists and mappings only")
