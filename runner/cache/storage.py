"""How a cache stores keys and values: in the dtype they come in, or in a denser form for a device's attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

SCALE_COLUMNS = 2
"""Columns of the scale in an int16 row: a float32 in the place of two codes, after D codes; value = code * scale."""


@dataclass(frozen=True)
class Storage:
    """Makes, fills and reads a cache's buffers `[B, KV, capacity, width]`.

    Attributes:
        empty: `empty(rows, capacity)` makes a buffer for rows like `rows` `[B, KV, L, D]`.
        write: `write(keys, values, k, v, at)` returns both buffers with `k` and `v` `[B, KV, L, D]` in the rows from
            `at` on; the old buffers must not be used again, as the new ones may share their memory.
        read: `read(buffer)` returns the rows as numbers.
        joins: whether a token's key and value may share a row: not where each row has a scale, which the larger of
            the two would set for both.
    """

    empty: Callable[[mx.array, int], mx.array]
    write: Callable[[mx.array, mx.array, mx.array, mx.array, int], tuple[mx.array, mx.array]]
    read: Callable[[mx.array], mx.array]
    joins: bool = False


def _empty(rows: mx.array, capacity: int) -> mx.array:
    return mx.zeros((*rows.shape[:2], capacity, rows.shape[3]), dtype=rows.dtype)


def _write(keys: mx.array, values: mx.array, k: mx.array, v: mx.array, at: int) -> tuple[mx.array, mx.array]:
    end = at + k.shape[2]
    keys[..., at:end, :] = k
    values[..., at:end, :] = v
    return keys, values


def unpacked(buffer: mx.array) -> mx.array:
    """The rows as numbers: the codes of int16 rows times the scale at their end, other rows unchanged."""
    if buffer.dtype != mx.int16:
        return buffer
    codes, scale = mx.split(buffer, [buffer.shape[3] - SCALE_COLUMNS], axis=3)
    return codes.astype(mx.float32) * mx.view(mx.contiguous(scale), mx.float32)


def row_width(buffer: mx.array) -> int:
    """The head size D of a buffer's rows, without the columns of a scale."""
    return buffer.shape[3] - (SCALE_COLUMNS if buffer.dtype == mx.int16 else 0)


PLAIN = Storage(_empty, _write, unpacked, joins=True)
"""Storage of rows in the dtype they come in."""
