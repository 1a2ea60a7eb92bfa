"""How many bytes an engine may hold, and what a request needs of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import mlx.core as mx

from runner.cache.kv import STEP, room_for
from runner.cache.storage import Storage
from runner.config.memory import Memory, Rows, State
from runner.errors import UsageError
from runner.ops.memory import capacity

SHARE = 0.85
"""Of the machine's memory, where nothing else is said: activations, the interpreter and the system need the rest."""

ALLOWANCE = 128
"""Tokens of an answer that there must be room for before it begins; for more, others may have to make way later."""


class Footprint:
    """Bytes that the caches of one model take for a sequence."""

    def __init__(self, layers: Sequence[Sequence[Memory]], storage: Storage, dtype: mx.Dtype) -> None:
        """`layers` is what each layer remembers; a job of the owner's thread."""
        memories = [memory for layer in layers for memory in layer]
        self._states = sum(memory.nbytes(dtype.size) for memory in memories if isinstance(memory, State))
        self._rows: dict[tuple[int | None, int], int] = {}  # bytes of a row, by the most tokens that are kept
        for memory in memories:
            if isinstance(memory, Rows):
                limit = memory.window if memory.window is not None else memory.chunk
                key = (limit, memory.heads)
                self._rows[key] = self._rows.get(key, 0) + _row(memory, storage, dtype)

    def of(self, tokens: int) -> int:
        """Bytes for a sequence of so many tokens, the room that buffers have beside them included."""
        total = 2 * self._states  # the one before the last token is kept too
        for (limit, _), nbytes in self._rows.items():
            kept = tokens if limit is None else min(tokens, limit + STEP)
            total += room_for(kept) * nbytes
        return total


def _row(memory: Rows, storage: Storage, dtype: mx.Dtype) -> int:
    """Bytes of one token in one layer, by the difference that a token makes to a buffer."""
    sizes = [memory.key_size + memory.value_size] if memory.joined and storage.joins else []
    total = 0
    for size in sizes or [memory.key_size, memory.value_size]:
        like = mx.zeros((1, memory.heads, 0, size), dtype)
        total += storage.empty(like, 2, None).nbytes - storage.empty(like, 1, None).nbytes
    return total


class Holder(Protocol):
    """What holds caches: the rows of one model, and the prefixes kept beside them."""

    @property
    def nbytes(self) -> int: ...
    @property
    def busy(self) -> bool: ...
    def evict(self, nbytes: int) -> int: ...


class Budget:
    """The bytes that weights, live sequences and kept prefixes may take together; shared by the models of an engine.

    Attributes:
        limit: bytes in all.
        weights: bytes of the models' weights.
        loose: bytes of those among them that can be let go of where others need the memory.
        unload: lets go of such weights that nobody uses now, of so many bytes if it can; a job of the owner's thread.
        holders: who else holds some.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.weights = 0
        self.loose = 0
        self.unload: Callable[[int], object] | None = None
        self.holders: list[Holder] = []

    def __repr__(self) -> str:
        return f"Budget({self.limit / 1e9:.2f} GB, {self.weights / 1e9:.2f} GB of them weights)"

    @classmethod
    def of_machine(cls, device: mx.Device) -> Budget:
        """What a machine, or the control group that this process runs in, allows."""
        found = capacity(device)
        return cls(int(found * SHARE) if found is not None else 1 << 62)

    @property
    def room(self) -> int:
        """Bytes for everything but weights."""
        return self.limit - self.weights

    @property
    def used(self) -> int:
        """Bytes of it that are taken."""
        return sum(holder.nbytes for holder in self.holders)

    def beside(self, holder: Holder) -> int:
        """Bytes that are taken by others than `holder`."""
        return sum(other.nbytes for other in self.holders if other is not holder)

    @property
    def live(self) -> int:
        """Bytes of it that answers under way take; what else is taken can make way."""
        return sum(holder.nbytes for holder in self.holders if holder.busy)

    @property
    def busy(self) -> bool:
        """Whether anything is computed, so that what does not fit now may fit later."""
        return any(holder.busy for holder in self.holders)

    def press(self, nbytes: int) -> None:
        """Let go of kept prefixes of at least so many bytes, or of all there are and of weights that nobody uses."""
        for holder in self.holders:
            if nbytes > 0:
                nbytes -= holder.evict(nbytes)
        if nbytes > 0 and self.unload is not None:
            self.unload(nbytes)

    def check(self, needed: int, tokens: int, own: int = 0) -> None:
        """Refuse what could not be computed if nothing else were.

        Args:
            needed: bytes for prompt and answer, of `tokens` together.
            own: bytes of loose weights that they are computed by, and which have to stay.

        Raises:
            UsageError: so many bytes are needed, and there are fewer, whatever else is let go of.
        """
        room = self.room + self.loose - own
        if needed > room:
            raise UsageError(
                f"prompt and answer of {tokens} tokens need {needed / 1e6:.1f} MB, and there are "
                f"{max(room, 0) / 1e6:.1f} MB beside the weights: shorten the prompt, ask for fewer tokens, "
                "or allow more memory"
            )
