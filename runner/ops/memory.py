"""How much memory MLX holds, the buffers that it freed and keeps for later included; and when these are given back."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx


@dataclass
class Memory:
    """Watches the memory of one piece of work.

    Attributes:
        clears: whether `settle` gives freed buffers back.
        peak: bytes that MLX held at most, as far as was looked.
    """

    clears: bool
    peak: int = 0

    def look(self) -> int:
        """Take note of what is held now; returns the peak.

        MLX's own peak leaves out freed buffers. They stay until they are given back, so that it is enough to look
        before that, and at the end.
        """
        self.peak = max(self.peak, mx.get_peak_memory(), mx.get_active_memory() + mx.get_cache_memory())
        return self.peak

    def settle(self) -> None:
        """Between two passes: look, and give freed buffers back where that is wanted."""
        if self.clears:
            self.look()
            mx.clear_cache()
