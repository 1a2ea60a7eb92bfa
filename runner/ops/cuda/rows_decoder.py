"""Runs decode steps of several sequences at once, each a graph of kernels that is recorded once and started at once.

As in `runner.ops.cuda.decoder`, kernels read weights and caches where MLX keeps them, on a stream of their own: MLX has
nothing to do while a step is under way, and `step` waits for its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int, c_void_p, memmove

import mlx.core as mx
import numpy as np

from runner.ops.cuda.decoder import Matrix, Rows, StepTensors, addresses
from runner.ops.cuda.driver import Driver
from runner.ops.cuda.nvrtc import compiled
from runner.ops.cuda.rows_shape import MOST_ROWS, NAMES, PART, TILE, Launch, RowsPlan
from runner.ops.cuda.shape import DOWN, GATE_UP, HEAD, OUTPUT, QKV, StepShape, Unfit

_CACHE = np.dtype([("keys", "u8"), ("values", "u8"), ("capacity", "i4"), ("start", "i4")])
"""`Cache` in `rows.cu`."""

Bound = np.ndarray
"""Where a sequence's rows lie: an array of `_CACHE`, one for each layer."""


class RowsDecoder:
    """A model's kernels for up to 64 sequences. All calls come from the thread that owns the device."""

    def __init__(self, shape: StepShape, tensors: StepTensors) -> None:
        """Check that there are kernels for the shape; they are compiled when they are first used.

        Raises:
            Unfit: there are none.
            BackendError: the driver refuses.
        """
        RowsPlan(shape, MOST_ROWS)
        self.shape = shape
        self._tensors = tensors
        self.driver = driver = Driver()
        driver.enter()
        self._architecture = driver.architecture
        self._early = driver.capability >= (9, 0)
        self._stream = driver.stream()
        self._sizes: dict[int, _Size] = {}
        self._last: tuple[_Size, int] | None = None
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

    def close(self) -> None:
        """Give the GPU's memory back."""
        self.driver.enter()
        self.driver.wait(self._stream)
        for size in self._sizes.values():
            size.close()
        self._sizes = {}
        self.driver.free_stream(self._stream)

    def refresh(self) -> None:
        """Look where the weights lie: an array that somebody has read on the host may have moved."""
        if (found := addresses(self._weights)) != self._found:
            self._found = found
            self._places = {id(array): place for array, place in zip(self._weights, found, strict=True)}
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

    def step(self, tokens: Sequence[int], positions: Sequence[int], caches: Sequence[Bound]) -> mx.array:
        """Logits `[R, V]` float32 behind `tokens`, whose keys and values are written into the caches.

        They are to be computed before the next step. A `refresh` came before, after whatever else has used the weights.

        Raises:
            BackendError: the driver reports an error.
        """
        count = len(tokens)
        assert 0 < count <= MOST_ROWS and len(positions) == len(caches) == count
        self.driver.enter()
        rows = next(rows for rows in (8, 16, 32, 64) if rows >= count)
        size = self._sizes.get(rows)
        if size is None:
            plan = RowsPlan(self.shape, rows)
            code = compiled(plan.source, self._architecture)
            size = self._sizes[rows] = _Size(self.driver, self._stream, plan, code, early=self._early)
        self._last = (size, count)
        size.run(self._tensors, self._places, self._windows, tokens, positions, caches)
        # A copy: whoever reads an array on the host moves its buffer, and the kernels know the address of this one.
        return size.logits[:count] * 1

    @property
    def best(self) -> list[tuple[int, float]]:
        """The token with the greatest logit, and that logit, of each row of the last step."""
        assert self._last is not None
        size, count = self._last
        return size.best(count)


class _Size:
    """The kernels of one number of rows, with the buffers they work in."""

    def __init__(self, driver: Driver, stream: c_void_p, plan: RowsPlan, code: bytes, *, early: bool) -> None:
        self._early = early
        self._driver, self._stream, self._plan = driver, stream, plan
        self._module = driver.module(code)
        self._functions: dict[str, c_void_p] = {}
        s, rows = plan.shape, plan.rows
        self.logits = mx.zeros((rows, s.vocab), mx.float32)
        mx.eval(self.logits)
        width = max(2, s.rope_dims)
        self._step = np.zeros(
            (), [("token", "i4", rows), ("position", "i4", rows), ("rope", "f4", (rows, s.ropes, width))]
        )
        self._caches = np.zeros((s.layers, rows), _CACHE)
        self._known: list[Bound] = []
        self._best = np.zeros(rows, np.uint64)
        self._here, _ = driver.host_buffer(self._best.nbytes + self._step.nbytes + self._caches.nbytes)
        vectors = max(1, s.chosen) * s.intermediate
        sizes = {
            "step": self._step.nbytes, "caches": self._caches.nbytes, "h": 4 * rows * s.hidden,
            "x": 2 * rows * s.hidden, "attended": 2 * rows * s.heads * s.head_dim, "inner": 2 * rows * vectors,
            "qkv": 4 * rows * s.rows[QKV], "counters": 4 * rows * (s.heads + 1), "plain": 4 * rows * s.hidden,
            "best": 8 * rows, "scores": 4 * rows * max(1, s.experts), "choices": 8 * rows * max(1, s.chosen),
        }  # fmt: skip
        self._at = {name: driver.allocate(max(16, size)) for name, size in sizes.items()}
        self._partial, self._parts = 0, 0
        self._load()
        self._graphs: dict[tuple[int, int], c_void_p] = {}
        self._logits_at = 0
        self._used = 0  # rows of the step that is recorded: of few, no blocks are started for others

    def close(self) -> None:
        self.forget()
        for address in self._at.values():
            self._driver.free(address)
        if self._partial:
            self._driver.free(self._partial)
        self._driver.free_host(self._here)
        self._driver.unload(self._module)

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
    ) -> None:
        driver, step, count = self._driver, self._step, len(tokens)
        step["token"][:count], step["position"][:count], step["position"][count:] = tokens, positions, -1
        if self._plan.shape.rope_dims:
            where = np.array(positions, np.float64)
            for kind, (frequencies, factor) in enumerate(tensors.frequencies):
                angles = where[:, None] * frequencies
                turns = np.stack([np.cos(angles), np.sin(angles)], axis=-1).reshape(count, -1) * factor
                step["rope"][:count, kind] = turns
        here = self._here + self._best.nbytes
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
        self._used = count if count < TILE else self._plan.rows
        if (graph := self._graphs.get((self._used, parts))) is None:
            graph = self._graphs[self._used, parts] = self._recorded(tensors, places, windows, parts)
        driver.replay(graph, self._stream)
        driver.fetch(self._here, self._at["best"], self._best.nbytes, self._stream)
        driver.wait(self._stream)
        memmove(self._best.ctypes.data, self._here, self._best.nbytes)

    def best(self, count: int) -> list[tuple[int, float]]:
        """The token with the greatest logit, and that logit, of each row of the last step."""
        keys = self._best[:count]
        order = (keys >> np.uint64(32)).astype(np.uint32)
        bits = np.where(order & np.uint32(1 << 31), order & np.uint32(0x7FFFFFFF), ~order).astype(np.uint32)
        ids = np.uint64(0xFFFFFFFF) - (keys & np.uint64(0xFFFFFFFF))
        return list(zip(ids.astype(int).tolist(), bits.view(np.float32).astype(float).tolist(), strict=True))

    def _recorded(self, tensors: StepTensors, places: dict[int, int], windows: Sequence[int], parts: int) -> c_void_p:
        driver, s = self._driver, self._plan.shape
        driver.wait(self._stream)  # before anything moves
        if parts > self._parts:
            self.forget()
            if self._partial:
                driver.free(self._partial)
            self._parts = parts
            self._partial = driver.allocate(4 * self._plan.rows * s.heads * parts * (s.head_dim + 2))
        (self._logits_at,) = addresses([self.logits])
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
        self._start(Launch("embed", (used, 1, 1), 256), at["step"], *first, at["h"], at["best"], early=False)
        for number, layer in enumerate(tensors.layers):
            products = layer.products
            self._norm(QKV, places[id(layer.input_norm)], 0)
            self._multiply(QKV, products[QKV], places, at["x"], at["qkv"])
            self._start(
                plan.attention(parts, used), at["caches"] + number * each, at["step"], at["qkv"],
                _place(places, layer.query_norm), _place(places, layer.key_norm), at["attended"], self._partial,
                at["counters"], c_int(windows[number]), c_int(-1 if layer.rope is None else layer.rope), c_int(parts),
            )  # fmt: skip
            self._multiply(OUTPUT, products[OUTPUT], places, at["attended"], at["h"])
            self._norm(GATE_UP, places[id(layer.inner_norm)], at["plain"] if s.experts else 0)
            if layer.router is None:
                self._multiply(GATE_UP, products[GATE_UP], places, at["x"], at["inner"])
                self._multiply(DOWN, products[DOWN], places, at["inner"], at["h"])
                continue
            counters, router = at["counters"] + 4 * rows * s.heads, places[id(layer.router)]
            self._start(plan.route(used), at["step"], at["plain"], router, at["scores"], counters, at["choices"])
            for launch, matrix, source, to in (
                (plan.opened(used), products[GATE_UP], at["x"], at["inner"]),
                (plan.closed(used), products[DOWN], at["inner"], at["h"]),
            ):
                arrays = [_place(places, array) for array in (matrix.weight, matrix.scales, matrix.biases)]
                self._start(launch, at["step"], at["choices"], *arrays, source, to)
        self._norm(HEAD, places[id(tensors.last_norm)], 0)
        self._multiply(HEAD, tensors.head, places, at["x"], self._logits_at)

    def _norm(self, index: int, weight: int, plain: int) -> None:
        launch = Launch(f"norm_{NAMES[index]}", (self._used, 1, 1), 256)
        self._start(launch, self._at["h"], weight, self._at["x"], plain)

    def _multiply(self, index: int, matrix: Matrix, places: dict[int, int], x: int, out: int) -> None:
        arrays = [_place(places, array) for array in matrix]
        self._start(self._plan.product(index), *arrays, x, out, self._at["best"])

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
