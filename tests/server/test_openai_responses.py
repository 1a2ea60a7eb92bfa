"""OpenAI's responses with the official client, and the requests that Codex makes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import msgspec
import openai
import pytest
from told_backend import Running, ToldBackend, events, tokenizer

from runner.server.answering import Delta
from runner.server.openai_responses import Items
from runner.server.openai_responses_body import Item, _messages
from runner.server.tool_calls import Call

THINKING = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' }}{%- if m.reasoning_content -%}"
    "{{ '<think>' + m.reasoning_content + '</think>' }}{%- endif -%}{{ m.content + '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
TOOL: Any = {
    "type": "function",
    "name": "exec_command",
    "description": "Runs a command",
    "parameters": {"type": "object", "properties": {"cmd": {"type": "string"}}, "required": ["cmd"]},
    "strict": False,
}
CALL = '<tool_call>\n{"name": "exec_command", "arguments": {"cmd": "ls"}}\n</tool_call>'


def script(prompt: str, _order: object) -> str:
    if "<tool_response>\n" in prompt:
        return "Two files."
    if "exec_command" in prompt:
        return f"<think>Look.</think>I look.{CALL}\n{CALL}"
    return "<think>Greet.</think>Hello!"


@pytest.fixture(scope="module")
def told() -> ToldBackend:
    return ToldBackend(script, facts=tokenizer(THINKING), context=8192)


@pytest.fixture(scope="module")
def server(told: ToldBackend) -> Iterator[Running]:
    with Running([told]) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def prompt_of(told: ToldBackend) -> str:
    return told.facts.tokenizer.decode(told.orders[-1].ids, skip_special_tokens=False)


def test_a_whole_response(client: openai.OpenAI) -> None:
    response = client.responses.create(model="told", input="Say hello", instructions="Be kind.")
    assert response.output_text == "Hello!" and response.status == "completed"
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.usage is not None and response.usage.output_tokens_details.reasoning_tokens > 5
    short = client.responses.create(model="told", input="Say hello", max_output_tokens=3)
    assert short.status == "incomplete" and short.incomplete_details is not None
    assert short.incomplete_details.reason == "max_output_tokens"


def test_a_stream(client: openai.OpenAI, server: Running) -> None:
    with client.responses.stream(model="told", input=[{"role": "user", "content": "Say hello"}]) as stream:
        kinds = [each.type for each in stream]
        final = stream.get_final_response()
    assert final.output_text == "Hello!" and kinds[0] == "response.created" and kinds[-1] == "response.completed"
    sent = httpx2.post(f"{server.url}/v1/responses", json={"input": "Say hello", "stream": True})
    found = list(events(sent.text))
    assert [each["sequence_number"] for each in found] == list(range(len(found)))
    assert all(f"event: {each['type']}\n" in sent.text for each in found)
    assert found[-1]["response"]["id"] and found[-1]["response"]["usage"]["total_tokens"] > 10
    deltas = [each for each in found if each["type"] == "response.output_text.delta"]
    assert {"item_id", "output_index", "content_index", "logprobs"} <= deltas[0].keys()
    assert "".join(each["delta"] for each in deltas) == "Hello!"


def codex(items: list[Any], **more: Any) -> dict[str, Any]:
    """A request as Codex 0.171.0 makes it, shortened."""

    def message(role: str, text: str) -> dict[str, Any]:
        return {"type": "message", "id": f"msg_{role}", "role": role, "content": [{"type": "input_text", "text": text}]}

    first = [message("developer", "You are Codex."), message("developer", "Sandboxed."), message("user", "<env/>")]
    namespace = {
        "type": "namespace",
        "name": "agents",
        "description": "d",
        "tools": [{**TOOL, "name": "spawn", "defer_loading": True}],
    }
    return {
        "model": "told",
        "input": [*first, message("user", "How many files?"), *items],
        "tools": [TOOL, namespace, {"type": "web_search", "external_web_access": False}],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "reasoning": {"summary": "auto"},
        "prompt_cache_key": "019ad",
        "client_metadata": {"a": "b"},
        **more,
    }


def test_codex_there_and_back(told: ToldBackend, server: Running) -> None:
    sent = httpx2.post(f"{server.url}/v1/responses", json=codex([]), timeout=20)
    assert sent.status_code == 200, sent.text
    assert "tools[2] (web_search)" in sent.headers["x-runner-ignored"]
    prompt = prompt_of(told)
    assert prompt.startswith("<|im_start|>system\nYou are Codex.\n\nSandboxed.") and '"spawn"' in prompt
    items = [each["item"] for each in events(sent.text) if each["type"] == "response.output_item.done"]
    assert [item["type"] for item in items] == ["reasoning", "message", "function_call", "function_call"]
    assert json.loads(items[2]["arguments"]) == {"cmd": "ls"} and items[2]["call_id"] != items[3]["call_id"]
    back = [
        *({**item, "encrypted_content": None} if item["type"] == "reasoning" else item for item in items),
        *({"type": "function_call_output", "call_id": item["call_id"], "output": "a b"} for item in items[2:]),
    ]
    final = httpx2.post(f"{server.url}/v1/responses", json=codex(back), timeout=20)
    completed = list(events(final.text))[-1]
    assert completed["type"] == "response.completed"
    assert completed["response"]["output"][-1]["content"][0]["text"] == "Two files."
    after = prompt_of(told)
    assert after.startswith(prompt.removesuffix("<|im_start|>assistant\n"))
    assert "<|im_start|>assistant\n<think>Look.</think>I look." in after


def test_forms_and_forced_calls(client: openai.OpenAI) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "x", "strict": True, "schema": {"type": "boolean"}}}
    assert client.responses.create(model="told", input="x", text=form).output_text in ("true", "false")
    forced: Any = {"type": "function", "name": "exec_command"}
    called = client.responses.create(model="told", input="x", tools=[TOOL], tool_choice=forced)
    assert called.output[-1].type == "function_call" and json.loads(called.output[-1].arguments)["cmd"] is not None


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "unheard_of"}]}, "tools[0].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "item_reference"),
        ({"input": []}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens must"),
        ({"top_p": 2}, "top_p must"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input_image"),
        ({"mood": 1}, "mood"),
        ({"input": "x" * 9000}, "maximum context length"),
    ],
)
def test_refused_by_name(client: openai.OpenAI, extra: dict[str, Any], named: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="told", input="x", extra_body=extra)
    assert named in caught.value.message


def test_a_failure_within_a_stream() -> None:
    backend = ToldBackend(script)
    with Running([backend], on_engine_failure="restart") as server:
        backend.fails = RuntimeError("secret")
        sent = httpx2.post(f"{server.url}/v1/responses", json={"input": "x", "stream": True})
        last = list(events(sent.text))[-1]
        assert last["type"] == "response.failed" and last["response"]["error"]["code"] == "server_error"
        assert "secret" not in sent.text


def test_names_in_a_header_have_no_controls(server: Running) -> None:
    body = {"model": "told", "input": "Say hello", "tools": [{"type": "web_search_\rX: y\x00\x7f"}]}
    sent = httpx2.post(f"{server.url}/v1/responses", json=body)
    assert sent.status_code == 200 and "web_search_ X: y" in sent.headers["x-runner-ignored"]


def test_an_unknown_name_of_any_length_is_refused(server: Running) -> None:
    """To look for a similar one among those that are known would take minutes."""
    sent = httpx2.post(f"{server.url}/v1/responses", json={"model": "told", "input": "x", "n" * 2_000_000: 1})
    assert sent.status_code == 400 and len(sent.text) < 1000


def test_reasoning_belongs_to_the_turn_it_came_in() -> None:
    def reasoning(text: str) -> dict[str, Any]:
        return {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": text}]}

    def said(role: str, text: str) -> dict[str, Any]:
        return {"type": "message", "role": role, "content": text}

    items = [
        said("user", "U1"), reasoning("R1"), said("user", "U2"), said("assistant", "A2"), said("user", "U3"),
        reasoning("R3"), reasoning("R4"), said("assistant", "A3"),
    ]  # fmt: skip
    found = [
        (m["role"], m["content"], m.get("reasoning_content")) for m in _messages(msgspec.convert(items, list[Item]))
    ]
    assert found == [
        ("user", "U1", None), ("assistant", "", "R1"), ("user", "U2", None), ("assistant", "A2", None),
        ("user", "U3", None), ("assistant", "A3", "R3\nR4"),
    ]  # fmt: skip


@pytest.mark.parametrize(("arguments", "status"), [('{"cmd": "l', "incomplete"), ('{"cmd": "ls"}', "completed")])
def test_a_call_that_the_length_has_cut_says_so(arguments: str, status: str) -> None:
    items = Items()
    items.add(Delta(0, calls=[Call(0, "call_1", "exec_command", arguments)]))
    items.end(cut=True)
    assert [(item["status"], item["arguments"]) for item in items.done] == [(status, arguments)]
    items.add(Delta(0, text="Half a sen"))
    items.end(cut=True)
    assert items.done[-1]["status"] == "incomplete"
