"""One token after another: a step's graph is built in Python, or, where the device can record it, replayed.

Building and scheduling the some 500 operations of a small model takes as long as a quarter of computing them. A step is
the same for each token but for positions, that is as long as the caches' buffers have room; so it is built for the
next position, the one after, one in the middle and the last that there is room for, and recorded where these differ in
nothing but positions that advance with the token. A model that looks at its token, or decides by its position within
that range, gives other graphs and is built anew for each token (the tests compare every position, for every family).
"""

from __future__ import annotations

import mlx.core as mx

from runner.cache.kv import KVCache
from runner.errors import RunnerError
from runner.families import Model
from runner.nn.batch import Batch
from runner.ops.table import Ops, Program

PATIENCE = 8
"""Tokens that are built before one is recorded: a short answer would not win back what recording costs."""

LEAST = 32
"""Tokens that a recording must be good for: it costs as much as building four, and more memory."""


class Steps:
    """The steps of decoding: `[B, V]` logits after each token `[B, 1]`, whose keys and values join `caches`."""

    def __init__(self, model: Model, caches: list[KVCache], ops: Ops) -> None:
        self._model = model
        self._caches = caches
        self._recorder = ops.recorder
        self._program: Program | None = None
        self._left = 0  # tokens that the program is good for
        self._built = 0

    def __call__(self, token: mx.array) -> mx.array:
        """Lazy, or on its way; the steps before must have been scheduled."""
        if self._left == 0:
            self._program = self._recorded(token)
        if self._program is None:
            self._built += 1
            return self._logits(token, self._caches)
        logits = self._program.run(token)
        self._left -= 1
        for cache in self._caches:
            cache.advance()
        return logits

    def _logits(self, ids: mx.array, caches: list[KVCache]) -> mx.array:
        return self._model.logits(self._model(Batch(ids, caches[0].offset), caches))[:, -1]

    def _recorded(self, token: mx.array) -> Program | None:
        room = min(cache.room for cache in self._caches)
        if self._recorder is None or self._built < PATIENCE or room < LEAST or token.dtype not in (mx.int32, mx.uint32):
            return None
        slot = self._recorder.slot(list(token.shape))
        ahead = [0, 1, room // 2, room - 1]
        try:
            steps = [self._logits(slot, [cache.ahead(count) for cache in self._caches]) for count in ahead]
            program = self._recorder.record(slot, steps, ahead)
        except (RuntimeError, RunnerError):  # it looked at its token, or ends before the last of these positions
            program = None
        if program is None:
            self._recorder = None
        else:
            self._left = room
        return program
