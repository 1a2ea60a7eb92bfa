"""From a prompt to tokens: prefill in chunks, then decode one token ahead of the one being read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx

from runner.cache.kv import KVCache, RotatingKVCache
from runner.cache.storage import PLAIN, Storage
from runner.config.base import Config
from runner.engine.replay import Steps
from runner.errors import UsageError
from runner.families import Model
from runner.nn.batch import Batch
from runner.ops.table import PORTABLE, Ops

PREFILL_CHUNK = 512
"""Tokens of a prompt in one pass: enough to fill the machine, few enough to cancel soon and keep activations small."""

Sample = Callable[[mx.array], tuple[mx.array, ...]]
"""Logits `[V]` of the next token to lazy arrays, of which the first is the token."""


def new_caches(config: Config, storage: Storage = PLAIN) -> list[KVCache]:
    """An empty cache for each layer, with rows as `storage` keeps them."""
    windows = [config.cache_window(index) for index in range(config.num_hidden_layers)]
    return [KVCache(storage) if window is None else RotatingKVCache(window, storage) for window in windows]


class Cancelled(Exception):
    """Raised by `prefill` when its caller no longer wants the answer."""


def prefill(
    model: Model,
    ids: Sequence[int],
    caches: list[KVCache],
    *,
    chunk: int = PREFILL_CHUNK,
    on_progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> mx.array:
    """Run the prompt through the model and return the logits `[V]` that follow it; only the last row's are computed.

    Raises:
        UsageError: the prompt is empty, or `chunk` is not positive.
        Cancelled: `cancelled()` said so between two chunks.
    """
    if not ids or chunk < 1:
        raise UsageError(f"prefill needs at least one token and a positive chunk, not {len(ids)} tokens and {chunk}")
    offset = caches[0].offset
    length = offset + len(ids)
    hidden = None
    for start in range(0, len(ids), chunk):
        if cancelled is not None and cancelled():
            raise Cancelled
        piece = mx.array([list(ids[start : start + chunk])], dtype=mx.int32)
        hidden = model(Batch(piece, offset + start, length), caches)
        if start + chunk < len(ids):
            mx.eval([array for cache in caches for array in cache.arrays])
        if on_progress is not None:
            on_progress(min(start + chunk, len(ids)), len(ids))
    assert hidden is not None
    return model.logits(hidden[:, -1:])[0, -1]


def decode(
    model: Model,
    logits: mx.array,
    caches: list[KVCache],
    sample: Sample,
    max_tokens: int,
    ops: Ops = PORTABLE,
) -> Iterator[tuple[mx.array, ...]]:
    """Yield what `sample` returns for up to `max_tokens` tokens; while one is read, the next is being computed.

    The token stays on the device between the steps; `ops` is the device's. The last token yielded is not in `caches`,
    unless the caller stops early: then it is.
    """
    steps = Steps(model, caches, ops)
    current = sample(logits)
    ops.schedule(*current)
    for index in range(max_tokens):
        following = None
        if index + 1 < max_tokens:
            following = sample(steps(current[0].reshape(1, 1))[0])
            ops.schedule(*following)
        yield current
        if following is not None:
            current = following
