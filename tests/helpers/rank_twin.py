"""What kernels for steps of several sequences do over ranks, by operations: where there is no GPU."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
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
    """A step that `compute` takes when somebody waits for it, or for one behind it."""

    def __init__(self, compute: Callable[[], np.ndarray]) -> None:
        self.latest = True
        self._compute: Callable[[], np.ndarray] | None = compute
        self._logits: np.ndarray | None = None

    def wait(self) -> None:
        if self._compute is not None:
            compute, self._compute = self._compute, None
            self._logits = compute()

    @property
    def logits(self) -> mx.array:
        return mx.array(self._ended)

    @property
    def best(self) -> list[tuple[int, float]]:
        return [(int(row.argmax()), float(row.max())) for row in self._ended]

    @property
    def _ended(self) -> np.ndarray:
        self.wait()
        assert self._logits is not None
        return self._logits


class Place:
    """Where a sequence's rows lie: the arrays that its caches hold, unless somebody else has put others there."""

    def __init__(self, caches: Caches) -> None:
        self.caches = caches
        self.found()

    def found(self) -> None:
        self._arrays = self.caches.arrays

    def check(self) -> None:
        arrays = self.caches.arrays
        assert len(arrays) == len(self._arrays) and all(map(operator.is_, arrays, self._arrays)), "rows have moved"


class Twin:
    """`RowsDecoder` of one rank, by the part of the model that is there.

    Rank 0 computes a step as late as it can, the others at once: what else these exchange would come between.
    """

    begun = 0

    def __init__(self, model: Any) -> None:
        self._model = model
        self._exchange: Exchange | None = None
        self._steps: list[TwinStep] = []  # the last two

    def connect(self, exchange: Exchange) -> None:
        assert exchange.word(bytes(range(exchange.rank, exchange.rank + 128))) == bytes(range(128))
        self._exchange = exchange

    def check(self) -> None: ...

    def ready(self, count: int) -> None: ...

    def refresh(self) -> None: ...

    def settle(self) -> None:
        for step in self._steps:
            step.wait()

    def close(self) -> None: ...

    def bound(self, several: Sequence[Caches]) -> list[Place]:
        return list(map(Place, several))

    def begin(self, tokens: Sequence[int], positions: Sequence[int], places: Sequence[Place]) -> TwinStep:
        assert self._exchange is not None
        assert [one.caches.offset for one in places] == list(positions) and all(one.caches.room for one in places)
        Twin.begun += 1
        before = self._steps[-1:]
        step = TwinStep(functools.partial(self._logits, tokens, positions, places, before))
        for one in before:
            one.latest = False
        for one in self._steps[:-1]:
            one.wait()
        self._steps = [*before, step]
        if self._exchange.rank:
            step.wait()
        return step

    def _logits(
        self, tokens: Sequence[int], positions: Sequence[int], places: Sequence[Place], before: list[TwinStep]
    ) -> np.ndarray:
        assert self._exchange is not None
        best = [token for one in before for token, _ in one.best]
        ids = mx.array([[token if token >= 0 else best[~token] for token in tokens]], mx.int32)
        each = [place.caches for place in places]
        ahead = [caches.offset - position for caches, position in zip(each, positions, strict=True)]
        for place, position in zip(places, positions, strict=True):
            place.check()
            Caches.rewind(place.caches, position)  # of this rank alone
        several = SeveralCaches(each, [1] * len(each))
        batch = Batch.of(ids, [Segment(1, position, position + 1) for position in positions])
        hidden = self._model(batch, several)
        if type(self._model.lm_head) is NoHead:
            logits = mx.zeros((len(tokens), self._model.embed_tokens.weight.shape[0]))
        else:
            logits = self._model.logits(hidden)[0].astype(mx.float32)
        mx.eval(hidden, logits, several.arrays)  # on all ranks, before the next exchange is begun
        found = self._exchange.from_first(logits)
        mx.eval(found)
        for place, position, count in zip(places, positions, ahead, strict=True):
            place.found()
            Caches.rewind(place.caches, position)  # whoever begins a step counts its tokens; what is there stays
            for _ in range(count):
                place.caches.advance()
        return np.array(found)


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
