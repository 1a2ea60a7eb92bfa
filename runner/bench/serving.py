"""How fast a server answers under load, in the words of vLLM's bench: TTFT, TPOT, ITL, E2EL, throughput, goodput.

The client is plain sockets, so that it takes little of the machine that it may share with the server.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, urlsplit

from runner.errors import UsageError

WORDS = (
    "the river runs behind a quiet house where seven children read old letters and count small silver coins while rain "
    "falls on green roofs near the harbour and distant ships carry tea salt paper glass copper wool and ideas from one "
    "shore to another every winter morning before people wake up"
)
TIMEOUT = 600.0
"""Seconds after which a request counts as failed."""


@dataclass(frozen=True)
class Load:
    """What to ask.

    Attributes:
        url: of the server, with or without `/v1`.
        model: the name to ask for; None: the first that the server lists.
        count: requests in all.
        concurrency: how many are open at once; None: as many as come.
        rate: requests a second, with exponential gaps; None: the next as soon as there is a place.
        prompt_tokens: tokens of each prompt, drawn by `seed`.
        text: send so many words instead, for servers that take no ids; most tokenizers make a token of each.
        output_tokens: tokens of each answer; end tokens are kept from coming.
        goals: milliseconds, by `ttft`, `tpot`, `e2el`, that a request must keep to count for the goodput.
    """

    url: str
    model: str | None = None
    count: int = 64
    concurrency: int | None = None
    rate: float | None = None
    prompt_tokens: int = 256
    output_tokens: int = 64
    seed: int = 0
    key: str | None = None
    goals: Mapping[str, float] = field(default_factory=dict)
    text: bool = False


@dataclass
class Asked:
    """One request: times of `time.perf_counter`, and tokens as the server counted them."""

    began: float
    moments: list[float] = field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Seconds to the first text."""
        return self.moments[0] - self.began

    @property
    def e2el(self) -> float:
        """Seconds to the end."""
        return self.ended - self.began

    @property
    def tpot(self) -> float:
        """Seconds for each token behind the first."""
        return (self.e2el - self.ttft) / max(self.output_tokens - 1, 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds between texts."""
        return [later - sooner for sooner, later in zip(self.moments, self.moments[1:], strict=False)]


class Server:
    """The server under test."""

    def __init__(self, url: str, key: str | None) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"--url must be an address such as http://127.0.0.1:8080, not {url!r}")
        self._parts: SplitResult = parts
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        self._key = key

    async def open(self, method: str, path: str, body: Any = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Send a request; returns the streams, to read the answer from."""
        parts = self._parts
        secure = parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=secure or None, limit=1 << 24)
        data = b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {self._base}{path} HTTP/1.1", f"Host: {parts.netloc}", f"Content-Length: {len(data)}"]
        lines += ["Content-Type: application/json", "Connection: close"]
        if self._key is not None:
            lines.append(f"Authorization: Bearer {self._key}")
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + data)
        await writer.drain()
        return reader, writer

    async def value(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and JSON of a whole answer."""
        reader, writer = await self.open(method, path, body)
        try:
            status = await status_of(reader)
            chunked, length = False, None
            while (line := (await reader.readline()).strip().lower()) != b"":
                name, _, given = line.partition(b":")
                chunked = chunked or (name == b"transfer-encoding" and given.strip() == b"chunked")
                if name == b"content-length":
                    length = int(given)
            data = b""
            if chunked:
                while size := int((await reader.readline()).split(b";")[0] or b"0", 16):
                    data += await reader.readexactly(size)
                    await reader.readline()
            elif length is not None:  # some servers keep the connection open, whatever they are asked
                data = await reader.readexactly(length)
            else:
                data = await reader.read()
        finally:
            writer.close()
        try:
            return status, json.loads(data)
        except ValueError:
            return status, None


async def status_of(reader: asyncio.StreamReader) -> int:
    """The status of an answer that begins."""
    words = (await reader.readline()).split()
    if len(words) < 2 or not words[1].isdigit():
        raise ConnectionError("the answer is no HTTP")
    return int(words[1])


async def measure(load: Load) -> dict[str, Any]:
    """Ask, and sum up with the keys of vLLM's bench; times in milliseconds.

    Raises:
        UsageError: the server cannot be reached, lists no model, or counts no tokens.
    """
    server = Server(load.url, load.key)
    try:
        model = load.model or await _first_model(server)
        pool = [] if load.text else await _ids(server, model)
    except (OSError, asyncio.IncompleteReadError) as error:
        raise UsageError(f"{load.url} cannot be reached: {error}") from error
    chance = random.Random(load.seed)
    words = [f" {word}" for word in WORDS.split()]
    prompts = [
        "".join(chance.choices(words, k=load.prompt_tokens))
        if load.text
        else [chance.choice(pool) for _ in range(load.prompt_tokens)]
        for _ in range(load.count)
    ]
    gate = asyncio.Semaphore(load.concurrency or load.count)

    async def one(prompt: str | list[int]) -> Asked:
        async with gate:
            asked = Asked(time.perf_counter())
            try:
                async with asyncio.timeout(TIMEOUT):
                    await _ask(server, model, prompt, load.output_tokens, asked)
            except (OSError, TimeoutError, ValueError, asyncio.IncompleteReadError) as error:
                asked.error = str(error) or type(error).__name__
            return asked

    began = time.perf_counter()
    tasks = []
    for prompt in prompts:
        tasks.append(asyncio.create_task(one(prompt)))
        if load.rate is not None:
            await asyncio.sleep(chance.expovariate(load.rate))
    answers = await asyncio.gather(*tasks)
    return summed(load, model, answers, time.perf_counter() - began)


async def _first_model(server: Server) -> str:
    _, listed = await server.value("GET", "/v1/models")
    data = listed.get("data") if isinstance(listed, dict) else None
    if not data or not isinstance(data[0], dict) or not isinstance(data[0].get("id"), str):
        raise UsageError("the server lists no model: name one")
    return str(data[0]["id"])


async def _ids(server: Server, model: str) -> list[int]:
    """Ids that the model knows, of plain words."""
    for body in ({"model": model, "prompt": WORDS, "add_special_tokens": False}, {"content": WORDS}):
        status, made = await server.value("POST", "/tokenize", body)
        if status == 200 and isinstance(made, dict) and made.get("tokens"):
            return sorted({int(each) for each in made["tokens"]})
    raise UsageError(
        f"the server does not say the tokens of a text for the model {model!r} (POST /tokenize): try --text-prompts"
    )


async def _ask(server: Server, model: str, prompt: str | list[int], most: int, asked: Asked) -> None:
    body = {
        "model": model, "prompt": prompt, "max_tokens": most, "temperature": 0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    reader, writer = await server.open("POST", "/v1/completions", body)
    try:
        status = await status_of(reader)
        if status != 200:
            raise ValueError(f"status {status}")
        while line := await reader.readline():
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                break
            now = time.perf_counter()
            event = json.loads(line[6:])
            if "error" in event:
                raise ValueError(str(event["error"]))
            if event.get("choices"):
                asked.moments.append(now)
            if usage := event.get("usage"):
                asked.prompt_tokens, asked.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        asked.ended = time.perf_counter()
        if not asked.moments or not asked.output_tokens:
            raise ValueError("the stream ended early")
    finally:
        writer.close()


def summed(load: Load, model: str, answers: Sequence[Asked], seconds: float) -> dict[str, Any]:
    """The results, with vLLM's keys."""
    good = [each for each in answers if each.error is None]
    output = sum(each.output_tokens for each in good)
    tokens = output + sum(each.prompt_tokens for each in good)
    kept = [each for each in good if all(getattr(each, name) * 1e3 <= limit for name, limit in load.goals.items())]
    result: dict[str, Any] = {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "model_id": model,
        "num_prompts": load.count,
        "request_rate": "inf" if load.rate is None else load.rate,
        "max_concurrency": load.concurrency,
        "duration": seconds,
        "completed": len(good),
        "failed": len(answers) - len(good),
        "errors": sorted({each.error for each in answers if each.error is not None}),
        "total_input_tokens": tokens - output,
        "total_output_tokens": output,
        "request_throughput": len(good) / seconds,
        "request_goodput": len(kept) / seconds if load.goals else None,
        "output_throughput": output / seconds,
        "total_token_throughput": tokens / seconds,
    }
    values = {
        "ttft": [each.ttft for each in good],
        "tpot": [each.tpot for each in good if each.output_tokens > 1],
        "itl": [gap for each in good for gap in each.gaps],
        "e2el": [each.e2el for each in good],
    }
    for name, found in values.items():
        times = sorted(value * 1e3 for value in found) or [0.0]
        result[f"mean_{name}_ms"] = statistics.fmean(times)
        result[f"median_{name}_ms"] = statistics.median(times)
        result[f"std_{name}_ms"] = statistics.pstdev(times)
        result[f"p99_{name}_ms"] = times[min(len(times) - 1, int(len(times) * 0.99))]
    return result


def table(result: Mapping[str, Any]) -> str:
    """The results for people."""
    lines = [
        f"{result['model_id']}: {result['completed']} answered and {result['failed']} failed in "
        f"{result['duration']:.1f} s",
        *(f"failed: {error}" for error in result["errors"]),
        "",
        f"requests           {result['request_throughput']:10.2f} /s",
        f"output             {result['output_throughput']:10.1f} tokens/s",
        f"input and output   {result['total_token_throughput']:10.1f} tokens/s",
    ]
    if result["request_goodput"] is not None:
        lines.append(f"goodput            {result['request_goodput']:10.2f} /s")
    lines += ["", f"{'ms':6}{'mean':>10}{'median':>10}{'p99':>10}"]
    for name in ("ttft", "tpot", "itl", "e2el"):
        numbers = "".join(f"{result[f'{kind}_{name}_ms']:10.1f}" for kind in ("mean", "median", "p99"))
        lines.append(f"{name.upper():6}{numbers}")
    return "\n".join(lines) + "\n"
