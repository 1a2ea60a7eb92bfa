"""What tests of operations share that take the kernels to one instruction set after another."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from runner.ops import cpu as kernels


@pytest.fixture
def best_level() -> Iterator[None]:
    """After a test, the kernels are at the level that they were at before."""
    if kernels.unavailable() is not None:
        yield
        return
    from runner.ops.cpu import _C

    best = _C.isa()
    yield
    _C.set_isa(best)
