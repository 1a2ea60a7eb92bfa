"""Several sequences' newest tokens by one kernel: what it is asked for, here, and what it gives, on an NVIDIA GPU."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cuda_cpu
import mlx.core as mx
import numpy as np
import pytest

from runner.cache.kv import ChunkedKVCache, KVCache, RotatingKVCache
from runner.cache.several import Histories, New
from runner.cache.storage import capacity
from runner.ops.cuda import several
from runner.ops.device import CUDA, current
from runner.ops.table import PORTABLE

needs_gpu = pytest.mark.skipif(not current().compiles, reason="there is no kernel for this device")
HEADS, GROUP, SIZE, WIDTH = 2, 3, 16, 8


def kernel(**given: Any) -> list[mx.array]:
    """What several.cu computes, in NumPy; like it, writes into the buffers that it is given."""
    q, k, v, places, sinks, *buffers = given["inputs"]
    (shape,) = given["output_shapes"]
    mx.eval(q, k, v, places, sinks, *buffers)
    out = np.zeros(shape, np.float32)
    made = kernel.made  # type: ignore[attr-defined]
    for row, (at, held, first) in enumerate(places.tolist()):
        keys, values = (np.array(buffer, copy=False) for buffer in buffers[2 * row : 2 * row + 2])
        assert keys.shape[2] == values.shape[2] == held
        keys[0, :, at], values[0, :, at] = np.array(k)[row, :, 0], np.array(v)[row, :, 0]
        for head in range(shape[1]):
            of = head // made.group
            scores = keys[0, of, first : at + 1] @ np.array(q)[row, head, 0] * made.scale
            scores = made.softcap * np.tanh(scores / made.softcap) if made.softcap else scores
            if made.sinks:
                scores = np.append(scores, float(sinks[head]))
            shares = np.exp(scores - scores.max())
            shares /= shares.sum()
            out[row, head, 0] = shares[: at + 1 - first] @ values[0, of, first : at + 1]
    return [mx.array(out)]


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sequences that the kernel was begun for, each time, with its work done here."""
    begun: list[int] = []

    def code(made: Any) -> bytes:
        kernel.made = made  # type: ignore[attr-defined]
        return b""

    def run(**given: Any) -> list[mx.array]:
        begun.append(given["scalars"][0])
        assert len(given["inputs"]) == 5 + 2 * kernel.made.most  # type: ignore[attr-defined]
        return kernel(**given)

    monkeypatch.setattr(several, "_code", code)
    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", run)
    return begun


def filled(make: Callable[[], KVCache], lengths: Sequence[int], dtype: mx.Dtype) -> tuple[KVCache, ...]:
    caches = []
    for index, length in enumerate(lengths):
        cache = make()
        for start in range(0, length, 5):
            cache.append(*rows(min(5, length - start), dtype, seed=100 * index + start))
        caches.append(cache)
    return tuple(caches)


def rows(count: int, dtype: mx.Dtype, *, seed: int) -> tuple[mx.array, mx.array]:
    draw = np.random.default_rng(seed)
    sizes = ((1, HEADS, count, SIZE), (1, HEADS, count, WIDTH))
    keys, values = (mx.array(draw.standard_normal(size).astype(np.float32)).astype(dtype) for size in sizes)
    return keys, values


def compare(make: Callable[[], KVCache], counts: tuple[int, ...], dtype: mx.Dtype, most: float, **how: Any) -> None:
    """Both ways, over some passes; the sequences' keys and values must be the same bits in the end."""
    steps = [count == 1 for count in counts]
    lengths = [random.Random(index).randrange(0, 300) for index in range(len(counts))]
    ours, theirs = (filled(make, lengths, dtype) for _ in range(2))
    distances = []
    for step in range(3):
        keys, values = rows(sum(counts), dtype, seed=step)
        numbers = np.random.default_rng(step + 7).standard_normal((1, HEADS * GROUP, sum(counts), SIZE))
        query = mx.array(numbers.astype(np.float32)).astype(dtype)
        got = several.attention_step(
            CUDA.attention_rows, query, New(ours, keys, values), counts, steps, scale=0.3, **how
        )
        assert got is not None and got.dtype == dtype
        want = PORTABLE.attention_rows(query, New(theirs, keys, values).written(counts), counts, scale=0.3, **how)
        mx.eval(got, want)
        assert got.shape == want.shape
        distances.append(float(mx.abs(got.astype(mx.float32) - want.astype(mx.float32)).max()))
    assert max(distances) < most, distances
    for one, other in zip(ours, theirs, strict=True):
        assert one.offset == other.offset
        for name in ("keys", "values"):
            assert mx.array_equal(getattr(one.history, name), getattr(other.history, name))


COUNTS = [(1,) * 5, (1, 1, 1, 7, 1, 1, 1, 1), (4, 1, 1, 1), (1,) * 70]
WAYS: list[dict[str, Any]] = [{}, {"softcap": 2.0}, {"sinks": mx.arange(HEADS * GROUP) / 3}]


@pytest.mark.parametrize("make", [KVCache, lambda: RotatingKVCache(40)], ids=["all", "window"])
@pytest.mark.parametrize("counts", COUNTS, ids=len)
@pytest.mark.parametrize("how", WAYS, ids=lambda how: "".join(how) or "plain")
def test_all_are_written_and_seen(
    emulated: list[int], make: Callable[[], KVCache], counts: tuple[int, ...], how: dict[str, Any]
) -> None:
    compare(make, counts, mx.float32, 1e-5, **how)
    assert emulated == {5: [5] * 3, 8: [3, 4] * 3, 4: [3] * 3, 70: [64, 6] * 3}[len(counts)]


@pytest.mark.parametrize(
    ("sinks", "dtype"),
    [
        (True, mx.bfloat16),
        pytest.param(False, mx.float32, marks=pytest.mark.long),
        pytest.param(True, mx.float16, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_the_text_computes_it(sinks: bool, dtype: mx.Dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, thread by thread: of three sequences, one is new, and of one the first are not seen."""
    monkeypatch.setattr(several, "SEQUENCES", (4,))
    caches = filled(KVCache, [0, 40, 41], dtype)
    new = New(caches, *rows(3, dtype, seed=1))
    numbers = np.random.default_rng(2).standard_normal((3, HEADS * GROUP, 1, SIZE)).astype(np.float32)
    query, extra = mx.array(numbers).astype(dtype), (mx.arange(HEADS * GROUP) / 3).astype(dtype)
    how: Any = {"scale": 0.3, "sinks": extra if sinks else None, "softcap": None if sinks else 2.0}
    made = several._kernel(query.swapaxes(0, 2), new, 3, **how)
    buffers = [buffer for cache in caches for buffer in cache.place(new.keys, new.values, 1)[0]]
    places = np.array(
        [[cache.offset, capacity(buffers[0]), first] for cache, first in zip(caches, (0, 0, 9), strict=True)]
    )
    keys, values = (array.swapaxes(0, 2) for array in (new.keys, new.values))
    inputs = [mx.contiguous(array) for array in (query, keys, values, mx.array(places, mx.int32), extra)]
    word = mx.uint32 if dtype == mx.float32 else mx.uint16
    stored = [np.array(array if array.dtype == mx.int32 else array.view(word)) for array in inputs]
    held = [np.array(buffer.view(word)) for buffer in buffers]
    out = np.zeros((3, HEADS * GROUP, 1, WIDTH), stored[0].dtype)
    cuda_cpu.several(made, stored, [*held, *held[:2]], out, tmp_path)
    kernel.made = made  # type: ignore[attr-defined]
    wide = [array if array.dtype == mx.int32 else array.astype(mx.float32) for array in [*inputs, *buffers]]
    (want,) = kernel(inputs=wide, output_shapes=[out.shape])
    got = mx.array(out).view(dtype).astype(mx.float32)
    assert float(mx.abs(got - want).max()) < (1e-5 if dtype == mx.float32 else 1e-2)
    for buffer, words in zip(wide[5:], held, strict=True):  # the new rows, and no others
        assert mx.array_equal(mx.array(words).view(dtype).astype(mx.float32), buffer)


@needs_gpu
@pytest.mark.parametrize("make", [KVCache, lambda: RotatingKVCache(40)], ids=["all", "window"])
@pytest.mark.parametrize("counts", COUNTS, ids=len)
@pytest.mark.parametrize("how", WAYS, ids=lambda how: "".join(how) or "plain")
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_the_kernel_gives_what_operations_give(
    make: Callable[[], KVCache], counts: tuple[int, ...], how: dict[str, Any], dtype: mx.Dtype
) -> None:
    compare(make, counts, dtype, {mx.float32: 2e-5, mx.float16: 5e-3, mx.bfloat16: 4e-2}[dtype], **how)


def test_what_has_no_kernel_is_left_alone(emulated: list[int]) -> None:
    """Nothing is written then, so that it can be done otherwise."""

    def refused(
        caches: tuple[KVCache, ...], counts: tuple[int, ...], heads: int = 6, size: int = SIZE, steps: bool = True
    ) -> bool:
        keys = mx.zeros((1, HEADS, sum(counts), size))
        query = mx.zeros((1, heads, sum(counts), size))
        before = [cache.offset for cache in caches]
        single = [steps and count == 1 for count in counts]
        found = several.attention_step(CUDA.attention_rows, query, New(caches, keys, keys), counts, single, scale=1.0)
        return found is None and [cache.offset for cache in caches] == before

    plain = tuple(KVCache() for _ in range(4))
    assert refused(plain[:2], (1, 1))
    assert refused(plain, (2, 2, 2, 2)) and refused(plain, (1, 1, 2, 1))
    assert refused(tuple(ChunkedKVCache(8) for _ in range(4)), (1,) * 4)
    assert refused(plain, (1,) * 4, heads=7) and refused(plain, (1,) * 4, heads=32, size=256)
    assert refused(plain, (1,) * 4, steps=False)  # prompts
    assert not refused(plain, (1,) * 4) and emulated == [4]


def test_new_rows_are_written_once() -> None:
    caches = filled(KVCache, [4, 6], mx.float32)
    histories = Histories(New(caches, *rows(2, mx.float32, seed=1)), (1, 1))
    assert histories.new is not None and [cache.offset for cache in caches] == [4, 6]
    assert [history.length for history in histories.each] == [5, 7] and histories.new is None
    assert [history.length for history in histories.each] == [5, 7]
