"""Rows are given room without a token being added to them."""

from __future__ import annotations

import mlx.core as mx
import pytest

from runner.cache.kv import KVCache, RotatingKVCache
from runner.errors import UsageError


@pytest.mark.parametrize("cache", [KVCache(), RotatingKVCache(20)])
def test_room_keeps_what_there_is(cache: KVCache) -> None:
    with pytest.raises(UsageError, match="empty"):
        cache.make_room(5)
    rows = mx.arange(2 * 250 * 4, dtype=mx.float32).reshape(1, 2, 250, 4)
    cache.append(rows, -rows)
    before = cache.history.latest(19)
    cache.make_room(300)
    assert cache.room >= 300 and cache.offset == 250
    after = cache.append(rows[:, :, :1], rows[:, :, :1]).latest(20)
    assert mx.array_equal(after.keys[:, :, :-1], before.keys) and mx.array_equal(after.values[:, :, :-1], before.values)
