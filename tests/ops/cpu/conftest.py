"""Parameters of every kernel test: plain MLX, and the extension with each instruction set this CPU has."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import pytest
from instruction_sets import available, table_at

from runner.ops import cpu as kernels
from runner.ops.table import PORTABLE, Ops

collect_ignore = [] if kernels.unavailable() is None else ["test_built.py"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "ops" in metafunc.fixturenames:
        metafunc.parametrize("ops", available(), indirect=True, scope="module")


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu() -> Iterator[None]:
    """MLX computes on the CPU here, on machines with a GPU too."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@pytest.fixture(scope="module")
def ops(request: pytest.FixtureRequest) -> Iterator[Ops]:
    """The table of ops under test, with the extension switched to the instruction set asked for."""
    if request.param == "mlx":
        yield PORTABLE
        return
    from runner.ops.cpu import _C

    best = _C.isa()
    yield table_at(request.param)
    _C.set_isa(best)
