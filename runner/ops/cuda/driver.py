"""The few calls of NVIDIA's driver that starting a kernel of one's own takes, in the context that MLX computes in."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import byref, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

import mlx.core as mx

from runner.errors import BackendError
from runner.ops.cuda.nvrtc import Nvrtc, compiled
from runner.ops.cuda.shape import Box

_PROCESSORS, _SHARED_MEMORY, _MAJOR, _MINOR, _COOPERATIVE = 16, 97, 75, 76, 95
"""Attributes of a device, by the driver's numbers."""

_DYNAMIC_SHARED_MEMORY = 8
"""The attribute of a kernel that says how much shared memory a launch may ask for."""

_NON_BLOCKING, _MAPPED, _NO_TIMES = 1, 3, 2

_PROGRAMMATIC, _RELAXED = 6, 2
"""The attribute of a launch that lets it begin early, and the mode of recording that hinders no other thread."""


class Driver:
    """The driver, opened for the first GPU."""

    def __init__(self) -> None:
        """Open the driver and the context that MLX uses.

        Raises:
            BackendError: there is no driver, or it refuses.
        """
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise BackendError(f"NVIDIA's driver cannot be opened: {error}") from error
        self._do("cuInit", c_uint(0))
        self._device = c_int()
        self._do("cuDeviceGet", byref(self._device), c_int(0))
        context = c_void_p()
        self._do("cuDevicePrimaryCtxRetain", byref(context), self._device)
        self._context = context

    def _do(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(c_int(code), byref(text))
            raise BackendError(f"{name}: {(text.value or b'').decode()} (CUDA error {code})")

    def enter(self) -> None:
        """Make the context this thread's; before any other call in a thread."""
        self._do("cuCtxSetCurrent", self._context)

    def _attribute(self, number: int) -> int:
        value = c_int()
        self._do("cuDeviceGetAttribute", byref(value), c_int(number), self._device)
        return value.value

    @property
    def capability(self) -> tuple[int, int]:
        """The GPU's compute capability, as (9, 0) for Hopper."""
        return self._attribute(_MAJOR), self._attribute(_MINOR)

    @property
    def architecture(self) -> str:
        """What NVRTC calls the GPU, with all instructions of its own, as `sm_90a`."""
        major, minor = self.capability
        return f"sm_{major}{minor}{'a' if major >= 9 else ''}"

    @property
    def bulk(self) -> bool:
        """Whether the GPU copies whole boxes of memory to shared memory by itself."""
        return self.capability >= (9, 0)

    @property
    def processors(self) -> int:
        """How many multiprocessors the GPU has."""
        return self._attribute(_PROCESSORS)

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory that a block may ask for."""
        return self._attribute(_SHARED_MEMORY)

    @property
    def cooperative(self) -> bool:
        """Whether a kernel can be started so that all its blocks are resident."""
        return bool(self._attribute(_COOPERATIVE))

    def module(self, code: bytes) -> c_void_p:
        """Load machine code."""
        module = c_void_p()
        self._do("cuModuleLoadData", byref(module), ctypes.c_char_p(code))
        return module

    def unload(self, module: c_void_p) -> None:
        """Give back what `module` loaded, of which nothing may be running."""
        self._do("cuModuleUnload", module)

    def function(self, module: c_void_p, name: str, shared_memory: int) -> c_void_p:
        """A kernel of a module, for launches with so many bytes of dynamic shared memory."""
        function = c_void_p()
        self._do("cuModuleGetFunction", byref(function), module, name.encode())
        self._do("cuFuncSetAttribute", function, c_int(_DYNAMIC_SHARED_MEMORY), c_int(shared_memory))
        return function

    def kernel(self, code: bytes, name: str, shared_memory: int) -> Kernel:
        """Load machine code and find a kernel in it, for launches with so many bytes of dynamic shared memory."""
        module = self.module(code)
        return Kernel(self, module, self.function(module, name, shared_memory), shared_memory)

    def resident(self, kernel: Kernel, threads: int) -> int:
        """How many blocks of a kernel fit a multiprocessor at once."""
        count = c_int()
        self._do(
            "cuOccupancyMaxActiveBlocksPerMultiprocessor",
            byref(count), kernel.function, c_int(threads), c_size_t(kernel.shared_memory),
        )  # fmt: skip
        return count.value

    def allocate(self, size: int) -> int:
        """The address of `size` bytes of the GPU's memory, all of them zero."""
        address = c_uint64()
        try:
            self._do("cuMemAlloc_v2", byref(address), c_size_t(size))
        except BackendError:
            mx.clear_cache()  # MLX may keep what it has freed, and gives it back behind what it computes
            mx.synchronize()
            self._do("cuMemAlloc_v2", byref(address), c_size_t(size))
        self._do("cuMemsetD8_v2", address, c_int(0), c_size_t(size))
        # It returns before the memory is zero, on a stream that ours do not wait for: what they write would be erased.
        self._do("cuStreamSynchronize", None)
        return address.value

    def free(self, address: int) -> None:
        """Give back what `allocate` returned."""
        self._do("cuMemFree_v2", c_uint64(address))

    def host_buffer(self, size: int) -> tuple[int, int]:
        """`size` bytes of this machine's memory that the GPU reads and writes: their addresses here and there."""
        here, there = c_void_p(), c_uint64()
        self._do("cuMemHostAlloc", byref(here), c_size_t(size), c_uint(_MAPPED))
        self._do("cuMemHostGetDevicePointer_v2", byref(there), here, c_uint(0))
        assert here.value is not None
        ctypes.memset(here.value, 0, size)
        return here.value, there.value

    def free_host(self, address: int) -> None:
        """Give back what `host_buffer` returned."""
        self._do("cuMemFreeHost", c_void_p(address))

    def stream(self) -> c_void_p:
        """A stream that does not wait for the others."""
        stream = c_void_p()
        self._do("cuStreamCreate", byref(stream), c_uint(_NON_BLOCKING))
        return stream

    def free_stream(self, stream: c_void_p) -> None:
        """Give back what `stream` returned."""
        self._do("cuStreamDestroy_v2", stream)

    def copy(self, to: int, source: int, size: int, stream: c_void_p) -> None:
        """Copy from this machine's memory, of a `host_buffer`, to the GPU's, behind what the stream does."""
        self._do("cuMemcpyHtoDAsync_v2", c_uint64(to), c_void_p(source), c_size_t(size), stream)

    def fetch(self, to: int, source: int, size: int, stream: c_void_p) -> None:
        """Copy from the GPU's memory to this machine's, of a `host_buffer`, behind what the stream does."""
        self._do("cuMemcpyDtoHAsync_v2", c_void_p(to), c_uint64(source), c_size_t(size), stream)

    def put(self, to: int, content: bytes) -> None:
        """Copy bytes to the GPU's memory, and wait."""
        self._do("cuMemcpyHtoD_v2", c_uint64(to), ctypes.c_char_p(content), c_size_t(len(content)))
        self._do("cuStreamSynchronize", None)  # the last part of it may still be on its way

    def clear(self, address: int, size: int, stream: c_void_p) -> None:
        """Set `size` bytes to zero, behind what the stream does."""
        self._do("cuMemsetD8Async", c_uint64(address), c_int(0), c_size_t(size), stream)

    def wait(self, stream: c_void_p) -> None:
        """Wait until the stream has done all it was given."""
        self._do("cuStreamSynchronize", stream)

    def event(self) -> c_void_p:
        """A mark that can be set behind what a stream does, and waited for."""
        event = c_void_p()
        self._do("cuEventCreate", byref(event), c_uint(_NO_TIMES))
        return event

    def free_event(self, event: c_void_p) -> None:
        """Give back what `event` returned."""
        self._do("cuEventDestroy_v2", event)

    def mark(self, event: c_void_p, stream: c_void_p) -> None:
        """Set an event behind what the stream was given so far."""
        self._do("cuEventRecord", event, stream)

    def reach(self, event: c_void_p) -> None:
        """Wait until the stream has come to where an event was set last."""
        self._do("cuEventSynchronize", event)

    def idle(self, stream: c_void_p) -> bool:
        """Whether the stream has done all it was given.

        Raises:
            BackendError: what it did has failed.
        """
        code = self._library.cuStreamQuery(stream)
        if code not in (0, 600):
            self._do("cuStreamQuery", stream)
        return bool(code == 0)

    def tensor_map(self, address: int, rows: int, box: Box) -> bytes:
        """128 bytes that tell a kernel how to copy boxes of a matrix: all bytes of a row in lines of `box.width`.

        Lines of 128 bytes come with their units of 16 bytes exchanged, by the lowest three bits of the row.
        """
        buffer = ctypes.create_string_buffer(256)
        at = (ctypes.addressof(buffer) + 63) // 64 * 64
        dims = (c_uint64 * 3)(box.width, rows, box.pitch // box.width)
        strides = (c_uint64 * 2)(box.pitch, box.width)
        size, every = (ctypes.c_uint32 * 3)(box.width, box.rows, box.lines), (ctypes.c_uint32 * 3)(1, 1, 1)
        bytes_, no_interleave, swizzle, whole_lines, zeros = 0, 0, 3 if box.width == 128 else 0, 3, 0
        self._do(
            "cuTensorMapEncodeTiled", c_void_p(at), c_int(bytes_), ctypes.c_uint32(3), c_void_p(address), dims, strides,
            size, every, c_int(no_interleave), c_int(swizzle), c_int(whole_lines), c_int(zeros),
        )  # fmt: skip
        return ctypes.string_at(at, 128)

    def launch(self, kernel: Kernel, blocks: int, threads: int, arguments: Sequence[int], stream: c_void_p) -> None:
        """Start a kernel of addresses, all of whose blocks are resident at once.

        Raises:
            BackendError: the blocks do not fit the GPU at once, or another error.
        """
        values = (c_uint64 * len(arguments))(*arguments)
        step = ctypes.sizeof(c_uint64)
        pointers = (c_void_p * len(arguments))(*(ctypes.addressof(values) + i * step for i in range(len(arguments))))
        self._do(
            "cuLaunchCooperativeKernel", kernel.function, c_uint(blocks), c_uint(1), c_uint(1), c_uint(threads),
            c_uint(1), c_uint(1), c_uint(kernel.shared_memory), stream, pointers,
        )  # fmt: skip

    def chain(
        self,
        function: c_void_p,
        grid: tuple[int, int, int],
        threads: int,
        shared_memory: int,
        arguments: Sequence[int | c_int],
        stream: c_void_p,
        *,
        early: bool,
    ) -> None:
        """Start a kernel of addresses and numbers of 32 bits.

        Args:
            early: whether its blocks may come before the kernel ahead of it has ended; it waits for that by itself.
        """
        values: list[Any] = [value if isinstance(value, c_int) else c_uint64(value) for value in arguments]
        pointers = (c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        attribute = _Attribute(_PROGRAMMATIC, b"", _Value(1))
        config = _Config(*grid, threads, 1, 1, shared_memory, stream, ctypes.pointer(attribute), int(early))
        self._do("cuLaunchKernelEx", byref(config), function, pointers, None)

    def record(self, work: Callable[[], None], stream: c_void_p) -> c_void_p:
        """What `work` starts on the stream, as a graph that `replay` starts at once. Nothing is computed now."""
        self._do("cuStreamBeginCapture_v2", stream, c_int(_RELAXED))
        graph, found = c_void_p(), c_void_p()
        try:
            work()
        finally:
            self._do("cuStreamEndCapture", stream, byref(graph))
        try:
            self._do("cuGraphInstantiateWithFlags", byref(found), graph, c_uint64(0))
        finally:
            self._do("cuGraphDestroy", graph)
        return found

    def replay(self, graph: c_void_p, stream: c_void_p) -> None:
        """Start what was recorded."""
        self._do("cuGraphLaunch", graph, stream)

    def forget(self, graph: c_void_p) -> None:
        """Give a recorded graph's memory back."""
        self._do("cuGraphExecDestroy", graph)


class _Value(ctypes.Structure):
    """`CUlaunchAttributeValue`, of which one number is used."""

    _fields_ = (("number", c_int), ("rest", ctypes.c_char * 60))


class _Attribute(ctypes.Structure):
    """`CUlaunchAttribute`."""

    _fields_ = (("id", c_int), ("pad", ctypes.c_char * 4), ("value", _Value))


class _Config(ctypes.Structure):
    """`CUlaunchConfig`."""

    _fields_ = (
        *((name, c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_memory")),
        ("stream", c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", c_uint),
    )


class Kernel:
    """A kernel that was loaded, and what a launch of it takes."""

    def __init__(self, driver: Driver, module: c_void_p, function: c_void_p, shared_memory: int) -> None:
        self._driver = driver
        self._module = module
        self.function = function
        self.shared_memory = shared_memory

    def unload(self) -> None:
        """Give its memory back; it must not be running."""
        self._driver.unload(self._module)


def impossible() -> str | None:
    """Why no kernel of this package can run on this machine's GPU, and what it would take; None: it can."""
    try:
        driver = Driver()
        major, minor = driver.capability
        if major < 8:
            return f"the GPU has compute capability {major}.{minor}, and the kernel needs 8.0"
        Nvrtc()
    except BackendError as error:
        return str(error)
    return None if driver.cooperative else "the GPU cannot hold all blocks of a kernel at once"


def code_of(source: str) -> bytes | None:
    """The machine code of a kernel's text for this machine's GPU; None where it can run none, or none can be made.

    Operations do without.
    """
    if impossible() is not None:
        return None
    try:
        return compiled(source, Driver().architecture)
    except BackendError:
        return None
