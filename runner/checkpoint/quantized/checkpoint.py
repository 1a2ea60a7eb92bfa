"""A published quantized checkpoint in mlx-lm's form: each layer as `.weight`, `.scales` and `.biases`, or plain."""

from __future__ import annotations

import functools
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
from runner.checkpoint.quantized.evidence import float8_layers, packed, signs, unexplained
from runner.checkpoint.quantized.layers import ITEM_SIZE, Form, Layer
from runner.checkpoint.quantized.options import short
from runner.checkpoint.quantized.tensors import Tensors
from runner.checkpoint.quantized.windows import read_window
from runner.errors import CheckpointError, ConfigError, WeightsError
from runner.families import find
from runner.local_files import quoted
from runner.weights.cuts import Cut, read_part
from runner.weights.plan import plan
from runner.weights.tags import Header, Source
from runner.weights.tree import leaves


@dataclass(frozen=True)
class Method:
    """A quantization method.

    Attributes:
        layers: lists a checkpoint's layers.
        suffixes: those that only its tensors have.
        outputs: the axis of outputs in its matrices.
    """

    layers: Callable[[Mapping[str, Any], Tensors], list[Layer]]
    suffixes: tuple[str, ...]
    outputs: int = 0


METHODS = {
    "gptq": Method(gptq.layers, (".qweight",), outputs=1),
    "awq": Method(awq.layers, (".qweight",), outputs=1),
    "fp8": Method(fp8.layers, (".weight",)),
    "compressed-tensors": Method(compressed_tensors.layers, (".weight_packed", ".weight_scale")),
}
"""The methods that are read, by `quant_method`."""

BY_FAMILY = "mxfp4"
"""The `quant_method` that a family's own weight tags read (gpt-oss); `Config.reads_packed` refuses it elsewhere."""


@dataclass(frozen=True)
class Part:
    """Header of one array (weight, scales or biases) that a layer becomes; `nbytes` is its size in memory."""

    layer: Layer
    suffix: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


class Published:
    """A `Source` over another that turns quantized layers into MLX's form, one array at a time, when they are read.

    Args:
        source: the published tensors.
        layers: the quantized layers; the tensors they are stored in disappear from `headers`.
        hidden: names of further tensors to leave out.
        again: lists the layers of some of the tensors as `layers` were.
        outputs: the axis of outputs in stored matrices.
    """

    def __init__(
        self,
        source: Source,
        layers: list[Layer],
        hidden: frozenset[str],
        again: Callable[[Tensors], list[Layer]],
        outputs: int,
    ) -> None:
        self.source = source
        self._again = again
        self._outputs = outputs
        stored = hidden.union(*(layer.stored for layer in layers))
        headers: dict[str, Header] = {name: info for name, info in source.headers.items() if name not in stored}
        self.parts: dict[str, Part] = {}
        for layer in layers:
            for suffix, (dtype, shape) in layer.parts().items():
                name = layer.name + suffix
                if name in headers or name in self.parts:
                    raise WeightsError(f"tensor {quoted(name)} is stored both as plain numbers and quantized")
                self.parts[name] = Part(layer, suffix, dtype, shape)
        self.headers: Mapping[str, Header] = MappingProxyType({**headers, **self.parts})

    def read(self, name: str) -> mx.array:
        """Return the tensor `name`; an array of a quantized layer is computed now.

        Raises:
            CheckpointError: no tensor has this name, or a number in it is not allowed by its format.
        """
        if name not in self.headers:
            raise CheckpointError(f"no tensor {quoted(name)}")
        part = self.parts.get(name)
        return self.source.read(name) if part is None else part.layer.part(part.suffix, self.source.read)

    def read_part(self, name: str, cut: Cut) -> mx.array:
        """The kept places of a tensor; see `PartSource`."""
        part = self.parts.get(name)
        if part is None:
            return read_part(self.source, name, cut)
        return read_window(self.source, part.layer, part.suffix, cut, self._outputs, self._again)


def as_mlx(config: Mapping[str, Any], source: Source) -> tuple[Mapping[str, Any], Source]:
    """Turn config and tensors of a published quantization into mlx-lm's form; other checkpoints come back unchanged.

    The tensors decide: a method's name on plain tensors, or on ones in MLX's form, is left over and removed, and float8
    weights with scales are read under any name.

    Raises:
        ConfigError: the tensors are packed by a method, or with an option, that is not supported.
        WeightsError: the tensors do not have the layout of the method.
    """
    raw = config.get("quantization_config") or config.get("compression_config")
    method = raw["quant_method"] if isinstance(raw, Mapping) and "quant_method" in raw else _NO_METHOD
    found = packed(source.headers)
    plain = {name: value for name, value in config.items() if name not in ("quantization_config", "compression_config")}
    if method is not _NO_METHOD and source.headers and not found and not signs(source.headers):
        return plain, source
    # gpt-oss reads its packed experts itself; without a method, only float8 weights explain themselves.
    if method == BY_FAMILY or (method is _NO_METHOD and not float8_layers(source.headers)):
        return config, source
    # List the layers, then describe them in mlx-lm's own key `quantization`, which the rest of the package reads.
    tensors = Tensors(source)
    layers = _alike(_layers(method, raw, found, tensors))
    # MLX's own settings are left over too where no tensor has its form.
    if plain.get("quantization") is not None and not any(header.dtype == "U32" for header in source.headers.values()):
        del plain["quantization"]
    if plain.get("quantization") is not None:
        raise ConfigError(
            "config.json has both quantization (MLX's) and a quantization_config with a quant_method, and there are "
            "tensors of both; expected only one"
        )
    quantization = _quantization({layer.name: layer.form for layer in layers})
    if quantization:
        plain["quantization"] = quantization
    known = METHODS.get(method) if isinstance(method, str) else None
    again = functools.partial(_layers, method, raw, [])
    return plain, Published(
        source, layers, _zero_biases(plain, layers, tensors), again, 0 if known is None else known.outputs
    )


_NO_METHOD = object()
"""In place of a `quant_method` where the config has none; a null is one of an unknown kind."""


def _layers(method: object, raw: Any, found: list[str], tensors: Tensors) -> list[Layer]:
    """The quantized layers: the method's where it is known and its tensors are there, else float8 with scales.

    Args:
        raw: the `quantization_config`.
        found: names of the tensors that are packed in some way.
    """
    known = METHODS.get(method) if isinstance(method, str) else None
    if known is not None and any(name.endswith(known.suffixes) for name in tensors.headers):
        layers = known.layers(raw, tensors)
        if layers:
            return layers
    rest = unexplained(found, tensors.headers)
    if not rest:
        return fp8.scaled(raw, tensors)
    example = f"{quoted(rest[0])} is {tensors.headers[rest[0]].dtype}"
    if known is not None:
        raise WeightsError(
            f"config.json says quant_method {method!r}, but no tensor is quantized that way, and {example}"
        )
    supported = ", ".join((*METHODS, f"{BY_FAMILY} (gpt-oss)"))
    if method is _NO_METHOD:
        raise WeightsError(f"some weights are float8 with scales, but {example}, and config.json names no quant_method")
    raise ConfigError(
        f"config.json: quant_method {short(method)} is not supported, and tensor {example}; "
        f"supported: {supported}, and MLX's own"
    )


def _alike(layers: list[Layer]) -> list[Layer]:
    """Make the experts of a layer alike: where one expert's matrix must become plain numbers, all with its input do.

    The model stacks the experts, and may fuse matrices that have the same input, so they must share one form.
    """

    def stack(layer: Layer) -> tuple[str, int] | None:
        """The experts that a layer belongs to, and its input size; None for a layer that is not an expert's."""
        found = re.match(r"(.*\.experts)\.\d+\.", layer.name)
        return None if found is None else (found[1], layer.shape[1])

    plain = {stack(layer) for layer in layers if layer.form is None} - {None}
    return [layer.plain() if stack(layer) in plain else layer for layer in layers]


def _quantization(forms: Mapping[str, Form | None]) -> dict[str, Any]:
    """The `quantization` of config.json as mlx-lm writes it: the most common form, and the layers that differ."""
    counts = Counter(form for form in forms.values() if form is not None)
    if not counts:
        return {}
    common = counts.most_common(1)[0][0]
    others = {name: False if form is None else vars(form) for name, form in forms.items() if form != common}
    return {**vars(common), **others}


def _zero_biases(config: Mapping[str, Any], layers: list[Layer], tensors: Tensors) -> frozenset[str]:
    """Names of all-zero biases that the family does not have: older quantizers gave a bias to every layer."""
    names = [f"{layer.name}.bias" for layer in layers if f"{layer.name}.bias" in tensors.headers]
    zero = frozenset(name for name in names if not np.any(np.array(tensors.read(name).astype(mx.float32))))
    if not zero:
        return zero
    # A zero bias stays if the model declares it: the family has biases, and this layer's happens to be zero.
    config_class, model_class = find(config)
    declared = plan(model_class, config_class.from_dict(config), None)
    return zero - {leaf.name for array in declared.arrays() for leaf in leaves(array.tree)}
