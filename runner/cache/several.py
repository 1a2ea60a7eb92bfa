"""The caches of several requests in one pass: what a layer is given is a list of its caches, one for each request.

Each request keeps its own: nothing is padded, moved or copied because another one came or went.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from runner.cache.caches import Caches, SharedCache
from runner.cache.kv import History, KVCache
from runner.cache.recurrent import StateCache


@dataclass(frozen=True)
class New:
    """Keys and values `[1, KV, T, D]` of a pass' tokens, which are still to be written into the `caches`."""

    caches: tuple[KVCache, ...]
    keys: mx.array
    values: mx.array

    def written(self, counts: tuple[int, ...]) -> tuple[History, ...]:
        """Write them; returns what each request's tokens may attend to."""
        write = self.caches[0].write_rows
        if write is None:
            ends = list(itertools.accumulate(counts[:-1]))
            parts = zip(self.caches, mx.split(self.keys, ends, 2), mx.split(self.values, ends, 2), strict=True)
            return tuple(cache.append(k, v) for cache, k, v in parts)
        each = list(zip(self.caches, counts, strict=True))
        buffers, at = zip(*(cache.place(self.keys, self.values, count) for cache, count in each), strict=True)
        found = zip(each, write(buffers, self.keys, self.values, at, counts), strict=True)
        return tuple(cache.placed(pair, count) for (cache, count), pair in found)


class Histories:
    """What the tokens of each request may attend to.

    Attributes:
        counts: how many of the pass' tokens each of them has.
    """

    def __init__(self, each: tuple[History, ...] | New, counts: tuple[int, ...]) -> None:
        """`New` ones are written when somebody looks at them, unless that is what attention does itself."""
        self._each = each
        self.counts = counts

    @property
    def each(self) -> tuple[History, ...]:
        """That of each request."""
        if isinstance(self._each, New):
            self._each = self._each.written(self.counts)
        return self._each

    @property
    def new(self) -> New | None:
        """What is still to be written, if it is."""
        return self._each if isinstance(self._each, New) else None

    def written(self) -> None:
        """Take note that somebody has written the new ones, and has placed them in their caches."""
        if isinstance(self._each, New):
            self._each = tuple(cache.history for cache in self._each.caches)


@dataclass(frozen=True)
class SeveralKV:
    """A layer's keys and values, those of each request in a cache of its own."""

    each: tuple[KVCache, ...]
    counts: tuple[int, ...]

    def append(self, keys: mx.array, values: mx.array) -> Histories:
        """Add keys and values `[1, KV, T, D]` of the pass' tokens; returns what each request's may attend to."""
        return Histories(New(self.each, keys, values), self.counts)

    @property
    def history(self) -> Histories:
        """What the last `append` of this pass returned."""
        return Histories(tuple(cache.history for cache in self.each), self.counts)


@dataclass(frozen=True)
class SeveralShared:
    """The keys and values of an earlier layer, for a layer that has none of its own."""

    each: tuple[SharedCache, ...]
    counts: tuple[int, ...]

    @property
    def history(self) -> Histories:
        """What the owners' attention saw in this pass."""
        return Histories(tuple(cache.history for cache in self.each), self.counts)


@dataclass(frozen=True)
class SeveralStates:
    """A layer's states, those of each request in a cache of its own."""

    each: tuple[StateCache, ...]


class SeveralCaches:
    """The caches of several requests, for a pass in which each has `counts` tokens; `layers` as `Caches.layers`."""

    def __init__(self, each: Sequence[Caches], counts: Sequence[int]) -> None:
        self.each = tuple(each)
        self.counts = tuple(counts)
        self.layers = [_several(given, tuple(counts)) for given in zip(*(one.layers for one in each), strict=True)]

    @property
    def last(self) -> int:
        """As `Caches.last`."""
        return self.each[0].last

    @property
    def offset(self) -> tuple[int, ...]:
        """Tokens that each of them has seen."""
        return tuple(caches.offset for caches in self.each)

    @property
    def room(self) -> int:
        """How many more steps of a token each a recorded one is valid for."""
        return min(caches.room for caches in self.each)

    def make_room(self, count: int) -> None:
        """Reallocate rows, where needed, so that `room` is at least `count`."""
        for caches in self.each:
            caches.make_room(count)

    def ahead(self, count: int) -> SeveralCaches:
        """A copy with `count` more tokens of each (at most `room`), to build later steps' graphs with."""
        return SeveralCaches([caches.ahead(count) for caches in self.each], self.counts)

    def advance(self) -> None:
        """Count one more token of each, which a recorded step has written into the buffers."""
        for caches in self.each:
            caches.advance()

    @property
    def arrays(self) -> list[mx.array]:
        """Everything they hold, for `mx.eval`."""
        return [array for caches in self.each for array in caches.arrays]


Memories = Caches | SeveralCaches
"""What a model is given: the caches of one request, or of several."""


def _several(given: tuple[Any, ...], counts: tuple[int, ...]) -> Any:
    """What a layer is given, of what it would be given for each request alone."""
    if isinstance(given[0], tuple):
        return tuple(_several(ones, counts) for ones in zip(*given, strict=True))
    if isinstance(given[0], StateCache):
        return SeveralStates(given)
    return (SeveralShared if isinstance(given[0], SharedCache) else SeveralKV)(given, counts)
