"""The few calls of NVIDIA's NCCL that ranks' kernels need between them: sums and gatherings, recorded in graphs.

It is the library that MLX brings and computes with. A communicator of one's own is used on a stream of one's own; what
MLX exchanges must have ended before, and the other way round: all ranks must exchange the same, in the same order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import byref, c_char, c_float, c_int, c_size_t, c_void_p

from runner.errors import BackendError
from runner.ops.cuda.driver import Driver
from runner.ops.exchange import Exchange

WORD = 128
"""Bytes of the word by which ranks find each other."""

_UINT64, _FLOAT32 = 5, 7
_SUM, _MAX = 0, 2


class _Word(ctypes.Structure):
    """`ncclUniqueId`."""

    _fields_ = (("bytes", c_char * WORD),)


class Nccl:
    """The library."""

    def __init__(self) -> None:
        """Open it.

        Raises:
            BackendError: it is not there.
        """
        try:
            # By this name it is the one that MLX has loaded, wherever that lies.
            self._library = ctypes.CDLL("libnccl.so.2")
        except OSError as error:
            raise BackendError(f"NCCL cannot be opened: {error}") from error
        self._library.ncclGetErrorString.restype = ctypes.c_char_p

    def do(self, name: str, *arguments: object) -> None:
        """Call one of its functions.

        Raises:
            BackendError: it reports an error.
        """
        code = getattr(self._library, name)(*arguments)
        if code:
            text = self._library.ncclGetErrorString(c_int(code)) or b""
            raise BackendError(f"{name}: {text.decode()} (NCCL error {code})")

    def word(self) -> bytes:
        """A new word for ranks to find each other by; rank 0 asks for it, and tells the others."""
        found = _Word()
        self.do("ncclGetUniqueId", byref(found))
        return bytes(found)


class Communicator:
    """What connects this process's GPU with those of the other ranks. It lasts as long as the process."""

    def __init__(self, nccl: Nccl, word: bytes, rank: int, size: int) -> None:
        """Connect, in the driver's context that is current; all ranks do so at the same time.

        Raises:
            BackendError: NCCL reports an error.
        """
        self._nccl = nccl
        self._address = c_void_p()
        nccl.do("ncclCommInitRank", byref(self._address), c_int(size), _Word.from_buffer_copy(word), c_int(rank))

    def add(self, address: int, count: int, stream: c_void_p) -> None:
        """Replace `count` numbers in float32 by the sums of all ranks', the same bits for each of them."""
        self._reduce(address, count, _FLOAT32, _SUM, stream)

    def greatest(self, address: int, count: int, stream: c_void_p) -> None:
        """Replace `count` whole numbers of 64 bits by the greatest of all ranks'."""
        self._reduce(address, count, _UINT64, _MAX, stream)

    def gather(self, source: int, to: int, count: int, stream: c_void_p) -> None:
        """Write all ranks' `count` numbers in float32 to `to`, rank by rank."""
        self._nccl.do(
            "ncclAllGather", c_void_p(source), c_void_p(to), c_size_t(count), c_int(_FLOAT32), self._address, stream
        )

    def _reduce(self, address: int, count: int, kind: int, how: int, stream: c_void_p) -> None:
        self._nccl.do(
            "ncclAllReduce", c_void_p(address), c_void_p(address), c_size_t(count), c_int(kind), c_int(how),
            self._address, stream,
        )  # fmt: skip


def connected(nccl: Nccl, exchange: Exchange) -> Communicator:
    """What connects the GPUs of the ranks of `exchange`; all ranks ask at the same time.

    Raises:
        BackendError: NCCL reports an error.
    """
    word = exchange.word(nccl.word() if exchange.rank == 0 else bytes(WORD))
    return Communicator(nccl, word, exchange.rank, exchange.size)


def check(communicator: Communicator, exchange: Exchange, driver: Driver, stream: c_void_p) -> None:
    """Add ones over all ranks, as a graph: whether that can be recorded is known before anything depends on it.

    Raises:
        BackendError: a rank cannot, or the sum is wrong.
    """
    count = 8
    size = ctypes.sizeof(c_float) * count
    here, _ = driver.host_buffer(size)
    there = driver.allocate(size)
    try:
        numbers = (c_float * count).from_address(here)
        numbers[:] = [1.0] * count
        graph = _recorded(lambda: communicator.add(there, count, stream), exchange, driver, stream)
        driver.copy(there, here, size, stream)
        driver.replay(graph, stream)
        driver.fetch(here, there, size, stream)
        driver.wait(stream)
        driver.forget(graph)
        if (found := list(numbers)) != [float(exchange.size)] * count:
            raise BackendError(f"NCCL adds ones of {exchange.size} ranks up to {found[0]}")
    finally:
        driver.free(there)
        driver.free_host(here)


def _recorded(work: Callable[[], None], exchange: Exchange, driver: Driver, stream: c_void_p) -> c_void_p:
    """`Driver.record` on all ranks or on none: nobody is to wait in an exchange that another does not begin."""
    graph, failed = None, BackendError("another process cannot record NCCL's sums")
    try:
        graph = driver.record(work, stream)
    except BackendError as error:
        failed = error
    if not exchange.agreed(graph is not None) or graph is None:
        raise failed
    return graph
