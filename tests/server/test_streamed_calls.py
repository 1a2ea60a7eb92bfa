"""Calls that a grammar leads are passed on as they are made, through each API; they cannot be invalid."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from told_backend import Running, ToldBackend, events

from runner.server.tool_calls import ValueEnd

PARAMETERS = {
    "type": "object",
    "properties": {"path": {"type": "string"}, "text": {"type": "string"}, "deep": {"type": "array", "items": {}}},
    "required": ["path", "text"],
}
ARGUMENTS = '{"path": "a\\"}.txt", "text": "<tool_call> {[ \\\\", "deep": [{"a": [1]}, "]"]}'
ASKED: Any = [{"role": "user", "content": "write"}]


def call(arguments: str = ARGUMENTS) -> str:
    return f'<tool_call>\n{{"name": "write", "arguments": {arguments}}}\n</tool_call>'


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with Running([ToldBackend(lambda prompt, order: f"I write.\n{call()}\n{call()} Done.")]) as running:
        yield running


def test_openai(server: Running) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    tools: Any = [{"type": "function", "function": {"name": "write", "parameters": PARAMETERS}}]
    arguments = {0: "", 1: ""}
    ids: dict[int, set[str]] = {0: set(), 1: set()}
    pieces, text, finish = 0, "", None
    for chunk in client.chat.completions.create(model="told", messages=ASKED, tools=tools, stream=True):
        delta = chunk.choices[0].delta
        text += delta.content or ""
        for each in delta.tool_calls or ():
            pieces += 1
            assert each.function is not None
            arguments[each.index] += each.function.arguments or ""
            ids[each.index] |= {each.id} if each.id else set()
        finish = chunk.choices[0].finish_reason
    assert pieces > 50 and finish == "tool_calls" and text == "I write. Done."
    assert [json.loads(each) for each in arguments.values()] == [json.loads(ARGUMENTS)] * 2
    assert all(len(each) == 1 for each in ids.values()) and ids[0] != ids[1]
    whole = client.chat.completions.create(model="told", messages=ASKED, tools=tools)
    calls = whole.choices[0].message.tool_calls or []
    assert [json.loads(each.function.arguments) for each in calls] == [json.loads(ARGUMENTS)] * 2  # type: ignore[union-attr]
    with client.chat.completions.stream(model="told", messages=ASKED, tools=tools) as stream:
        kinds = [each.type for each in stream]
    assert kinds.count("tool_calls.function.arguments.done") == 2


def test_anthropic(server: Running) -> None:
    client = anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0)
    tools: Any = [{"name": "write", "input_schema": PARAMETERS}]
    with client.messages.stream(model="told", max_tokens=2000, messages=ASKED, tools=tools) as stream:
        kinds = [each.type for each in stream]
        message = stream.get_final_message()
    assert kinds.count("input_json") > 50
    assert [block.type for block in message.content] == ["text", "tool_use", "tool_use", "text"]
    assert message.content[2].input == json.loads(ARGUMENTS) and message.stop_reason == "tool_use"
    short = client.messages.create(model="told", max_tokens=60, messages=ASKED, tools=tools)
    assert short.stop_reason == "max_tokens" and short.content[-1].input == {}


def test_responses(server: Running) -> None:
    tools = [{"type": "function", "name": "write", "parameters": PARAMETERS}]
    body = {"input": "write", "tools": tools, "stream": True}
    found = list(events(httpx2.post(f"{server.url}/v1/responses", json=body, timeout=20).text))
    done = [each["item"] for each in found if each["type"] == "response.output_item.done"]
    assert [item["type"] for item in done] == ["message", "function_call", "function_call", "message"]
    assert found[-1]["response"]["output"] == done and json.loads(done[1]["arguments"]) == json.loads(ARGUMENTS)
    deltas = [each for each in found if each["type"] == "response.function_call_arguments.delta"]
    assert len(deltas) > 50
    assert "".join(each["delta"] for each in deltas if each["item_id"] == done[2]["id"]) == done[2]["arguments"]


def test_ollama(server: Running) -> None:
    tools = [{"type": "function", "function": {"name": "write", "parameters": PARAMETERS}}]
    sent = httpx2.post(f"{server.url}/api/chat", json={"messages": ASKED, "tools": tools}, timeout=20)
    lines = [json.loads(line) for line in sent.text.splitlines()]
    calls = [each for line in lines for each in line.get("message", {}).get("tool_calls", ())]
    assert [each["function"]["arguments"] for each in calls] == [json.loads(ARGUMENTS)] * 2


def test_arguments_that_do_not_fit_cannot_come() -> None:
    backend = ToldBackend(lambda prompt, order: call('{"path": 5, "text": true, "other": }'))
    tools: Any = [{"type": "function", "function": {"name": "write", "parameters": PARAMETERS}}]
    with Running([backend]) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        for seed in range(5):
            answer = client.chat.completions.create(
                model="told", messages=ASKED, tools=tools, seed=seed, max_tokens=900
            )
            for made in answer.choices[0].message.tool_calls or ():
                if answer.choices[0].finish_reason != "length":
                    assert isinstance(json.loads(made.function.arguments)["path"], str)  # type: ignore[union-attr]


def test_the_end_of_a_value_cut_anywhere() -> None:
    for size in range(1, 9):
        end, taken = ValueEnd(), 0
        text = ARGUMENTS + "} rest"
        for start in range(0, len(text), size):
            count, ended = end.take(text[start : start + size])
            taken += count
            if ended:
                break
        assert taken == len(ARGUMENTS)
