"""Counts the operations of a lazy MLX graph as a GPU would run them, on a machine that has none."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

VIEWS = frozenset(
    ["Broadcast", "ExpandDims", "Flatten", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unflatten"]
)
"""Primitives that look at the same memory in another way: no kernel runs for them."""

FREE = frozenset({"Depends", "StopGradient"})
"""Primitives that stand for no work; `Depends` is what the stand-ins below hold their inputs by."""


def operations(*outputs: mx.array) -> Counter[str]:
    """How often each primitive that computes is in the graph that `outputs`, not evaluated yet, stand for."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "graph.dot"
        mx.export_to_dot(str(file), *outputs)
        names = re.findall(r'\[label ="([^"]*)", shape=rectangle\]', file.read_text())
    # A compiled function is one kernel, whatever it consists of.
    found = Counter("Compiled" if name.startswith("Compiled") else name for name in names)
    return Counter({name: count for name, count in found.items() if name not in VIEWS | FREE})


def forget(caches: Iterable[Any]) -> None:
    """Put numbers in the place of the graphs that caches hold, so that the next step's graph starts at them."""
    for cache in caches:
        for name, value in list(vars(cache).items()):
            if isinstance(value, mx.array):
                setattr(cache, name, mx.zeros(value.shape, value.dtype))
        mx.eval([value for value in vars(cache).values() if isinstance(value, mx.array)])


@contextmanager
def one_kernel_each() -> Iterator[None]:
    """Let `mx.fast`'s norms, RoPE and attention be one operation each, as on a GPU; a CPU has them as many small ones.

    The stand-ins have the shape, the dtype and the inputs of the real ones, but their numbers mean nothing: graphs made
    here are for counting only. Attention stays what it is where Metal has no kernel: for keys wider than values or than
    256.
    """
    real = {name: getattr(mx.fast, name) for name in ("rms_norm", "layer_norm", "rope", "scaled_dot_product_attention")}

    def norm(x: mx.array, *parameters: Any, **_: Any) -> mx.array:
        weights = [p for p in parameters if isinstance(p, mx.array)]
        return _one(x, *weights, dtype=weights[0].dtype if weights else x.dtype)

    def rope(x: mx.array, *_: Any, offset: Any = 0, freqs: Any = None, **__: Any) -> mx.array:
        return _one(x, offset, freqs)

    def attention(q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
        if q.shape[-1] != v.shape[-1] or q.shape[-1] > 256:
            result: mx.array = real["scaled_dot_product_attention"](q, k, v, **options)
            return result
        return _one(q, k, v, options.get("mask"), options.get("sinks"))

    stand_ins = {"rms_norm": norm, "layer_norm": norm, "rope": rope, "scaled_dot_product_attention": attention}
    try:
        for name, stand_in in stand_ins.items():
            setattr(mx.fast, name, stand_in)
        yield
    finally:
        for name, function in real.items():
            setattr(mx.fast, name, function)


def _one(x: mx.array, *others: Any, dtype: mx.Dtype | None = None) -> mx.array:
    """One operation that reads x and `others` and has the shape of x."""
    made = mx.compile(lambda a: (a + a).astype(dtype or a.dtype))(x)
    arrays = [other for other in others if isinstance(other, mx.array)]
    held = mx.depends([made], arrays) if arrays else [made]
    result: mx.array = held[0]
    return result
