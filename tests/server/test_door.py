"""Who may ask, and the bounds on what they send: hosts, origins, keys, sizes, times, broken HTTP."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import openai
import pytest
from told_backend import Running, ToldBackend, waited

from runner.server import limits
from runner.server.errors import ApiError
from runner.server.fields import MAX_DEPTH, parse
from runner.server.limits import host_of
from runner.server.log import LOG
from runner.server.model import Served

BODY = json.dumps({"messages": [{"role": "user", "content": "x"}]})


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    backend = ToldBackend(lambda prompt, order: "yes")
    options = {"allow_hosts": ["box.lan"], "allow_origins": ["https://chat.example.org"], "api_key": "s3cret"}
    with Running([backend], **options) as running:
        yield running


def ask(server: Running, path: str = "/v1/models", **headers: str) -> httpx2.Response:
    given = {"authorization": "Bearer s3cret", **{name.replace("_", "-"): value for name, value in headers.items()}}
    return httpx2.get(server.url + path, headers=given)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:80", 200),
        ("localhost", 200),
        ("app.localhost:8080", 200),
        ("[::1]:8080", 200),
        ("box.lan", 200),
        ("BOX.LAN.:1", 200),
        ("evil.example", 403),
        ("192.168.1.4", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost@evil.example", 400),
        ("evil.example/box.lan", 400),
        ("", 400),
        ("box.lan:abc", 400),
    ],
)
def test_hosts(server: Running, host: str, status: int) -> None:
    answer = ask(server, host=host)
    assert answer.status_code == status, answer.text
    if status == 403:
        assert "--allow-host" in answer.json()["error"]["message"]


def test_a_request_of_http_1_0_without_a_host(server: Running) -> None:
    assert b" 400 " in server.raw(b"GET /v1/models HTTP/1.0\r\n\r\n")


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("https://chat.example.org", 200),
        ("https://evil.example", 403),
        ("null", 403),
        ("file://", 403),
        ("http://[", 403),
    ],
)
def test_origins(server: Running, origin: str, status: int) -> None:
    answer = ask(server, origin=origin)
    assert answer.status_code == status
    assert answer.headers.get("access-control-allow-origin") == (origin if status == 200 else None)
    asked = httpx2.options(
        f"{server.url}/v1/chat/completions", headers={"origin": origin, "access-control-request-method": "POST"}
    )
    assert asked.status_code == (204 if status == 200 else 403)


def test_the_servers_own_page_may_ask(server: Running) -> None:
    assert ask(server, origin=server.url).status_code == 200


def test_keys(server: Running) -> None:
    url = f"{server.url}/v1/models"
    assert httpx2.get(url).status_code == 401 and httpx2.get(url).headers["www-authenticate"] == "Bearer"
    for headers in ({"authorization": "Bearer wrong"}, {"x-api-key": "s3cre"}, {"authorization": "Basic s3cret"}):
        assert httpx2.get(url, headers=headers).status_code == 401
    assert httpx2.get(url, headers={"x-api-key": "s3cret"}).status_code == 200
    assert httpx2.get(f"{server.url}/health").status_code == 200
    assert httpx2.get(f"{server.url}/metrics").status_code == 401
    assert httpx2.post(f"{server.url}/v1/messages", content=BODY).json()["type"] == "error"
    assert "s3cret" not in json.dumps(server.lines)


def test_keys_are_compared_in_constant_time(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(limits.hmac, "compare_digest", lambda a, b: seen.append((a, b)) or False)
    assert ask(server).status_code == 401 and seen == [(b"s3cret", b"s3cret")]


def test_bodies_that_are_too_large_or_compressed(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    url, headers = f"{server.url}/v1/chat/completions", {"authorization": "Bearer s3cret"}
    monkeypatch.setattr(limits, "MAX_BODY", 1000)
    assert httpx2.post(url, content=b"x" * 1001, headers=headers).status_code == 413
    pieces = (b"x" * 100 for _ in range(20))
    assert httpx2.post(url, content=pieces, headers=headers).status_code == 413  # chunked: no length is declared
    assert httpx2.post(url, content=b"x", headers={**headers, "content-encoding": "gzip"}).status_code == 415


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"messages": NaN}', b"[" * 100_000,
        b'{"a":' * 100 + b"1" + b"}" * 100, b'{"logit_bias": [' + b"1," * 100_000 + b"1]}",
        b'{"messages": "\\ud800"}', b'{"\\udfff": 1}', b'{"max_tokens": 1e999}', b'{"a": 1} {"b": 2}',
        b'{"max_tokens": ' + b"9" * 5000 + b"}",
    ],
)  # fmt: skip
def test_what_is_no_request(server: Running, body: bytes) -> None:
    headers = {"authorization": "Bearer s3cret"}
    answer = httpx2.post(f"{server.url}/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_what_is_no_http(server: Running) -> None:
    for data in (b"hello\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"):
        answer = server.raw(data)
        assert answer.startswith(b"HTTP/1.1 400 ") and b'"invalid_request_error"' in answer
    huge = b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 70_000 + b"\r\n\r\n"
    assert server.raw(huge).startswith(b"HTTP/1.1 4")
    both = b"Host: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    assert server.raw(b"POST /v1/models HTTP/1.1\r\n" + both).startswith(b"HTTP/1.1 400 ")


def test_slow_headers_and_bodies(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.server.process.HEADER_SECONDS", 0.2)
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.2)
    start = time.monotonic()
    assert server.raw(b"GET / HTTP/1.1\r\nHost: local").startswith(b"HTTP/1.1 408 ")
    assert server.raw(b"").startswith(b"HTTP/1.1 408 ")
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX-Api-Key: s3cret\r\nContent-Length: 99\r\n\r\n{"
    assert server.raw(head).startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - start < 5


def test_one_that_does_not_read_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.server.streaming.SEND_SECONDS", 0.3)
    backend = ToldBackend(lambda prompt, order: "x" * 200_000, context=300_000)
    with Running([backend]) as server:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(server.address)
            body = json.dumps({"prompt": "x", "stream": True})
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n{body}"
            client.sendall(head.encode())
            assert waited(lambda: backend.made > 100)
            assert waited(lambda: backend.open == 0, 20)
        assert backend.made < 200_000


@pytest.mark.parametrize("reads", [False, True])
def test_one_that_does_not_read_a_whole_answer_is_left_too(monkeypatch: pytest.MonkeyPatch, reads: bool) -> None:
    """One that reads slowly is not."""
    monkeypatch.setattr("runner.server.process.STALL_SECONDS", 1.5)
    with Running([ToldBackend(lambda prompt, order: "x")]) as server, socket.socket() as client:
        if not reads:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(server.address)
        body = json.dumps({"prompt": "abc " * 400_000, "return_token_strs": True})
        head = f"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        client.sendall(head.encode())
        client.settimeout(20)
        found = client.recv(1 << 16)  # it has begun
        size = int(found.partition(b"content-length: ")[2].partition(b"\r")[0])
        assert size > 4_000_000
        got = len(found.partition(b"\r\n\r\n")[2])
        if not reads:
            time.sleep(4)
        with contextlib.suppress(ConnectionResetError):
            while got < size and (piece := client.recv(1 << 16)):
                got += len(piece)
                if reads and got < 1_000_000:
                    time.sleep(0.05)
        assert (got == size) == reads


def test_paths_and_methods(server: Running) -> None:
    assert ask(server, "/v1/nothing").status_code == 404
    for path, taken in (("/v1/chat/completions", "POST"), ("/api/delete", "DELETE"), ("/health", "GET, HEAD")):
        answer = httpx2.patch(server.url + path, headers={"authorization": "Bearer s3cret"})
        assert (answer.status_code, answer.headers["allow"]) == (405, taken)
        headers = {"origin": "https://chat.example.org", "access-control-request-method": "POST"}
        asked = httpx2.options(server.url + path, headers=headers)
        assert asked.headers["access-control-allow-methods"] == taken
    assert ask(server, "/v1/models/..%2f..%2fetc%2fpasswd").status_code == 404
    assert httpx2.head(f"{server.url}/health").status_code == 200


def test_the_log_has_no_text_of_requests(server: Running) -> None:
    headers = {"authorization": "Bearer s3cret", "content-type": "application/json"}
    body = BODY.replace('"x"', '"my secret question"')
    answer = httpx2.post(f"{server.url}/v1/chat/completions", content=body, headers=headers)

    def lines() -> list[dict[str, Any]]:
        return [each for each in server.lines if each.get("request_id") == answer.headers["x-request-id"]]

    assert waited(lambda: len(lines()) == 1)
    (line,) = lines()
    assert line["completion_tokens"] == 4 and line["finish"] == ["stop"] and line["status"] == 200
    assert "secret" not in json.dumps(server.lines)


def test_metrics(server: Running) -> None:
    headers = {"authorization": "Bearer s3cret"}

    def counted() -> list[float]:
        found = dict(line.rsplit(" ", 1) for line in ask(server, "/metrics").text.splitlines() if line[:1] != "#")
        names = ("prompt_tokens_total", "generation_tokens_total", "prefix_cache_hits_total")
        return [float(found.get(f'{name}{{model_name="told"}}', 0)) for name in names]

    before = counted()
    usage = httpx2.post(f"{server.url}/v1/chat/completions", content=BODY, headers=headers).json()["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    added = [usage["prompt_tokens"], usage["completion_tokens"], cached]
    assert waited(lambda: counted() == [old + new for old, new in zip(before, added, strict=True)])
    text = ask(server, "/metrics").text
    for name in (
        "num_requests_running", "num_requests_waiting", "prompt_tokens_total", "generation_tokens_total",
        "time_to_first_token_seconds_bucket", "inter_token_latency_seconds_count", "e2e_request_latency_seconds_sum",
        "request_success_total", "prefix_cache_queries_total", "prefix_cache_hits_total", "kv_cache_usage_perc",
    ):  # fmt: skip
        assert f"{name}{{" in text, name
    assert 'request_success_total{finished_reason="stop",model_name="told"}' in text


ASKED: dict[str, Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]]] = {
    "/v1/chat/completions": lambda tools: {"tools": [{"type": "function", "function": each} for each in tools]},
    "/v1/responses": lambda tools: {"input": "x", "tools": [{"type": "function", **each} for each in tools]},
    "/v1/messages": lambda tools: {
        "max_tokens": 9, "tools": [{"name": each["name"], "input_schema": each["parameters"]} for each in tools]
    },
    "/api/chat": lambda tools: {"stream": False, "tools": [{"type": "function", "function": each} for each in tools]},
}  # fmt: skip
"""Each API's request with tools, but for its messages."""


def test_every_answer_has_an_id_of_its_own_which_the_log_has_too(server: Running) -> None:
    headers = {"authorization": "Bearer s3cret"}
    answers = [
        ask(server), ask(server), ask(server, "/v1/nothing"), ask(server, host="evil.example"),
        httpx2.get(f"{server.url}/v1/models"),
        *(httpx2.post(server.url + path, headers=headers, content="{") for path in ASKED),
        httpx2.post(f"{server.url}/v1/chat/completions", headers=headers, content=BODY[:-1] + ', "stream": true}'),
    ]  # fmt: skip
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert len(set(ids)) == len(ids) and all(re.fullmatch("[0-9a-f]{16}", each) for each in ids)
    assert ids == [answer.headers["request-id"] for answer in answers], "the name that Anthropic's clients read"

    def once() -> bool:
        logged = [line["request_id"] for line in list(server.lines) if "request_id" in line]
        return all(logged.count(each) == 1 for each in ids)

    assert waited(once)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="s3cret")
    assert client.models.list()._request_id not in {None, *ids}


def with_tools(server: Running, path: str, count: int, levels: int = 1) -> tuple[int, str]:
    """The status of a request with so many tools, whose schemas have so many levels; and what is wrong with it."""
    body = ASKED[path]([{"name": f"f{index}", "parameters": "@"} for index in range(count)])
    messages = {} if "input" in body else {"messages": [{"role": "user", "content": "x"}]}
    deep = '{"items":' * (levels - 1) + "{}" + "}" * (levels - 1)
    text = json.dumps({**messages, **body}).replace('"@"', deep)
    answer = httpx2.post(server.url + path, content=text, timeout=60)
    error = answer.json().get("error")
    return answer.status_code, "" if not error else error if isinstance(error, str) else error["message"]


@pytest.mark.parametrize("path", ASKED)
def test_how_deep_schemas_may_be_and_how_many_tools_there_may_be(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.server.openai_chat_body.MAX_TOOLS", 20)
    around = 4 if path in ("/v1/chat/completions", "/api/chat") else 3  # levels of the request above a schema
    with Running([ToldBackend(lambda prompt, order: "yes")]) as server:
        for levels, status in ((MAX_DEPTH - around, 200), (MAX_DEPTH - around + 1, 400), (50_000, 400)):
            found, said = with_tools(server, path, 1, levels)
            assert found == status and (status == 200 or f"more than {MAX_DEPTH} deep" in said), (levels, said)
        for count, status in ((20, 200), (21, 400)):
            found, said = with_tools(server, path, count)
            assert found == status and (status == 200 or "at most 20" in said), (count, said)


@pytest.mark.parametrize("end", ['"', '"}', '"}]}', '"}]}      ', ' and more"}', '\\u0041"}', '\\n"}'])
def test_half_a_surrogate_pair_is_called_so(end: str) -> None:
    """Near the end of a request it was said to be cut off."""
    with pytest.raises(ApiError, match=r"not valid JSON: .*surrogate pair"):
        parse(b'{"messages": [{"content": "a\\ud83d' + end.encode())
    with pytest.raises(ApiError, match="not valid JSON: Input data was truncated"):
        parse(b'{"messages": [{"content": "a\\ud83d\\ude00')


def test_answers_have_so_long_to_end_and_no_longer() -> None:
    told = ToldBackend(lambda prompt, order: "x" * 1000)
    told.pause = 0.1
    with Running([told], shutdown_timeout=0.5) as server, ThreadPoolExecutor() as pool:
        whole = pool.submit(httpx2.post, f"{server.url}/api/chat", content=BODY[:-1] + ', "stream": false}', timeout=9)
        with httpx2.stream("POST", f"{server.url}/v1/completions", json={"prompt": "x", "stream": True}) as sent:
            pieces = sent.iter_text()
            next(pieces)
            assert waited(lambda: told.open == 2)
            began = time.monotonic()
            server.end()
            rest = "".join(pieces)
            assert json.loads(rest.rpartition("data: ")[2])["error"]["message"] == "the server was told to end"
            assert "[DONE]" not in rest
            assert 0.4 < time.monotonic() - began < 5
        assert whole.result().status_code == 503 and whole.result().json() == {"error": "the server was told to end"}
        assert waited(lambda: server.code == 0) and told.open == 0 and server.serving.places.taken == 0
        with pytest.raises(ConnectionError):
            server.raw(b"")
        assert not [line for line in server.lines if "Traceback" in line.get("text", "")]


@pytest.mark.parametrize(
    ("path", "last"),
    [
        ("/v1/chat/completions", '"code":"shutting_down"'),
        ("/v1/messages", 'event: error\ndata: {"type":"error"'),
        ("/v1/responses", '"status":"failed"'),
        ("/api/chat", '{"error":"the server was told to end"}'),
    ],
)
def test_a_stream_that_is_cut_says_so_in_the_words_of_its_api(path: str, last: str) -> None:
    told = ToldBackend(lambda prompt, order: "x" * 1000)
    told.pause = 0.05
    hello = {"role": "user", "content": "Hi"}
    body = {"model": "told", "stream": True, **({"input": "Hi"} if "responses" in path else {"messages": [hello]})}
    if path == "/v1/messages":
        body["max_tokens"] = 900
    with Running([told], shutdown_timeout=0.2) as server:
        with httpx2.stream("POST", server.url + path, json=body) as sent:
            pieces = sent.iter_text()
            next(pieces)
            assert waited(lambda: told.open == 1)
            server.end()
            end = "".join(pieces).rstrip("\n").split("\n\n")[-1]
        assert last in end and "the server was told to end" in end, end
        assert waited(lambda: server.code == 0) and told.open == 0 and server.serving.places.taken == 0
        assert [line["error"] for line in server.lines if line.get("path") == path] == ["the server was told to end"]
        assert not [line for line in server.lines if "Traceback" in line.get("text", "")]


def test_a_prompt_that_takes_its_time_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates and tokens are made on other threads than the event loop's."""
    prepare, going, gate = Served.prepare, threading.Event(), threading.Event()

    def slow(self: Served, ask: Any) -> Any:
        going.set()
        assert gate.wait(20)
        return prepare(self, ask)

    monkeypatch.setattr(Served, "prepare", slow)
    with Running([ToldBackend(lambda prompt, order: "yes")]) as server, ThreadPoolExecutor() as pool:
        one = pool.submit(httpx2.post, f"{server.url}/v1/chat/completions", content=BODY, timeout=30)
        assert going.wait(10)
        for path in ("/health", "/metrics", "/v1/models", "/api/tags"):
            assert httpx2.get(server.url + path).status_code == 200
        assert httpx2.post(f"{server.url}/tokenize", json={"prompt": "abc"}).json()["count"] == 3
        assert not one.done()
        gate.set()
        assert one.result().status_code == 200


def test_an_operator_may_have_unknown_fields_left_out() -> None:
    asked = {**json.loads(BODY), "mood": 1, "messages": [{"role": "user", "content": "x", "tone": "warm"}]}
    with Running([ToldBackend(lambda prompt, order: "yes")], unknown_fields="warn") as server:
        answer = httpx2.post(f"{server.url}/v1/chat/completions", json=asked)
        assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"] == "yes"
        ignored = sorted(answer.headers["x-runner-ignored"].split(", "))
        assert ignored == ["messages[0].tone", "mood"]
        assert waited(lambda: [sorted(line["ignored"]) for line in server.lines if "ignored" in line] == [ignored])
        wrong = httpx2.post(f"{server.url}/v1/chat/completions", json={**asked, "n": "two"})
        assert wrong.status_code == 400, "a known field is never left out"


def test_the_log_has_texts_only_where_it_was_asked_for_them() -> None:
    for level, shown in (("INFO", False), ("DEBUG", True)):
        with Running([ToldBackend(lambda prompt, order: "yes")]) as server:
            logging.getLogger(LOG).setLevel(level)
            assert httpx2.post(f"{server.url}/v1/chat/completions", content=BODY).status_code == 200
            assert waited(lambda: any("completion_tokens" in line for line in server.lines))
            assert ('"content": "x"' in json.dumps(server.lines)) is shown


@pytest.mark.parametrize(
    ("value", "name"), [("a.b:1", "a.b"), ("[::1]", "::1"), ("a b", None), ("a#b", None), (None, None), (":80", None)]
)
def test_the_name_in_a_host_header(value: str | None, name: str | None) -> None:
    assert host_of(value) == name


def test_below_a_path_that_a_proxy_took_off_or_left() -> None:
    with Running([ToldBackend(lambda prompt, order: "yes")], root_path="/llm") as server:
        for path in ("/llm/v1/models", "/v1/models", "/llm/health", "/llm/page/page.js"):
            assert httpx2.get(server.url + path).status_code == 200, path
        for path in ("/llmv1/models", "/llm/llm/v1/models"):
            assert httpx2.get(server.url + path).status_code == 404, path
        assert "page.js" in httpx2.get(f"{server.url}/llm/", headers={"accept": "text/html"}).text
