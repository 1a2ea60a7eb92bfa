"""Operations on the newest tokens of several sequences side by side, each with its own history: plain MLX, in loops.

A segment is the next `counts[i]` tokens of sequence i; segments follow each other along one axis. What a token gets
depends on its own sequence alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from runner.cache.kv import History
from runner.cache.storage import PLAIN
from runner.errors import UsageError
from runner.ops.attention import MaskRule, attention, chunk_mask, window_mask

Buffers = tuple[mx.array, mx.array]
"""A cache's buffers of keys and of values."""


def attention_rows(
    fused: Callable[..., mx.array],
    query: mx.array,
    histories: Sequence[History],
    counts: Sequence[int],
    *,
    scale: float,
    sinks: mx.array | None = None,
    softcap: float | None = None,
) -> mx.array:
    """Causal attention of queries `[1, H, T, D]`: segment i stands at the last positions of `histories[i]`.

    Each query sees its history up to its own position, within that history's window or chunk. `sinks` `[H]` are extra
    logits without a value; `softcap` c makes a score `c * tanh(score / c)`. Returns `[1, H, T, Dv]` in `query`'s dtype.
    `fused` is the device's `Ops.fused`.

    Raises:
        UsageError: there are not as many counts as histories, they do not add up to T, or a history is shorter.
    """
    check_counts(query.shape[2], counts, len(histories))
    found = []
    for (first, last), history in zip(segments(counts), histories, strict=True):
        if last - first > history.length:
            raise UsageError(f"{last - first} queries stand at the end of a history of {history.length} tokens")
        part, keys, values = query[:, :, first:last], history.keys, history.values
        mask = rule(last - first, history)
        found.append(attention(fused, part, keys, values, mask, scale=scale, window=None, sinks=sinks, softcap=softcap))
    return mx.concatenate(found, axis=2)


def rule(queries: int, history: History) -> MaskRule:
    """What the last `queries` positions of a history see of it: causal, in its window or chunk; None: all."""
    length = history.length
    if history.chunk is not None and history.chunk < length:
        return chunk_mask(queries, length, history.chunk)
    if history.window is not None and history.window < length:
        return window_mask(queries, length, history.window)
    return None if queries == 1 else "causal"


def append_rows(
    buffers: Sequence[Buffers],
    keys: mx.array,
    values: mx.array,
    at: Sequence[int],
    counts: Sequence[int],
    *,
    write: Callable[[mx.array, mx.array, mx.array, mx.array, int], Buffers] = PLAIN.write,
) -> list[Buffers]:
    """Write segments of keys `[1, KV, T, D]` and values `[1, KV, T, Dv]`, the i-th into `buffers[i]` from row `at[i]`.

    Returns the buffers; the old ones must not be used again, as the new ones may share their memory. `write` is the
    buffers' `Storage.write`.

    Raises:
        UsageError: there are not as many counts and rows as buffers, or the counts do not add up to T.
    """
    check_counts(keys.shape[2], counts, len(buffers))
    if len(at) != len(buffers):
        raise UsageError(f"{len(at)} rows to write at, for {len(buffers)} sequences")
    return [
        write(*pair, keys[:, :, first:last], values[:, :, first:last], row)
        for (first, last), pair, row in zip(segments(counts), buffers, at, strict=True)
    ]


def rope(
    turn: Callable[..., mx.array], x: mx.array, places: tuple[int, ...], *, most: int | None = None, **settings: Any
) -> mx.array:
    """RoPE of tokens `[1, H, T, D]` with a position for each, by the op `turn`, which takes `[B]` positions.

    Args:
        most: how many tokens `turn` can take at once; None: any number.

    Raises:
        UsageError: there is not one position for each token of a single row.
    """
    if x.shape[0] != 1 or x.shape[2] != len(places):
        raise UsageError(f"RoPE: {len(places)} positions, one for each token of a single row, for x {x.shape}")
    tokens, positions = x.swapaxes(0, 2), mx.array(places, dtype=mx.int32)
    count = len(places) if most is None else most
    turned = [
        turn(tokens[first : first + count], positions[first : first + count], **settings)
        for first in range(0, len(places), count)
    ]
    return (turned[0] if len(turned) == 1 else mx.concatenate(turned)).swapaxes(0, 2)


def segments(counts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The first token and the one behind the last, for each segment."""
    first = 0
    for count in counts:
        yield first, first + count
        first += count


def check_counts(tokens: int, counts: Sequence[int], sequences: int) -> None:
    """Raise `UsageError` unless there is a positive count for each of the sequences, and they add up to `tokens`."""
    if len(counts) != sequences or sum(counts) != tokens or min(counts, default=1) < 1:
        raise UsageError(f"segments of {list(counts)} tokens do not divide {tokens} tokens among {sequences} sequences")
