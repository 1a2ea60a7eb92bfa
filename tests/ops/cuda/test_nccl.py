"""What ranks make sure of before their kernels exchange anything; the driver and NCCL are stand-ins."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from runner.errors import BackendError
from runner.ops.cuda.nccl import check


class Driver:
    """Memory of this process for a GPU's; what is recorded is done when it is replayed."""

    def __init__(self, *, records: bool) -> None:
        self._records = records
        self.held: dict[int, Any] = {}
        self.replayed = 0

    def host_buffer(self, size: int) -> tuple[int, int]:
        return self.allocate(size), 0

    def allocate(self, size: int) -> int:
        buffer = ctypes.create_string_buffer(size)
        self.held[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    def free(self, address: int) -> None:
        del self.held[address]

    free_host = free

    def record(self, work: Callable[[], None], stream: object) -> Callable[[], None]:
        if not self._records:
            raise BackendError("ncclAllReduce: unhandled cuda error")
        return work

    def replay(self, graph: Callable[[], None], stream: object) -> None:
        self.replayed += 1
        graph()

    def copy(self, to: int, source: int, size: int, stream: object) -> None:
        ctypes.memmove(to, source, size)

    fetch = copy

    def wait(self, stream: object) -> None: ...

    def forget(self, graph: object) -> None: ...


class Sums:
    """Adds up what so many ranks have, if all have the same."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks

    def add(self, address: int, count: int, stream: object) -> None:
        numbers = (ctypes.c_float * count).from_address(address)
        numbers[:] = [self._ranks * number for number in numbers]


@pytest.mark.parametrize(
    ("records", "others", "sums", "why"),
    [
        (True, True, 2, None),
        (True, True, 1, "ones of 2 ranks up to 1.0"),
        (False, True, 2, "unhandled cuda error"),
        (True, False, 2, "another process cannot"),
    ],
)
def test_a_sum_is_tried_where_all_can_record_one(records: bool, others: bool, sums: int, why: str | None) -> None:
    """A rank that begins it without another would wait for ever. Nothing is left behind."""
    driver = Driver(records=records)
    exchange = SimpleNamespace(size=2, agreed=lambda here: here and others)

    def tried() -> None:
        check(Sums(sums), exchange, driver, ctypes.c_void_p())  # type: ignore[arg-type]

    if why is None:
        tried()
    else:
        with pytest.raises(BackendError, match=why):
            tried()
    assert driver.replayed == (records and others) and not driver.held
