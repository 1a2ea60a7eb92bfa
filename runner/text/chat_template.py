"""Chat templates: choosing one, and rendering it to the text that transformers renders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import CodeType
from typing import Any

from runner.errors import TemplateError
from runner.text.chat_inputs import REASONING, ChatInputs, size_of
from runner.text.template_limits import MAX_SOURCE
from runner.text.template_shapes import TemplateShapes

_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_MAX_COMPILED = 16


class ChatTemplates:
    """A tokenizer's chat templates, by name, and the variables that all of them can read (`bos_token`, ...)."""

    def __init__(self, templates: Mapping[str, str], variables: Mapping[str, str]) -> None:
        self._templates = dict(templates)
        self._variables = dict(variables)
        self._compiled: dict[str, CodeType] = {}
        self._shapes: dict[str, TemplateShapes] = {}

    @property
    def sources(self) -> Mapping[str, str]:
        """The Jinja source of each template, by name."""
        return self._templates

    def replaced(self, templates: Mapping[str, str]) -> ChatTemplates:
        """Other templates with the same variables."""
        return ChatTemplates(templates, self._variables)

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

    @property
    def variables(self) -> Mapping[str, str]:
        """Variables that every template can read, by name."""
        return self._variables

    def reads(self, source: str) -> frozenset[str]:
        """Return the names of the variables that the template `source` reads, those that it always gets included."""
        from runner.text.template_sandbox import variables_of

        self._code(source)
        return variables_of(source)

    def fit(self, source: str, inputs: ChatInputs) -> ChatInputs:
        """Return the inputs in the shapes that the template `source` understands (`TemplateShapes.fit`)."""
        if source not in self._shapes:
            while len(self._shapes) >= _MAX_COMPILED:
                self._shapes.pop(next(iter(self._shapes)))
            self._shapes[source] = TemplateShapes(lambda probe: self.render(source, probe))
        return self._shapes[source].fit(inputs)

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
        size = size_of(variables) + len(source)
        text = render_template(
            self._code(source), variables, size=size, now=inputs.now, deadline=inputs.deadline
        )  # fmt: skip
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


def _tag_final(messages: list[dict[str, Any]], key: str, source: str) -> list[dict[str, Any]]:
    """Return the messages with a tag after the text that the model is to continue; way and tag are transformers'."""
    final = messages[-1]
    value = final.get(key)
    if value is None:
        raise TemplateError(f"continue_final_message: the final message has no {key!r:.40} to continue")
    # A reasoning text stands in the message under several names, and the template may read any of them.
    keys = [name for name in REASONING if final.get(name) == value] if key in REASONING else [key]
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
