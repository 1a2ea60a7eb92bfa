"""The plain MLX path as a GPU runs it, on any machine: its device, its decode step as a graph, and loud models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import pytest

from runner.engine.loaded import Loaded
from runner.nn.batch import Batch
from runner.ops.device import CPU_WITHOUT_KERNELS, Device, current

# On a CPU, MLX has no product of 16-bit matrices gathered by expert.
PLAIN = Device("plain", CPU_WITHOUT_KERNELS) if mx.default_device() == mx.Device(mx.cpu) else current()

KEYS = 3
"""How many keys the token of `decode_step` sees, its own included."""


@dataclass(frozen=True)
class Step:
    """One primitive of a graph: its name, whether it needs nothing but what is stored, its inputs and output."""

    name: str
    stored: bool
    inputs: list[tuple[tuple[int, ...], mx.Dtype]]
    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def casts_a_matrix(self) -> bool:
        """Whether a matrix changes its dtype: a stored one, or more rows than a token has (a cache's)."""
        (shape, dtype), *_ = self.inputs or [((), self.dtype)]
        floats = mx.issubdtype(dtype, mx.floating) and mx.issubdtype(self.dtype, mx.floating)
        matrix = len(shape) > 1 and ((self.stored and len(shape) == 2) or min(shape[-2:]) > 1)
        return self.name == "AsType" and floats and matrix


class _Cut:
    """Ends the graph where a GPU has one kernel and a CPU many steps: arguments are kept, results made of the ids."""

    def __init__(self) -> None:
        self.arguments: list[mx.array] = []
        self.ids = mx.array([[0]])

    def result(self, shape: tuple[int, ...], *arguments: Any) -> mx.array:
        """Numbers in the dtype that MLX gives the result; casts of arguments become part of the graph, as in MLX."""
        arrays = [item for item in arguments if isinstance(item, mx.array) and mx.issubdtype(item.dtype, mx.floating)]
        dtype = sum((mx.zeros((), item.dtype) for item in arrays[1:]), mx.zeros((), arrays[0].dtype)).dtype
        self.arguments += [item.astype(dtype) for item in arrays]
        return self.made(shape, dtype)

    def made(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        """Some numbers that depend on the ids, so that nothing made of them counts as stored."""
        return mx.broadcast_to(mx.min(self.ids).astype(dtype), shape)

    def norm(self, x: mx.array, weight: mx.array | None, *rest: Any) -> mx.array:
        return self.result(x.shape, x, weight, *rest)

    def rope(self, x: mx.array, *rest: Any, **options: Any) -> mx.array:
        return self.result(x.shape, x)

    def attention(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, sinks: Any = None
    ) -> mx.array:
        return self.result((*q.shape[:3], v.shape[-1]), q, k, v, mask, sinks)

    def dequantize(self, weight: mx.array, scales: mx.array, biases: Any, *, bits: int, **form: Any) -> mx.array:
        shape = (*weight.shape[:-1], weight.shape[-1] * 32 // bits)
        return self.made(shape, mx.bfloat16) if biases is None else self.result(shape, scales, biases)

    def gather_mm(self, a: mx.array, b: mx.array, *, rhs_indices: mx.array, sorted_indices: bool) -> mx.array:
        return self.result((*rhs_indices.shape, a.shape[-2], b.shape[-1]), a, b)


def decode_step(engine: Loaded, monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """The graph of the step for the third token, with MLX's fast kernels and gathered products cut out."""
    cut = _Cut()
    for name in ("rms_norm", "layer_norm"):
        monkeypatch.setattr(mx.fast, name, cut.norm)
    monkeypatch.setattr(mx.fast, "rope", cut.rope)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", cut.attention)
    monkeypatch.setattr(mx, "gather_mm", cut.gather_mm)
    monkeypatch.setattr(mx, "dequantize", cut.dequantize)
    caches = engine.new_caches()
    for number in (
        3,
        1,
    ):  # for packed matrices and two vectors, MLX compiles a kernel that needs headers of CUDA's toolkit
        mx.eval(engine.model(Batch(mx.array([[number]])), caches), caches.arrays)

    def step(ids: mx.array) -> list[mx.array]:
        cut.arguments.clear()
        cut.ids = ids
        return [engine.model.logits(engine.model(Batch(ids, KEYS - 1), caches)), *cut.arguments]

    told: list[Mapping[str, Any]] = []
    mx.export_function(told.append, step, mx.array([[4]]))
    return list(_steps(told))


def _steps(told: list[Mapping[str, Any]]) -> Iterator[Step]:
    stored = {name for item in told if item["type"] == "constants" for name, _ in item["constants"]}
    for item in told:
        if item["type"] != "primitive":
            continue
        same = all(name in stored for name, *_ in item["inputs"])
        stored |= {name for name, *_ in item["outputs"]} if same else set()
        for _, shape, dtype in item["outputs"]:
            yield Step(item["name"], same, [tuple(rest) for _, *rest in item["inputs"]], tuple(shape), dtype)


@dataclass
class Loud:
    """An embedding whose largest number is 100,000: past float16's 65,504, and nothing to bfloat16 and float32."""

    rows: Callable[[mx.array], mx.array]
    factor: float

    def __call__(self, ids: mx.array) -> mx.array:
        return self.rows(ids) * self.factor


def loud(engine: Loaded) -> Loaded:
    """The same engine with loud embeddings; nothing else of the model changes."""
    model: Any = engine.model
    largest = float(mx.max(mx.abs(model.embed_tokens(mx.arange(engine.config.vocab_size)).astype(mx.float32))))
    model.embed_tokens = Loud(model.embed_tokens, 1e5 / largest)
    return engine
