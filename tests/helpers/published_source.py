"""Layers of a published format in memory, seen through `runner.checkpoint.quantized`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from published_reference import Array, Case, is_float8
from sources import NAMES, Info

from runner.checkpoint.quantized import as_mlx

DTYPES = {**NAMES, mx.uint8: "U8", mx.int8: "I8", mx.int64: "I64"}


class Layers:
    """An in-memory `Source` of quantized layers."""

    def __init__(self, cases: Mapping[str, Case]) -> None:
        self.arrays: dict[str, mx.array] = {}
        self.headers: dict[str, Info] = {}
        for layer, case in cases.items():
            for suffix, array in case.tensors.items():
                name = f"{layer}.{suffix}"
                dtype = "F8_E4M3" if is_float8(suffix, case) else DTYPES[array.dtype]
                self.arrays[name], self.headers[name] = array, Info(dtype, tuple(array.shape), array.nbytes)

    def read(self, name: str) -> mx.array:
        return self.arrays[name]


def opened(case: Case, options: Mapping[str, Any] | None = None) -> tuple[Any, Any]:
    """Pass a checkpoint with the one layer `a` to `as_mlx`: the config and source that it becomes."""
    raw = case.options if options is None else options
    return as_mlx({"model_type": "t", "quantization_config": raw}, Layers({"a": case}))


def values(config: Any, source: Any, name: str = "a") -> Array:
    """The layer's matrix in float32: dequantized by MLX, or as it is where it became plain numbers."""
    for full, header in source.headers.items():
        array = source.read(full)
        assert DTYPES[array.dtype] == header.dtype and tuple(array.shape) == header.shape, full
        assert array.nbytes == header.nbytes
    weight = source.read(f"{name}.weight")
    if f"{name}.scales" not in source.headers:
        return np.array(weight.astype(mx.float32))
    form = config["quantization"].get(name, {k: config["quantization"][k] for k in ("bits", "group_size", "mode")})
    scales = source.read(f"{name}.scales")
    if form["mode"] != "affine":
        return np.array(mx.dequantize(weight, scales, None, dtype=mx.float32, **form))
    biases = source.read(f"{name}.biases").astype(mx.float32)
    return np.array(mx.dequantize(weight, scales.astype(mx.float32), biases, **form))
