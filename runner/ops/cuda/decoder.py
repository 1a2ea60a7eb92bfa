"""Runs a model's decode steps as launches of one kernel, each of several tokens, which the host reads as they come.

The kernel reads weights and caches where MLX keeps them, at their addresses, and on a stream of its own. So MLX must
have nothing to do while launches are under way, and arrays must stay where they are: `bind` waits for MLX, `finish` for
the kernel, and whoever computes with MLX in between calls them.
"""

from __future__ import annotations

import ctypes
import functools
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import mlx.core as mx
import numpy as np

from runner.errors import BackendError
from runner.ops.cuda.driver import Driver, impossible
from runner.ops.cuda.nvrtc import compiled
from runner.ops.cuda.shape import HEAD, MOST_STEPS, SAID, Division, StepShape, divide

THREADS = 544
"""Of a block: 16 warps that multiply, and one that fills the ring."""

QUEUED = 2
"""Launches that are given to the GPU before the first of them has ended, so that it never waits for Python."""

LAUNCH_SECONDS = 0.018
"""What a launch may take: an answer that nobody wants any more ends with the launches under way."""

PATIENCE = 2.0
"""Seconds that a block waits for another before it gives up."""

_LAYER = np.dtype(
    [("w", "u8", 4), ("s", "u8", 4), ("z", "u8", 4), ("bias", "u8", 4), ("n1", "u8"), ("n2", "u8"), ("qn", "u8"),
     ("kn", "u8"), ("kc", "u8"), ("vc", "u8"), ("cap", "i4"), ("window", "i4"), ("shift", "i4"), ("rope", "i4")]
)  # fmt: skip
"""`Layer` in `step.cu`."""


class Matrix(NamedTuple):
    """A product's arrays: plain numbers `[out, in]`, or packed ones with scales and biases, as MLX packs them."""

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    bias: mx.array | None = None


class LayerTensors(NamedTuple):
    """A layer's arrays, and which of the step's kinds of RoPE it has (None: no positions).

    In a mixture, the products after attention are the experts', `[experts, out, in]`, and `router` is `[experts, in]`.
    """

    products: tuple[Matrix, Matrix, Matrix, Matrix]
    input_norm: mx.array
    inner_norm: mx.array
    query_norm: mx.array | None
    key_norm: mx.array | None
    rope: int | None
    router: mx.array | None = None


class StepTensors(NamedTuple):
    """All that a step reads besides the caches.

    Attributes:
        frequencies: radians that each plane turns per position, and a factor on what is rotated, for each kind of RoPE.
    """

    layers: list[LayerTensors]
    last_norm: mx.array
    head: Matrix
    embedding: Matrix
    frequencies: list[tuple[np.ndarray, float]]


class Rows(NamedTuple):
    """Where one layer's keys and values lie, `[1, KV, capacity, D]`; `shift` is the position of row 0."""

    keys: mx.array
    values: mx.array
    window: int | None
    shift: int


@dataclass(frozen=True)
class Picking:
    """How the kernel picks tokens; temperature 0 takes the greatest logit.

    Attributes:
        counts: how often each token was seen, float32 `[V]`, which the kernel counts on; None without penalties.
        bias: what is added to logits, float32 `[V]`; None: nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    counts: mx.array | None = None
    bias: mx.array | None = None


GREEDY = Picking()
"""The greatest logit, nothing else."""


class Said(NamedTuple):
    """What the kernel says of a step: the token and the greatest logit; `unresolved` where the host must draw it."""

    token: int
    peak: float
    unresolved: bool

    @property
    def problem(self) -> str | None:
        """What the logits hold, where no token can be picked from them."""
        return problem(self.peak)


def problem(peak: float) -> str | None:
    """What logits hold whose greatest is `peak`, where no token can be picked from them."""
    if math.isfinite(peak):
        return None
    return "NaN" if math.isnan(peak) else "infinity" if peak > 0 else "no finite number"


def addresses(arrays: Sequence[mx.array]) -> list[int]:
    """The addresses of arrays on the GPU, which a kernel writes down; the arrays must be contiguous and computed.

    Raises:
        BackendError: the kernel cannot be compiled.
    """
    mx.eval(list(arrays))
    code = _address_code()
    each = list({id(array): array for array in arrays}.values())
    asked: list[mx.array] = []
    for start in range(0, len(each), _AT_ONCE):
        group = each[start : start + _AT_ONCE]
        # MLX compiles its own kernels with all its headers, 1.6 seconds for each type of array: this one is ours.
        asked += mx.fast.precompiled_cuda_kernel(
            name="runner_addresses",
            compiled_source=code,
            inputs=group + [group[0]] * (_AT_ONCE - len(group)),
            output_shapes=[(_AT_ONCE,)],
            output_dtypes=[mx.uint64],
            scalars=[],
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
        )
    mx.eval(asked)
    values = [value for out in asked for value in cast(list[int], out.tolist())]
    found = dict(zip(map(id, each), values, strict=False))
    return [found[id(array)] for array in arrays]


@functools.cache
def _address_code() -> bytes:
    """A kernel that writes down what it is given."""
    given = ", ".join(f"unsigned long long a{i}" for i in range(_AT_ONCE))
    lines = " ".join(f"out[{i}] = a{i};" for i in range(_AT_ONCE))
    text = f'extern "C" __global__ void runner_addresses({given}, unsigned long long* out) {{ {lines} }}'
    return compiled(text, Driver().architecture)


_AT_ONCE = 64


class StepDecoder:
    """A model's kernel, loaded, with the buffers it works in. All calls come from the thread that owns the device."""

    def __init__(self, shape: StepShape, tensors: StepTensors) -> None:
        """Compile and load the kernel.

        Raises:
            Unfit: no kernel can be made for this shape or this GPU.
            BackendError: compiling or loading it failed.
        """
        self.driver = driver = Driver()
        driver.enter()
        if (why := impossible()) is not None:
            raise BackendError(why)
        self.division: Division = divide(shape, driver.processors, driver.shared_memory, copies=not driver.bulk)
        code = compiled(self.division.source, driver.architecture)
        self._kernel = driver.kernel(code, "decode_steps", self.division.shared_memory)
        if driver.resident(self._kernel, THREADS) < 1:
            raise BackendError("the GPU has no room for a block of the kernel")
        self.shape = shape
        self._tensors = tensors
        self._stream = driver.stream()
        self._launch = _launch_type(self.division)
        size = self._launch.itemsize
        self._exchange_bytes = 8 * self.division.exchange
        self._exchange = driver.allocate(self._exchange_bytes)
        self._state = driver.allocate(16)
        self._table_bytes = _LAYER.itemsize * (shape.layers + 1)
        self._table = driver.allocate(self._table_bytes)
        self._launches = [driver.allocate(size) for _ in range(QUEUED + 1)]
        self._logits = mx.zeros((shape.vocab,), mx.float32)
        self._said_here, self._said_there = driver.host_buffer(16 * SAID + 16)
        self._staging, _ = driver.host_buffer(size * (QUEUED + 1) + self._table_bytes)
        self._said = np.ctypeslib.as_array((ctypes.c_uint32 * (4 * SAID + 4)).from_address(self._said_here))
        self._serial = 0  # steps given to the GPU, whose records the host finds in their order
        self._read = 0
        self._ends: deque[int] = deque()  # what `_serial` was after each launch under way
        self._lengths: deque[int] = deque()  # steps of each launch whose end was not read
        self._ended: float | None = None  # when the last launch did
        self._epoch = 1
        self._slot = 0
        self._broken: str | None = None
        self._seconds = 0.004  # of a step, as measured
        self._rows: Sequence[Rows] = ()
        self._picking: list[mx.array] = []
        self._picking_at: list[int] = []
        self._fault = False
        self._limit = PATIENCE
        self._find()

    @property
    def ahead(self) -> int:
        """Tokens of one launch at most."""
        return max(1, min(self.division.steps, int(LAUNCH_SECONDS / self._seconds)))

    @property
    def pending(self) -> int:
        """Steps that were given to the GPU and have not been read."""
        return self._serial - self._read

    @property
    def logits(self) -> mx.array:
        """Logits `[V]` float32 of the last step, before any bias or penalty; of a step alone, or of one unresolved."""
        return self._logits

    def close(self) -> None:
        """Give the GPU's memory back."""
        driver = self.driver
        driver.enter()
        driver.wait(self._stream)
        for address in (self._exchange, self._state, self._table, self._maps, *self._launches):
            driver.free(address)
        driver.free_host(self._said_here)
        driver.free_host(self._staging)
        driver.free_stream(self._stream)
        self._kernel.unload()

    def bind(self, rows: Sequence[Rows]) -> None:
        """Let the next launches read and write these caches; waits for MLX, whose arrays they are."""
        self.driver.enter()
        self._rows = list(rows)
        buffers = addresses([array for row in rows for array in (row.keys, row.values)])
        mx.synchronize()
        for layer, row in enumerate(rows):
            entry = self._layers[layer]
            entry["kc"], entry["vc"] = buffers[2 * layer : 2 * layer + 2]
            entry["cap"], entry["shift"], entry["window"] = row.keys.shape[2], row.shift, row.window or 0
        ctypes.memmove(self._staging, self._layers.ctypes.data, self._table_bytes)
        self.driver.copy(self._table, self._staging, self._table_bytes, self._stream)
        self.driver.clear(self._state, 16, self._stream)
        self.driver.wait(self._stream)
        self._forget()

    def launch(
        self, steps: int, position: int, token: int | None, picking: Picking, chances: Sequence[float], *, keep: bool
    ) -> None:
        """Give the GPU `steps` steps, the first of them for `token` at `position`; None: the last launch's token.

        Args:
            chances: a number from 0 up to 1 for each step, where a temperature is set.
            keep: whether `logits` is wanted afterwards.
        """
        driver, shape = self.driver, self.shape
        entry = np.zeros((), self._launch)
        entry["steps"], entry["pos"], entry["token"], entry["first"] = steps, position, token or 0, token is not None
        sampled = picking.temperature > 0
        entry["mode"], entry["top_k"], entry["top_p"] = sampled, picking.top_k, picking.top_p
        entry["inv_t"] = 1 / picking.temperature if sampled else 1.0
        entry["log_min_p"] = math.log(picking.min_p) if picking.min_p > 0 else -np.inf
        entry["penalised"], entry["biased"] = picking.counts is not None, picking.bias is not None
        entry["repetition"], entry["presence"] = picking.repetition, picking.presence
        entry["frequency"], entry["want_logits"] = picking.frequency, keep or sampled
        entry["serial"], entry["epoch"], entry["fault"] = self._serial & 0x7FFFFFFF, self._epoch, self._fault
        entry["limit_ns"] = int(self._limit * 1e9)
        if chances:
            entry["chance"][: len(chances)] = chances
        if shape.rope_dims:
            positions = np.arange(position, position + steps, dtype=np.float64)
            for kind, (frequencies, factor) in enumerate(self._tensors.frequencies):
                angles = positions[:, None] * frequencies
                turns = np.stack([np.cos(angles), np.sin(angles)], axis=-1).reshape(steps, -1) * factor
                entry["rope"][:steps, kind] = turns
        self._slot = (self._slot + 1) % len(self._launches)
        size, there = self._launch.itemsize, self._launches[self._slot]
        here = self._staging + self._table_bytes + self._slot * size
        ctypes.memmove(here, entry.tobytes(), size)
        driver.copy(there, here, size, self._stream)
        counts, bias = self._picked(picking)
        emb = self._embedding
        driver.launch(
            self._kernel,
            self.division.blocks,
            THREADS,
            [
                self._table, there, self._state, self._exchange, *emb, counts, bias, self._logits_at,
                self._said_there, self._said_there + 16 * SAID, self._maps,
            ],
            self._stream,
        )  # fmt: skip
        self._serial += steps
        self._ends.append(self._serial)
        self._lengths.append(steps)
        self._epoch = (self._epoch + steps * (shape.layers + 1)) & 0xFFFFFFFF

    def read(self) -> Said:
        """What the kernel says of the next step, waiting for it.

        Raises:
            BackendError: the kernel failed; this decoder can do nothing any more.
        """
        at = 4 * (self._read & 0x7FFFFFFF) % (4 * SAID)
        wanted = (self._read & 0x7FFFFFFF) + 1
        asked = time.perf_counter()
        pause = self._seconds / 8
        while int(self._said[at + 3]) != wanted:
            time.sleep(min(pause, 0.0002))
            if time.perf_counter() - asked > 3 * self._limit + 1:
                self.driver.wait(self._stream)  # what it has begun would still be written while others move the rows
                self._fail("it does not answer")
        token, bits, status = (int(value) for value in self._said[at : at + 3])
        if status == 2:
            self.driver.wait(self._stream)
            self._fail("a block waited in vain for another")
        self._read += 1
        if self._ends and self._read == self._ends[0]:
            # A launch has ended: how long its steps took, if the GPU had been busy since the one before.
            begun, self._ended = self._ended, time.perf_counter()
            if begun is not None:
                self._seconds = min(0.1, max(1e-5, (self._ended - begun) / self._lengths[0]))
            self._lengths.popleft()
        return Said(token, float(np.uint32(bits).view(np.float32)), status == 1)

    @property
    def queued(self) -> bool:
        """Whether another launch may be given to the GPU: no more than `QUEUED` are under way."""
        while self._ends and self._ends[0] <= self._read:
            self._ends.popleft()
        return len(self._ends) < QUEUED

    def settle(self) -> None:
        """Wait until all launches have ended, so that MLX may read `logits`."""
        self.driver.wait(self._stream)

    def finish(self) -> None:
        """Wait for the launches under way, whose unread steps are forgotten; MLX may compute then."""
        self.driver.enter()
        self._said[4 * SAID] = 1
        self.driver.wait(self._stream)
        self._said[4 * SAID] = 0
        self._forget()
        self.driver.clear(self._state, 16, self._stream)
        self.driver.wait(self._stream)

    def _forget(self) -> None:
        self._read = self._serial
        self._ends.clear()
        self._lengths.clear()
        self._ended = None

    def _picked(self, picking: Picking) -> list[int]:
        wanted = [array for array in (picking.counts, picking.bias) if array is not None]
        if [id(array) for array in wanted] != [id(array) for array in self._picking]:
            self._picking, self._picking_at = wanted, addresses(wanted) if wanted else []
            mx.synchronize()
        found = iter(self._picking_at)
        return [0 if array is None else next(found) for array in (picking.counts, picking.bias)]

    def refresh(self) -> None:
        """Look where the weights lie, before an answer: an array that somebody has read on the host may have moved."""
        if addresses(self._weights) != self._found:
            self.driver.free(self._maps)
            self._find()

    def _find(self) -> None:
        """Write down where the weights lie, and how boxes of them are copied."""
        tensors = self._tensors
        arrays: list[mx.array] = []
        places: list[tuple[int, str, int | None]] = []

        def put(layer: int, field: str, index: int | None, array: mx.array | None) -> None:
            if array is not None:
                arrays.append(array)
                places.append((layer, field, index))

        for number, layer in enumerate(tensors.layers):
            for index, matrix in enumerate(layer.products):
                for field, array in zip(("w", "s", "z", "bias"), matrix, strict=True):
                    put(number, field, index, array)
            put(number, "n1", None, layer.input_norm)
            put(number, "n2", None, layer.inner_norm)
            put(number, "qn", None, layer.query_norm)
            put(number, "kn", None, layer.key_norm)
        last = len(tensors.layers)
        for field, array in zip(("w", "s", "z", "bias"), tensors.head, strict=True):
            put(last, field, 0, array)
        put(last, "n1", None, tensors.last_norm)
        table = tensors.embedding[:3]
        self._weights = [*arrays, self._logits, *(array for array in table if array is not None)]
        self._found = found = addresses(self._weights)
        self._layers = np.zeros(last + 1, _LAYER)
        for (number, field, place), address in zip(places, found, strict=False):
            if place is None:
                self._layers[number][field] = address
            else:
                self._layers[number][field][place] = address
        for number, layer in enumerate(tensors.layers):
            self._layers[number]["rope"] = -1 if layer.rope is None else layer.rope
        self._logits_at = found[len(arrays)]
        rest = iter(found[len(arrays) + 1 :])
        self._embedding = [0 if array is None else next(rest) for array in table]
        maps = self._boxes()
        self._maps = self.driver.allocate(len(maps))
        self.driver.put(self._maps, maps)

    def _boxes(self) -> bytes:
        """Tensor maps of weight, scales and biases, for each product of each layer, and of the head."""
        products, maps = self.division.products, bytearray(len(self._layers) * 4 * 3 * 128)
        for number, entry in enumerate(self._layers):
            for index, product in enumerate(products[:HEAD] if number < len(self._layers) - 1 else products[HEAD:]):
                boxes = product.boxes if product.mapped and not self.division.copies else ()
                for kind, (field, box) in enumerate(zip("wsz", boxes, strict=False)):
                    start = ((number * 4 + index) * 3 + kind) * 128
                    address = int(entry[field][index])
                    maps[start : start + 128] = self.driver.tensor_map(address, product.rows, box)
        return bytes(maps)

    def _fail(self, why: str) -> None:
        self._broken = why
        raise BackendError(f"the kernel for decode steps has failed: {why}")


def _launch_type(division: Division) -> np.dtype:
    """`Launch` in `step.cu`."""
    names = ["steps", "pos", "token", "mode", "top_k", "penalised", "biased", "want_logits", "fault", "first", "serial"]
    floats = ["inv_t", "top_p", "log_min_p", "repetition", "presence", "frequency", "reserved3", "reserved4"]
    width = max(2, division.shape.rope_dims)
    return np.dtype(
        [(name, "i4") for name in [*names, "reserved"]]
        + [("limit_ns", "u8"), ("epoch", "u4"), ("reserved2", "u4")]
        + [(name, "f4") for name in floats]
        + [("chance", "f4", division.steps), ("rope", "f4", (division.steps, division.shape.ropes, width))]
    )


assert MOST_STEPS * (QUEUED + 1) < SAID, "records of steps that were not read yet are overwritten"
