"""KV caches: keys and values of the tokens seen so far, whose number is the offset that RoPE gets."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx

from runner.cache.mark import Mark
from runner.cache.storage import PLAIN, Powers, Storage, WriteRows, capacity, cut, fill, gathered
from runner.errors import UsageError

STEP = 256
"""Granularity of a buffer's capacity in tokens. Growing copies, so a long cache grows by a quarter of its length."""


class History(NamedTuple):
    """What attention sees: the first `length` rows of the buffers, the newest last, and the window to apply to them.

    Row 0 has the position `start`. With `chunk`, it is the first of a chunk of so many, and a query sees the rows of
    its own chunk only.
    With `split`, a row of `stored_keys` is a key of so many numbers and then a value; `stored_values` has no columns.
    """

    stored_keys: mx.array
    stored_values: mx.array
    length: int
    window: int | None = None
    storage: Storage = PLAIN
    split: int | None = None
    chunk: int | None = None
    start: int = 0

    @property
    def each(self) -> tuple[History]:
        """Itself, as the only one: those of several requests in a pass are `Histories`."""
        return (self,)

    @property
    def keys(self) -> mx.array:
        """Keys `[B, KV, S, D]` as numbers."""
        return self.storage.read(self.stored_keys, self.length)[..., : self.split]

    @property
    def values(self) -> mx.array:
        """Values `[B, KV, S, Dv]` as numbers."""
        if self.split is not None:
            return self.storage.read(self.stored_keys, self.length)[..., self.split :]
        return self.storage.read(self.stored_values, self.length)

    @property
    def rows(self) -> mx.array:
        """Keys and values side by side, `[B, KV, S, D + Dv]`: without a copy where they are stored so."""
        if self.split is not None:
            return self.storage.read(self.stored_keys, self.length)
        return mx.concatenate([self.keys, self.values], axis=-1)

    def latest(self, count: int) -> History:
        """The newest `count` rows of these, or all where there are fewer."""
        first = max(0, self.length - count)
        keys, values = (cut(buffer, first, self.length) for buffer in (self.stored_keys, self.stored_values))
        return self._replace(
            stored_keys=keys, stored_values=values, length=self.length - first, start=self.start + first
        )


class KVCache:
    """A cache that keeps every token. Buffers grow in steps and are written in place, so nothing else may hold them."""

    def __init__(self, storage: Storage = PLAIN, powers: Powers | None = None) -> None:
        self.storage = storage
        self._powers = powers or (None, None)
        self.offset = 0
        self._start = 0  # position of the buffer's first token
        self._keys: mx.array | None = None
        self._values: mx.array | None = None
        self._history: History | None = None

    @property
    def history(self) -> History:
        """What the last `append` returned: layers that share these keys and values look at it.

        Raises:
            UsageError: nothing was appended yet.
        """
        if self._history is None:
            raise UsageError("a layer that shares another's keys and values came before it")
        return self._history

    @property
    def window(self) -> int | None:
        """How many tokens attention looks back, the newest included; None: to the first token."""
        return None

    @property
    def chunk(self) -> int | None:
        """Into how many tokens positions are divided, to whose start attention looks back; None: they are not."""
        return None

    @property
    def forgets(self) -> bool:
        """Whether there are tokens behind to which only a mark can go back."""
        return self.window is not None

    @property
    def write_rows(self) -> WriteRows | None:
        """What writes the rows of several caches like this one at once; None: each appends its own."""
        return self.storage.write_rows

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, including rows not used yet."""
        return sum(0 if buffer is None else buffer.nbytes for buffer in (self._keys, self._values))

    def bytes_read(self, length: float) -> float:
        """Bytes that a decode step reads after `length` tokens: the rows that attention sees, not the spare ones."""
        seen = length if self.window is None else min(length, self.window)
        return sum(array.nbytes / array.shape[2] for array in self.arrays) * seen

    @property
    def arrays(self) -> list[mx.array]:
        """The buffers, for `mx.eval`."""
        return [buffer for buffer in (self._keys, self._values) if buffer is not None]

    def append(self, keys: mx.array, values: mx.array) -> History:
        """Add keys and values `[B, KV, L, D]` of the next L tokens; returns what those tokens may attend to."""
        count = keys.shape[2]
        buffers, stored = self.place(keys, values, count)
        return self.placed(self.storage.write(*buffers, keys, values, stored), count)

    def place(self, keys: mx.array, values: mx.array, count: int) -> tuple[tuple[mx.array, mx.array], int]:
        """Buffers with room for `count` rows like those of `keys` and `values`, and the row of the first of them."""
        # Rows in the buffer, whose first need not be position 0 under a sliding window.
        stored = self.offset - self._start
        full = self._keys is None or stored + count > capacity(self._keys)
        if full or self._values is None or self._outlived():
            stored = self._make_room(keys, values, stored, count)
        assert self._keys is not None and self._values is not None
        return (self._keys, self._values), stored

    def placed(self, buffers: tuple[mx.array, mx.array], count: int) -> History:
        """Take the buffers of `place` back with the next `count` tokens in them; returns what those may attend to."""
        self._keys, self._values = buffers
        self.offset += count
        end = self.offset - self._start
        self._history = History(*buffers, end, self.window, self.storage, chunk=self.chunk, start=self._start)
        return self._history

    @property
    def room(self) -> int:
        """How many more tokens fit before the buffers are reallocated."""
        return 0 if self._keys is None else capacity(self._keys) - (self.offset - self._start)

    @property
    def start(self) -> int:
        """The position of the buffers' first row: 0, unless rows before a window or chunk were dropped."""
        return self._start

    def make_room(self, count: int) -> None:
        """Reallocate the buffers, where needed, so that `room` is at least `count`; something must be in them."""
        if self._keys is None or self._values is None:
            raise UsageError("an empty cache does not know what its rows are like")
        if self.room < count:
            new = [mx.zeros((*b.shape[:2], count, b.shape[3]), dtype=b.dtype) for b in (self._keys, self._values)]
            self._make_room(new[0], new[1], self.offset - self._start, count)

    def ahead(self, count: int) -> KVCache:
        """A copy with `count` more tokens (at most `room`) over the same buffers, to build later steps' graphs with."""
        later = copy.copy(self)
        later.offset += count
        return later

    def advance(self) -> None:
        """Count one more token, whose keys and values have been written into the buffers after the last one's."""
        self.offset += 1

    def trim(self, count: int) -> None:
        """Forget the newest `count` tokens.

        Raises:
            UsageError: `count` is negative, or more than the cache can take back.
        """
        if not 0 <= count <= self.trimmable():
            raise UsageError(f"the cache can forget 0 to {self.trimmable()} of its {self.offset} tokens, not {count}")
        self.offset -= count
        self._history = None

    def reserve(self, count: int) -> None:
        """Make each of the next pass' `count` tokens a place to go back to: rows always are."""

    def reach(self, offset: int) -> int:
        """The furthest place at or before `offset` that `go_back` can go to; 0 at worst."""
        return offset if self.offset - offset <= self.trimmable() else 0

    def go_back(self, offset: int) -> None:
        """Forget all tokens from `offset` on, a place that `reach` named."""
        if offset == 0:
            self._keys = self._values = self._history = None
            self.offset = self._start = 0
        else:
            self.trim(self.offset - offset)

    def mark(self) -> Mark:
        """What `restore` needs to come back to here: nothing, as earlier rows stay."""
        return Mark(self.offset, {})

    def restore(self, mark: Mark) -> None:
        """Come back to where `mark` was made; `reach` must have named the place."""
        self.go_back(mark.offset)

    def rows(self, first: int, last: int) -> Mapping[str, mx.array]:
        """The rows of the tokens from `first` up to `last`: views, to be copied before anything more is written."""
        if self._keys is None or self._values is None:
            return {}
        buffers = {"keys": self._keys, "values": self._values}
        return {name: cut(buffer, first - self._start, last - self._start) for name, buffer in buffers.items()}

    def hold(self, pieces: Sequence[Mapping[str, mx.array]], offset: int) -> None:
        """Hold copies of the rows in `pieces`, one piece after another, the last of which ends at token `offset`."""
        stored = sum(capacity(piece["keys"]) for piece in pieces)
        self._keys, self._values = (
            gathered(buffers, self.storage.empty(buffers[0][..., :0, :], room_for(stored) - stored, None))
            for buffers in ([piece[name] for piece in pieces] for name in ("keys", "values"))
        )
        self._history = None
        self.offset, self._start = offset, offset - stored

    def trimmable(self) -> int:
        """How many of the newest tokens `trim` can forget."""
        return self.offset

    def _marked(self, count: int) -> Mark:
        """A mark of the newest `count` rows, copied: the buffers are written in place."""
        rows = self.rows(self.offset - count, self.offset) if count else {}
        return Mark(self.offset, {name: gathered([buffer]) for name, buffer in rows.items()})

    def _restore(self, mark: Mark) -> None:
        """Hold a copy of the rows of `mark`, which may be come back to again."""
        if mark.arrays:
            self.hold([mark.arrays], mark.offset)
        else:
            self._keys = self._values = self._history = None
            self.offset = self._start = mark.offset

    def _kept(self, stored: int) -> int:
        """How many of the `stored` tokens are still needed when the buffers are reallocated."""
        return stored

    def _outlived(self) -> bool:
        """Whether the buffers must be reallocated, although there is room: they begin with tokens not needed."""
        return False

    def _make_room(self, keys: mx.array, values: mx.array, stored: int, count: int) -> int:
        """Reallocate the buffers for the tokens kept and `count` new ones; returns how many are kept."""
        kept = self._kept(stored)
        room = room_for(kept + count)
        for_keys, for_values = (
            self.storage.empty(*new) for new in zip((keys, values), (room, room), self._powers, strict=True)
        )
        self._keys = _moved(self._keys, for_keys, stored, kept)
        self._values = _moved(self._values, for_values, stored, kept)
        self._start = self.offset - kept
        return kept


def _moved(old: mx.array | None, new: mx.array, stored: int, kept: int) -> mx.array:
    """The buffer `new` with the last `kept` of the rows stored in `old` at its front.

    The powers come along also where no row does: one that was made like rows of codes knows none.
    """
    if old is not None:
        fill(new, old, stored - kept, stored)
    return new


def room_for(need: int) -> int:
    """How many rows to make room for where `need` are needed now: a quarter more, in whole steps."""
    return -(-(need + max(STEP // 2, need // 4)) // STEP) * STEP


class JoinedKVCache(KVCache):
    """A cache whose tokens' keys and values lie side by side in one buffer, for attention that reads both as one row.

    The buffer of values has no columns.
    """

    @property
    def write_rows(self) -> None:
        """None: what writes several caches' rows puts keys into one buffer and values into the other."""

    def append(self, keys: mx.array, values: mx.array) -> History:
        count, split = keys.shape[2], keys.shape[3]
        stored = self.offset - self._start
        if self._keys is None or stored + count > capacity(self._keys):
            rows = mx.concatenate([keys, values], axis=-1)
            stored = self._make_room(rows, rows[..., :0], stored, count)
        assert self._keys is not None and self._values is not None
        # Each part into its columns: to join them first would write the row twice.
        end = stored + count
        self._keys[..., stored:end, :split] = keys
        self._keys[..., stored:end, split:] = values
        self.offset += count
        self._history = History(self._keys, self._values, end, self.window, self.storage, split)
        return self._history


class RotatingKVCache(KVCache):
    """A cache for layers that look back `window` tokens: it drops older ones.

    The buffer holds the window and a margin; when it is full, the window moves to its front. Moving one window per
    margin costs less than wrapped-around indices would, and the history stays sorted by position.
    """

    def __init__(self, window: int, storage: Storage = PLAIN, powers: Powers | None = None) -> None:
        super().__init__(storage, powers)
        self._window = window

    @property
    def window(self) -> int | None:
        return self._window

    def trimmable(self) -> int:
        """How many of the newest tokens `trim` can forget: the next token's whole window must still be there."""
        return self.offset if self._start == 0 else max(0, self.offset - self._start - self._window + 1)

    def _kept(self, stored: int) -> int:
        return min(stored, self._window - 1)  # the next token is itself part of its window

    def mark(self) -> Mark:
        """What `restore` needs to come back to here: a copy of the rows that the next token's window holds."""
        return self._marked(self._kept(self.offset - self._start))

    def restore(self, mark: Mark) -> None:
        """Come back to where `mark` was made, with copies of the marked rows."""
        self._restore(mark)


class ChunkedKVCache(KVCache):
    """A cache for layers that look back to the start of their chunk: positions are divided into chunks of `chunk`.

    Before an `append`, rows of earlier chunks are dropped, so that the first row is the first of a chunk, and a single
    query sees all there is. A pass may run over the end of its chunk: the rows of both are kept until the next one.
    """

    def __init__(self, chunk: int, storage: Storage = PLAIN, powers: Powers | None = None) -> None:
        super().__init__(storage, powers)
        self._chunk = chunk

    @property
    def _first(self) -> int:
        """The position at which the next token's chunk starts."""
        return self.offset // self._chunk * self._chunk

    @property
    def forgets(self) -> bool:
        return True

    def bytes_read(self, length: float) -> float:
        return super().bytes_read(length % self._chunk)

    @property
    def chunk(self) -> int | None:
        return self._chunk

    @property
    def room(self) -> int:
        """How many more tokens fit before the buffers are reallocated: never more than the chunk has left."""
        return 0 if self._outlived() else min(super().room, self._first + self._chunk - self.offset)

    def trimmable(self) -> int:
        """How many of the newest tokens `trim` can forget: those whose rows are still there."""
        return self.offset - self._start

    def reach(self, offset: int) -> int:
        # The first token of a chunk needs no rows.
        return offset if offset >= self._start else offset // self._chunk * self._chunk

    def go_back(self, offset: int) -> None:
        if offset > self._start:
            self.trim(self.offset - offset)
        else:
            self._keys = self._values = self._history = None
            self.offset = self._start = offset

    def mark(self) -> Mark:
        """What `restore` needs to come back to here: a copy of the chunk's rows so far, none at its start."""
        return self._marked(self.offset - self._first)

    def restore(self, mark: Mark) -> None:
        """Come back to where `mark` was made, with copies of the marked rows."""
        self._restore(mark)

    def _kept(self, stored: int) -> int:
        return self.offset - self._first

    def _outlived(self) -> bool:
        return self._first > self._start
