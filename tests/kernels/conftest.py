"""What every kernel test runs over: plain MLX, and the extension once for each instruction set this CPU has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from runner.nn.fast import PORTABLE, Ops
from runner.ops import cpu as kernels

collect_ignore = [] if kernels.unavailable() is None else ["test_built.py"]


def available() -> list[str]:
    """ "mlx" always; the extension's tables where it is built, so that nothing is skipped where it is not."""
    if kernels.unavailable() is not None:
        return ["mlx"]
    from runner.ops.cpu import _C

    best = _C.isa()
    found = [name for name in ("scalar", "avx2", "avx512") if _C.set_isa(name)]
    _C.set_isa(best)
    return ["mlx", *found]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "ops" in metafunc.fixturenames:
        metafunc.parametrize("ops", available(), indirect=True, scope="module")


@pytest.fixture(scope="module")
def ops(request: pytest.FixtureRequest) -> Iterator[Ops]:
    """The table of ops under test, with the extension switched to the asked instruction set."""
    if request.param == "mlx":
        yield PORTABLE
        return
    from runner.ops.cpu import _C
    from runner.ops.cpu.ops import KERNELS

    best = _C.isa()
    assert _C.set_isa(request.param)
    yield KERNELS
    _C.set_isa(best)
