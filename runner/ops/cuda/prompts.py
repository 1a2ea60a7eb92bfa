"""Several prompts in one pass: their first keys and values into caches, and attention, by few operations.

MLX and Python need some 10 us for each operation: for eight prompts of 256 tokens, written and attended to one by one,
that is 22 ms a pass of a model of 1B parameters, which an H200 computes in 8.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from runner.cache.kv import History
from runner.cache.storage import PLAIN, capacity
from runner.ops.attention import MaskRule
from runner.ops.cuda.driver import code_of
from runner.ops.cuda.shape import text
from runner.ops.side_by_side import Buffers, append_rows, check_counts, segments

AT_ONCE = 8
"""Prompts that one kernel writes."""

UNIT = 16
"""Bytes that it copies at a time."""

PAD = 64
"""Tokens to a multiple of which prompts are filled up at least, so that many have the same length."""


def write_rows(
    buffers: Sequence[Buffers], keys: mx.array, values: mx.array, at: Sequence[int], counts: Sequence[int]
) -> list[Buffers]:
    """`append_rows`, in which buffers that nothing is written in yet are made anew, several by one kernel."""
    rows = [array.shape[3] * array.itemsize for array in (keys, values)]
    fresh = [i for i, (row, count) in enumerate(zip(at, counts, strict=True)) if row == 0 and count > 1]
    if len(fresh) < 2 or any(row % UNIT for row in rows) or _code() is None:
        return append_rows(buffers, keys, values, at, counts)
    found = dict(enumerate(buffers))
    places = list(segments(counts))
    for start in range(0, len(fresh), AT_ONCE):
        group = fresh[start : start + AT_ONCE]
        found |= zip(group, _made(keys, values, [places[i] for i in group], [buffers[i] for i in group]), strict=True)
    for i, (first, last) in enumerate(places):
        if i not in fresh:
            found[i] = PLAIN.write(*buffers[i], keys[:, :, first:last], values[:, :, first:last], at[i])
    return [found[i] for i in range(len(buffers))]


def _made(
    keys: mx.array, values: mx.array, places: Sequence[tuple[int, int]], like: Sequence[Buffers]
) -> list[Buffers]:
    """New buffers like those of `like`, which hold the tokens at these places."""
    spare = AT_ONCE - len(places)
    shapes = [buffer.shape for pair in like for buffer in pair] + [(1,)] * (2 * spare)
    numbers = [(first, last - first, capacity(pair[0])) for (first, last), pair in zip(places, like, strict=True)]
    code = _code()
    assert code is not None
    made = mx.fast.precompiled_cuda_kernel(
        name="runner_prompts",
        compiled_source=code,
        inputs=[keys, values],
        output_shapes=shapes,
        output_dtypes=[keys.dtype, values.dtype] * AT_ONCE,
        scalars=[
            keys.shape[2],
            keys.shape[1],
            *(array.shape[3] * array.itemsize // UNIT for array in (keys, values)),
            *(number for one in [*numbers, *[(0, 0, 0)] * spare] for number in one),
        ],
        grid=(32 * 256, len(places), 1),
        threadgroup=(256, 1, 1),
        ensure_row_contiguous=True,
    )
    return list(zip(made[0 : 2 * len(places) : 2], made[1 : 2 * len(places) : 2], strict=True))


@functools.cache
def _code() -> bytes | None:
    """The kernel; None where none can be made."""
    return code_of(text("prompts.cu"))


def attention_of_one(
    others: Callable[..., mx.array],
    query: mx.array,
    key: mx.array,
    value: mx.array,
    mask: MaskRule,
    *,
    length: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    **settings: Any,
) -> mx.array:
    """`Ops.attention`, in which a piece of a prompt is filled up behind its end so that fewer lengths are met.

    MLX has cuDNN make a plan for each pair of lengths, which takes 37 ms.
    """
    keys = key.shape[2] if length is None else length
    filled = _up(keys, query.shape[2])
    sees_all = isinstance(mask, str) and softcap is None and (window is None or window >= filled)
    if keys < filled <= key.shape[2] and sees_all and query.shape[2] >= PAD:
        more = mx.pad(query, [(0, 0), (0, 0), (0, filled - keys), (0, 0)])
        return others(more, key, value, mask, length=filled, window=window, **settings)[:, :, : query.shape[2]]
    return others(query, key, value, mask, length=length, window=window, softcap=softcap, **settings)


def attention(
    others: Callable[..., mx.array],
    query: mx.array,
    histories: Sequence[History],
    counts: Sequence[int],
    *,
    scale: float,
    sinks: mx.array | None = None,
    softcap: float | None = None,
) -> mx.array:
    """`attention_rows`, in which prompts of about the same length are one call; `others` takes what is left.

    A prompt is filled up behind its end, where causality hides what is there. So there are fewer lengths, too: MLX has
    cuDNN make a plan for each, which takes 37 ms.
    """
    check_counts(query.shape[2], counts, len(histories))
    groups: dict[int, list[int]] = {}
    for i, (history, count) in enumerate(zip(histories, counts, strict=True)):
        if softcap is None and (length := _filled(history, count)):
            groups.setdefault(length, []).append(i)
    calls = [(length, part) for length, group in groups.items() for part in _parts(group)]
    if not calls:
        return others(query, histories, counts, scale=scale, sinks=sinks, softcap=softcap)
    places = list(segments(counts))
    found: dict[int, mx.array] = {}
    for length, group in calls:
        together = _attended(query, [places[i] for i in group], [histories[i] for i in group], length, scale, sinks)
        if len(group) == len(histories) and len(group) * length == query.shape[2]:
            return together.swapaxes(0, 1).reshape(1, query.shape[1], query.shape[2], -1)
        for one, i in zip(mx.split(together, len(group)), group, strict=True):
            found[i] = one[:, :, : counts[i]]
    rest = [i for i in range(len(histories)) if i not in found]
    if rest:
        queries = [query[:, :, first:last] for first, last in (places[i] for i in rest)]
        of_rest = others(
            mx.concatenate(queries, axis=2), [histories[i] for i in rest], [counts[i] for i in rest],
            scale=scale, sinks=sinks, softcap=softcap,
        )  # fmt: skip
        for i, (first, last) in zip(rest, segments([counts[i] for i in rest]), strict=True):
            found[i] = of_rest[:, :, first:last]
    return mx.concatenate([found[i] for i in range(len(histories))], axis=2)


def _parts(group: list[int]) -> list[list[int]]:
    """A group of prompts in parts of 8, 4 and 2, of which there are few plans; one may be left out."""
    found: list[list[int]] = []
    while len(group) > 1:
        count = min(AT_ONCE, 1 << (len(group).bit_length() - 1))
        found.append(group[:count])
        group = group[count:]
    return found


def _up(length: int, queries: int) -> int:
    """A length filled up: by a quarter of the queries at most, so that there are few."""
    step = max(PAD, 1 << max(0, queries.bit_length() - 3))
    return -(-length // step) * step


def _filled(history: History, count: int) -> int:
    """The length up to which a prompt is filled, whose first pass this is; 0: it is none, or sees not all of itself."""
    limits = [limit for limit in (history.window, history.chunk) if limit is not None]
    if count < PAD or history.length != count or history.split is not None or any(one < count for one in limits):
        return 0
    length = _up(count, count)
    return length if length <= capacity(history.stored_keys) else 0


def _attended(
    query: mx.array,
    places: Sequence[tuple[int, int]],
    histories: Sequence[History],
    length: int,
    scale: float,
    sinks: mx.array | None,
) -> mx.array:
    """`[n, H, length, Dv]`: attention of the prompts at these places of `query` `[1, H, T, D]`, filled up."""
    count, heads = len(places), query.shape[1]
    keys, values = (
        mx.concatenate([PLAIN.read(buffer, length) for buffer in buffers])
        for buffers in zip(*((one.stored_keys, one.stored_values) for one in histories), strict=True)
    )
    first = places[0][0]
    if all(place == (first + i * length, first + (i + 1) * length) for i, place in enumerate(places)):
        part = query[:, :, first : first + count * length]
    else:
        # What stands in the place of missing queries is any other one: nobody looks at what comes of it.
        index = [np.minimum(np.arange(start, start + length), end - 1) for start, end in places]
        part = mx.take(query, mx.array(np.concatenate(index).astype(np.int32)), axis=2)
    queries = part.reshape(heads, count, length, -1).swapaxes(0, 1)
    sinks = None if sinks is None else sinks.astype(query.dtype)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask="causal", sinks=sinks)
