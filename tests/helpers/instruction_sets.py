"""The kernel tables (MLX's, and one per instruction set) that kernel tests are repeated for."""

from __future__ import annotations

from runner.ops import cpu as kernels
from runner.ops.table import PORTABLE, Ops


def available() -> list[str]:
    """List the tables: "mlx" always, and those of the extension where it is built; without it, no test is skipped."""
    if kernels.unavailable() is not None:
        return ["mlx"]
    from runner.ops.cpu import _C

    best = _C.isa()
    found = [name for name in ("scalar", "avx2", "avx512", "amx") if _C.set_isa(name)]
    _C.set_isa(best)
    return ["mlx", *found]


def table_at(name: str) -> Ops:
    """The table of one of these names; the extension stays at its level (see the fixture `best_level`)."""
    if name == "mlx":
        return PORTABLE
    from runner.ops.cpu import _C
    from runner.ops.cpu.ops import KERNELS

    assert _C.set_isa(name)
    return KERNELS
