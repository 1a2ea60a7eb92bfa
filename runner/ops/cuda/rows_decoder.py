"""Runs decode steps of several sequences at once, each a graph of kernels that is recorded once and started at once.

As in `runner.ops.cuda.decoder`, kernels read weights and caches where MLX keeps them, on a stream of their own. A step
is begun, and waited for later: meanwhile the host hands out the tokens of the one before. As long as it is under way,
nobody else may touch the caches of its sequences, or let go of them.

Where a model is shared out over ranks, all of them take the same steps in the same order. What they exchange is
recorded with the kernels: a step takes no more of the host's time than one of a whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int, c_uint64, c_void_p, memmove
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from runner.errors import BackendError
from runner.ops.cuda.decoder import Matrix, Rows, StepTensors, addresses
from runner.ops.cuda.driver import Driver
from runner.ops.cuda.nccl import Communicator, Nccl, check, connected
from runner.ops.cuda.nvrtc import compiled
from runner.ops.cuda.rows_shape import MOST_ROWS, NAMES, PART, TILE, Launch, RowsPlan
from runner.ops.cuda.shape import DOWN, GATE_UP, HEAD, OUTPUT, QKV, StepShape, Unfit
from runner.ops.exchange import Exchange, ring_bytes

_CACHE = np.dtype([("keys", "u8"), ("values", "u8"), ("capacity", "i4"), ("start", "i4")])
"""`Cache` in `rows.cu`."""

Bound = np.ndarray
"""Where a sequence's rows lie: an array of `_CACHE`, one for each layer."""

_AT_ONCE = 2
"""Steps under way at most: the next one waits on the device for the end of the last."""


class Logits(NamedTuple):
    """Where a step's logits are found: in float32, rank by rank, `used` rows of each rank's part of the vocabulary."""

    array: mx.array
    ranks: int
    used: int


class RowsStep:
    """A step that was begun, and what comes of it.

    Attributes:
        latest: whether none was begun after it.
    """

    def __init__(self, driver: Driver, slot: _Slot, logits: Logits, count: int) -> None:
        self.latest = True
        self._driver, self._slot = driver, slot
        self._logits = logits
        self._count = count
        self._best: np.ndarray | None = None
        self._error: BackendError | None = None

    def wait(self) -> None:
        """Wait for its end, however it ends."""
        if self._best is None and self._error is None:
            try:
                self._driver.enter()
                self._driver.reach(self._slot.event)
                self._best = self._slot.best[: self._count].copy()
            except BackendError as error:
                self._error = error

    @property
    def best(self) -> list[tuple[int, float]]:
        """The token with the greatest logit, and that logit, of each row, once it has ended.

        Raises:
            BackendError: the driver reports an error.
        """
        keys = self._ended()
        order = (keys >> np.uint64(32)).astype(np.uint32)
        bits = np.where(order & np.uint32(1 << 31), order & np.uint32(0x7FFFFFFF), ~order).astype(np.uint32)
        ids = np.uint64(0xFFFFFFFF) - (keys & np.uint64(0xFFFFFFFF))
        return list(zip(ids.astype(int).tolist(), bits.view(np.float32).astype(float).tolist(), strict=True))

    @property
    def logits(self) -> mx.array:
        """Logits `[R, V]` float32, once it has ended; to be computed before the next step is begun.

        Raises:
            BackendError: the driver reports an error.
        """
        self._ended()
        array, ranks, used = self._logits
        parts = array.reshape(-1)[: ranks * used * array.shape[-1]].reshape(ranks, used, -1)[:, : self._count]
        # A copy: whoever reads an array on the host moves its buffer, and the kernels know the address of this one.
        return parts.swapaxes(0, 1).reshape(self._count, -1) * 1

    def _ended(self) -> np.ndarray:
        self.wait()
        if self._error is not None:
            raise self._error
        assert self._best is not None
        return self._best


class _Slot:
    """What one of the steps under way has of its own.

    Attributes:
        number: which slot it is.
        event: set behind its end.
        best: the order of each row's greatest logit and its token, as numbers, where the device writes them.
        step: the one that was begun last here.
    """

    def __init__(self, driver: Driver, number: int) -> None:
        self.number = number
        self.event = driver.event()
        self.address, _ = driver.host_buffer(8 * MOST_ROWS)
        self.best = np.ctypeslib.as_array((c_uint64 * MOST_ROWS).from_address(self.address))
        self.step: RowsStep | None = None

    def free(self, driver: Driver) -> None:
        driver.free_event(self.event)
        driver.free_host(self.address)


class RowsDecoder:
    """A model's kernels for up to 64 sequences. All calls come from the thread that owns the device."""

    def __init__(self, shape: StepShape, tensors: StepTensors) -> None:
        """Check that there are kernels for the shape; they are compiled when they are first used.

        Those of a part of a model need a `connect` first.

        Raises:
            Unfit: there are none.
            BackendError: the driver refuses, or there is no NCCL for a part of a model.
        """
        RowsPlan(shape, MOST_ROWS)
        self.shape = shape
        self._nccl = Nccl() if shape.ranks > 1 else None
        self._ranks: _Ranks | None = None
        self._tensors = tensors
        self.driver = driver = Driver()
        driver.enter()
        self._architecture = driver.architecture
        self._early = driver.capability >= (9, 0)
        self._stream = driver.stream()
        self._sizes: dict[int, _Size] = {}
        self._slots = [_Slot(driver, number) for number in range(_AT_ONCE)]
        self._best_at = driver.allocate(_AT_ONCE * 8 * MOST_ROWS)
        self._begun = 0  # steps
        self._windows: list[int] = []
        matrices = [matrix for layer in tensors.layers for matrix in layer.products]
        self._weights: list[mx.array] = [
            array for matrix in [*matrices, tensors.head, tensors.embedding] for array in matrix if array is not None
        ]
        for layer in tensors.layers:
            small = (layer.input_norm, layer.inner_norm, layer.query_norm, layer.key_norm, layer.router)
            self._weights += [array for array in small if array is not None]
        self._weights.append(tensors.last_norm)
        self._found: list[int] = []
        self._places: dict[int, int] = {}

    def connect(self, exchange: Exchange) -> None:
        """Connect the kernels of a part of a model with those of the other ranks, which do so at the same time.

        Raises:
            BackendError: NCCL reports an error; the others may wait for this process then.
        """
        assert self._nccl is not None
        self.driver.enter()
        self._ranks = _Ranks(exchange, connected(self._nccl, exchange))

    def check(self) -> None:
        """Try a sum over all ranks, which do so at the same time, behind `connect`.

        Raises:
            BackendError: it does not come about, or is wrong.
        """
        assert self._ranks is not None
        self.driver.enter()
        check(self._ranks.kernels, self._ranks.exchange, self.driver, self._stream)

    def close(self) -> None:
        """Give the GPU's memory back; what steps have found can still be asked of them."""
        self.settle()
        self.driver.enter()
        self.driver.wait(self._stream)
        for size in self._sizes.values():
            size.close()
        self._sizes = {}
        for slot in self._slots:
            slot.free(self.driver)
        self.driver.free(self._best_at)
        self.driver.free_stream(self._stream)

    def refresh(self) -> None:
        """Look where the weights lie: an array that somebody has read on the host may have moved."""
        if (found := addresses(self._weights)) != self._found:
            self._found = found
            self._places = {id(array): place for array, place in zip(self._weights, found, strict=True)}
            self.settle()
            for size in self._sizes.values():
                size.forget()

    def bound(self, several: Sequence[Sequence[Rows]]) -> list[Bound]:
        """Where the layers' rows of each sequence lie; waits for MLX, whose arrays they are.

        Raises:
            Unfit: the sequences' layers have other windows than those before.
        """
        places = iter(addresses([array for rows in several for row in rows for array in (row.keys, row.values)]))
        result = []
        for rows in several:
            found = np.zeros(len(rows), _CACHE)
            for entry, row in zip(found, rows, strict=True):
                entry["keys"], entry["values"] = next(places), next(places)
                entry["capacity"], entry["start"] = row.keys.shape[2], row.shift
            windows = [row.window or 0 for row in rows]
            self._windows = self._windows or windows
            if windows != self._windows:
                raise Unfit("windows that differ from sequence to sequence")
            result.append(found)
        return result

    def begin(self, tokens: Sequence[int], positions: Sequence[int], caches: Sequence[Bound]) -> RowsStep:
        """Begin the step behind `tokens`, whose keys and values are written into the caches.

        A `refresh` came before, after whatever else has used the weights.

        Args:
            tokens: of each sequence; ~p stands for the token with the greatest logit of row p of the step before, which
                need not have ended.

        Raises:
            BackendError: the driver reports an error.
        """
        count = len(tokens)
        assert 0 < count <= MOST_ROWS and len(positions) == len(caches) == count
        size = self._size(count)
        slot = self._slots[self._begun % _AT_ONCE]
        if slot.step is not None:
            slot.step.wait()
        size.run(self._tensors, self._places, self._windows, tokens, positions, caches, slot.number)
        best = self._best_at + slot.number * 8 * MOST_ROWS
        self.driver.fetch(slot.address, best, 8 * count, self._stream)
        self.driver.mark(slot.event, self._stream)
        self._begun += 1
        for other in self._slots:
            if other.step is not None:
                other.step.latest = False
        slot.step = RowsStep(self.driver, slot, size.logits, count)
        return slot.step

    def ready(self, count: int) -> None:
        """Compile, unless that was done, what `begin` needs for so many sequences.

        Raises:
            BackendError: the compiler or the driver reports an error.
        """
        self._size(count)

    def _size(self, count: int) -> _Size:
        self.driver.enter()
        rows = next(rows for rows in (8, 16, 32, 64) if rows >= count)
        size = self._sizes.get(rows)
        if size is None:
            plan = RowsPlan(self.shape, rows)
            code = compiled(plan.source, self._architecture)
            size = _Size(self.driver, self._stream, plan, code, self._best_at, self._ranks, early=self._early)
            self._sizes[rows] = size
        return size

    def settle(self) -> None:
        """Wait for the end of all steps that were begun."""
        for slot in self._slots:
            if slot.step is not None:
                slot.step.wait()


class _Ranks(NamedTuple):
    """The ranks that a model is shared out over: what MLX has between them, and what kernels have."""

    exchange: Exchange
    kernels: Communicator


class _Size:
    """The kernels of one number of rows, with the buffers they work in."""

    def __init__(
        self,
        driver: Driver,
        stream: c_void_p,
        plan: RowsPlan,
        code: bytes,
        best_at: int,
        ranks: _Ranks | None,
        *,
        early: bool,
    ) -> None:
        """`best_at` is where the steps' greatest logits are found, those of one slot behind those of the other."""
        self._early = early
        self._ranks = ranks
        self._best_at = best_at
        self._driver, self._stream, self._plan = driver, stream, plan
        self._module = driver.module(code)
        self._functions: dict[str, c_void_p] = {}
        s, rows = plan.shape, plan.rows
        parts = s.ranks if s.gathered else 1
        self._found = mx.zeros((parts * rows, s.rows[HEAD]), mx.float32)  # logits
        mx.eval(self._found)
        width = max(2, s.rope_dims)
        self._step = np.zeros(
            (), [("token", "i4", rows), ("position", "i4", rows), ("rope", "f4", (rows, s.ropes, width))]
        )
        self._caches = np.zeros((s.layers, rows), _CACHE)
        self._known: list[Bound] = []
        self._staged = self._step.nbytes + self._caches.nbytes  # bytes on their way, for each step under way
        self._here, _ = driver.host_buffer(_AT_ONCE * self._staged)
        vectors = max(1, s.chosen) * s.intermediate
        sizes = {
            "step": self._step.nbytes, "caches": self._caches.nbytes, "h": 4 * rows * s.hidden,
            "x": 2 * rows * s.hidden, "attended": 2 * rows * s.heads * s.head_dim, "inner": 2 * rows * vectors,
            "qkv": 4 * rows * s.rows[QKV], "counters": 4 * rows * (s.heads + 1), "plain": 4 * rows * s.hidden,
            "scores": 4 * rows * max(1, s.experts), "choices": 8 * rows * max(1, s.chosen),
            "sum": 4 * rows * s.hidden if any(s.summed) else 0,
            "part": 4 * rows * s.rows[HEAD] if s.gathered else 0,
        }  # fmt: skip
        self._at = {name: driver.allocate(max(16, size)) for name, size in sizes.items()}
        self._partial, self._parts = 0, 0
        self._load()
        self._graphs: dict[tuple[int, int, int], c_void_p] = {}
        self._logits_at = 0
        self._used = 0  # rows of the step that is recorded: of few, no blocks are started for others
        self._slot = 0  # of that step

    def close(self) -> None:
        self.forget()
        for address in self._at.values():
            self._driver.free(address)
        if self._partial:
            self._driver.free(self._partial)
        self._driver.free_host(self._here)
        self._driver.unload(self._module)

    @property
    def logits(self) -> Logits:
        """Where those of the last step are found."""
        s = self._plan.shape
        return Logits(self._found, s.ranks if s.gathered else 1, self._used)

    def forget(self) -> None:
        """Forget the recorded graphs: they hold addresses."""
        for graph in self._graphs.values():
            self._driver.forget(graph)
        self._graphs = {}

    def run(
        self,
        tensors: StepTensors,
        places: dict[int, int],
        windows: Sequence[int],
        tokens: Sequence[int],
        positions: Sequence[int],
        caches: Sequence[Bound],
        slot: int,
    ) -> None:
        """Give a step to the device. The step that had the slot before has ended."""
        driver, step, count = self._driver, self._step, len(tokens)
        step["token"][:count], step["position"][:count], step["position"][count:] = tokens, positions, -1
        if self._plan.shape.rope_dims:
            where = np.array(positions, np.float64)
            for kind, (frequencies, factor) in enumerate(tensors.frequencies):
                angles = where[:, None] * frequencies
                turns = np.stack([np.cos(angles), np.sin(angles)], axis=-1).reshape(count, -1) * factor
                step["rope"][:count, kind] = turns
        here = self._here + slot * self._staged
        memmove(here, step.ctypes.data, step.nbytes)
        driver.copy(self._at["step"], here, step.nbytes, self._stream)
        if len(self._known) != count or any(a is not b for a, b in zip(self._known, caches, strict=True)):
            self._known = list(caches)
            for row, cache in enumerate(caches):
                self._caches[:, row] = cache
            there = here + step.nbytes
            memmove(there, self._caches.ctypes.data, self._caches.nbytes)
            driver.copy(self._at["caches"], there, self._caches.nbytes, self._stream)
        parts = 4
        while parts <= max(positions) // PART:
            parts *= 2
        self._used, self._slot = count if count < TILE else self._plan.rows, slot
        if (graph := self._graphs.get((self._used, parts, slot))) is None:
            graph = self._graphs[self._used, parts, slot] = self._recorded(tensors, places, windows, parts)
        driver.replay(graph, self._stream)
        if self._ranks is not None:
            self._ranks.exchange.sent += self._sent

    @property
    def _sent(self) -> int:
        """Bytes that each rank sends in a step."""
        s, used = self._plan.shape, self._used
        sums = s.layers * sum(s.summed) * ring_bytes(4 * used * s.hidden, s.ranks) + ring_bytes(8 * used, s.ranks)
        return sums + ((s.ranks - 1) * 4 * used * s.rows[HEAD] if s.gathered else 0)

    def _recorded(self, tensors: StepTensors, places: dict[int, int], windows: Sequence[int], parts: int) -> c_void_p:
        driver, s = self._driver, self._plan.shape
        driver.wait(self._stream)  # before anything moves
        if parts > self._parts:
            self.forget()
            if self._partial:
                driver.free(self._partial)
            self._parts = parts
            self._partial = driver.allocate(4 * self._plan.rows * s.heads * parts * (s.head_dim + 2))
        (self._logits_at,) = addresses([self._found])
        return driver.record(lambda: self._step_of(tensors, places, windows, parts), self._stream)

    def _load(self) -> None:
        """Find the kernels of the module, which the driver may load only now, before any is recorded."""
        plan = self._plan
        norms = [Launch(f"norm_{NAMES[index]}", (1, 1, 1), 256) for index in (QKV, GATE_UP, HEAD)]
        launches = [Launch("embed", (1, 1, 1), 256), *norms, plan.attention(1, 1)]
        if plan.shape.experts:
            launches += [plan.route(1), plan.opened(1), plan.closed(1)]
        launches += [plan.product(index) for index in range(5) if NAMES[index] not in {one.name for one in launches}]
        for launch in launches:
            self._functions[launch.name] = self._driver.function(self._module, launch.name, launch.shared_memory)

    def _step_of(self, tensors: StepTensors, places: dict[int, int], windows: Sequence[int], parts: int) -> None:
        """Start all kernels of a step, in their order."""
        plan, at = self._plan, self._at
        s, rows, used = plan.shape, plan.rows, self._used
        each = _CACHE.itemsize * rows
        table = tensors.embedding
        first = [_place(places, array) for array in (table.weight, table.scales, table.biases)]
        best, before = (self._best(slot) for slot in (self._slot, 1 - self._slot))
        self._start(Launch("embed", (used, 1, 1), 256), at["step"], *first, at["h"], best, before, early=False)
        attended, fed = s.summed
        for number, layer in enumerate(tensors.layers):
            products = layer.products
            self._norm(QKV, places[id(layer.input_norm)], 0, summed=fed and number > 0)
            self._multiply(QKV, products[QKV], places, at["x"], at["qkv"])
            self._start(
                plan.attention(parts, used), at["caches"] + number * each, at["step"], at["qkv"],
                _place(places, layer.query_norm), _place(places, layer.key_norm), at["attended"], self._partial,
                at["counters"], c_int(windows[number]), c_int(-1 if layer.rope is None else layer.rope), c_int(parts),
                c_int(plan.parts_each(parts, used)),
            )  # fmt: skip
            self._multiply(OUTPUT, products[OUTPUT], places, at["attended"], at["sum" if attended else "h"])
            self._norm(GATE_UP, places[id(layer.inner_norm)], at["plain"] if s.experts else 0, summed=attended)
            to = at["sum" if fed else "h"]
            if layer.router is None:
                self._multiply(GATE_UP, products[GATE_UP], places, at["x"], at["inner"])
                self._multiply(DOWN, products[DOWN], places, at["inner"], to)
                continue
            counters, router = at["counters"] + 4 * rows * s.heads, places[id(layer.router)]
            self._start(plan.route(used), at["step"], at["plain"], router, at["scores"], counters, at["choices"])
            for launch, matrix, source, out in (
                (plan.opened(used), products[GATE_UP], at["x"], at["inner"]),
                (plan.closed(used), products[DOWN], at["inner"], to),
            ):
                arrays = [_place(places, array) for array in (matrix.weight, matrix.scales, matrix.biases)]
                self._start(launch, at["step"], at["choices"], *arrays, source, out)
        self._norm(HEAD, places[id(tensors.last_norm)], 0, summed=fed)
        if not s.headless:
            out = at["part"] if s.gathered else self._logits_at
            self._multiply(HEAD, tensors.head, places, at["x"], out)
        if self._ranks is not None:
            if s.gathered:
                self._ranks.kernels.gather(at["part"], self._logits_at, used * s.rows[HEAD], self._stream)
            self._ranks.kernels.greatest(best, used, self._stream)

    def _norm(self, index: int, weight: int, plain: int, *, summed: bool) -> None:
        """Start a norm; `summed`: of the residual stream with what all ranks add to it, each its part."""
        at, sums = self._at, 0
        if summed:
            assert self._ranks is not None, "a part of a model that is not connected"
            sums = at["sum"]
            self._ranks.kernels.add(sums, self._used * self._plan.shape.hidden, self._stream)
        # Nothing can come before the end of what another library has started.
        launch = Launch(f"norm_{NAMES[index]}", (self._used, 1, 1), 256)
        self._start(launch, at["h"], weight, at["x"], plain, sums, early=not sums)

    def _multiply(self, index: int, matrix: Matrix, places: dict[int, int], x: int, out: int) -> None:
        arrays = [_place(places, array) for array in matrix]
        self._start(self._plan.product(index), *arrays, x, out, self._best(self._slot), c_int(self._first_id))

    @property
    def _first_id(self) -> int:
        """The id of this rank's first logit."""
        s = self._plan.shape
        return self._ranks.exchange.rank * s.rows[HEAD] if s.gathered and self._ranks is not None else 0

    def _best(self, slot: int) -> int:
        """Where the greatest logits of the step in a slot are found."""
        return self._best_at + slot * 8 * MOST_ROWS

    def _start(self, launch: Launch, *arguments: int | c_int, early: bool = True) -> None:
        self._driver.chain(
            self._functions[launch.name],
            launch.grid,
            launch.threads,
            launch.shared_memory,
            arguments,
            self._stream,
            early=early and self._early,
        )


def _place(places: dict[int, int], array: mx.array | None) -> int:
    return 0 if array is None else places[id(array)]
