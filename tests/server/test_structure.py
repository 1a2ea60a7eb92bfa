"""Answers and calls of a form: enforced, or refused by name."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import anthropic
import jsonschema
import openai
import pydantic
import pytest
from told_backend import SPECIAL, Running, ToldBackend, tokenizer

HELLO: Any = [{"role": "user", "content": "Go"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["cat", "dog"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 30},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 3},
    },
    "required": ["name", "kind", "age", "tags"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "pet", "description": "d", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "none", "description": "d"}},
]


@pytest.fixture(scope="module", params=["plain marks", "special marks"])
def client(request: pytest.FixtureRequest) -> Iterator[openai.OpenAI]:
    marks = ("<tool_call>", "</tool_call>") if request.param == "special marks" else ()
    knows = (
        "{{ tools | tojson if tools else '' }}<tool_call></tool_call>"
        "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor -%}"
    )
    backend = ToldBackend(lambda prompt, order: "Sure.", facts=tokenizer(knows, (*SPECIAL, *marks)))
    with Running([backend]) as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def test_json_of_a_schema(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}}
    for seed in range(5):
        answer = client.chat.completions.create(model="told", messages=HELLO, response_format=form, seed=seed)
        assert answer.choices[0].finish_reason == "stop"
        jsonschema.validate(json.loads(answer.choices[0].message.content or ""), SCHEMA)


def test_the_clients_own_way_to_parse(client: openai.OpenAI) -> None:
    class Pet(pydantic.BaseModel):
        age: int
        kind: str

    parsed = client.chat.completions.parse(model="told", messages=HELLO, response_format=Pet, seed=1)
    assert isinstance(parsed.choices[0].message.parsed, Pet)


@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [
        ({"regex": "[0-9]{3}-[a-z]{2}"}, r"\d{3}-[a-z]{2}"),
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"grammar": 'start: "a" "b"+ "c"'}, "ab+c"),
        ({"json": {"type": "boolean"}}, "true|false"),
        ({"json_object": True}, r"\{.*\}"),
    ],
)
def test_structured_outputs(client: openai.OpenAI, outputs: dict[str, Any], pattern: str) -> None:
    extra = {"structured_outputs": outputs}
    chat = client.chat.completions.create(model="told", messages=HELLO, seed=1, extra_body=extra, max_tokens=3000)
    assert re.fullmatch(pattern, chat.choices[0].message.content or "", re.DOTALL)
    text = client.completions.create(model="told", prompt="x", seed=1, extra_body=extra, max_tokens=3000, n=2)
    assert all(re.fullmatch(pattern, choice.text, re.DOTALL) for choice in text.choices)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "pet"}}])
def test_forced_calls(client: openai.OpenAI, choice: Any) -> None:
    for seed in range(5):
        for parallel in (True, False):
            answer = client.chat.completions.create(
                model="told", messages=HELLO, tools=TOOLS, tool_choice=choice, seed=seed, parallel_tool_calls=parallel
            )
            calls = answer.choices[0].message.tool_calls or []
            assert calls and answer.choices[0].finish_reason == "tool_calls" and not answer.choices[0].message.content
            for call in calls:
                assert call.type == "function" and (choice == "required" or call.function.name == "pet")
                arguments = json.loads(call.function.arguments)
                if call.function.name == "pet":
                    jsonschema.validate(arguments, SCHEMA)


def test_strict_arguments_where_the_model_decides(client: openai.OpenAI) -> None:
    strict: Any = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}]
    answer = client.chat.completions.create(model="told", messages=HELLO, tools=strict)
    assert answer.choices[0].message.content == "Sure." and answer.choices[0].finish_reason == "stop"


def test_json_or_a_call(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "boolean"}}}
    found = set()
    for seed in range(12):
        answer = client.chat.completions.create(
            model="told", messages=HELLO, tools=TOOLS, response_format=form, seed=seed
        ).choices[0]
        found.add(answer.finish_reason)
        assert answer.message.tool_calls or answer.message.content in ("true", "false")
    assert found == {"stop", "tool_calls"}


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "not"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "hiccup"}}}}, "hiccup"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "json_schema.schema"),
        ({"structured_outputs": {"regex": "(?=a)b"}}, "constraint"),
        ({"structured_outputs": {"regex": "("}}, "constraint"),
        ({"structured_outputs": {"regex": "a" * 300_000}}, "characters"),
        ({"structured_outputs": {"grammar": "nonsense"}}, "constraint"),
        ({"structured_outputs": {"choice": []}}, "choice"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"choice": ["a"]}, "ignore_eos": True}, "ignore_eos"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": TOOLS, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        (
            {"tools": [{"type": "function", "function": {"name": "x", "parameters": {"type": "object", "not": {}}}}],
             "tool_choice": "required"},
            "not",
        ),
    ],
)  # fmt: skip
def test_refused_by_name(client: openai.OpenAI, extra: dict[str, Any], named: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        if "tool_choice" in extra and "tools" not in extra:
            extra = {**extra, "tools": []}
        client.chat.completions.create(model="told", messages=HELLO, extra_body=extra)
    assert named in caught.value.message, caught.value.message


def test_anthropics_words() -> None:
    with Running([ToldBackend(lambda prompt, order: "Sure.")]) as server:
        client = anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0)
        tools: Any = [{"name": "pet", "input_schema": SCHEMA}]
        for choice in ({"type": "any"}, {"type": "tool", "name": "pet", "disable_parallel_tool_use": True}):
            message = client.messages.create(
                model="told", max_tokens=1000, messages=HELLO, tools=tools, tool_choice=choice
            )
            assert message.stop_reason == "tool_use"
            jsonschema.validate(message.content[0].input, SCHEMA)
        form = {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}
        message = client.messages.create(model="told", max_tokens=1000, messages=HELLO, extra_body=form)
        jsonschema.validate(json.loads(message.content[0].text), SCHEMA)


def test_a_hostile_regex_ends_soon() -> None:
    with Running([ToldBackend(lambda prompt, order: "Sure.")]) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=30)
        for regex in ("(a?){5000}a{5000}", "((a{1,1000}){1,1000}){1,1000}", "(.*a.{20}){50}", "(" * 5000 + ")" * 5000):
            began = time.monotonic()
            form = {"structured_outputs": {"regex": regex}}
            try:
                client.chat.completions.create(model="told", messages=HELLO, extra_body=form, max_tokens=5)
            except openai.BadRequestError as error:
                assert "regex" in error.message or "constraint" in error.message
            assert time.monotonic() - began < 15, regex[:20]
        assert client.chat.completions.create(model="told", messages=HELLO).choices[0].message.content == "Sure."


def test_a_hostile_schema_does_not_hold_up_others() -> None:
    deep: dict[str, Any] = {"type": "string"}
    while len(json.dumps(deep)) < 50_000:
        deep = {"anyOf": [deep, {"type": "array", "items": deep, "maxItems": 1000}]}
    with Running([ToldBackend(lambda prompt, order: "Sure.")]) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=20)
        form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": deep}}
        ended = []

        def hostile() -> None:
            with contextlib.suppress(openai.BadRequestError):
                client.chat.completions.create(model="told", messages=HELLO, response_format=form, max_tokens=5)
            ended.append(True)

        thread = threading.Thread(target=hostile)
        thread.start()
        assert client.chat.completions.create(model="told", messages=HELLO).choices[0].message.content == "Sure."
        assert not ended, "it was too easy"
        thread.join(20)
        assert ended
