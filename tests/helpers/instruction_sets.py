"""The kernel tables (MLX's, and one per instruction set) that kernel tests are repeated for."""

from __future__ import annotations

from runner.ops import cpu as kernels


def available() -> list[str]:
    """List the tables: "mlx" always, and those of the extension where it is built; without it, no test is skipped."""
    if kernels.unavailable() is not None:
        return ["mlx"]
    from runner.ops.cpu import _C

    best = _C.isa()
    found = [name for name in ("scalar", "avx2", "avx512", "amx") if _C.set_isa(name)]
    _C.set_isa(best)
    return ["mlx", *found]
