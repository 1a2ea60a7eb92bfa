"""Guarantees beyond right numbers, of plain MLX and the extension: threads, streams, chunks, reads in place."""

from __future__ import annotations

import threading
from typing import Any

import mlx.core as mx
import numpy as np
from twins import numpy, rand

from runner.ops import cpu as kernels
from runner.ops.quantized import QuantizedWeight
from runner.ops.table import PORTABLE, Ops

BUILT = kernels.unavailable() is None


def quantised(n: int, k: int, seed: int) -> tuple[mx.array, mx.array, mx.array]:
    packed, scales, shifts = mx.quantize(rand(n, k, seed=seed), group_size=64, bits=4)
    return packed, scales, shifts


def everything(ops: Ops, seed: int = 0) -> list[Any]:
    """One result of every op, large enough to be shared between threads."""
    packed, scales, shifts = quantised(700, 256, seed)
    q, k = rand(1, 6, 1, 64, seed=seed), rand(1, 2, 900, 64, seed=seed + 1)
    results = []
    for rows in (1, 7, 70):
        x = rand(rows, 256, seed=seed + rows)
        results.append(ops.quantized_linear(x, QuantizedWeight(packed, scales, shifts, 64, 4, "affine"), None))
        results.append(ops.linear(x, rand(700, 256, seed=seed), None))
    results.append(ops.attention(q, k, k, None, scale=0.1, window=None, sinks=None))
    many = rand(1, 6, 80, 64, seed=seed)
    results.append(ops.attention(many, k, k, "causal", scale=0.1, window=None, sinks=None))
    results.append(ops.rms_norm(rand(300, 256, seed=seed), None, 1e-5))
    results.append(ops.glu(rand(40, 4096, seed=seed), "silu"))
    results.append(ops.rope(many, 5, dims=64, traditional=False, base=1e4, scale=1.0, freqs=None))
    results.append(ops.argmax(rand(3, 50000, seed=seed)))
    return [numpy(x) for x in results]


def test_the_number_of_threads_changes_no_bit(ops: Ops) -> None:
    def with_threads(n: int) -> list[Any]:
        if ops is not PORTABLE:
            from runner.ops.cpu import _C

            _C.set_num_threads(n)
        return everything(ops)

    before = kernels.num_threads() if BUILT else 1
    try:
        one = with_threads(1)
        for n in (2, 3, 8):
            for a, b in zip(one, with_threads(n), strict=True):
                assert np.array_equal(a, b)
    finally:
        with_threads(before)


def test_several_python_threads_at_once(ops: Ops) -> None:
    """Each thread has a stream of its own; the pool serves them in turn."""
    expected = everything(ops, seed=3)
    wrong: list[str] = []

    def work() -> None:
        for _ in range(3):
            with mx.stream(mx.new_stream(mx.cpu)):
                found = everything(ops, seed=3)
            if not all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True)):
                wrong.append("different numbers")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not wrong and not any(thread.is_alive() for thread in threads)


def test_results_do_not_depend_on_how_many_rows_come_together(ops: Ops) -> None:
    """A prompt in one piece, in chunks or token by token: equal within the rounding of float32 sums."""
    packed, scales, shifts = quantised(96, 512, 4)
    x = rand(40, 512, seed=8)
    whole = numpy(ops.quantized_linear(x, QuantizedWeight(packed, scales, shifts, 64, 4, "affine"), None))
    for step in (1, 3, 16, 20):
        parts = [
            numpy(ops.quantized_linear(x[i : i + step], QuantizedWeight(packed, scales, shifts, 64, 4, "affine"), None))
            for i in range(0, 40, step)
        ]
        # Without AVX-512 many rows are computed in float and few in 16-bit integers: their rounding is the difference.
        assert np.abs(np.concatenate(parts) - whole).max() < 2e-4 * whole.std()


def test_keys_are_read_where_they_lie(ops: Ops) -> None:
    """A cache is larger than its used part, which lies apart for each head: unused rows must not affect a result."""
    cache = np.full((1, 2, 64, 32), np.nan, dtype=np.float32)
    cache[:, :, :37] = numpy(rand(1, 2, 37, 32, seed=0))
    used = mx.array(cache)[:, :, :37]
    for length in (1, 20):
        q = rand(1, 4, length, 32, seed=1)
        plain = mx.array(np.ascontiguousarray(cache[:, :, :37]))
        found = ops.attention(q, used, used, "causal", scale=0.2, window=None, sinks=None)
        want = ops.attention(q, plain, plain, "causal", scale=0.2, window=None, sinks=None)
        assert np.array_equal(numpy(found), numpy(want))
