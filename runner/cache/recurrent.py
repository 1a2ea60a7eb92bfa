"""State caches: what a recurrent layer or a short convolution carries from token to token."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import mlx.core as mx

from runner.cache.mark import Mark
from runner.config.memory import State
from runner.errors import UsageError

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

States = Mapping[str, mx.array]


Slots = Callable[[], Sequence[States]]
"""Makes buffers `[2, B, ..]` of each sequence, of which a token reads one slot and writes the other in place."""

Stepped = tuple[mx.array, Mapping[str, Sequence[mx.array]]]
"""What one token of each sequence puts out, and by their names the buffers in which the states behind it are."""

Move = Callable[[Slots, Sequence[int]], Stepped | None]
"""Moves states by one token, from the position of each sequence on; None where the device has no such step."""


class EachState(Protocol):
    """A layer's states in one pass: those of one request, or those of each of several."""

    @property
    def each(self) -> Sequence[StateCache]:
        """The cache of each request."""


def step(cache: EachState, x: mx.array, move: Move) -> mx.array | None:
    """What `move` makes of one token of each request, whose states it moves in place; None where they cannot be.

    They can where every request has one token in `x` `[B, L, ..]`, none of which must be a place to go back to.
    """
    if x.shape[1] != len(cache.each) or any(own.reserved for own in cache.each):
        return None
    found = move(lambda: [own.slots(x) for own in cache.each], [own.offset for own in cache.each])
    if found is None:
        return None
    output, moved = found
    for index, own in enumerate(cache.each):
        own.step(**{name: buffers[index] for name, buffers in moved.items()})
    return output


LONG = 1 << 20
"""Steps that a recorded one is valid for where nothing but states is kept: as many as one likes."""


class StateCache:
    """Arrays of a fixed size that each token changes.

    A state can't be taken back token by token. The one before the last pass is kept, so that a pass can be taken back
    as a whole; after `reserve`, the pass also leaves the state behind each of its tokens.

    A pass makes new arrays (`read`, `write`), or moves the states of one token in place (`slots`, `step`): then they
    lie in buffers of two slots, and each token writes the slot that the last one did not.
    """

    def __init__(self, memory: State) -> None:
        self._memory = memory
        self.offset = 0
        self._states: States | None = None  # None: in the slots, or zeros before the first token
        self._slots: States | None = None
        self._earlier: list[tuple[int, States | None]] = []  # offsets and states of places to go back to
        self._stepped = False  # whether the other slot holds the state before the last token
        self._reserved = 0

    @property
    def each(self) -> tuple[StateCache, ...]:
        """Itself, as `step` takes caches."""
        return (self,)

    @property
    def nbytes(self) -> int:
        """Bytes of the states, those to go back to included."""
        kept = [self._states, self._slots, *(states for _, states in self._earlier)]
        return sum(array.nbytes for states in kept if states is not None for array in states.values())

    def bytes_read(self, length: float) -> float:
        """Bytes that a decode step reads, however long the sequence is."""
        return sum(array.nbytes for array in self.arrays) / (1 if self._slots is None else 2)

    @property
    def arrays(self) -> list[mx.array]:
        """The states, for `mx.eval`."""
        return list((self._slots or self._states or {}).values())

    @property
    def room(self) -> int:
        """How many more steps a recorded one is valid for: none while each makes arrays of its own."""
        return 0 if self._slots is None else LONG

    def read(self, like: mx.array) -> States:
        """The states `[B, *shape]`: zeros of the batch and dtype of `like` before the first token."""
        if (states := self._now) is not None:
            return states
        return {
            name: mx.zeros((like.shape[0], *shape), DTYPES.get(self._memory.dtypes.get(name, ""), like.dtype))
            for name, shape in self._memory.shapes.items()
        }

    @property
    def _now(self) -> States | None:
        """The states, in the slots as views of them."""
        if self._slots is None:
            return self._states
        return {name: buffer[self.offset % 2] for name, buffer in self._slots.items()}

    @property
    def reserved(self) -> bool:
        """Whether the next pass must leave the state behind each of its tokens."""
        return self._reserved > 0

    def reserve(self, count: int) -> None:
        """Make each of the next pass' `count` tokens a place to go back to: `write` takes `[count, B, *shape]` then."""
        self._reserved = count

    def write(self, count: int, **states: mx.array) -> None:
        """Replace the states: those behind `count` more tokens, `[B, *shape]`, or after `reserve` behind each of them.

        Raises:
            UsageError: `count` is not what was reserved.
        """
        if self._reserved and count != self._reserved:
            raise UsageError(f"a pass of {self._reserved} tokens was reserved, not one of {count}")
        self._earlier = [(self.offset, self._now)]
        if self._reserved:
            for index in range(count - 1):
                self._earlier.append((self.offset + index + 1, {name: a[index] for name, a in states.items()}))
            states = {name: array[-1] for name, array in states.items()}
        self._states, self._slots, self._stepped = states, None, False
        self._reserved = 0
        self.offset += count

    def slots(self, like: mx.array) -> States:
        """Buffers `[2, B, *shape]`, for one token: the states lie in slot `offset % 2`, the next ones go to the other.

        Nothing else may hold the buffers, as they are written in place.
        """
        if self._slots is None:
            self._slots = {name: mx.stack([array, array]) for name, array in self.read(like).items()}
            self._states, self._stepped = None, False
        return self._slots

    def step(self, **slots: mx.array) -> None:
        """Count one more token, whose states are in the other slot now."""
        self._slots = slots
        self.advance()

    def reach(self, offset: int) -> int:
        """The furthest place at or before `offset` that `go_back` can go to; 0 at worst."""
        places = [place for place, _ in self._earlier] + [self.offset - self._stepped, self.offset]
        return max((place for place in places if place <= offset), default=0)

    def go_back(self, offset: int) -> None:
        """Forget all tokens from `offset` on, a place that `reach` named."""
        if offset == self.offset:
            return
        if self._stepped and offset == self.offset - 1:
            self.offset, self._stepped = offset, False
            return
        self._states = next((states for place, states in self._earlier if place == offset), None)
        self._earlier = [(place, states) for place, states in self._earlier if place < offset]
        self.offset, self._slots, self._stepped = offset, None, False

    def mark(self) -> Mark:
        """What `restore` needs to come back to here: the states, copied where a later token overwrites them."""
        if self._slots is None:
            return Mark(self.offset, dict(self._states or {}))
        slot = mx.array(self.offset % 2)
        return Mark(self.offset, {name: mx.take(buffer, slot, axis=0) for name, buffer in self._slots.items()})

    def restore(self, mark: Mark) -> None:
        """Come back to where `mark` was made."""
        self._states, self._slots, self._earlier = mark.arrays or None, None, []
        self.offset, self._stepped = mark.offset, False

    def ahead(self, count: int) -> StateCache:
        """A copy with `count` more tokens over the same buffers, to build later steps' graphs with."""
        later = copy.copy(self)
        later.offset += count
        return later

    def advance(self) -> None:
        """Count one more token, whose states have been written into the other slot."""
        self.offset += 1
        self._earlier, self._stepped = [], True
