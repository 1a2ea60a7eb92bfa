"""One request by itself: its scheduler takes a step whenever the caller wants more, and the device never runs ahead.

What an engine does for many requests is done here for one, so that the tokens are the same. Only who sets the pace
differs: an engine goes on whether its answers are read or not, a request here waits for whoever iterates over it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from runner.engine.loaded import Loaded
from runner.engine.prompt_cache import PromptCache
from runner.engine.sampler import Token
from runner.engine.scheduler import Scheduler
from runner.engine.ticket import Ended, Mailbox, Order
from runner.ops.memory import Memory
from runner.ops.owner import OWNER


class Cancelled(Exception):
    """Raised while a prompt is read, when its caller no longer wants an answer."""


class Run:
    """A request on a loaded model: iterate over its tokens, with None after each step that no token came of.

    `reused` is known once the iteration has begun.

    Whatever touches the device is a job of its owner's thread, and a job holds whole passes: an exception that
    interrupts the iterating thread finds every layer at the same offset. The callbacks are called on that thread.
    """

    def __init__(
        self,
        engine: Loaded,
        kept: PromptCache,
        order: Order,
        on_prefill: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> None:
        """Prepare to answer `order`; nothing runs yet.

        Args:
            on_prefill: called after each chunk of the prompt with the tokens done and the tokens in all.
            cancelled: asked before each chunk of the prompt; true ends it with `Cancelled`.
        """
        self.engine = engine
        self.active = False  # whether it uses the prompt cache
        self.memory = Memory(engine.device.keeps)
        self.budget = order.budget
        self._kept = kept
        self._order = order
        self._on_prefill = on_prefill
        self._cancelled = cancelled
        self._mailbox = Mailbox()

    @property
    def reused(self) -> int:
        """Tokens of the prompt that the prompt cache held."""
        return self._mailbox.reused

    def __iter__(self) -> Iterator[Token | None]:
        """Yield the tokens, and None after each step that no token came of.

        Raises:
            UsageError: the prompt cache is in use by another answer.
            NumericsError: the logits are NaN or infinite.
            Cancelled: the caller says so while the prompt is read.
        """
        self.active = True
        scheduler: Scheduler | None = None
        try:
            scheduler = self.engine.run(self._begin)
            events = self._mailbox.events
            while True:
                if self._cancelled is not None and scheduler.starting and self._cancelled():
                    raise Cancelled
                self.engine.run(scheduler.safe_step)
                made = False
                while not events.empty():
                    event = events.get_nowait()
                    if isinstance(event, Token):
                        made = True
                        yield event
                    elif not isinstance(event, Ended):
                        if self._on_prefill is not None:
                            self._on_prefill(*event)
                    elif event.error is not None:
                        raise event.error
                    else:
                        return
                if not made:
                    yield None
        finally:
            # First of all: an exception that hits the rest of the ending must not leave the cache lent for good.
            self.active = False
            self._mailbox.cancelled = True
            if scheduler is not None:
                # By the owner, and before any later job of it: the device may be ahead of what was read.
                OWNER.post(scheduler.safe_step)

    def _begin(self) -> Scheduler:
        self._kept.lend(self)
        scheduler = Scheduler(self.engine, self._kept, rows=1, memory=self.memory)
        scheduler.add(self._order, self._mailbox)
        return scheduler
