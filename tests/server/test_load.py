"""Thousands of requests, a third of whose clients leave in the middle: none is lost, and no place stays taken."""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import time
from collections.abc import Iterator

import pytest
from places import ROOT
from told_backend import Running, ToldBackend, local, waited

import runner

FIXTURE = ROOT / "tests" / "fixtures" / "llama" / "llama-gqa"
TOKENS = 16


@pytest.fixture
def server() -> Iterator[Running]:
    lm = runner.load(FIXTURE)
    with Running([local(lm, "tiny", memory=64 << 20)], log_level="error") as running:
        yield running


async def one(server: Running, chance: random.Random, leaves: bool) -> int:
    """One request; the tokens that came, or -1 where the client left."""
    prompt = [chance.randrange(5, 250) for _ in range(TOKENS)]
    body = json.dumps(
        {"prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True, "stream": chance.random() < 0.5,
         "stream_options": None, "temperature": 0.0, "logprobs": 0}
    ).encode()  # fmt: skip
    reader, writer = await asyncio.open_connection(*server.address)
    try:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
        writer.write(head % len(body) + body)
        await writer.drain()
        if leaves:
            await asyncio.sleep(chance.random() * 0.1)
            return -1
        answer = await asyncio.wait_for(reader.read(), 120)
    finally:
        writer.close()
    count = 0
    for line in answer.splitlines():
        if line.startswith((b"data: {", b"{")):
            for choice in json.loads(line.removeprefix(b"data: "))["choices"]:
                count += len(choice["logprobs"]["tokens"]) if choice["logprobs"] else 0
    return count


async def many(server: Running, count: int, at_once: int) -> list[int]:
    chance = random.Random(5)
    gate = asyncio.Semaphore(at_once)

    async def gated(index: int) -> int:
        async with gate:
            return await one(server, chance, leaves=index % 3 == 2)

    return await asyncio.gather(*(gated(index) for index in range(count)))


def load(server: Running, count: int) -> None:
    found = asyncio.run(many(server, count, 32))
    stayed = [each for each in found if each >= 0]
    assert len(stayed) == count - count // 3 and set(stayed) == {TOKENS}
    assert waited(lambda: server.serving.places.taken == 0)
    (served,) = server.serving.models.values()
    assert waited(lambda: served.backend.status().running == 0 and served.backend.status().waiting == 0)


def test_none_is_lost(server: Running) -> None:
    load(server, 60)


@pytest.mark.long
def test_none_of_five_thousand_is_lost(server: Running) -> None:
    load(server, 500)
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    load(server, 5000)
    with open("/proc/self/statm") as file:
        assert int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") - before < 128 << 20


@pytest.mark.long
def test_an_idle_server_idles_and_a_token_leaves_at_once() -> None:
    backend = ToldBackend(lambda prompt, order: "x" * 300)
    with Running([backend]) as server:
        asyncio.run(asyncio.sleep(1))
        before, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
        time.sleep(10)
        after, seconds = resource.getrusage(resource.RUSAGE_SELF), time.monotonic() - began
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        assert used / seconds < 0.005, used / seconds

        async def lags() -> list[float]:
            """Seconds from the moment that the backend has a token to its arrival here, in one process's clock."""
            made: list[float] = []
            backend.pause = 0.005
            reader, writer = await asyncio.open_connection(*server.address)
            body = json.dumps({"prompt": "x", "max_tokens": 200, "stream": True}).encode()
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
            while not (line := await reader.readline()).startswith(b"data: [DONE]"):
                arrived = time.perf_counter()
                if b'"text":"x"' in line:
                    made.append(arrived - backend.moments[len(made)])
            writer.close()
            return made

        found = sorted(asyncio.run(lags()))
        assert found[len(found) // 2] < 0.003, found[len(found) // 2]
