"""Requests as other clients make them, over a real socket: each is answered in the form that its client reads.

`tests/data/clients` has them, written by hand after what each client's published source sends; it says which.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from places import ROOT
from told_backend import Running, ToldBackend, events, tokenizer

FILES = sorted((ROOT / "tests" / "data" / "clients").glob("*.json"))
CASES = [
    pytest.param(request, id=f"{file.stem}: {request['what']}")
    for file in FILES
    for request in json.loads(file.read_text(encoding="utf-8"))["requests"]
]
TEMPLATE = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' }}{%- if m.reasoning_content -%}"
    "{{ '<think>' + m.reasoning_content + '</think>' }}{%- endif -%}"
    "{%- if m.content is string -%}{{ m.content }}{%- else -%}{%- for p in m.content -%}{{ p.text }}{%- endfor -%}"
    "{%- endif -%}{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
CALL = '<tool_call>\n{"name": "get_time", "arguments": {"zone": "UTC"}}\n</tool_call>'


def script(prompt: str, _order: object) -> str:
    return CALL if "get_time" in prompt and "noon" not in prompt else "Hello!"


@pytest.fixture(scope="module")
def told() -> ToldBackend:
    return ToldBackend(script, facts=tokenizer(TEMPLATE))


@pytest.fixture(scope="module")
def server(told: ToldBackend) -> Iterator[Running]:
    with Running([told], api_key="none") as running:
        yield running


def chunks(text: str, usage: bool) -> Iterator[dict[str, Any]]:
    """The choices of a stream, which has what clients count on: one id, a finish that is null until the end, counts
    behind it only where they were asked for, and [DONE]."""
    assert text.endswith("data: [DONE]\n\n")
    found = list(events(text))
    assert len({(each["id"], each["created"], each["model"]) for each in found}) == 1
    counts = [each["usage"] for each in found if each.get("usage")]
    assert len(counts) == usage and (not usage or found[-1]["choices"] == [])
    choices = [choice for each in found for choice in each["choices"]]
    assert all(choice["index"] == 0 for choice in choices)
    *before, last = [choice["finish_reason"] for choice in choices]
    assert set(before) <= {None} and last in ("stop", "length", "tool_calls")
    yield from choices


def gathered(choices: list[dict[str, Any]]) -> tuple[str, dict[str, Any] | None]:
    """Text and call of a streamed chat, put together as clients do: by index, the name once, arguments in pieces."""
    text, name, arguments = "", "", ""
    for choice in choices:
        text += choice["delta"].get("content") or ""
        for part in choice["delta"].get("tool_calls") or ():
            assert part["index"] == 0
            if "id" in part:
                assert name == "" and part["type"] == "function"
                name = part["function"]["name"]
            arguments += part["function"].get("arguments", "")
    return text, {"name": name, "arguments": json.loads(arguments)} if name else None


def read(wire: str, sent: httpx2.Response, request: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """The answer, as a client of the wire reads it."""
    usage = request.get("usage", False)
    if wire == "chat-stream":
        assert sent.headers["content-type"].startswith("text/event-stream")
        return gathered(list(chunks(sent.text, usage)))
    if wire == "chat":
        (choice,) = sent.json()["choices"]
        assert choice["finish_reason"] == "stop" and sent.json()["usage"]["total_tokens"] > 0
        return choice["message"]["content"], None
    if wire == "completion-stream":
        return "".join(choice["text"] for choice in chunks(sent.text, usage)), None
    if wire == "completion":
        return "".join(choice["text"] for choice in sent.json()["choices"]), None
    if wire == "responses-stream":
        found = list(events(sent.text))
        assert found[-1]["type"] == "response.completed"
        return "".join(each["delta"] for each in found if each["type"] == "response.output_text.delta"), None
    assert wire in ("lines", "generate-lines") and sent.headers["content-type"].startswith("application/x-ndjson")
    lines = [json.loads(line) for line in sent.text.splitlines()]
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True] and lines[-1]["eval_count"] > 0
    if wire == "lines":
        return "".join(line["message"]["content"] for line in lines), None
    return "".join(line["response"] for line in lines), None


def facts(wire: str, value: Any) -> None:
    """What clients look up in answers about models."""
    if wire == "models":
        assert value["object"] == "list" and [model["id"] for model in value["data"]] == ["told"]
    elif wire == "version":
        assert [int(part) for part in value["version"].split(".")[:2]]
    elif wire == "tags":
        (model,) = value["models"]
        assert model["model"] == model["name"] and model["digest"] and model["details"]["family"]
    elif wire == "ps":
        assert value["models"][0]["expires_at"] and value["models"][0]["size"] >= 0
    elif wire == "show":
        assert value["model_info"]["told.context_length"] == 4096
        assert {"completion", "tools"} <= set(value["capabilities"]) and isinstance(value["parameters"], str)
    else:  # lm-eval's: log-likelihoods of prompts, the first token's unknown, and one token more
        for choice in value["choices"]:
            found = choice["logprobs"]
            assert found["token_logprobs"][0] is None and len(found["tokens"]) == len(found["token_logprobs"])
            assert all(isinstance(each, float) for each in found["token_logprobs"][1:])
            assert len(found["top_logprobs"]) == len(found["tokens"])
        assert [choice["index"] for choice in value["choices"]] == [0, 1]


@pytest.mark.parametrize("request_", CASES)
def test_requests_of_other_clients(told: ToldBackend, server: Running, request_: dict[str, Any]) -> None:
    wire, path = request_["wire"], request_["path"]
    headers = {"Authorization": "Bearer none", **request_.get("headers", {})}
    sent = httpx2.request(
        request_.get("method", "POST"), server.url + path, json=request_.get("body"), headers=headers, timeout=20
    )
    assert sent.status_code == 200, sent.text
    assert request_.get("ignored", "") in sent.headers.get("x-runner-ignored", "")
    if "prompt" not in request_:
        facts(wire, sent.json())
        return
    prompt = told.facts.tokenizer.decode(told.orders[-1].ids, skip_special_tokens=False)
    assert [each for each in request_["prompt"] if each not in prompt] == []
    text, call = read(wire, sent, request_)
    if "call" in request_:
        assert call == request_["call"]
    elif "json" in request_:
        (name, values), *_ = request_["json"].items()
        assert json.loads(text).keys() == {name} and json.loads(text)[name] in values
    else:
        assert text == request_["said"] and call is None
    if "tokens" in request_:
        assert list(events(sent.text))[-1]["usage"]["completion_tokens"] == request_["tokens"]
