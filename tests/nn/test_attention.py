"""Attention over a cache with a window: slices of the keys and shared masks against a mask for each layer."""

from __future__ import annotations

import functools

import mlx.core as mx
import pytest
from operations import operations

from runner.cache.kv import History
from runner.nn.attention import Attend
from runner.nn.batch import Batch
from runner.nn.fast import scaled_dot_product_attention
from runner.ops.attention import window_mask
from runner.ops.device import CPU_WITHOUT_KERNELS, current
from runner.ops.table import PORTABLE, Ops

TABLES = list({ops.name: ops for ops in (PORTABLE, CPU_WITHOUT_KERNELS, current().ops)}.values())
by_table = pytest.mark.parametrize("ops", TABLES, ids=lambda ops: ops.name)
ROOM = 5


def rand(*shape: int, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def inputs(queries: int, keys: int, window: int | None) -> tuple[mx.array, History]:
    """Queries, and keys and values in buffers with room for more, which must never be looked at."""
    q, k, v = rand(2, 6, queries, 16, seed=1), rand(2, 3, keys, 16, seed=2), rand(2, 3, keys, 16, seed=3)
    spare = mx.full((2, 3, ROOM, 16), float("nan"))
    buffers = [mx.concatenate([rows, spare], axis=2) for rows in (k, v)]
    return q, History(buffers[0], buffers[1], keys, window)


def naive(q: mx.array, history: History, softcap: float | None) -> mx.array:
    """Every score, and a mask of all keys."""
    k, v = (mx.repeat(rows, 2, axis=1) for rows in (history.keys, history.values))
    scores = q @ k.swapaxes(2, 3) * 0.25
    scores = scores if softcap is None else softcap * mx.tanh(scores / softcap)
    mask = window_mask(q.shape[2], history.length, history.window or history.length)
    return mx.softmax(mx.where(mask, scores, -mx.inf), axis=-1) @ v


@by_table
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(("queries", "keys"), [(1, 3), (4, 4), (5, 9), (9, 9), (20, 20), (3, 7)])
def test_a_query_sees_its_own_chunk_only(ops: Ops, softcap: float | None, queries: int, keys: int) -> None:
    q, history = inputs(queries, keys, None)
    batch = Batch(mx.zeros((2, queries), dtype=mx.int32), keys - queries)
    found = Attend(scale=0.25, softcap=softcap, ops=ops)(q, history._replace(chunk=4), batch)
    for query in range(queries):  # each alone, over the rows of its chunk
        place = keys - queries + query
        rows = slice(place // 4 * 4, place + 1)
        own = History(history.keys[:, :, rows], history.values[:, :, rows], place % 4 + 1)
        assert mx.allclose(found[:, :, query : query + 1], naive(q[:, :, query : query + 1], own, softcap), atol=1e-5)


@by_table
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 4, 9, 30])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (1, 20), (2, 9), (9, 9), (5, 20)])
def test_a_window_is_a_mask_of_all_keys(
    ops: Ops, softcap: float | None, window: int | None, queries: int, keys: int
) -> None:
    q, history = inputs(queries, keys, window)
    batch = Batch(mx.zeros((2, queries), dtype=mx.int32), keys - queries)
    found = Attend(scale=0.25, softcap=softcap, ops=ops)(q, history, batch)
    assert mx.allclose(found, naive(q, history, softcap), atol=1e-5)
    direct = functools.partial(scaled_dot_product_attention, q, history.stored_keys, history.stored_values)
    assert mx.allclose(direct(scale=0.25, window=window, length=keys, softcap=softcap, ops=ops), found, atol=1e-6)


@by_table
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("queries", [1, 3])
def test_heads_that_share_wide_keys(ops: Ops, queries: int, masked: bool, sinks: bool) -> None:
    """All heads attend to the same rows, whose first columns are the values: latent attention."""
    q, rows = rand(2, 6, queries, 24, seed=1), rand(2, 1, 20, 24, seed=2)
    mask = window_mask(queries, 17, 17) & (mx.arange(17) > 2) if masked else None
    extra = rand(6, seed=3) if sinks else None
    found = scaled_dot_product_attention(q, rows, rows[..., :16], mask, scale=0.25, length=17, sinks=extra, ops=ops)
    scores = q @ rows[:, :, :17].swapaxes(2, 3) * 0.25
    scores = mx.where(window_mask(queries, 17, 17) if mask is None else mask, scores, -mx.inf)
    if extra is not None:
        scores = mx.concatenate([scores, mx.broadcast_to(extra[:, None, None], (*scores.shape[:3], 1))], axis=-1)
    wanted = mx.softmax(scores, axis=-1)[..., :17] @ rows[:, :, :17, :16]
    assert found.shape == wanted.shape and mx.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_single_query_makes_no_mask(softcap: float | None) -> None:
    q, history = inputs(1, 20, 4)
    mx.eval(q, history.stored_keys, history.stored_values)
    found = Attend(scale=0.25, softcap=softcap)(q, history, Batch(mx.zeros((2, 1), dtype=mx.int32), 19))
    assert not {"Arange", "Select", "LessEqual"} & operations(found).keys()


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_layers_of_a_pass_share_the_mask_of_a_window(softcap: float | None) -> None:
    """A mask for each window of the pass, however many layers have it; another pass makes its own."""

    def masks(windows: list[int], passes: int = 1) -> int:
        found = []
        for _ in range(passes):
            batch = Batch(mx.zeros((2, 5), dtype=mx.int32), 15)
            for window in windows:
                q, history = inputs(5, 20, window)
                mx.eval(q, history.stored_keys, history.stored_values)
                found.append(Attend(scale=0.25, softcap=softcap)(q, history, batch))
        return operations(*found)["LessEqual"]

    assert masks([4]) == masks([4, 4, 4]) == 1
    assert masks([4, 9, 4, 9]) == 2
    assert masks([4, 4], passes=2) == 2


def test_a_mask_of_the_batch_wins_over_what_is_shared() -> None:
    q, history = inputs(3, 9, None)
    padded = mx.arange(9) >= 2
    mask = window_mask(3, 9, 9) & padded
    batch = Batch(mx.zeros((2, 3), dtype=mx.int32), 6, mask=mask)
    found = Attend(scale=0.25, softcap=1.5)(q, history, batch)
    scores = 1.5 * mx.tanh(q @ mx.repeat(history.keys, 2, axis=1).swapaxes(2, 3) * 0.25 / 1.5)
    wanted = mx.softmax(mx.where(mask, scores, -mx.inf), axis=-1) @ mx.repeat(history.values, 2, axis=1)
    assert mx.allclose(found, wanted, atol=1e-5)
