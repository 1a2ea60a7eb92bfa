"""Operations on several sequences side by side against a loop over them, each alone."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from runner.cache.kv import History
from runner.cache.storage import PLAIN, Storage
from runner.errors import UsageError
from runner.ops.device import METAL, current, most_turned_on_cuda
from runner.ops.side_by_side import rope
from runner.ops.table import PORTABLE, Ops

TABLES = list({ops.name: ops for ops in (PORTABLE, METAL, current().ops)}.values())
by_table = pytest.mark.parametrize("ops", TABLES, ids=lambda ops: ops.name)
COUNTS = [1, 3, 1, 9, 2]
LENGTHS = [1, 3, 70, 11, 150]
HEADS, KV, SIZE, WIDE = 6, 3, 16, 24


def rand(*shape: int, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def histories(windows: list[int | None], chunks: list[int | None]) -> list[History]:
    """A history of each length, in buffers with room for more, which must never be looked at."""
    found = []
    for seed, length in enumerate(LENGTHS):
        spare = mx.full((1, KV, 5, WIDE), float("nan"))
        keys = mx.concatenate([rand(1, KV, length, SIZE, seed=10 + seed), spare[..., :SIZE]], axis=2)
        values = mx.concatenate([rand(1, KV, length, WIDE, seed=20 + seed), spare], axis=2)
        found.append(History(keys, values, length, windows[seed], chunk=chunks[seed]))
    return found


def naive(q: mx.array, history: History, place: int, softcap: float | None, sinks: mx.array | None) -> np.ndarray:
    """One query `[H, D]` at a place of its history, key by key."""
    first = 0
    if history.window is not None:
        first = max(0, place - history.window + 1)
    if history.chunk is not None:
        first = place // history.chunk * history.chunk
    k, v = (np.array(rows[0, :, first : place + 1], dtype=np.float64) for rows in (history.keys, history.values))
    out = np.zeros((HEADS, WIDE))
    for head in range(HEADS):
        scores = k[head * KV // HEADS] @ np.array(q[head], dtype=np.float64) * 0.3
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        weights = np.exp(scores)
        total = weights.sum() + (0 if sinks is None else np.exp(float(sinks[head])))
        out[head] = weights @ v[head * KV // HEADS] / total
    return out


@by_table
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sinking", [False, True])
@pytest.mark.parametrize("kind", ["all", "window", "chunk"])
def test_attention_is_that_of_each_sequence_alone(ops: Ops, softcap: float | None, sinking: bool, kind: str) -> None:
    windows = [4, 2, 64, None, 100] if kind == "window" else [None] * 5
    chunks = [8, None, 64, 4, 128] if kind == "chunk" else [None] * 5
    seen = histories(windows, chunks)
    q, sinks = rand(1, HEADS, sum(COUNTS), SIZE, seed=1), rand(HEADS, seed=2) if sinking else None
    found = ops.attention_rows(q, seen, COUNTS, scale=0.3, sinks=sinks, softcap=softcap)
    assert found.shape == (1, HEADS, sum(COUNTS), WIDE) and found.dtype == q.dtype
    token = 0
    for history, count in zip(seen, COUNTS, strict=True):
        for place in range(history.length - count, history.length):
            wanted = naive(q[0, :, token], history, place, softcap, sinks)
            assert np.allclose(np.array(found[0, :, token]), wanted, atol=2e-5)
            token += 1


def written(ops: Ops, storage: Storage) -> None:
    capacities, at = [3, 6, 80, 20, 160], [2, 0, 70, 11, 150]
    like = rand(1, KV, 4, SIZE, seed=3)
    buffers, alone = [], []
    for seed, (capacity, row) in enumerate(zip(capacities, at, strict=True)):
        for pairs in (buffers, alone):  # the same rows before, in buffers of their own
            empty = storage.empty(like, capacity), storage.empty(rand(1, KV, 4, WIDE, seed=4), capacity)
            k, v = rand(1, KV, max(row, 1), SIZE, seed=50 + seed), rand(1, KV, max(row, 1), WIDE, seed=60 + seed)
            pairs.append(storage.write(*empty, k, v, 0))
    k, v = rand(1, KV, sum(COUNTS), SIZE, seed=5), rand(1, KV, sum(COUNTS), WIDE, seed=6)
    found = ops.append_rows(buffers, k, v, at, COUNTS)
    first = 0
    for got, pair, row, count in zip(found, alone, at, COUNTS, strict=True):
        rows = slice(first, first + count)
        wanted = storage.write(*pair, k[:, :, rows], v[:, :, rows], row)
        first += count
        for one, other in zip(got, wanted, strict=True):
            end = row + count
            assert mx.array_equal(storage.read(one, end), storage.read(other, end))


@by_table
def test_rows_are_written_as_into_each_alone(ops: Ops) -> None:
    written(ops, PLAIN if ops.storage is PLAIN else ops.storage)


@by_table
@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("freqs", [None, "some"])
def test_each_token_is_turned_by_its_own_position(ops: Ops, traditional: bool, freqs: str | None) -> None:
    places = (0, 7, 3, 3, 1000)
    x = rand(1, len(places), HEADS, SIZE, seed=1).swapaxes(1, 2)
    base, table = (10000.0, None) if freqs is None else (None, mx.array([1.0, 2, 3, 5, 10, 100]))
    dims = SIZE if freqs is None else 12
    found = ops.rope(x, places, dims=dims, traditional=traditional, base=base, scale=0.5, freqs=table)
    for index, place in enumerate(places):
        one = x[:, :, index : index + 1]
        wanted = ops.rope(one, place, dims=dims, traditional=traditional, base=base, scale=0.5, freqs=table)
        assert mx.allclose(found[:, :, index : index + 1], wanted, atol=1e-6)


def block(first: int, last: int) -> int:
    """Threads in the third dimension of the block that MLX takes for RoPE, of `first` pairs, a token and `last`."""
    sizes, powers = (first, 1, last), [0, 0, 0]
    while True:
        before = sum(powers)
        for index, size in enumerate(sizes):
            if sum(powers) < 10 and size >= 2 ** (powers[index] + 1):
                powers[index] += 1
        if sum(powers) in (before, 10):
            return int(2 ** powers[2])


@pytest.mark.parametrize("heads", [1, 4, 6, 32, 71, 128])
@pytest.mark.parametrize("dims", [2, 4, 8, 10, 16, 24, 32, 64, 128])
def test_no_more_tokens_are_turned_at_once_than_cuda_starts_threads_for(heads: int, dims: int) -> None:
    most, fours = most_turned_on_cuda(heads, dims), -(-heads // 4)
    if most is None:
        assert max(block(dims // 2, tokens * fours) for tokens in (1, 36, 500, 2048)) <= 64
    else:
        assert block(dims // 2, most * fours) <= 64 < block(dims // 2, (most + 1) * fours)


@pytest.mark.parametrize("most", [1, 2, 3, 7])
def test_tokens_turned_a_few_at_a_time(most: int) -> None:
    places, x = (0, 7, 3, 3, 1000, 8, 9), rand(1, HEADS, 7, SIZE, seed=1)
    how = {"dims": SIZE, "traditional": True, "base": 1e4, "scale": 1.0, "freqs": None}
    assert mx.array_equal(rope(PORTABLE.rope, x, places, most=most, **how), PORTABLE.rope(x, places, **how))


@by_table
def test_segments_that_do_not_fit_are_refused(ops: Ops) -> None:
    seen = histories([None] * 5, [None] * 5)
    q, k, v = (rand(1, heads, 16, size, seed=1) for heads, size in ((HEADS, SIZE), (KV, SIZE), (KV, WIDE)))
    buffers = [(history.stored_keys, history.stored_values) for history in seen]
    for counts in ([1, 3, 1, 9], [1, 3, 1, 9, 1], [1, 4, 0, 9, 2], [2, 2, 1, 9, 2]):
        with pytest.raises((UsageError, ValueError), match=r"16 tokens|a history of 1 token"):
            ops.attention_rows(q, seen, counts, scale=1.0)
    for counts in ([1, 3, 1, 9], [1, 3, 1, 9, 1], [1, 4, 0, 9, 2]):
        with pytest.raises((UsageError, ValueError), match="16 tokens"):
            ops.append_rows(buffers, k, v, [0] * 5, counts)
    with pytest.raises((UsageError, ValueError), match="4 rows to write at"):
        ops.append_rows(buffers, k, v, [0] * 4, COUNTS)
    with pytest.raises((UsageError, ValueError), match=r"RoPE|rope"):
        ops.rope(q, (1, 2, 3), dims=SIZE, traditional=False, base=1e4, scale=1.0, freqs=None)
