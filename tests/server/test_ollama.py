"""Ollama's API with its Python client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import ollama
import pytest
from told_backend import Running, ToldBackend, tokenizer

from runner.server.app import routes

HELLO = [{"role": "user", "content": "Say hello"}]
THINKING = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking -%}{{ '<think></think>' }}{%- endif -%}{%- endif -%}"
)


def script(prompt: str, _order: object) -> str:
    if "<tools>" in prompt and "<tool_response>\n" not in prompt:
        return '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    return "Hello!" if prompt.endswith("</think>") else "<think>Greet.</think>Hello!"


@pytest.fixture(scope="module")
def told() -> ToldBackend:
    return ToldBackend(script, facts=tokenizer(THINKING))


@pytest.fixture(scope="module")
def server(told: ToldBackend) -> Iterator[Running]:
    with Running([told]) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> ollama.Client:
    return ollama.Client(server.url)


def prompt_of(told: ToldBackend) -> str:
    return told.facts.tokenizer.decode(told.orders[-1].ids, skip_special_tokens=False)


def test_chat_whole_and_streamed(client: ollama.Client) -> None:
    whole = client.chat("told", HELLO)
    assert whole.message.content == "Hello!" and whole.message.thinking == "Greet."
    assert whole.done and whole.done_reason == "stop" and whole.eval_count > 5 and whole.prompt_eval_count > 10
    assert isinstance(whole.total_duration, int) and whole.total_duration > whole.eval_duration > 0
    parts = list(client.chat("told:latest", HELLO, stream=True))
    assert "".join(part.message.content or "" for part in parts) == "Hello!"
    assert "".join(part.message.thinking or "" for part in parts) == "Greet."
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]


def test_thinking_off_and_options(told: ToldBackend, client: ollama.Client) -> None:
    options: Any = {"temperature": 0.5, "num_predict": 3, "stop": ["x"], "seed": 4, "repeat_penalty": 1.2,
                    "repeat_last_n": 64, "num_ctx": 2048, "num_thread": 4}  # fmt: skip
    answer = client.chat("told", HELLO, think=False, options=options)
    assert answer.message.content == "Hel" and answer.done_reason == "length" and not answer.message.thinking
    params = told.orders[-1].params
    assert (params.temperature, params.seed, params.repetition_penalty, params.penalty_window) == (0.5, 4, 1.2, 64)
    with pytest.raises(ollama.ResponseError, match="maximum context length is 20 tokens"):
        client.chat("told", HELLO, options={"num_ctx": 20})
    client.chat("told", HELLO, options={"num_predict": -1, "repeat_last_n": 0, "repeat_penalty": 1.5})
    for name in ("num_predict", "num_ctx"):
        with pytest.raises(ollama.ResponseError, match=f"options.{name} must be at least 1"):
            client.chat("told", HELLO, options={name: -5})
    for name, value in (("repeat_penalty", 0), ("temperature", -1), ("num_predict", 0), ("stop", [""])):
        with pytest.raises(ollama.ResponseError, match=f"^options.{name}"):
            client.chat("told", HELLO, options={name: value})
    client.chat("told", HELLO, options={"repeat_last_n": 10**12})
    assert told.orders[-1].params.repetition_penalty == 1.0


def test_tools_there_and_back(told: ToldBackend, client: ollama.Client) -> None:
    def add(a: int) -> int:
        """Adds.

        Args:
            a: a number
        """
        return a

    answer = client.chat("told", HELLO, tools=[add])
    (call,) = answer.message.tool_calls or ()
    assert call.function.name == "add" and call.function.arguments == {"a": 1}
    history = [*HELLO, answer.message, {"role": "tool", "tool_name": "add", "content": "1"}]
    final = client.chat("told", history, tools=[add])
    assert final.message.content == "Hello!" and "<tool_response>\n1\n</tool_response>" in prompt_of(told)
    streamed = [part.message.tool_calls for part in client.chat("told", HELLO, tools=[add], stream=True)]
    assert [len(calls) for calls in streamed if calls] == [1]


def test_a_call_that_the_length_has_cut_is_no_call(client: ollama.Client) -> None:
    """With what it has of arguments, a client would make it."""
    add: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    whole = client.chat("told", HELLO, tools=[add]).eval_count or 0
    for count in range(1, whole):
        options = {"num_predict": count}
        parts = [client.chat("told", HELLO, tools=[add], options=options)]
        parts += client.chat("told", HELLO, tools=[add], options=options, stream=True)
        assert parts[0].done_reason == parts[-1].done_reason == "length"
        for part in parts:
            assert all(call.function.arguments == {"a": 1} for call in part.message.tool_calls or ())


def test_generate(told: ToldBackend, client: ollama.Client) -> None:
    answer = client.generate("told", "Say hello", system="Be brief.", think=False)
    assert answer.response == "Hello!"
    assert prompt_of(told).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSay hello")
    client.generate("told", "as it is", raw=True)
    assert prompt_of(told) == "as it is"
    assert "".join(part.response for part in client.generate("told", "x", stream=True, think=False)) == "Hello!"
    assert client.generate("told", "").done_reason == "load"
    assert client.chat("told", []).done_reason == "load"


def test_forms(client: ollama.Client) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    answer = client.chat("told", HELLO, format=schema, think=False, options={"seed": 1, "num_predict": 500})
    assert set(json.loads(answer.message.content or "")) >= {"a"}
    assert isinstance(json.loads(client.generate("told", "x", format="json", think=False).response), dict)


def test_models(client: ollama.Client, server: Running) -> None:
    (model,) = client.list().models
    assert model.model == "told" and model.details is not None and model.details.family == "told" and model.digest
    shown = client.show("told")
    assert shown.modelinfo is not None and shown.modelinfo["told.context_length"] == 4096
    assert shown.capabilities == ["completion", "tools", "thinking"]
    assert client.ps().models[0].model == "told"
    assert httpx2.get(server.url).text == "Ollama is running" and httpx2.head(server.url).status_code == 200
    assert httpx2.get(f"{server.url}/api/version").json()["version"]


def test_what_is_not_done(client: ollama.Client, server: Running) -> None:
    for ask in (
        lambda: client.pull("x"),
        lambda: client.delete("told"),
        lambda: client.copy("told", "x"),
        lambda: client.create("x", from_="told"),
        lambda: client.push("told"),
    ):
        with pytest.raises(ollama.ResponseError, match="models are given to this server when it is started") as caught:
            ask()
        assert caught.value.status_code == 403
    with pytest.raises(ollama.ResponseError) as missing:
        client.chat("llama3.2", HELLO)
    assert missing.value.status_code == 404 and "llama3.2" in missing.value.error
    with pytest.raises(ollama.ResponseError, match="embed"):
        client.embed("told", "x")


@pytest.mark.parametrize(
    ("path", "extra", "named"),
    [
        ("chat", {"options": {"mirostat": 2}}, "options.mirostat"),
        ("chat", {"options": {"temp": 2}}, "options.temp"),
        ("chat", {"format": "xml"}, "format"),
        ("chat", {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "images"),
        ("chat", {"mood": 1}, "mood"),
        ("generate", {"template": "x"}, "template"),
        ("generate", {"suffix": "x"}, "suffix"),
        ("generate", {"context": [1]}, "context"),
        ("generate", {"raw": True, "system": "x"}, "raw"),
    ],
)
def test_refused_by_name(server: Running, path: str, extra: dict[str, Any], named: str) -> None:
    body = {"model": "told", **({"messages": HELLO} if path == "chat" else {"prompt": "x"}), **extra}
    answer = httpx2.post(f"{server.url}/api/{path}", json=body)
    assert answer.status_code == 400 and named in answer.json()["error"]


def test_every_api_gives_the_same_prompt(told: ToldBackend, server: Running) -> None:
    """Decision 2: one kind of request inside."""
    prompts = []
    for path, extra in (
        ("/v1/chat/completions", {"reasoning_effort": "none"}),
        ("/v1/messages", {"max_tokens": 10, "thinking": {"type": "disabled"}}),
        ("/api/chat", {"think": False, "stream": False}),
    ):
        answer = httpx2.post(server.url + path, json={"model": "told", "messages": HELLO, **extra})
        assert answer.status_code == 200, answer.text
        prompts.append(list(told.orders[-1].ids))
    assert prompts[0] == prompts[1] == prompts[2]
    assert len(routes(server.serving)) > 20


def test_thoughts_as_messages_of_their_own() -> None:
    template = (
        "{%- for m in messages -%}{{ '[' + m.role + '|' + (m.reasoning_content or '') + '|' + m.content + ']' }}"
        "{%- endfor -%}"
    )
    told = ToldBackend(lambda prompt, order: "x", facts=tokenizer(template))
    thought, answer, asked = ({"role": role, "content": role[0]} for role in ("thinking", "assistant", "user"))
    with Running([told]) as server:
        for messages, prompt in (
            ([asked, thought, answer, asked], "[user||u][assistant|t|a][user||u]"),
            ([asked, thought, asked], "[user||u][assistant|t|][user||u]"),
            ([asked, thought, {**answer, "thinking": "own"}, asked], "[user||u][assistant|own|a][user||u]"),
        ):
            sent = httpx2.post(f"{server.url}/api/chat", json={"messages": messages, "stream": False})
            assert sent.status_code == 200, sent.text
            assert prompt_of(told) == prompt
