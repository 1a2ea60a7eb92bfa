"""What kernels for steps of several sequences do over ranks, by operations: where there is no GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from runner.cache.caches import Caches
from runner.cache.several import SeveralCaches
from runner.engine import step_shape
from runner.engine.compiled import Compiled
from runner.nn.batch import Batch, Segment
from runner.nn.stages import NoHead
from runner.ops.exchange import Exchange
from runner.ranks import follower, leader


class TwinStep:
    """A step that has ended as soon as it was begun."""

    def __init__(self, logits: np.ndarray, best: list[int]) -> None:
        self.latest = True
        self._logits, self._best = logits, best

    def wait(self) -> None: ...

    @property
    def logits(self) -> mx.array:
        return mx.array(self._logits)

    @property
    def best(self) -> list[tuple[int, float]]:
        return [(token, float(row[token])) for token, row in zip(self._best, self._logits, strict=True)]


class Twin:
    """`RowsDecoder` of one rank, by the part of the model that is there."""

    begun = 0

    def __init__(self, model: Any) -> None:
        self._model = model
        self._exchange: Exchange | None = None
        self._last: TwinStep | None = None

    def connect(self, exchange: Exchange) -> None:
        assert exchange.word(bytes(range(exchange.rank, exchange.rank + 128))) == bytes(range(128))
        self._exchange = exchange

    def ready(self, count: int) -> None: ...

    def refresh(self) -> None: ...

    def settle(self) -> None: ...

    def close(self) -> None: ...

    def bound(self, several: Sequence[Caches]) -> list[Caches]:
        return list(several)

    def begin(self, tokens: Sequence[int], positions: Sequence[int], caches: Sequence[Caches]) -> TwinStep:
        assert self._exchange is not None
        assert [one.offset for one in caches] == list(positions)
        Twin.begun += 1
        best = [] if self._last is None else [token for token, _ in self._last.best]
        ids = mx.array([[token if token >= 0 else best[~token] for token in tokens]], mx.int32)
        several = SeveralCaches(list(caches), [1] * len(caches))
        batch = Batch.of(ids, [Segment(1, place, place + 1) for place in positions])
        hidden = self._model(batch, several)
        if type(self._model.lm_head) is NoHead:
            logits = mx.zeros((len(tokens), self._model.embed_tokens.weight.shape[0]))
        else:
            logits = self._model.logits(hidden)[0].astype(mx.float32)
        mx.eval(hidden, logits, several.arrays)  # on all ranks, before the next exchange is begun
        found = self._exchange.from_first(logits)
        mx.eval(found)
        for one, place in zip(caches, positions, strict=True):
            Caches.rewind(one, place)  # whoever begins a step counts its tokens; what is there stays
        if self._last is not None:
            self._last.latest = False
        rows = np.array(found)
        self._last = TwinStep(rows, rows.argmax(-1).tolist())
        return self._last


def take_twins() -> None:
    """Let this process, which is a rank, decode by twins."""

    def suited(device: Any, settings: Any) -> Any:
        return dataclasses.replace(device, ops=dataclasses.replace(device.ops, recorder=None), compiles=True)

    def rows(self: Any) -> Any:
        if self.part is not None and self._rows is None and self.refused_rows is None:
            self._rows = Twin(self._model)
        return self._rows

    leader.suited = follower.suited = suited
    step_shape.rows_of = lambda caches: caches  # type: ignore[assignment, return-value]
    Compiled.rows = rows  # type: ignore[method-assign]
