"""Memory that MLX holds: freed buffers count, and are given back where that is wanted."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from runner.ops.memory import Memory, capacity

SIZE = 4 << 20  # MLX keeps no buffers of a CPU that are much larger


def free_some() -> None:
    array = mx.zeros(SIZE // 4, dtype=mx.float32)
    mx.eval(array)
    mx.synchronize()  # a GPU holds it until then


def test_freed_buffers_count_and_are_given_back() -> None:
    mx.clear_cache()
    mx.reset_peak_memory()
    memory = Memory(keeps=0)
    free_some()
    larger = mx.zeros(2 * SIZE // 4, dtype=mx.float32)  # does not fit where the other was
    mx.eval(larger)
    mx.synchronize()
    del larger
    assert mx.get_peak_memory() < 3 * SIZE <= mx.get_active_memory() + mx.get_cache_memory()
    memory.settle()
    assert mx.get_cache_memory() == 0 and memory.peak >= 3 * SIZE
    peak = memory.peak
    free_some()
    assert memory.look() == peak  # what was given back is not counted again


def test_some_freed_buffers_stay_where_they_may() -> None:
    """To get them anew for each piece of a prompt took a GPU a third of its time."""
    mx.clear_cache()
    free_some()
    Memory(keeps=2 * SIZE).settle()
    assert mx.get_cache_memory() >= SIZE
    Memory(keeps=SIZE // 2).settle()
    assert mx.get_cache_memory() == 0


def test_nothing_is_given_back_on_a_cpu() -> None:
    mx.clear_cache()
    memory = Memory(keeps=None)
    free_some()
    memory.settle()
    assert mx.get_cache_memory() >= SIZE and memory.look() >= mx.get_active_memory() + SIZE
    mx.clear_cache()


def group(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_what_a_machine_has_and_what_its_container_may_use(tmp_path: Path) -> None:
    cpu = mx.Device(mx.cpu)
    whole = capacity(cpu, tmp_path)
    assert whole is not None and whole > 1 << 30
    swap = group(tmp_path / "swap", {"proc/meminfo": "MemTotal: 5 kB\nSwapTotal:       2048 kB\n"})
    assert capacity(cpu, swap) == whole + (2 << 20)
    two = {"sys/fs/cgroup/memory.max": "1000000\n", "sys/fs/cgroup/memory.swap.max": "24\n"}
    assert capacity(cpu, group(tmp_path / "two", two)) == 1000024
    free = {"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.swap.max": "max\n"}
    assert capacity(cpu, group(tmp_path / "free", free)) == whole
    one = {"sys/fs/cgroup/memory/memory.limit_in_bytes": "3000000\n"}
    assert capacity(cpu, group(tmp_path / "one", one)) == 3000000
