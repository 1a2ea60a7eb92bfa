"""Caches against a naive one that concatenates everything, and trimmed caches against fresh ones."""

from __future__ import annotations

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.cache.kv import KVCache, RotatingKVCache
from runner.errors import UsageError


def tokens(start: int, count: int) -> mx.array:
    return mx.broadcast_to(mx.arange(start, start + count)[None, None, :, None], (1, 2, count, 4)).astype(mx.float32)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.sampled_from([None, 1, 5, 64, 300]))
def test_history_is_everything_seen_or_at_least_the_window(counts: list[int], window: int | None) -> None:
    cache = KVCache() if window is None else RotatingKVCache(window)
    for count in counts:
        start = cache.offset
        history = cache.append(tokens(start, count), -tokens(start, count))
        held = history.keys.shape[2]
        needed = cache.offset if window is None else min(cache.offset, window + count - 1)
        assert needed <= held <= cache.offset and history.window == window
        assert mx.array_equal(history.keys, tokens(cache.offset - held, held))
        assert mx.array_equal(history.values, -history.keys)
    if window is not None:
        assert cache.nbytes <= 2 * 4 * 2 * 4 * 1.25 * (window + max(counts) + 1024)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 500), st.integers(0, 500), st.sampled_from([None, 5, 64]))
def test_trimmed_and_replayed_is_fresh(count: int, back: int, window: int | None) -> None:
    cache = KVCache() if window is None else RotatingKVCache(window)
    for start in range(0, count, 100):
        cache.append(tokens(start, min(100, count - start)), tokens(start, min(100, count - start)))
    if back > cache.trimmable():
        with pytest.raises(UsageError, match="forget"):
            cache.trim(back)
        return
    cache.trim(back)
    history = cache.append(tokens(900, 1), tokens(900, 1))
    seen = min(history.keys.shape[2], window or count + 1)
    wanted = mx.concatenate([tokens(count - back - seen + 1, seen - 1), tokens(900, 1)], axis=2)
    assert seen == min(count - back + 1, window or count + 1)
    assert mx.array_equal(history.keys[:, :, -seen:], wanted)
