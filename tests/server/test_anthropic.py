"""Anthropic's messages with the official client, and the requests that Claude Code makes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx2
import pytest
from told_backend import Running, ToldBackend, tokenizer

HELLO: Any = [{"role": "user", "content": "Say hello"}]
TOOLS: Any = [
    {
        "name": "Read",
        "description": "Reads a file",
        "input_schema": {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "type": "object",
            "properties": {"path": {"type": "string"}},
            "required": ["path"],
            "additionalProperties": False,
        },
        "cache_control": {"type": "ephemeral"},
        "defer_loading": True,
    },
    {"type": "web_search_20250305", "name": "web_search", "max_uses": 5},
]
THINKING = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' }}{%- if m.reasoning_content -%}"
    "{{ '<think>' + m.reasoning_content + '</think>' }}{%- endif -%}{{ m.content + '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking -%}{{ '<think></think>' }}{%- endif -%}{%- endif -%}"
)
CALL = '<tool_call>\n{"name": "Read", "arguments": {"path": "a.txt"}}\n</tool_call>'


def script(prompt: str, _order: object) -> str:
    if "<tool_response>\n" in prompt:
        return "It says hi."
    if "Read" in prompt:
        return f"<think>A file.</think>I look.\n{CALL}\n{CALL}"
    if "</think>" in prompt[-12:]:
        return "Hello!"
    return "<think>Greet.</think>\n\nHello!"


@pytest.fixture(scope="module")
def told() -> ToldBackend:
    return ToldBackend(script, facts=tokenizer(THINKING), context=8192)


@pytest.fixture(scope="module")
def server(told: ToldBackend) -> Iterator[Running]:
    with Running([told]) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0)


def prompt_of(told: ToldBackend) -> str:
    return told.facts.tokenizer.decode(told.orders[-1].ids, skip_special_tokens=False)


def test_a_whole_message(client: anthropic.Anthropic) -> None:
    message = client.messages.create(model="told", max_tokens=100, messages=HELLO)
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.content[0].thinking == "Greet." and message.content[1].text == "Hello!"
    assert message.stop_reason == "end_turn" and message.usage.input_tokens > 10 and message.usage.output_tokens > 10


def test_a_stream_has_its_events_in_order(client: anthropic.Anthropic) -> None:
    with client.messages.stream(model="told", max_tokens=100, messages=HELLO) as stream:
        kinds = [each.type for each in stream if each.type not in ("text", "thinking", "signature", "input_json")]
        message = stream.get_final_message()
    order = [kind for place, kind in enumerate(kinds) if place == 0 or kind != kinds[place - 1]]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert [kind for kind in order if kind != "ping"] == [
        "message_start",
        *block,
        *block,
        "message_delta",
        "message_stop",
    ]
    assert message.content[0].thinking == "Greet." and message.content[1].text == "Hello!"
    assert message.usage.output_tokens > 10


def test_the_wire(server: Running) -> None:
    body = {"model": "told", "max_tokens": 50, "messages": HELLO, "stream": True}
    sent = httpx2.post(f"{server.url}/v1/messages?beta=true", json=body)
    lines = sent.text.split("\n\n")
    first = json.loads(lines[0].split("\ndata: ")[1])
    assert lines[0].startswith("event: message_start\n") and first["message"]["content"] == []
    assert {"input_tokens", "output_tokens"} <= first["message"]["usage"].keys()
    assert lines[1].startswith("event: ping")


def test_tools_there_and_back(told: ToldBackend, client: anthropic.Anthropic) -> None:
    asked: Any = [{"role": "user", "content": "Read a.txt"}]
    raw = client.messages.with_raw_response.create(model="told", max_tokens=500, messages=asked, tools=TOOLS)
    message = raw.parse()
    assert "tools[1] (web_search_20250305)" in raw.headers["x-runner-ignored"]
    assert "Reads a file" in prompt_of(told) and "web_search" not in prompt_of(told)
    assert message.stop_reason == "tool_use"
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert message.content[2].input == {"path": "a.txt"}
    with client.messages.stream(model="told", max_tokens=500, messages=asked, tools=TOOLS) as stream:
        streamed = stream.get_final_message()
    assert [block.type for block in streamed.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert streamed.content[3].input == {"path": "a.txt"} and streamed.stop_reason == "tool_use"
    results = [
        {"type": "tool_result", "tool_use_id": message.content[2].id, "content": "hi"},
        {"type": "tool_result", "tool_use_id": message.content[3].id, "is_error": True,
         "content": [{"type": "text", "text": "gone"}]},
        {"type": "text", "text": "And now?"},
    ]  # fmt: skip
    history: Any = [*asked, {"role": "assistant", "content": message.content}, {"role": "user", "content": results}]
    final = client.messages.create(model="told", max_tokens=100, messages=history, tools=TOOLS)
    assert final.content[0].text == "It says hi."
    prompt = prompt_of(told)
    assert "<tool_response>\nhi\n</tool_response>" in prompt and "Error: gone" in prompt and "And now?" in prompt
    assert "<think>A file.</think>I look." in prompt


def test_hidden_reasoning_is_played_back(told: ToldBackend, client: anthropic.Anthropic) -> None:
    thinking: Any = {"type": "adaptive", "display": "omitted"}
    message = client.messages.create(model="told", max_tokens=100, messages=HELLO, thinking=thinking)
    assert message.content[0].thinking == "" and message.content[0].signature
    with client.messages.stream(model="told", max_tokens=100, messages=HELLO, thinking=thinking) as stream:
        streamed = stream.get_final_message()
    assert streamed.content[0].thinking == "" and streamed.content[0].signature == message.content[0].signature
    history: Any = [*HELLO, {"role": "assistant", "content": streamed.content}, *HELLO]
    client.messages.create(model="told", max_tokens=100, messages=history)
    assert "<think>Greet.</think>Hello!" in prompt_of(told)
    for signature in ("", "runner1.!!!", "runner1.AAAA", "other"):
        block = {"type": "thinking", "thinking": "", "signature": signature}
        history[1]["content"] = [block, {"type": "text", "text": "x"}]
        client.messages.create(model="told", max_tokens=100, messages=history)
        assert "<think>" not in prompt_of(told).replace("<think></think>", "")


def test_reasoning_off_stops_and_prefill(told: ToldBackend, client: anthropic.Anthropic) -> None:
    off = client.messages.create(model="told", max_tokens=100, messages=HELLO, thinking={"type": "disabled"})
    assert [block.type for block in off.content] == ["text"]
    stopped = client.messages.create(
        model="told", max_tokens=100, messages=HELLO, thinking={"type": "disabled"}, stop_sequences=["zzz", "lo"]
    )
    assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == "lo" and stopped.content[0].text == "Hel"
    short = client.messages.create(model="told", max_tokens=3, messages=HELLO, thinking={"type": "disabled"})
    assert short.stop_reason == "max_tokens"
    client.messages.create(model="told", max_tokens=100, messages=[*HELLO, {"role": "assistant", "content": "Well,"}])
    assert prompt_of(told).endswith("assistant\nWell,")


def claude_code(**more: Any) -> dict[str, Any]:
    """A request as Claude Code 2.1.332 makes it, shortened."""
    text = {"type": "text", "cache_control": {"type": "ephemeral"}}
    return {
        "model": "told",
        "max_tokens": 32000,
        "stream": True,
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.332.abc; cch=1;"},
            {**text, "text": "You are Claude Code."},
            {**text, "text": "Be brief."},
        ],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "<system-reminder>"}, {**text, "text": "Hello"}]},
            {"role": "system", "content": [{**text, "text": "Tools are deferred."}]},
        ],
        "tools": [TOOLS[0]],
        "thinking": {"type": "adaptive", "display": "updates"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "metadata": {"user_id": "{}"},
        **more,
    }


def test_claude_codes_request(told: ToldBackend, server: Running) -> None:
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "claude-code-20250219,x", "x-api-key": "dummy"}
    for stream in (True, False):
        sent = httpx2.post(
            f"{server.url}/v1/messages?beta=true", json=claude_code(stream=stream), headers=headers, timeout=20
        )
        assert sent.status_code == 200, sent.text
        assert sent.headers["x-runner-ignored"].startswith(("context_management", "messages", "metadata", "system"))
    prompt = prompt_of(told)
    assert "billing" not in prompt and "You are Claude Code.\n\nBe brief." in prompt and "Tools are deferred." in prompt
    # The next prompt has another header; what comes before the answer stays the same, whichever form it has.
    other = claude_code(stream=False)
    other["system"][0]["text"] += " cch=2"
    other["messages"][1]["content"] = "Tools are deferred."
    httpx2.post(f"{server.url}/v1/messages?beta=true", json=other, headers=headers, timeout=20)
    assert prompt_of(told) == prompt


def test_counting(server: Running, client: anthropic.Anthropic, told: ToldBackend) -> None:
    count = client.messages.count_tokens(model="told", messages=HELLO, tools=[])
    client.messages.create(model="told", max_tokens=10, messages=HELLO)
    assert count.input_tokens == len(told.orders[-1].ids)
    assert [model.id for model in client.models.list()] == ["told"]


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"messages": [{"role": "user", "content": "x" * 9000}]}, r"prompt is too long: \d+ tokens > 8192 maximum"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"mood": 1}, "mood"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"tools": [{"type": "unheard_of", "name": "x"}]}, r"tools\[0\]"),
        ({"tools": [{"name": "x"}]}, r"tools\[0\].input_schema"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]}, "results"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
    ],
)
def test_refused_by_name(client: anthropic.Anthropic, extra: dict[str, Any], named: str) -> None:
    with pytest.raises(anthropic.BadRequestError, match=named) as caught:
        client.messages.create(**{"model": "told", "max_tokens": 10, "messages": HELLO, "extra_body": extra})
    body: Any = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"


def test_not_found(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="claude-x", max_tokens=10, messages=HELLO)


def test_pings_while_a_prompt_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.server.streaming.PING_SECONDS", 0.05)
    monkeypatch.setattr("runner.server.anthropic.START_SECONDS", 0.02)
    backend = ToldBackend(lambda prompt, order: "ok")
    backend.held.clear()
    with Running([backend]) as server:
        body = {"model": "told", "max_tokens": 50, "messages": HELLO, "stream": True}
        with httpx2.stream("POST", f"{server.url}/v1/messages", json=body, timeout=10) as sent:
            text = ""
            for piece in sent.iter_text():
                text += piece
                if text.count("event: ping") == 4:
                    backend.held.set()
    assert text.index("message_start") < text.index("ping") and "message_stop" in text


def test_the_first_event_says_what_was_read_before() -> None:
    backend = ToldBackend(lambda prompt, order: "ok")
    backend.cached = 7
    body: dict[str, Any] = {"model": "told", "max_tokens": 50, "messages": HELLO}
    with Running([backend]) as server:
        usages = []
        with httpx2.stream("POST", f"{server.url}/v1/messages", json={**body, "stream": True}, timeout=10) as sent:
            for line in sent.iter_lines():
                if line.startswith("data: "):
                    value = json.loads(line[6:])
                    usages += [u for u in (value.get("message", {}).get("usage"), value.get("usage")) if u]
        usages.append(httpx2.post(f"{server.url}/v1/messages", json=body).json()["usage"])
        del body["max_tokens"]
        whole = httpx2.post(f"{server.url}/v1/messages/count_tokens", json=body).json()["input_tokens"]
        body["max_tokens"] = 50
        backend.fails = MemoryError()
        with httpx2.stream("POST", f"{server.url}/v1/messages", json={**body, "stream": True}, timeout=10) as sent:
            assert "event: error" in "".join(sent.iter_text())
    assert len(usages) == 3
    for usage in usages:
        assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (whole - 7, 7)
