"""Read bandwidth of this machine's memory: the limit for decoding, as each token reads every weight once.

Method: a buffer far larger than the CPU's caches is filled, then read from end to end several times, and the fastest
pass counts. On a CPU, each thread of our kernels adds up the 64-bit words of its own range (without the extension:
NumPy's sum in as many threads as there are cores); on a GPU, MLX's sum reads the buffer.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np

from runner.ops import cpu as kernels

BUFFER = 1 << 30
"""Bytes read per pass: 32 times the largest cache of an ordinary machine; a quarter of the memory if that is less."""

PASSES = 8


def read_bandwidth(passes: int = PASSES) -> float:
    """Measure the read bandwidth, in bytes per second."""
    size = min(BUFFER, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4) // 4096 * 4096
    if mx.default_device() != mx.Device(mx.cpu):
        return size / _device_pass(size, passes)
    if kernels.unavailable() is None:
        return size / kernels.read_seconds(size, passes)
    return size / _numpy_pass(size, passes)


def _device_pass(size: int, passes: int) -> float:
    buffer = mx.ones((size // 4,), dtype=mx.uint32)
    mx.eval(buffer)
    best = float("inf")
    for _ in range(passes + 1):  # one more: the first pass is a warm-up
        start = time.perf_counter()
        mx.eval(mx.sum(buffer))
        best = min(best, time.perf_counter() - start)
    return best


def _numpy_pass(size: int, passes: int) -> float:
    threads = os.cpu_count() or 1
    parts = np.array_split(np.ones(size // 8, dtype=np.uint64), threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(passes):
            start = time.perf_counter()
            list(pool.map(np.sum, parts))
            best = min(best, time.perf_counter() - start)
    return best
