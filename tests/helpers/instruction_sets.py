"""The tables of ops that kernels' tests run over."""

from __future__ import annotations

from runner.ops import cpu as kernels


def available() -> list[str]:
    """ "mlx" always; the extension's tables where it is built, so that nothing is skipped where it is not."""
    if kernels.unavailable() is not None:
        return ["mlx"]
    from runner.ops.cpu import _C

    best = _C.isa()
    found = [name for name in ("scalar", "avx2", "avx512") if _C.set_isa(name)]
    _C.set_isa(best)
    return ["mlx", *found]
