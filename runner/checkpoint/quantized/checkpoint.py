"""A published checkpoint as MLX would have it: each quantised layer under the names of its packed or plain parts."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import numpy as np

from runner.checkpoint.quantized import awq, compressed_tensors, fp8, gptq
from runner.checkpoint.quantized.layers import ITEM_SIZE, Form, Layer
from runner.checkpoint.quantized.options import short
from runner.checkpoint.quantized.tensors import Tensors
from runner.errors import CheckpointError, ConfigError, WeightsError
from runner.families import find
from runner.local_files import quoted
from runner.weights.plan import plan
from runner.weights.tags import Header, Source
from runner.weights.tree import leaves

METHODS: Mapping[str, Callable[[Mapping[str, Any], Tensors], list[Layer]]] = {
    "gptq": gptq.layers,
    "awq": awq.layers,
    "fp8": fp8.layers,
    "compressed-tensors": compressed_tensors.layers,
}
"""By `quant_method`."""

BY_FAMILY = "mxfp4"
"""Read by the tags of the families that are published so (gpt-oss); `Config.reads_packed` refuses it elsewhere."""


@dataclass(frozen=True)
class Part:
    """A tensor of a layer under MLX's name; `nbytes` as held in memory."""

    layer: Layer
    suffix: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


class Published:
    """A `Source` over another: quantised layers are repacked when they are read, one at a time."""

    def __init__(self, source: Source, layers: list[Layer], hidden: frozenset[str]) -> None:
        self.source = source
        stored = hidden.union(*(layer.stored for layer in layers))
        headers: dict[str, Header] = {name: info for name, info in source.headers.items() if name not in stored}
        self.parts: dict[str, Part] = {}
        for layer in layers:
            for suffix, (dtype, shape) in layer.parts().items():
                name = layer.name + suffix
                if name in headers or name in self.parts:
                    raise WeightsError(f"{quoted(name)} is there both as plain numbers and quantised")
                self.parts[name] = Part(layer, suffix, dtype, shape)
        self.headers: Mapping[str, Header] = MappingProxyType({**headers, **self.parts})

    def read(self, name: str) -> mx.array:
        """The tensor `name`; one of a quantised layer is made now.

        Raises:
            CheckpointError: no such tensor, or a number in it is not what its format allows.
        """
        if name not in self.headers:
            raise CheckpointError(f"no tensor {quoted(name)}")
        part = self.parts.get(name)
        return self.source.read(name) if part is None else part.layer.part(part.suffix, self.source.read)


def as_mlx(config: Mapping[str, Any], source: Source) -> tuple[Mapping[str, Any], Source]:
    """`config.json` and tensors of a published quantisation as MLX's form; any other checkpoint comes back as it is.

    Raises:
        ConfigError: the method or one of its options is not supported.
        WeightsError: the tensors are not as the method has them.
    """
    raw = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(raw, Mapping) or "quant_method" not in raw or raw["quant_method"] == BY_FAMILY:
        return config, source
    method = raw["quant_method"]
    if not isinstance(method, str) or method not in METHODS:
        supported = ", ".join((*METHODS, f"{BY_FAMILY} (gpt-oss)"))
        raise ConfigError(
            f"config.json: quant_method {short(method)} is not supported; these are: {supported}, and MLX's own"
        )
    if config.get("quantization") is not None:
        raise ConfigError("config.json: both quantization (MLX's) and a quantization_config with a quant_method")
    tensors = Tensors(source)
    layers = _alike(METHODS[method](raw, tensors))
    if not layers:
        raise WeightsError(f"config.json says quant_method {method!r}, but no tensor is quantised so")
    result = {
        name: value for name, value in config.items() if name not in ("quantization_config", "compression_config")
    }
    quantization = _quantization({layer.name: layer.form for layer in layers})
    if quantization:
        result["quantization"] = quantization
    return result, Published(source, layers, _zero_biases(result, layers, tensors))


def _alike(layers: list[Layer]) -> list[Layer]:
    """Experts' matrices with the same input are one stacked matrix: where one must become plain numbers, all do."""

    def stack(layer: Layer) -> tuple[str, int] | None:
        found = re.match(r"(.*\.experts)\.\d+\.", layer.name)
        return None if found is None else (found[1], layer.shape[1])

    plain = {stack(layer) for layer in layers if layer.form is None} - {None}
    return [layer.plain() if stack(layer) in plain else layer for layer in layers]


def _quantization(forms: Mapping[str, Form | None]) -> dict[str, Any]:
    """config.json's `quantization` as mlx-lm writes it: the commonest form, and the layers that differ."""
    counts = Counter(form for form in forms.values() if form is not None)
    if not counts:
        return {}
    common = counts.most_common(1)[0][0]
    others = {name: False if form is None else vars(form) for name, form in forms.items() if form != common}
    return {**vars(common), **others}


def _zero_biases(config: Mapping[str, Any], layers: list[Layer], tensors: Tensors) -> frozenset[str]:
    """Biases of zeros that older quantisers gave to every layer, also where the family has none."""
    names = [f"{layer.name}.bias" for layer in layers if f"{layer.name}.bias" in tensors.headers]
    zero = frozenset(name for name in names if not np.any(np.array(tensors.read(name).astype(mx.float32))))
    if not zero:
        return zero
    config_class, model_class = find(config)
    declared = plan(model_class, config_class.from_dict(config), None)
    return zero - {leaf.name for array in declared.arrays() for leaf in leaves(array.tree)}
