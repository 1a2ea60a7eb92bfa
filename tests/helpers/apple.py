"""A Mac's GPU for machines that have none: its facts, and a wired limit that is written down."""

from __future__ import annotations

import dataclasses

from runner.engine.loaded import Loaded
from runner.ops.metal import Metal


class Limit:
    """A wired limit as MLX keeps it; `said` is all that it was set to."""

    def __init__(self, start: int = 0) -> None:
        self.now = start
        self.said: list[int] = []

    def set(self, nbytes: int) -> int:
        self.said.append(nbytes)
        before, self.now = self.now, nbytes
        return before


def metal(generation: int = 14, *, working_set: int = 12 << 30, limit: Limit | None = None) -> Metal:
    """An M2's GPU in a machine of 16 GiB, or another's."""
    return Metal(f"Apple M{generation - 12}", generation, working_set, 16 << 30, (limit or Limit()).set)


def on_a_mac(engine: Loaded, gpu: Metal, **settings: int) -> Loaded:
    """`engine` as if it computed on `gpu`."""
    device = dataclasses.replace(engine.device, metal=gpu, keeps=0, **settings)
    return dataclasses.replace(engine, device=device)
