"""Decode steps: the graph of a step is built in Python for each token or, where the device can record it, replayed.

For a small model, building and scheduling its roughly 500 operations takes a quarter as long as computing them. As long
as the buffers of the KV caches have room, the steps of different tokens differ only in positions. So a step is built
for the next position, the one after it, one in the middle and the last that there is room for, and is recorded if these
graphs differ in nothing but positions that advance with the token. A model that looks at its token, or that decides by
its position within that range, gives graphs that differ in more, and is built anew for each token (the tests compare
every position, for every family).
"""

from __future__ import annotations

import mlx.core as mx

from runner.cache.several import Memories, SeveralCaches
from runner.errors import RunnerError
from runner.families import Model
from runner.nn.batch import Batch, Segment
from runner.ops.table import Ops, Program

PATIENCE = 8
"""Steps that are built before one is recorded: a short answer would not win back the cost of recording."""

LEAST = 32
"""Steps that a recording must be valid for: recording costs as much as building four steps, and more memory."""


ROOM = 128
"""Steps that there is to be room for in the caches of several requests: as much as in those of one, in the mean."""


class Steps:
    """Runs decode steps: each call maps tokens `[B, 1]` to logits `[B, V]` and appends keys and values to `caches`.

    With the caches of several requests, it maps `[1, R]`, a token of each, to logits `[R, V]`.
    """

    def __init__(self, model: Model, caches: Memories, ops: Ops) -> None:
        self._model = model
        self._caches = caches
        self._schedule = ops.schedule
        self._recorder = ops.recorder
        self._program: Program | None = None
        self._left = 0  # steps that the program is still valid for
        self._built = 0  # steps that were built in Python
        self._at = caches.offset  # where the last step left the caches

    def __call__(self, token: mx.array) -> mx.array:
        """Return the logits, lazy or already being computed; the earlier steps must have been scheduled."""
        if self._at != self._caches.offset:  # another pass has moved them since
            self.forget()
        if self._left == 0:
            self._program = self._recorded(token)
        if self._program is None:
            self._built += 1
            built = self._logits(token, self._caches)
            self._at = self._caches.offset
            return built
        # The program writes keys and values into the caches' buffers; Python only moves the offsets along.
        logits = self._program.run(token)
        self._left -= 1
        self._caches.advance()
        self._at = self._caches.offset
        return logits

    def forget(self) -> None:
        """Forget a recorded step, as a pass of another size has moved the caches on."""
        self._program, self._left, self._built = None, 0, 0

    def _logits(self, ids: mx.array, caches: Memories) -> mx.array:
        if isinstance(caches, SeveralCaches):
            batch = Batch.of(ids, [Segment(1, offset) for offset in caches.offset])
            return mx.squeeze(self._model.logits(self._model(batch, caches)), 0)
        return self._model.logits(self._model(Batch(ids, caches.offset), caches))[:, -1]

    def _recorded(self, token: mx.array) -> Program | None:
        """Record a step that is valid for as many tokens as the caches have room for; None: build this step instead."""
        # Recording must pay: the answer is long enough already, and the program will serve enough steps.
        if self._recorder is None or self._built < PATIENCE or token.dtype not in (mx.int32, mx.uint32):
            return None
        # A program addresses the buffers it was recorded with, so it lasts until the first cache needs larger ones: of
        # several the first would soon, so all get some room.
        if isinstance(self._caches, SeveralCaches):
            self._caches.make_room(ROOM)
            # They hold what is computed from here on: of a recorded graph nothing may be held by others.
            self._schedule(*self._caches.arrays)
        room = self._caches.room
        if room < LEAST:
            return None
        # The slot stands for any token: a graph that needs the token's value cannot be built over it.
        slot = self._recorder.slot(list(token.shape))
        # Positions 0 and 1 show what advances per token, the others that it does so up to the end of the room.
        ahead = [0, 1, room // 2, room - 1]
        try:
            # Each graph is built over copies of the caches: the caches themselves must not move before a step runs.
            steps = [self._logits(slot, self._caches.ahead(count)) for count in ahead]
            program = self._recorder.record(slot, steps, ahead)
        except (RuntimeError, RunnerError):  # the model looked at its token, or has no position as far ahead as these
            program = None
        # A model whose steps differ will differ again: do not try a second time.
        if program is None:
            self._recorder = None
        else:
            self._left = room
        return program
