"""What Claude Code 2.1.332 and Codex 0.171.0 need back, seen by leaving it out: one test for each thing, on the wire.

Where it is missing they ask again, give up, or lose an item without a word; `test_agents` runs the clients themselves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from told_backend import Running, ToldBackend, events, waited

CALLS = '<tool_call>\n{"name": "Read", "arguments": {"path": "a"}}\n</tool_call>'
SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
TOOL = {"name": "Read", "description": "Reads", "input_schema": SCHEMA}
FUNCTION = {"type": "function", "name": "Read", "description": "Reads", "parameters": SCHEMA, "strict": False}


def script(prompt: str, _order: object) -> str:
    if "<tool_response>\n" in prompt:
        return "Done."
    return f"I look.{CALLS}\n{CALLS}" if '"Read"' in prompt else "Hello!"


@pytest.fixture(scope="module")
def told() -> ToldBackend:
    return ToldBackend(script)


@pytest.fixture(scope="module")
def server(told: ToldBackend) -> Iterator[Running]:
    with Running([told]) as running:
        yield running


def claude(server: Running, content: Any = "Hi", **more: Any) -> httpx2.Response:
    messages = [{"role": "user", "content": content}]
    body = {"model": "told", "max_tokens": 500, "messages": messages, **more}
    return httpx2.post(f"{server.url}/v1/messages?beta=true", json=body, headers={"x-api-key": "any"}, timeout=20)


def codex(server: Running, text: str = "Hi", **more: Any) -> httpx2.Response:
    items = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}]
    body = {"model": "told", "input": items, "store": False, "stream": True, **more}
    return httpx2.post(f"{server.url}/v1/responses", json=body, timeout=20)


def named(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Events with their names."""
    found = []
    for piece in text.strip().split("\n\n"):
        name, _, data = piece.partition("\ndata: ")
        found.append((name.removeprefix("event: "), json.loads(data)))
    return found


def test_claude_every_event_has_its_name_and_every_block_its_bounds(server: Running) -> None:
    found = named(claude(server, stream=True, tools=[TOOL]).text)
    assert all(name == value["type"] for name, value in found)
    names = [name for name, _ in found if name != "ping"]
    assert names[0] == "message_start" and names[-2:] == ["message_delta", "message_stop"]
    start = found[0][1]["message"]
    assert {"id", "type", "role", "model", "content", "usage"} <= start.keys() and start["content"] == []
    assert start["usage"]["input_tokens"] > 0
    opened: int | None = None
    deltas: dict[int, int] = {}
    for name, value in found:
        if name == "content_block_start":
            assert opened is None and value["index"] == len(deltas)
            opened, deltas[value["index"]] = value["index"], 0
        elif name == "content_block_delta":
            assert value["index"] == opened
            deltas[value["index"]] += 1
        elif name == "content_block_stop":
            assert value["index"] == opened
            opened = None
    assert opened is None and len(deltas) == 3 and 0 not in deltas.values()


def test_claude_two_calls_in_one_message(server: Running) -> None:
    found = named(claude(server, stream=True, tools=[TOOL]).text)
    starts = [value["content_block"] for name, value in found if name == "content_block_start"][1:]
    assert [(each["type"], each["name"], each["input"]) for each in starts] == [("tool_use", "Read", {})] * 2
    assert len({each["id"] for each in starts}) == 2
    parts: dict[int, str] = {}
    for _name, value in found:
        if value.get("delta", {}).get("type") == "input_json_delta":
            parts[value["index"]] = parts.get(value["index"], "") + value["delta"]["partial_json"]
    assert [json.loads(part) for part in parts.values()] == [{"path": "a"}] * 2
    (ended,) = [value for name, value in found if name == "message_delta"]
    assert ended["delta"]["stop_reason"] == "tool_use" and ended["usage"]["output_tokens"] > 10


def test_claude_the_same_request_whole(server: Running) -> None:
    whole = claude(server, stream=False, tools=[TOOL]).json()
    assert whole["type"] == "message" and [each["type"] for each in whole["content"]] == [
        "text",
        "tool_use",
        "tool_use",
    ]
    assert whole["stop_reason"] == "tool_use"


def test_claude_the_length_ends_an_answer_only_where_it_does(server: Running) -> None:
    assert claude(server, max_tokens=6).json()["stop_reason"] == "max_tokens"
    assert claude(server, max_tokens=7).json()["stop_reason"] == "end_turn"
    assert claude(server, max_tokens=128_000).json()["stop_reason"] == "end_turn"  # more than there is room for


def test_claude_a_failed_call_comes_back(told: ToldBackend, server: Running) -> None:
    call = {"type": "tool_use", "id": "toolu_1", "name": "Nope", "input": {"wrong": [1]}}
    results = [
        {"type": "tool_result", "tool_use_id": "toolu_1", "is_error": True, "content": "No such tool: Nope"},
        {"type": "tool_result", "tool_use_id": "toolu_2", "is_error": False, "content": "fine"},
    ]
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": [call, {**call, "id": "toolu_2", "name": "Read"}]},
        {"role": "user", "content": results},
    ]
    assert claude(server, messages=turns, tools=[TOOL]).json()["content"] == [{"type": "text", "text": "Done."}]
    prompt = told.facts.tokenizer.decode(told.orders[-1].ids, skip_special_tokens=False)
    assert "Error: No such tool: Nope" in prompt and "fine" in prompt


def test_claude_what_it_would_leave_out_on_a_400_is_taken(server: Running) -> None:
    sent = claude(
        server,
        messages=[{"role": "user", "content": "Hi"}, {"role": "system", "content": "Tools."}],
        thinking={"type": "adaptive", "display": "omitted"},
        context_management={"edits": []},
        output_config={"effort": "high"},
    )
    assert sent.status_code == 200 and "context_management" in sent.headers["x-runner-ignored"]


def test_claude_too_long_a_prompt_in_its_words(server: Running) -> None:
    sent = claude(server, "x" * 5000)
    assert sent.status_code == 400
    message = sent.json()["error"]["message"]
    assert message.startswith("prompt is too long: 50") and message.endswith(" tokens > 4096 maximum")


def test_claude_errors_have_its_names() -> None:
    backend = ToldBackend(script)
    with Running([backend], api_key="right", max_queue=1, on_engine_failure="restart") as server:

        def asked(key: str, **more: Any) -> tuple[int, str, str | None]:
            body = {"model": "told", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}], **more}
            sent = httpx2.post(f"{server.url}/v1/messages", json=body, headers={"x-api-key": key}, timeout=20)
            return sent.status_code, sent.json()["error"]["type"], sent.headers.get("retry-after")

        assert asked("wrong") == (401, "authentication_error", None)
        assert asked("right", model="claude-x") == (404, "not_found_error", None)
        assert asked("right", mood=1) == (400, "invalid_request_error", None)
        backend.held.clear()
        body = {"model": "told", "max_tokens": 9, "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
        with httpx2.stream("POST", f"{server.url}/v1/messages", json=body, headers={"x-api-key": "right"}) as stream:
            assert stream.status_code == 200
            assert asked("right") == (429, "rate_limit_error", "1")
            backend.held.set()
            stream.read()
        assert waited(lambda: server.serving.places.taken == 0)
        backend.fails = RuntimeError("secret")
        status, kind, _ = asked("right")
        assert status >= 500 and kind in ("api_error", "overloaded_error")


def test_codex_every_item_is_done_and_the_response_completed(server: Running) -> None:
    found = list(events(codex(server, tools=[FUNCTION]).text))
    done = [each["item"] for each in found if each["type"] == "response.output_item.done"]
    assert [item["type"] for item in done] == ["message", "function_call", "function_call"]
    assert done[0]["role"] == "assistant" and done[0]["content"][0]["type"] == "output_text"
    assert all({"call_id", "name", "arguments"} <= item.keys() for item in done[1:])
    last = found[-1]
    assert last["type"] == "response.completed" and last["response"]["id"] == found[0]["response"]["id"]
    usage = last["response"]["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] > 0
    kinds = {each["type"] for each in found}
    assert {"response.created", "response.output_item.added", "response.content_part.added"} <= kinds
    assert {"response.output_text.delta", "response.output_text.done", "response.content_part.done"} <= kinds


def test_codex_two_calls_and_both_results(told: ToldBackend, server: Running) -> None:
    found = events(codex(server, tools=[FUNCTION]).text)
    items = [each["item"] for each in found if each["type"] == "response.output_item.done"]
    results = [{"type": "function_call_output", "call_id": each["call_id"], "output": "out"} for each in items[1:]]
    asked = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}
    last = list(events(codex(server, tools=[FUNCTION], input=[asked, *items, *results]).text))[-1]
    assert last["response"]["output"][0]["content"][0]["text"] == "Done."
    prompt = told.facts.tokenizer.decode(told.orders[-1].ids, skip_special_tokens=False)
    assert prompt.count("<tool_response>\nout\n</tool_response>") == 2


def test_codex_no_limit_of_its_own_needs_none(server: Running) -> None:
    last = list(events(codex(server).text))[-1]
    assert last["type"] == "response.completed" and last["response"]["output"][0]["content"][0]["text"] == "Hello!"


def test_codex_an_answer_that_the_length_ends_is_incomplete(server: Running) -> None:
    last = list(events(codex(server, max_output_tokens=3).text))[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


def test_codex_too_long_a_prompt_has_its_code(server: Running) -> None:
    sent = codex(server, "x" * 5000)
    assert sent.status_code == 400 and sent.json()["error"]["code"] == "context_length_exceeded"


def test_codex_every_field_and_tool_it_sends_is_taken(server: Running) -> None:
    sent = codex(
        server,
        tools=[FUNCTION, {"type": "namespace", "name": "n", "description": "d", "tools": [{**FUNCTION, "name": "f"}]},
               {"type": "web_search", "external_web_access": False}],
        tool_choice="auto", parallel_tool_calls=True, include=["reasoning.encrypted_content"],
        reasoning={"summary": "auto"}, prompt_cache_key="x", client_metadata={"a": "b"},
    )  # fmt: skip
    assert sent.status_code == 200, sent.text


def test_codex_errors_say_when_to_ask_again() -> None:
    backend = ToldBackend(script)
    with Running([backend], max_queue=1, on_engine_failure="restart") as server:
        backend.held.clear()
        body = {"input": "Hi", "stream": True}
        with httpx2.stream("POST", f"{server.url}/v1/responses", json=body) as stream:
            assert stream.status_code == 200
            full = codex(server)
            assert (full.status_code, full.headers["retry-after"]) == (429, "1")
            backend.held.set()
            stream.read()
        assert waited(lambda: server.serving.places.taken == 0)
        assert codex(server, model="other").status_code == 404
        backend.fails = RuntimeError("secret")
        last = list(events(codex(server).text))[-1]
        assert last["type"] == "response.failed" and last["response"]["error"]["code"] == "server_error"
        assert waited(lambda: not backend.dead)
        assert list(events(codex(server).text))[-1]["type"] == "response.completed"
