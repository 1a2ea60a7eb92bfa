"""What a request asks of an engine, and what its caller holds of it: an iterator over tokens, for threads and asyncio.

The engine's thread puts what happens into a queue that is written in C, so that no exception which a signal raises in
the waiting thread can leave a lock behind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

from runner.engine.sampler import Token
from runner.engine.sampling import SamplingParams
from runner.engine.speculation import Guide, Proposer

if TYPE_CHECKING:
    import asyncio

    from runner.engine.budget import Footprint


@dataclass(frozen=True, kw_only=True)
class Order:
    """A prompt to answer, checked already.

    Attributes:
        ids: the prompt.
        budget: how many tokens may be generated; 0: none, for the scores of the prompt alone.
        ends: ids that end the answer.
        choice: which of several answers to the same prompt it is: each draws by numbers of its own.
        priority: who has a higher one goes first; of equals, who came first.
        deadline: the `time.monotonic()` at which the answer ends, wherever it is.
        weights: names and weights of the adapters to compute with.
        turns: positions in the prompt where a later one may part from it.
        guide: says which tokens may come next; None: all may.
        proposer: makes what guesses tokens ahead, a job of the owner's thread; None: nothing does.
        beside: bytes that its caches take, which are none of the model's; None: it has none.
        scores: None, or that the log-probability of each token of the prompt is wanted, and those of so many of the
            likeliest in its place.
    """

    ids: list[int]
    params: SamplingParams
    budget: int
    ends: Collection[int] = frozenset()
    choice: int = 0
    priority: int = 0
    deadline: float = math.inf
    weights: Mapping[str, float] = field(default_factory=dict)
    turns: Collection[int] = ()
    guide: Guide | None = None
    proposer: Callable[[], Proposer] | None = None
    beside: Footprint | None = None
    scores: int | None = None


class Progress(NamedTuple):
    """A part of the prompt was read: `done` of its tokens, of `total` that no cache held."""

    done: int
    total: int


class Ended(NamedTuple):
    """The end of an answer, and the error where there was one."""

    reason: str
    error: BaseException | None = None


Event = Token | Progress | Ended


class Mailbox:
    """The engine's end of a ticket: where events are put, and whether they are still wanted.

    Attributes:
        cancelled: set by the caller, asked between steps.
        reused: tokens of the prompt that a cache held; known once the prompt is begun.
        read: tokens of the prompt that were read.
        scores: of the prompt's tokens, where they were asked for: the first has none.
    """

    def __init__(self) -> None:
        self.cancelled = False
        self.reused = 0
        self.read = 0
        self.scores: list[Token] = []
        self.events: SimpleQueue[Event] = SimpleQueue()
        self.wake: Callable[[], None] | None = None

    def put(self, event: Event) -> None:
        """Hand something to whoever waits, or will."""
        self.events.put(event)
        if (wake := self.wake) is not None:
            wake()


class Ticket:
    """A request that an engine works on: iterate over its tokens with `for` or `async for`, in one place.

    A ticket that is let go of is cancelled.
    """

    def __init__(self, mailbox: Mailbox, poke: Callable[[], None]) -> None:
        """`poke` makes the engine look at its requests."""
        self._mailbox = mailbox
        self._poke = poke
        self._end: Ended | None = None

    def __repr__(self) -> str:
        return f"Ticket({self.finish_reason or 'under way'}, {self.reused} tokens reused, {self.read} read)"

    def __del__(self) -> None:
        if self._end is None:
            self.cancel()

    @property
    def reused(self) -> int:
        """Tokens of the prompt that were not read again."""
        return self._mailbox.reused

    @property
    def read(self) -> int:
        """Tokens of the prompt that were read so far."""
        return self._mailbox.read

    @property
    def scores(self) -> list[Token]:
        """The prompt's tokens with their log-probabilities, as far as they were read; the first has none."""
        return self._mailbox.scores

    @property
    def finish_reason(self) -> str | None:
        """Once all is read: "stop" (one of `ends`), "length", "cancelled", "timeout" or "error"; else None."""
        return None if self._end is None else self._end.reason

    def cancel(self) -> None:
        """End the answer within one step, in the middle of its prompt too; tokens that were made still come."""
        if not self._mailbox.cancelled:
            self._mailbox.cancelled = True
            self._poke()

    def events(self) -> Iterator[Token | Progress]:
        """The tokens, and how far the prompt is read between them; raises what ended the answer."""
        while (event := self._next(self._mailbox.events.get)) is not None:
            yield event

    def __iter__(self) -> Iterator[Token]:
        return (event for event in self.events() if isinstance(event, Token))

    def __aiter__(self) -> Ticket:
        return self

    async def __anext__(self) -> Token:
        while True:
            event = await self.event()
            if event is None:
                raise StopAsyncIteration
            if isinstance(event, Token):
                return event

    async def event(self) -> Token | Progress | None:
        """The next event for a coroutine, whose event loop goes on meanwhile; None at the end."""
        import asyncio  # who waits has it loaded; a short answer should not

        while True:
            try:
                return self._next(self._mailbox.events.get_nowait)
            except Empty:
                await self._arrival(asyncio.get_running_loop(), asyncio.Event())

    async def _arrival(self, loop: asyncio.AbstractEventLoop, arrived: asyncio.Event) -> None:
        """Wait until there is an event, or there may be."""

        def wake() -> None:
            try:
                loop.call_soon_threadsafe(arrived.set)
            except RuntimeError:  # the loop was closed: nobody waits any more
                self._mailbox.wake = None

        self._mailbox.wake = wake
        if self._mailbox.events.empty():  # what came before `wake` was set is there now
            await arrived.wait()
        self._mailbox.wake = None

    def _next(self, get: Callable[[], Event]) -> Token | Progress | None:
        """The next event; None at the end, however often one asks."""
        if self._end is None:
            event = get()
            if not isinstance(event, Ended):
                return event
            self._end = event
        if self._end.error is not None:
            raise self._end.error
        return None
