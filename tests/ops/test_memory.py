"""Memory that MLX holds: freed buffers count, and are given back where that is wanted."""

from __future__ import annotations

import mlx.core as mx

from runner.ops.memory import Memory

SIZE = 4 << 20  # MLX keeps no buffers of a CPU that are much larger


def free_some() -> None:
    array = mx.zeros(SIZE // 4, dtype=mx.float32)
    mx.eval(array)


def test_freed_buffers_count_and_are_given_back() -> None:
    mx.clear_cache()
    mx.reset_peak_memory()
    memory = Memory(clears=True)
    free_some()
    larger = mx.zeros(2 * SIZE // 4, dtype=mx.float32)  # does not fit where the other was
    mx.eval(larger)
    del larger
    assert mx.get_peak_memory() < 3 * SIZE <= mx.get_active_memory() + mx.get_cache_memory()
    memory.settle()
    assert mx.get_cache_memory() == 0 and memory.peak >= 3 * SIZE
    peak = memory.peak
    free_some()
    assert memory.look() == peak  # what was given back is not counted again


def test_nothing_is_given_back_on_a_cpu() -> None:
    mx.clear_cache()
    memory = Memory(clears=False)
    free_some()
    memory.settle()
    assert mx.get_cache_memory() >= SIZE and memory.look() >= mx.get_active_memory() + SIZE
    mx.clear_cache()
