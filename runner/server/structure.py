"""What an answer must be, in the words of the APIs, as a constraint; and calls that a model is held to make."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import msgspec

from runner.constraints import Choice, Constraint, JsonObject, JsonSchema, Lark, Regex
from runner.server import inert
from runner.server.errors import invalid
from runner.server.inert import Table
from runner.server.tool_formats import Marks


class TextFormat(msgspec.Struct, tag_field="type", tag="text"):
    """Any text."""

    inert: ClassVar[Table] = {}


class ObjectFormat(msgspec.Struct, tag_field="type", tag="json_object"):
    """A JSON object."""

    inert: ClassVar[Table] = {}


class NamedSchema(msgspec.Struct):
    """A schema and its name."""

    schema: dict[str, Any]
    inert: ClassVar[Table] = inert.SCHEMA


class SchemaFormat(msgspec.Struct, tag_field="type", tag="json_schema"):
    """JSON of a schema."""

    json_schema: NamedSchema
    inert: ClassVar[Table] = {}


Format = TextFormat | ObjectFormat | SchemaFormat


class StructuredOutputs(msgspec.Struct):
    """vLLM's way to say what an answer must be; one of these."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    inert: ClassVar[Table] = inert.STRUCTURED

    def constraint(self) -> Constraint:
        """The constraint.

        Raises:
            ApiError: there are none, or several.
        """
        made: list[Constraint] = []
        if self.json is not None:
            made.append(JsonSchema(self.json))
        if self.regex is not None:
            made.append(Regex(self.regex))
        if self.choice is not None:
            made.append(Choice(self.choice))
        if self.grammar is not None:
            made.append(Lark(self.grammar))
        if self.json_object:
            made.append(JsonObject())
        if len(made) != 1:
            raise invalid(
                "structured_outputs takes one of json, regex, choice, grammar, json_object", "structured_outputs"
            )
        return made[0]


def constraint_of(form: Format | None, outputs: StructuredOutputs | None) -> Constraint | None:
    """The constraint of a request; None: any text.

    Raises:
        ApiError: both are given.
    """
    if form is not None and outputs is not None:
        raise invalid("response_format and structured_outputs were given: leave one out", "structured_outputs")
    if outputs is not None:
        return outputs.constraint()
    if isinstance(form, SchemaFormat):
        return JsonSchema(form.json_schema.schema)
    return JsonObject() if isinstance(form, ObjectFormat) else None


def calls_of(
    tools: Sequence[Mapping[str, Any]],
    marks: Marks,
    token_ids: Mapping[str, int],
    *,
    parallel: bool,
    instead: Literal["text"] | Constraint | None = None,
) -> Lark:
    """The grammar of answers that call one of `tools`, with arguments of its schema.

    Calls have the form {"name": ..., "arguments": {...}} between the model's own marks, which is read, whichever
    form its template has.

    Args:
        marks: around a call.
        token_ids: ids of the special tokens among the marks.
        parallel: whether several calls may follow each other.
        instead: what else the answer may be: "text" without a call, and then a text may stand before the calls, too; or
            JSON; None: nothing else.

    Raises:
        ApiError: the model's calls cannot be told from what else the answer may be.
    """
    lines, names = [], []
    for index, tool in enumerate(tools):
        function = tool["function"]
        names.append(f"call_{index}")
        head = f'{{"name": {json.dumps(function["name"])}, "arguments": '
        lines.append(f'call_{index}: {json.dumps(head)} args_{index} "}}"')
        lines.append(f"args_{index}: %json {json.dumps(spaced(function['parameters']))}")
    body = " | ".join(names)

    def mark(text: str) -> str:
        return f"<[{token_ids[text]}]>" if text in token_ids else json.dumps(text)

    opening = f'{mark(marks.opening)} "\\n"' if marks.opening else ""
    closing = f'"\\n" {mark(marks.closing)}' if marks.closing else ""
    lines.append(f"body: {body}")
    lines.append(f"call: {opening} body {closing}")
    more = '("\\n" call)*' if parallel and marks.closing else ""
    if instead is None:
        return Lark("\n".join([f"start: call {more}", *lines]))
    if not marks.opening:
        raise invalid("this model's calls have no mark by which they could be told from an answer", "tools")
    if isinstance(instead, JsonSchema | JsonObject):
        schema = json.loads(instead.text) if isinstance(instead, JsonSchema) else {"type": "object"}
        lines.append(f"answer: %json {json.dumps({**schema, 'x-guidance': {'whitespace_flexible': False}})}")
        return Lark("\n".join([f"start: call {more} | answer", *lines]))
    if instead != "text":
        raise invalid(
            "with tools only JSON can be asked for: leave structured_outputs or tools out", "structured_outputs"
        )
    # Texts, each up to a mark and the call behind it, and a last one without.
    if marks.opening in token_ids:
        led = "led: TEXT call"
    else:
        led = f'lead[lazy]: TEXT {json.dumps(marks.opening)}\nled: lead "\\n" body {closing}'
    start = "start: led* rest" if parallel and marks.closing else "start: led | rest"
    return Lark("\n".join([start, led, "rest: TEXT", "TEXT: /(.|\\n)*/", *lines]))


def spaced(parameters: Any) -> dict[str, Any]:
    """A schema of arguments, whose JSON has a space behind commas and colons, as models have seen it."""
    schema = dict(parameters) if isinstance(parameters, Mapping) else {}
    if "type" not in schema and not any(key in schema for key in ("anyOf", "oneOf", "allOf", "$ref")):
        schema["type"] = "object"
    options = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return {**schema, "x-guidance": options}
