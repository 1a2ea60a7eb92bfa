"""How much memory a machine has, how much of it MLX holds (freed buffers included), and when these are given back."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx


@dataclass
class Memory:
    """Watches the memory of one piece of work.

    Attributes:
        keeps: bytes of freed buffers from which on `settle` gives them back; None: never.
        peak: bytes that MLX held at most, as far as was looked.
    """

    keeps: int | None
    peak: int = 0

    def look(self) -> int:
        """Take note of what is held now; returns the peak.

        MLX's own peak leaves out freed buffers. They stay until they are given back, so that it is enough to look
        before that, and at the end.
        """
        self.peak = max(self.peak, mx.get_peak_memory(), mx.get_active_memory() + mx.get_cache_memory())
        return self.peak

    def settle(self) -> None:
        """Between two passes: look, and give freed buffers back where they have become too many."""
        if self.keeps is not None:
            self.look()
            if mx.get_cache_memory() > self.keeps:
                mx.clear_cache()


def capacity(device: mx.Device, root: Path = Path("/")) -> int | None:
    """Bytes that a process can use on `device` at most; None where the system doesn't say.

    A GPU's own memory, which on a Mac is the machine's. For a CPU the machine's and its swap space, within the limits
    of the control group that a container runs in.

    Args:
        root: where `/proc` and `/sys` lie.
    """
    if device != mx.Device(mx.cpu):
        info = mx.device_info(device)
        found = info.get("total_memory") or info.get("memory_size")
        return int(found) if found else None
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None
    swap = re.search(r"^SwapTotal: *(\d+) kB$", _text(root / "proc/meminfo"), re.MULTILINE)
    total += int(swap[1]) * 1024 if swap else 0
    # Version 2 of control groups, then version 1, which counts swap apart too; "max" or 2^63 for no limit.
    limits = [
        (_text(root / "sys/fs/cgroup/memory.max"), _text(root / "sys/fs/cgroup/memory.swap.max")),
        (_text(root / "sys/fs/cgroup/memory/memory.limit_in_bytes"), "max"),
    ]
    for memory, beside in limits:
        if memory.isdigit():
            room = int(beside) if beside.isdigit() else int(swap[1]) * 1024 if swap else 0
            total = min(total, int(memory) + room)
    return total


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
