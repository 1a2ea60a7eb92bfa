"""How a cache stores keys and values: in the dtype they come in, or in a denser form for a device's attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

SCALE_COLUMNS = 2
"""Columns of the scale in an int16 row: a float32 in the place of two codes, after D codes."""

HEADER_ROWS = 1
"""Rows at the end of an int16 buffer that hold no token but the D channels' powers: value = code * scale * 2^power."""

Powers = tuple[mx.array, mx.array]
"""The powers of the channels of keys and of values, int16 `[KV, D]` each: the same in all caches of a layer."""

WriteRows = Callable[..., Sequence[tuple[mx.array, mx.array]]]
"""`Storage.write_rows`."""


@dataclass(frozen=True)
class Storage:
    """Makes, fills and reads a cache's buffers `[B, KV, capacity, width]` (one more row where they are int16).

    Attributes:
        empty: `empty(rows, capacity, powers)` makes a buffer for rows like `rows` `[B, KV, L, D]`, with its channels'
            powers, int16 `[KV, D]` (None: all 0), where it has any.
        write: `write(keys, values, k, v, at)` returns both buffers with `k` and `v` `[B, KV, L, D]` in the rows from
            `at` on; the old buffers must not be used again, as the new ones may share their memory.
        write_rows: `write_rows(buffers, k, v, at, counts)` does so for pairs of buffers of several sequences at once:
            the i-th `counts[i]` rows of `k` and `v` `[1, KV, T, D]` go to the i-th pair, from row `at[i]` on. None:
            they are written one by one.
        read: `read(buffer, length)` returns the first `length` rows as numbers `[B, KV, length, D]`.
        joins: whether a token's key and value may share a row: not where each row has a scale, which the larger of
            the two would set for both.
        powers: `powers(keys, values)` are the channels' powers for rows like these numbers `[B, KV, L, D]`, of any
            tokens; None: this storage has none.
    """

    empty: Callable[[mx.array, int, mx.array | None], mx.array]
    write: Callable[[mx.array, mx.array, mx.array, mx.array, int], tuple[mx.array, mx.array]]
    read: Callable[[mx.array, int], mx.array]
    joins: bool = False
    powers: Callable[[mx.array, mx.array], Powers] | None = None
    write_rows: WriteRows | None = None


def _empty(rows: mx.array, capacity: int, powers: mx.array | None = None) -> mx.array:
    return mx.zeros((*rows.shape[:2], capacity, rows.shape[3]), dtype=rows.dtype)


def _write(keys: mx.array, values: mx.array, k: mx.array, v: mx.array, at: int) -> tuple[mx.array, mx.array]:
    end = at + k.shape[2]
    keys[..., at:end, :] = k
    values[..., at:end, :] = v
    return keys, values


def unpacked(buffer: mx.array, length: int) -> mx.array:
    """The first rows as numbers: int16 codes times their row's scale and their channel's power, others unchanged."""
    rows = buffer[..., :length, :]
    if buffer.dtype != mx.int16:
        return rows
    codes, scale = mx.split(rows, [row_width(buffer)], axis=3)
    powers = buffer[..., -HEADER_ROWS:, : row_width(buffer)].astype(mx.float32)
    return codes.astype(mx.float32) * mx.view(mx.contiguous(scale), mx.float32) * mx.power(2.0, powers)


def row_width(buffer: mx.array) -> int:
    """The head size D of a buffer's rows, without the columns of a scale."""
    return buffer.shape[3] - (SCALE_COLUMNS if buffer.dtype == mx.int16 else 0)


def capacity(buffer: mx.array) -> int:
    """How many tokens' rows a buffer has."""
    return buffer.shape[2] - _header(buffer)


def cut(buffer: mx.array, first: int, last: int) -> mx.array:
    """A buffer of the rows from `first` up to `last`: a view, but where it needs a header."""
    rows = buffer[..., first:last, :]
    return mx.concatenate([rows, buffer[..., capacity(buffer) :, :]], axis=2) if _header(buffer) else rows


def gathered(pieces: Sequence[mx.array], spare: mx.array | None = None) -> mx.array:
    """A new buffer of the pieces' rows one after another, then those of `spare`; the powers are the first piece's.

    Always a copy, in memory that nothing else holds: a slice of a single head would stay a view, also through
    `mx.contiguous`, and a view sees what is written into its buffer later.
    """
    first = pieces[0]
    rows = [piece[..., : capacity(piece), :] for piece in pieces]
    end = first[..., :0, :] if spare is None else spare
    return mx.concatenate([*rows, end, first[..., capacity(first) :, :]], axis=2)


def fill(buffer: mx.array, old: mx.array, first: int, last: int) -> None:
    """Put the rows of `old` from `first` up to `last` at the front of a new `buffer`, and the powers at its end."""
    if last > first:
        buffer[..., : last - first, :] = old[..., first:last, :]
    if _header(buffer):
        buffer[..., capacity(buffer) :, :] = old[..., capacity(old) :, :]


def _header(buffer: mx.array) -> int:
    return HEADER_ROWS if buffer.dtype == mx.int16 else 0


PLAIN = Storage(_empty, _write, unpacked, joins=True)
"""Storage of rows in the dtype they come in."""
