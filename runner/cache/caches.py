"""All that a model remembers of one sequence: the caches of its layers, which go forward and back together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeGuard

import mlx.core as mx

from runner.cache.kv import ChunkedKVCache, History, JoinedKVCache, KVCache, RotatingKVCache
from runner.cache.mark import Edge, Marks
from runner.cache.recurrent import StateCache
from runner.cache.storage import PLAIN, Powers, Storage, capacity
from runner.config.memory import Memory, Rows, Shared, State

Cache = KVCache | StateCache


@dataclass(frozen=True)
class SharedCache:
    """The keys and values of an earlier layer, for a layer that has none of its own."""

    owner: KVCache

    @property
    def history(self) -> History:
        """What the owner's attention saw in this pass."""
        return self.owner.history


class Caches(Sequence[Cache]):
    """The caches of one sequence (or of B sequences in lockstep), layer by layer.

    As a sequence it is every cache once, in the order of the layers. `layers` is what each layer is given: its cache,
    a tuple where it has none or several.

    Attributes:
        moves: how often rows may have been put elsewhere, other than by a pass: what was found out about where they lie
            before holds no longer.
    """

    def __init__(self, layers: list[Any], caches: list[Cache]) -> None:
        self.layers = layers
        self.moves = 0
        self._caches = caches

    def __repr__(self) -> str:
        return f"Caches({len(self._caches)} caches, {self.offset} tokens, {self.nbytes / 1e6:.1f} MB)"

    @classmethod
    def of(
        cls,
        memories: Sequence[Sequence[Memory]],
        storage: Storage = PLAIN,
        powers: Sequence[Powers | None] | None = None,
    ) -> Caches:
        """Empty caches for what each layer remembers, rows kept by `storage` with the channels' `powers` of each."""
        caches: list[Cache] = []
        layers: list[Any] = []
        rows: dict[int, KVCache] = {}
        for index, wanted in enumerate(memories):
            found: list[Cache | SharedCache] = []
            for memory in wanted:
                if isinstance(memory, Shared):
                    found.append(SharedCache(rows[memory.layer]))
                    continue
                cache = _cache(memory, storage, powers[len(caches)] if powers else None)
                if isinstance(cache, KVCache):
                    rows.setdefault(index, cache)
                caches.append(cache)
                found.append(cache)
            layers.append(found[0] if len(found) == 1 else tuple(found))
        return cls(layers, caches)

    @property
    def each(self) -> tuple[Caches]:
        """Itself, as the only one: several in a pass are `SeveralCaches`."""
        return (self,)

    def __getitem__(self, index: Any) -> Any:
        return self._caches[index]

    def __len__(self) -> int:
        return len(self._caches)

    def __iter__(self) -> Iterator[Cache]:
        return iter(self._caches)

    @cached_property
    def last(self) -> int:
        """The last layer that remembers something of its own; those behind it only serve a token's logits."""
        return max((index for index, given in enumerate(self.layers) if _own(given)), default=0)

    @property
    def offset(self) -> int:
        """Tokens seen so far: the position of the next one."""
        return self._caches[0].offset

    @property
    def nbytes(self) -> int:
        """Bytes of all caches."""
        return sum(cache.nbytes for cache in self._caches)

    @property
    def arrays(self) -> list[mx.array]:
        """Everything they hold, for `mx.eval`."""
        return [array for cache in self._caches for array in cache.arrays]

    @property
    def room(self) -> int:
        """How many more steps a recorded one is valid for."""
        return min(cache.room for cache in self._caches)

    def make_room(self, count: int) -> None:
        """Reallocate rows, where needed, so that `room` is at least `count`; a token must be in them already."""
        self.moves += 1
        for cache in self._caches:
            if isinstance(cache, KVCache):
                cache.make_room(count)

    def ahead(self, count: int) -> Caches:
        """A copy with `count` more tokens (at most `room`) over the same buffers, to build later steps' graphs with."""
        copies = {id(cache): cache.ahead(count) for cache in self._caches}
        return Caches([_copied(given, copies) for given in self.layers], [copies[id(cache)] for cache in self._caches])

    def advance(self) -> None:
        """Count one more token, which a recorded step has written into the buffers."""
        for cache in self._caches:
            cache.advance()

    def reserve(self, count: int) -> None:
        """Make each of the next pass' `count` tokens a place that `reach` can name."""
        for cache in self._caches:
            cache.reserve(count)

    @property
    def needs_marks(self) -> bool:
        """Whether there are places behind that only a mark can bring back: states, windows, chunks."""
        return not all(keeps_all(cache) for cache in self._caches)

    @property
    def keeps_rows(self) -> bool:
        """Whether some cache keeps a row of every token."""
        return any(keeps_all(cache) for cache in self._caches)

    def mark(self) -> Marks:
        """Keep what is needed to come back to here later."""
        return Marks(self.offset, tuple(cache.mark() for cache in self._caches))

    def reach(self, offset: int, marks: Sequence[Marks] = ()) -> int:
        """The furthest place at or before `offset` that *every* cache can be at; 0, an empty sequence, at worst."""
        # Without a mark: where one cache can't be, another may not be able to be either, so ask again from there.
        place = offset
        while (lower := min(cache.reach(place) for cache in self._caches)) < place:
            place = lower
        marked = (m.offset for m in marks if m.offset <= offset and self._restorable(m))
        return max(place, *marked, 0)

    def rewind(self, offset: int, marks: Sequence[Marks] = ()) -> None:
        """Go to a place that `reach` named, with the same marks. All caches go, or none."""
        self.moves += 1
        if all(cache.reach(offset) == offset for cache in self._caches):
            for cache in self._caches:
                cache.go_back(offset)
            return
        found = next(m for m in marks if m.offset == offset and self._restorable(m))
        for cache, mark in zip(self._caches, found.marks, strict=True):
            cache.restore(mark)

    def _restorable(self, marks: Marks) -> bool:
        """Whether those caches that keep nothing in a mark, being rows, can be there by themselves."""
        return all(
            bool(mark.arrays) or cache.reach(mark.offset) == mark.offset
            for cache, mark in zip(self._caches, marks.marks, strict=True)
        )

    def rows(self, first: int, last: int) -> Edge:
        """The rows of the tokens from `first` up to `last`: views, to be copied before the next pass."""
        return Edge(first, last, tuple(c.rows(first, last) if keeps_all(c) else {} for c in self._caches))

    def hold(self, edges: Sequence[Edge], marks: Marks | None = None) -> None:
        """Hold copies of the rows in `edges`, one after another from the first token on: only for empty caches.

        Args:
            marks: of the place where the last edge ends; needed where `needs_marks` is true.
        """
        self.moves += 1
        offset = edges[-1].last
        for index, cache in enumerate(self._caches):
            if keeps_all(cache):
                cache.hold([edge.rows[index] for edge in edges], offset)
            else:
                assert marks is not None and marks.offset == offset
                cache.restore(marks.marks[index])

    def clear(self) -> None:
        """Forget everything."""
        self.moves += 1
        for cache in self._caches:
            cache.go_back(0)


def _own(given: Any) -> bool:
    """Whether what a layer is given is its own, at least in part."""
    return any(map(_own, given)) if isinstance(given, tuple) else not isinstance(given, SharedCache)


def keeps_all(cache: Cache) -> TypeGuard[KVCache]:
    """Whether a cache keeps a row of every token, so that it can go back to each of them."""
    return isinstance(cache, KVCache) and not cache.forgets


def agreeing(edges: Sequence[Edge]) -> int:
    """How many of the first `edges` can be held together: those whose channels have the first one's powers.

    Only rows of int16 have powers (see `storage`); one buffer has one set of them.
    """
    first, *others = ([a[..., capacity(a) :, :] for a in edge.arrays if a.dtype == mx.int16] for edge in edges)
    equal = [all(mx.array_equal(*pair) for pair in zip(first, powers, strict=True)) for powers in others]
    return 1 + [*equal, False].index(False)


def _copied(given: Any, copies: Mapping[int, Cache]) -> Any:
    """What a layer is given, of `copies` by the id of what they are copied from.

    Not within `ahead`: a function that calls itself there is held by its own cell, and with it the weights of the
    graphs that are built over the copies, until Python looks for cycles.
    """
    if isinstance(given, tuple):
        return tuple(_copied(one, copies) for one in given)
    if isinstance(given, SharedCache):
        owner = copies[id(given.owner)]
        assert isinstance(owner, KVCache)
        return SharedCache(owner)
    return copies[id(given)]


def _cache(memory: Rows | State, storage: Storage, powers: Powers | None) -> Cache:
    if isinstance(memory, State):
        return StateCache(memory)
    if memory.window is not None:
        return RotatingKVCache(memory.window, storage, powers)
    if memory.chunk is not None:
        return ChunkedKVCache(memory.chunk, storage, powers)
    return JoinedKVCache(storage) if memory.joined and storage.joins else KVCache(storage, powers)
