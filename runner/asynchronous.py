"""Answers for asyncio: each step of one is a job of the thread that owns the device, which no event loop waits for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from runner.answer import Chunk, Steps
from runner.engine.loaded import Loaded
from runner.ops.owner import OWNER


async def chunks(engine: Loaded, begin: Callable[[], Steps]) -> AsyncGenerator[Chunk, None]:
    """Yield the chunks of the answer that `begin` prepares.

    `begin` (templates, tokens) runs on a thread of asyncio's. Steps of several answers take turns, and so do those of
    answers that other threads wait for. However the iteration ends, by a cancelled task or an unfinished loop too, the
    answer gives its caches back behind the step that is under way.
    """
    steps = await asyncio.to_thread(begin)

    def step() -> Chunk | None:
        chunk = next(steps)
        if chunk is not None and chunk.finish_reason is not None:
            steps.close()  # now, and not once the caller asks for more
        return chunk

    chunk: Chunk | None = None
    try:
        while chunk is None or chunk.finish_reason is None:
            chunk = await engine.wait(step)
            if chunk is not None:
                yield chunk
    finally:
        # Not here: a generator cannot be closed while another thread is within it.
        OWNER.post(steps.close)


def in_loop(callback: Callable[[int, int], None] | None) -> Callable[[int, int], None] | None:
    """A function for other threads that has the running event loop call `callback`."""
    if callback is None:
        return None
    loop = asyncio.get_running_loop()

    def called(done: int, total: int) -> None:
        loop.call_soon_threadsafe(callback, done, total)

    return called
