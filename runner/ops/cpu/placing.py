"""Where weights lie: side by side in large pages of memory, instead of wherever MLX's reader put them."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from runner.ops.cpu import _C

HUGE = 64 << 20
"""Bytes of a model from which its weights are worth a copy.

In pages of 4 KiB a decode step takes a seventh longer with LFM2-1.2B (660 MB), 1.1 to 1.2 times as long with
SmolLM2-135M (98 MB), whose loading the copy did not make slower by more than can be told.
"""

CHUNK = 64 << 20
"""Bytes of memory taken at a time, while there is so much to come."""

LEAST = 33 << 20
"""Bytes that the C library always asks the system for, so that nobody has touched them (mallopt(3): up to 32 MiB it may
take what the process has freed)."""

SMALL = 4096
"""Bytes of arrays that stay where they are: norms and biases, which a step reads little of."""

LINE = 64


class Pages:
    """Moves arrays into memory of its own, in the order in which it is called with them.

    An array keeps its identity, shape and numbers; only where they lie changes. The memory lives as long as an array in
    it does.
    """

    def __init__(self, nbytes: int = CHUNK) -> None:
        """`nbytes` of all arrays together: the last memory that is taken for them is no larger than it need be."""
        self._chunks: list[_Chunk] = []
        self._to_come = nbytes

    def __call__(self, array: mx.array) -> None:
        """Move an evaluated array; one that shares its numbers with another, or is no plain row of them, stays."""
        size = -(-array.nbytes // LINE) * LINE
        to_come, self._to_come = self._to_come, self._to_come - array.nbytes
        if size < SMALL:
            return
        if size > CHUNK // 2:
            _C.move_into(array, _C.pages(size), 0)
            return
        chunk = next((each for each in self._chunks if each.left >= size), None)
        if chunk is None:
            wanted = to_come + to_come // 64  # a little more, as each array begins at a line
            room = min(CHUNK, max(LEAST, -(-wanted // LINE) * LINE))
            chunk = _Chunk(_C.pages(room), room)
            self._chunks.append(chunk)
        if _C.move_into(array, chunk.pages, chunk.pages.nbytes - chunk.left):
            chunk.left -= size


@dataclass
class _Chunk:
    """Memory that arrays are put into from its beginning on; `left` bytes are free."""

    pages: mx.array
    left: int


def placing(nbytes: int) -> Pages | None:
    """What moves the weights of a model of so many bytes as they are read; None: they may stay where they are."""
    return Pages(nbytes) if nbytes >= HUGE else None
