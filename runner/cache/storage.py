"""How a cache keeps keys and values: as they come, or in a denser form that a device's attention reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

SCALE_COLUMNS = 2
"""An int16 row of D codes ends with a float32 in the place of two more: value = code * scale."""


@dataclass(frozen=True)
class Storage:
    """Makes, fills and reads a cache's buffers `[B, KV, capacity, width]`.

    `empty(rows, capacity)`: a buffer for rows like `rows` `[B, KV, L, D]`. `write(keys, values, k, v, at)`: both
    buffers with `k` and `v` `[B, KV, L, D]` in the rows from `at` on; the old ones must not be used again, their memory
    may be the new ones'. `read(buffer)`: rows as numbers.
    """

    empty: Callable[[mx.array, int], mx.array]
    write: Callable[[mx.array, mx.array, mx.array, mx.array, int], tuple[mx.array, mx.array]]
    read: Callable[[mx.array], mx.array]


def _empty(rows: mx.array, capacity: int) -> mx.array:
    return mx.zeros((*rows.shape[:2], capacity, rows.shape[3]), dtype=rows.dtype)


def _write(keys: mx.array, values: mx.array, k: mx.array, v: mx.array, at: int) -> tuple[mx.array, mx.array]:
    end = at + k.shape[2]
    keys[..., at:end, :] = k
    values[..., at:end, :] = v
    return keys, values


def unpacked(buffer: mx.array) -> mx.array:
    """Rows as numbers: int16 rows are multiplied by the scale at their end, others are themselves."""
    if buffer.dtype != mx.int16:
        return buffer
    codes, scale = mx.split(buffer, [buffer.shape[3] - SCALE_COLUMNS], axis=3)
    return codes.astype(mx.float32) * mx.view(mx.contiguous(scale), mx.float32)


def row_width(buffer: mx.array) -> int:
    """D of a buffer's rows."""
    return buffer.shape[3] - (SCALE_COLUMNS if buffer.dtype == mx.int16 else 0)


PLAIN = Storage(_empty, _write, unpacked)
"""Rows in the dtype they come in."""
