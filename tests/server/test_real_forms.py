"""The demo model held to forms: ten schemas and forced calls, over HTTP. Each answer fits, or says `length`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import openai
import pytest
from told_backend import Running, local

import runner

pytestmark = [
    pytest.mark.real,
    pytest.mark.long,
    pytest.mark.skipif("RUNNER_DEMO_MODEL" not in os.environ, reason="RUNNER_DEMO_MODEL is not set"),
]
TEXT = {"type": "string", "maxLength": 12}
YES = {"type": "boolean"}


def fields(**properties: Any) -> dict[str, Any]:
    """An object of exactly these properties."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


SCHEMAS: list[dict[str, Any]] = [
    fields(colour={"enum": ["red", "green", "blue"]}, size={"enum": [1, 2, 3, None]}),
    fields(grid={"type": "array", "maxItems": 2, "items": {"type": "array", "maxItems": 3, "items": YES}}),
    fields(plate={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}),
    fields(value={"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "null"}, TEXT]}),
    fields(age={"type": "integer", "minimum": 18, "maximum": 99}, share={"type": "number", "minimum": 0, "maximum": 1}),
    {"$ref": "#/$defs/node", "$defs": {
        "node": fields(name=TEXT, next={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/leaf"}]}),
        "leaf": fields(name=TEXT)}},
    fields(tags={"type": "array", "minItems": 1, "maxItems": 3, "items": TEXT}),
    {"type": "array", "minItems": 2, "maxItems": 2,
     "items": fields(x={"type": "integer", "minimum": -5, "maximum": 5})},
    fields(kind={"const": "point"}, at=fields(x=YES, y=YES)),
    {"type": "object", "properties": {"a": TEXT, "b": {"type": "integer", "maximum": 100, "minimum": 0}},
     "required": ["a"], "additionalProperties": False},
]  # fmt: skip


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    lm = runner.load(os.environ["RUNNER_DEMO_MODEL"])
    with Running([local(lm, "demo")]) as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=600)


def test_two_hundred_answers_fit_their_schemas(client: openai.OpenAI) -> None:
    def ask(case: tuple[int, int]) -> str:
        schema, seed = SCHEMAS[case[0]], case[1]
        answer = client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "Give me an example as JSON."}],
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
            seed=seed,
            temperature=1.0,
            max_tokens=300,
        ).choices[0]
        if answer.finish_reason != "length":
            jsonschema.validate(json.loads(answer.message.content or ""), schema)
        return answer.finish_reason

    with ThreadPoolExecutor(8) as pool:
        ends = list(pool.map(ask, [(place, seed) for place in range(10) for seed in range(20)]))
    assert len(ends) == 200 and ends.count("stop") > 150 and set(ends) <= {"stop", "length"}


def test_fifty_forced_calls_are_valid(client: openai.OpenAI) -> None:
    parameters = fields(city=TEXT, days={"type": "integer", "minimum": 1, "maximum": 14})
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]

    def ask(seed: int) -> int:
        answer = client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "How is the weather in Oslo?"}],
            tools=tools,
            tool_choice={"type": "function", "function": {"name": "weather"}} if seed % 2 else "required",
            parallel_tool_calls=False,
            seed=seed,
            temperature=1.0,
            max_tokens=200,
        ).choices[0]
        assert answer.finish_reason == "tool_calls"
        (call,) = answer.message.tool_calls or ()
        jsonschema.validate(json.loads(call.function.arguments), parameters)  # type: ignore[union-attr]
        return 1

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(50))) == 50
