"""Mutated requests: each gets an answer in its API's form, none is the server's fault, and nothing is left behind."""

from __future__ import annotations

import json
import os
import random
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from told_backend import Running, ToldBackend, waited

MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
TOOL = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
SEEDS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "told", "messages": [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "c", "content": "1"}],
        "temperature": 0.5, "top_p": 0.9, "seed": 1, "n": 2, "stop": ["x"], "stream": True, "logprobs": True,
        "top_logprobs": 2, "stream_options": {"include_usage": True}, "logit_bias": {"5": 1},
        "tools": [{"type": "function", "function": TOOL}], "tool_choice": "auto", "max_tokens": 5,
        "response_format": {"type": "text"}, "reasoning_effort": "low", "user": "u", "priority": 1,
    },
    "/v1/completions": {"prompt": ["a", "b"], "max_tokens": 3, "echo": True, "logprobs": 1, "seed": 1, "n": 1},
    "/v1/responses": {
        "model": "told", "input": [{"type": "message", "role": "developer", "content": "d"},
            {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "1"}],
        "tools": [{"type": "function", **TOOL}, {"type": "web_search"}], "store": False, "max_output_tokens": 4,
        "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "boolean"}}},
    },
    "/v1/messages": {
        "model": "told", "max_tokens": 4, "system": [{"type": "text", "text": "s"}], "messages": [
            {"role": "user", "content": "x"}, {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "t", "signature": ""},
                {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "1"}]}],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}], "stream": True, "thinking": {"type": "adaptive"},
    },
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "x"}], "tools": []},
    "/api/chat": {"model": "told", "messages": [{"role": "user", "content": "x"}], "options": {"num_predict": 3},
                  "format": "json", "think": True, "stream": False},
    "/api/generate": {"model": "told", "prompt": "x", "options": {"num_predict": 3, "temperature": 0.5}},
    "/api/show": {"model": "told"},
    "/tokenize": {"prompt": "abc"},
    "/detokenize": {"tokens": [1, 2]},
}  # fmt: skip
VALUES = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**64), 10**40, 0.5, -0.0, 1e308, "", "x", "\x00", "é😀",
    "a" * 5000, [], {}, [[]], [{}], {"a": {}}, [None], ["x"] * 200, {"type": "text"}, {"type": "function"}, "auto",
    "told", [1, "a"],
    {"$ref": "#"}, {"type": "object", "properties": {"a": {"$ref": "#"}}}, {"type": "array", "items": {"not": {}}},
]  # fmt: skip
HEADERS = [
    b"Content-Length: 5\r\n", b"Content-Length: -1\r\n", b"Content-Length: 99999999999\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip\r\n", b"Content-Encoding: gzip\r\n",
    b"Expect: 100-continue\r\n", b"Host: evil\r\n", b"X: " + b"y" * 9000 + b"\r\n", b"Origin: null\r\n",
    b"Connection: upgrade\r\nUpgrade: websocket\r\n", b"\x00: 1\r\n",
    b"Authorization: Bearer \xff\xfe\r\n", b"Cookie: a=b\r\n", b": x\r\n", b"Accept: */*\r\n",
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from places(each, (*path, key))


def mutated(chance: random.Random, value: Any) -> Any:
    """A copy with something else in one place."""
    value = json.loads(json.dumps(value))
    found = [each for each in places(value) if each]
    if not found:
        return chance.choice(VALUES)
    path = chance.choice(found)
    where = value
    for key in path[:-1]:
        where = where[key]
    kind = chance.randrange(5)
    if kind == 0:
        del where[path[-1]]
    elif kind == 1 and isinstance(where, dict):
        where[chance.choice(["mood", "temperture", "", "__class__", str(path[-1]) + "s"])] = where.pop(path[-1])
    elif kind == 2 and isinstance(where, list):
        where.extend(where * chance.randrange(1, 4))
    else:
        where[path[-1]] = chance.choice(VALUES)
    return value


def request(chance: random.Random) -> tuple[str, bytes, bool]:
    """A path, the bytes of a request to it, and whether it is whole."""
    path = chance.choice(list(SEEDS))
    body = SEEDS[path]
    for _ in range(chance.randrange(3)):
        body = mutated(chance, body)
    data = json.dumps(body).encode()
    kind = chance.randrange(10)
    if kind == 0:
        data = data[: chance.randrange(len(data) + 1)]
    elif kind == 1:
        spot = chance.randrange(len(data) + 1)
        data = data[:spot] + bytes(chance.randrange(256) for _ in range(chance.randrange(1, 5))) + data[spot:]
    elif kind == 2:
        data = json.dumps(chance.choice(VALUES)).encode()
    headers = b"Host: localhost\r\nContent-Length: %d\r\n" % len(data)
    whole = chance.randrange(8) != 0
    if not whole:
        headers += chance.choice(HEADERS)
    head = b"%s %s HTTP/1.1\r\n" % (chance.choice([b"POST"] * 20 + [b"PUT", b"GET", b"post", b""]), path.encode())
    raw = head + headers + b"Connection: close\r\n\r\n" + data
    if chance.randrange(20) == 0:
        raw, whole = raw[: chance.randrange(len(raw))], False
    return path, raw, whole


def check(path: str, answer: bytes) -> int | None:
    """The status of an answer, which must be in the form of its API; None where there is none."""
    if not answer:
        return None
    head, _, body = answer.partition(b"\r\n\r\n")
    if head.startswith(b"HTTP/1.1 100"):
        head, _, body = body.partition(b"\r\n\r\n")
    if not head:
        return None
    status = int(head.split()[1])
    assert status < 500, (path, answer[:500])
    if status >= 400:
        if b"chunked" in head:
            body = body.partition(b"\r\n")[2]
        told = json.loads(body)
        error = told["error"]
        assert isinstance(error, str) or error["message"], told
    return status


def fuzz(count: int, seed: int) -> dict[int | None, int]:
    chance = random.Random(seed)
    backend = ToldBackend(lambda prompt, order: "yes <tool_call>{}</tool_call>")
    seen: dict[int | None, int] = {}
    with Running([backend]) as server:
        for _ in range(count):
            path, raw, whole = request(chance)
            with socket.create_connection(server.address, 20) as connection:
                connection.sendall(raw)
                if not whole:
                    connection.shutdown(socket.SHUT_WR)  # half closed: nothing more comes
                pieces = []
                while piece := connection.recv(65536):
                    pieces.append(piece)
            status = check(path, b"".join(pieces))
            assert status is not None or not whole, raw[:300]
            seen[status] = seen.get(status, 0) + 1
        assert waited(lambda: backend.open == 0) and waited(lambda: server.serving.places.taken == 0)
        assert not [line for line in server.lines if line.get("status", 0) >= 500 or "text" in line]
        server.lines.clear()
    return seen


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_mutated_requests() -> None:
    seen = fuzz(250, 1)
    assert seen.get(400, 0) > 50, seen


@pytest.mark.long
def test_mutated_requests_for_long() -> None:
    fuzz(2000, 2)
    before = resident()
    seen = fuzz(20_000, 3)
    assert seen.get(400, 0) > 5000, seen
    assert resident() - before < 64 << 20
