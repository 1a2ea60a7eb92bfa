"""Answers as they come: tokens of a backend become text, reasoning and the reason for the end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from runner.engine.sampler import Token
from runner.server.model import Prepared
from runner.server.tool_calls import SPECIAL, Call, CallPart, gathered
from runner.text.separator import Split

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Delta:
    """What one token adds to one of the choices; one with nothing in it says that the prompt is being read.

    Attributes:
        token: the token itself.
        finish: on the last one of a choice "stop", "length" or "tool_calls".
        calls: calls of functions that the token completes.
        stopped_by: on the last one the stop text that ended the answer, if one did.
    """

    choice: int
    text: str = ""
    reasoning: str = ""
    token: Token | None = None
    finish: str | None = None
    calls: Sequence[Call | CallPart] = ()
    stopped_by: str | None = None


@dataclass(frozen=True)
class Whole:
    """One answer when it has ended; `last` says why."""

    text: str
    reasoning: str
    calls: Sequence[Call]
    last: Delta


@dataclass
class Usage:
    """Tokens of a request; those of the answers grow while they come."""

    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass
class Answering:
    """The answers to one prepared request, and what is known of them so far.

    Attributes:
        started: time of `time.perf_counter` at which the request was ready to be answered.
        first: the time of the first token.
        last: the time of the latest token.
        gaps: seconds between one token and the next, of each choice.
        finished: why each choice ended.
    """

    prepared: Prepared
    usage: Usage = field(init=False)
    started: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)
    finished: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.usage = Usage(len(self.prepared.ids))

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Make the answers; closing it ends them."""
        choices = [self._choice(choice) for choice in range(self.prepared.ask.choices)]
        async with contextlib.aclosing(merged(choices)) as all_of_them:
            async for delta in all_of_them:
                yield delta

    async def whole(self) -> Whole:
        """The answer to a request for one, all of it."""
        made = [delta async for delta in self.deltas()]
        return Whole(
            "".join(delta.text for delta in made),
            "".join(delta.reasoning for delta in made),
            gathered([call for delta in made for call in delta.calls]),
            made[-1],
        )

    async def _choice(self, choice: int) -> AsyncGenerator[Delta, None]:
        prepared, usage = self.prepared, self.usage
        text, finder = prepared.answer_text(choice), prepared.finder()
        made, reasoned, spoken, called, before = 0, False, False, False, 0.0
        async with contextlib.aclosing(prepared.served.backend.tokens(prepared.order(choice))) as steps:
            async for step in steps:
                usage.cached_tokens = max(usage.cached_tokens, step.cached_tokens)
                if step.token is None:
                    yield Delta(choice)
                    continue
                now = time.perf_counter()
                if self.first is None:
                    self.first = now
                if made:
                    self.gaps.append(now - before)
                self.last = before = now
                made += 1
                usage.completion_tokens += 1
                split, reason = Split(), None
                if step.token.id in prepared.ends:
                    reason = "stop"
                else:
                    split, stopped = text.add(step.token.id)
                    reason = "stop" if stopped else "length" if made == prepared.budget else None
                if reason is not None:
                    tail, stopped = text.finish()
                    split, reason = split + tail, "stop" if stopped else reason
                content = split.content
                calls: list[Call | CallPart] = []
                if finder is not None:
                    content, calls = finder.add(content)
                    if reason is not None:
                        rest, more = finder.flush(ended=step.token.id in prepared.ends)
                        content, calls = content + rest, calls + more
                    if calls and not prepared.parallel and not prepared.led:
                        calls, reason = calls[:1], reason or "stop"
                    called = called or bool(calls)
                    if called and reason == "stop":
                        reason = "tool_calls"
                reasoned = reasoned or bool(split.reasoning)
                spoken = spoken or bool(content or calls)
                usage.reasoning_tokens += reasoned and not spoken
                if reason is not None:
                    self.finished[choice] = reason
                reasoning = split.reasoning.replace(SPECIAL, "")
                stopped_by = text.found if reason is not None else None
                yield Delta(choice, content, reasoning, step.token, reason, calls, stopped_by)
                if reason is not None:
                    return
        raise RuntimeError("the backend ended an answer before its length, without an end token")


@contextlib.asynccontextmanager
async def started(stream: AsyncGenerator[T, None], seconds: float) -> AsyncIterator[AsyncIterator[T]]:
    """A generator's items, once the first is there or so many seconds are over; the generator ends with the block.

    Raises:
        Exception: what the generator raises in place of its first item.
    """
    first = asyncio.ensure_future(anext(stream))

    async def items() -> AsyncIterator[T]:
        yield await first
        async for item in stream:
            yield item

    try:
        await asyncio.wait([first], timeout=seconds)
        if first.done():
            first.result()
        yield items()
    finally:
        first.cancel()
        with contextlib.suppress(BaseException):
            await first
        await stream.aclose()


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """What several generators yield, as it comes; all are closed with this one, however it ends."""
    if len(streams) == 1:
        async with contextlib.aclosing(streams[0]) as only:
            async for item in only:
                yield item
        return
    queue: asyncio.Queue[tuple[T | None, Exception | None]] = asyncio.Queue()

    async def work(stream: AsyncGenerator[T, None]) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for made in stream:
                    queue.put_nowait((made, None))
            queue.put_nowait((None, None))
        except Exception as error:
            queue.put_nowait((None, error))

    tasks = [asyncio.create_task(work(stream)) for stream in streams]
    try:
        left = len(tasks)
        while left:
            found, error = await queue.get()
            if error is not None:
                raise error
            if found is None:
                left -= 1
            else:
                yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
