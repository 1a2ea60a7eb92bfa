"""Chat templates: choosing one, checking its inputs, and rendering it to the text that transformers renders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from types import CodeType
from typing import Any

from runner.errors import TemplateError
from runner.text.template_limits import MAX_SOURCE

Message = Mapping[str, Any]
_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_REASONING = ("reasoning_content", "thinking", "reasoning")
_MAX_DEPTH = 100
_MAX_COMPILED = 16


@dataclass(frozen=True)
class ChatInputs:
    """Inputs of one rendering: plain JSON-like copies, so that a template gets no object of the caller's.

    `continue_final_message` is the key of the last message that the model is to go on writing; None: a new message.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    extra: dict[str, Any]
    add_generation_prompt: bool = False
    continue_final_message: str | None = None
    now: datetime = field(default_factory=datetime.now)


def chat_inputs(
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    continue_final_message: bool | str = False,
    **extra: Any,
) -> ChatInputs:
    """Check and copy the inputs of a template, as transformers does.

    Keys of a message that are None are left out. The reasoning of a message gets the names `thinking` and
    `reasoning_content`, whichever of its names it came under, since templates read either.

    Args:
        continue_final_message: True to let the model go on writing the `content` of the last message, or another key of
            that message.
        extra: variables for the template.

    Raises:
        TemplateError: the chat is empty, a message is not a mapping, a value is not JSON-like, or both a generation
            prompt and a message to continue are asked for.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise TemplateError('messages must be a list of at least one {"role": ..., "content": ...}')
    if add_generation_prompt and continue_final_message:
        raise TemplateError("add_generation_prompt and continue_final_message exclude each other: choose one")
    if tools is not None and not (isinstance(tools, Sequence) and all(isinstance(tool, Mapping) for tool in tools)):
        raise TemplateError("tools must be a list of JSON schemas (mappings); describe a function by its schema")
    copied: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TemplateError(f"messages[{index}] is a {type(message).__name__}, expected a mapping with a role")
        plain = _plain({key: value for key, value in message.items() if value is not None}, f"messages[{index}]")
        reasoning = next((plain[key] for key in _REASONING if plain.get(key) is not None), None)
        # The first of the names that is set gives the text; a `thinking` of the message's own stays.
        if reasoning is not None:
            plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
        copied.append(plain)
    key = "content" if continue_final_message is True else continue_final_message or None
    return ChatInputs(
        copied, _plain(tools, "tools"), _plain(extra, "template arguments"), add_generation_prompt, key
    )  # fmt: skip


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


class ChatTemplates:
    """A tokenizer's chat templates, by name, and the variables that all of them can read (`bos_token`, ...)."""

    def __init__(self, templates: Mapping[str, str], variables: Mapping[str, str]) -> None:
        self._templates = dict(templates)
        self._variables = dict(variables)
        self._compiled: dict[str, CodeType] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._templates)

    def choose(self, template: str | None, tools: Sequence[Any] | None) -> str:
        """Return the Jinja source of a template.

        `template` is a name, the source itself, or None for the model's choice: the template `tool_use` if there are
        tools and such a template, otherwise `default`.

        Raises:
            TemplateError: there is no such template.
        """
        # Text without a brace is taken for a mistyped name: as Jinja source it would render every chat the same.
        if template is not None:
            if template not in self._templates and "{" not in template:
                raise TemplateError(
                    f"no chat template is called {template!r:.80}; {self._listed()}, or pass Jinja text"
                )
            return self._templates.get(template, template)
        if tools is not None and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" in self._templates:
            return self._templates["default"]
        if self._templates:
            raise TemplateError(f"the model has several chat templates and no default: name one; {self._listed()}")
        raise TemplateError(
            "the model has no chat template (none in chat_template.jinja, additional_chat_templates/, "
            "tokenizer_config.json, processor_config.json, chat_template.json or a GGUF file's metadata): it is "
            "probably a base model. Complete raw text instead, or pass a template"
        )

    def _listed(self) -> str:
        return f"there are: {', '.join(self._templates)}" if self._templates else "the model has none"

    def render(self, source: str, inputs: ChatInputs) -> str:
        """Render `inputs` with the template `source`, within the limits of `runner.text.template_sandbox`."""
        from runner.text.template_sandbox import render_template  # jinja2 only where a chat is rendered

        # To continue a message is to render it with a tag at its end and cut the text off at the tag.
        messages, cut = inputs.messages, inputs.continue_final_message
        if cut is not None:
            messages = _tag_final(messages, cut, source)
        # Later entries win: no variable of the caller's can replace the messages.
        variables = {
            **self._variables,
            **inputs.extra,
            "messages": messages,
            "tools": inputs.tools,
            "documents": inputs.extra.get("documents"),
            "add_generation_prompt": inputs.add_generation_prompt,
        }
        text = render_template(self._code(source), variables, size=_size(variables) + len(source), now=inputs.now)
        return text if cut is None else _cut_at_tag(text, inputs.messages[-1][cut])

    def _code(self, source: str) -> CodeType:
        """Compiled code of a template; that of the last few templates is kept."""
        from runner.text.template_sandbox import compile_template

        if len(source) > MAX_SOURCE:
            raise TemplateError(f"the chat template has {len(source)} characters, more than the {MAX_SOURCE} allowed")
        if source not in self._compiled:
            while len(self._compiled) >= _MAX_COMPILED:
                self._compiled.pop(next(iter(self._compiled)))
            self._compiled[source] = compile_template(source)
        return self._compiled[source]


def _size(value: Any) -> int:
    """Number of characters and items in a plain value."""
    if isinstance(value, str):
        return len(value) + 1
    if isinstance(value, Mapping):
        return 1 + sum(_size(key) + _size(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return 1 + sum(_size(item) for item in value)
    return 1


def _tag_final(messages: list[dict[str, Any]], key: str, source: str) -> list[dict[str, Any]]:
    """Return the messages with a tag after the text that the model is to continue; way and tag are transformers'."""
    final = messages[-1]
    value = final.get(key)
    if value is None:
        raise TemplateError(f"continue_final_message: the final message has no {key!r:.40} to continue")
    # A reasoning text stands in the message under several names, and the template may read any of them.
    keys = [name for name in _REASONING if final.get(name) == value] if key in _REASONING else [key]
    if not any(name in source for name in keys):
        raise TemplateError(f"continue_final_message: the chat template does not read {key!r:.40}")
    if isinstance(value, str):
        return [*messages[:-1], {**final, **dict.fromkeys(keys, value + _CONTINUE_TAG)}]
    # Content in blocks: the tag goes behind the last block of text.
    blocks = list(value) if isinstance(value, (list, tuple)) else []
    for index in reversed(range(len(blocks))):
        if isinstance(blocks[index], dict) and isinstance(blocks[index].get("text"), str):
            blocks[index] = {**blocks[index], "text": blocks[index]["text"] + _CONTINUE_TAG}
            return [*messages[:-1], {**final, key: blocks}]
    raise TemplateError("continue_final_message: the final message has no text to continue")


def _cut_at_tag(text: str, final: Any) -> str:
    """Cut the rendered text where the final message's own text ends."""
    tag = text.rfind(_CONTINUE_TAG.strip())
    wanted = final if isinstance(final, str) else next(b["text"] for b in reversed(final) if "text" in b)
    if tag < 0 or wanted.strip() not in text:
        raise TemplateError("continue_final_message: the chat template changes or drops the final message")
    if text.startswith(_CONTINUE_TAG, tag):
        return text[:tag]
    return text[:tag].rstrip()  # the template trimmed the message, so its trailing space goes too
