"""What attention remembers: keys and values of the tokens seen so far, whose count is the offset RoPE gets."""

from __future__ import annotations

import copy
from typing import NamedTuple

import mlx.core as mx

from runner.cache.storage import PLAIN, Storage
from runner.errors import UsageError

STEP = 256
"""Tokens a cache grows by, at least; growing copies, so that a long one grows by a quarter of itself."""


class History(NamedTuple):
    """What attention sees: the first `length` rows of the buffers, the newest last, and the window to apply to them."""

    stored_keys: mx.array
    stored_values: mx.array
    length: int
    window: int | None = None
    storage: Storage = PLAIN

    @property
    def keys(self) -> mx.array:
        """Keys `[B, KV, S, D]` as numbers."""
        return self.storage.read(self.stored_keys[..., : self.length, :])

    @property
    def values(self) -> mx.array:
        """Values `[B, KV, S, Dv]` as numbers."""
        return self.storage.read(self.stored_values[..., : self.length, :])


class KVCache:
    """Keeps every token. Buffers grow in steps; appending writes in place, so nobody else may hold on to them."""

    def __init__(self, storage: Storage = PLAIN) -> None:
        self.storage = storage
        self.offset = 0
        self._start = 0  # position of the buffer's first token
        self._keys: mx.array | None = None
        self._values: mx.array | None = None

    @property
    def window(self) -> int | None:
        """How far back attention looks; None: to the first token."""
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, the unused ends included."""
        return sum(0 if buffer is None else buffer.nbytes for buffer in (self._keys, self._values))

    @property
    def arrays(self) -> list[mx.array]:
        """The buffers, to evaluate."""
        return [buffer for buffer in (self._keys, self._values) if buffer is not None]

    def append(self, keys: mx.array, values: mx.array) -> History:
        """Add `[B, KV, L, D]` of the next L tokens and return what they may look at."""
        count = keys.shape[2]
        stored = self.offset - self._start
        if self._keys is None or self._values is None or stored + count > self._keys.shape[2]:
            stored = self._make_room(keys, values, stored)
        assert self._keys is not None and self._values is not None
        end = stored + count
        self._keys, self._values = self.storage.write(self._keys, self._values, keys, values, stored)
        self.offset += count
        return History(self._keys, self._values, end, self.window, self.storage)

    @property
    def room(self) -> int:
        """How many more tokens fit before the buffers are laid out anew."""
        return 0 if self._keys is None else self._keys.shape[2] - (self.offset - self._start)

    def ahead(self, count: int) -> KVCache:
        """This cache with `count` more tokens, within `room`, over the same buffers: to build graphs with."""
        later = copy.copy(self)
        later.offset += count
        return later

    def advance(self) -> None:
        """A token's keys and values were written behind the last one's, into the same buffers."""
        self.offset += 1

    def trim(self, count: int) -> None:
        """Forget the newest `count` tokens.

        Raises:
            UsageError: `count` is negative, or more than the cache can take back.
        """
        if not 0 <= count <= self.trimmable():
            raise UsageError(f"the cache can forget 0 to {self.trimmable()} of its {self.offset} tokens, not {count}")
        self.offset -= count

    def trimmable(self) -> int:
        """How many of the newest tokens `trim` can forget."""
        return self.offset

    def _kept(self, stored: int) -> int:
        """How many of the `stored` tokens are still needed when the buffer is laid out anew."""
        return stored

    def _make_room(self, keys: mx.array, values: mx.array, stored: int) -> int:
        """Lay the buffers out anew for the kept tokens and the new ones; returns how many are kept."""
        kept = self._kept(stored)
        need = kept + keys.shape[2]
        capacity = -(-(need + max(STEP // 2, need // 4)) // STEP) * STEP
        self._keys = self._moved(self._keys, keys, stored, kept, capacity)
        self._values = self._moved(self._values, values, stored, kept, capacity)
        self._start = self.offset - kept
        return kept

    def _moved(self, old: mx.array | None, like: mx.array, stored: int, kept: int, capacity: int) -> mx.array:
        buffer = self.storage.empty(like, capacity)
        if old is not None and kept:
            buffer[..., :kept, :] = old[..., stored - kept : stored, :]
        return buffer


class RotatingKVCache(KVCache):
    """For layers that look back `window` tokens: old ones make room for new ones, in order.

    The buffer holds the window and a margin; when it is full, the window moves to its front. Moving one window each
    margin costs less than the wrapped-around indices it spares, and the history stays sorted by position.
    """

    def __init__(self, window: int, storage: Storage = PLAIN) -> None:
        super().__init__(storage)
        self._window = window

    @property
    def window(self) -> int | None:
        return self._window

    def trimmable(self) -> int:
        """After forgetting, the next token's whole window must still be there."""
        return self.offset if self._start == 0 else max(0, self.offset - self._start - self._window + 1)

    def _kept(self, stored: int) -> int:
        return min(stored, self._window - 1)
