"""Timing of several requests at once, through the scheduler that an engine has.

Their depth comes from kept prefixes, as the next turn of a conversation finds it: only the tokens of the test are read
while the clock runs. Making tokens does not include taking caches out of the kept prefixes and putting them back, as a
single sequence's caches are filled before its clock runs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from runner.engine.loaded import Loaded
from runner.engine.sampler import Token
from runner.engine.sampling import SamplingParams
from runner.engine.scheduler import Scheduler
from runner.engine.sharing import Sharing
from runner.engine.ticket import Event, Mailbox, Order
from runner.ops.memory import Memory
from runner.ops.owner import OWNER

UNBOUNDED = 1 << 62


class Clock(Mailbox):
    """A mailbox that notes when each token came.

    Attributes:
        times: in seconds, of a clock that begins somewhere.
    """

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def put(self, event: Event) -> None:
        """Note the time of a token; nobody reads it."""
        if isinstance(event, Token):
            self.times.append(time.perf_counter())


class Many:
    """`batch` requests at once over one model; a part of the owner's thread."""

    def __init__(self, loaded: Loaded, batch: int, depth: int, numbers: np.random.Generator) -> None:
        """Read what each of them begins with: `depth` tokens of its own."""
        self._loaded = loaded
        self._numbers = numbers
        self._scheduler = Scheduler(loaded, Sharing(loaded, UNBOUNDED if depth else 0), rows=batch)
        self._before = [self._ids(depth) for _ in range(batch)]
        self.read_bytes = 0.0  # of the caches of all, at their mean length in the last answers
        if depth:
            self._answers([[*ids, *self._ids(1)] for ids in self._before], 1)

    @property
    def memory(self) -> Memory:
        """What was held meanwhile."""
        return self._scheduler.memory

    def read(self, tokens: int) -> float:
        """Seconds in which each of them reads a prompt of so many further tokens."""
        start = time.perf_counter()
        self._answers([[*ids, *self._ids(tokens)] for ids in self._before], 1)
        return time.perf_counter() - start

    def generate(self, tokens: int) -> float:
        """Seconds from the first token that the last of them makes until all have made so many more."""
        boxes = self._answers([[*ids, *self._ids(1)] for ids in self._before], tokens + 1)
        return max(box.times[-1] for box in boxes) - max(box.times[0] for box in boxes)

    def _answers(self, prompts: Sequence[list[int]], count: int) -> list[Clock]:
        params = SamplingParams(temperature=0.0)
        boxes = [Clock() for _ in prompts]
        for ids, box in zip(prompts, boxes, strict=True):
            self._scheduler.add(Order(ids=ids, params=params, budget=count), box)
        length = len(prompts[0]) - 1 + (count + 2) / 2  # in the mean, behind the first token
        weighed = False
        while self._scheduler.step():
            OWNER.check_wanted()
            if not weighed and len(self._scheduler.live) == len(prompts):
                weighed = True
                caches = [row.caches for row in self._scheduler.live if row.caches is not None]
                self.read_bytes = sum(one.bytes_read(length) for each in caches for one in each)
        mx.synchronize()
        return boxes

    def _ids(self, count: int) -> list[int]:
        found: list[int] = self._numbers.integers(0, self._loaded.config.vocab_size, count).tolist()
        return found
