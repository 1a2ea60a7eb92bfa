"""`quant_method` "compressed-tensors": six of the formats that llm-compressor writes.

    pack-quantized        `weight_packed` int32: integers + 2^(bits - 1), lowest bits first: MLX's words as they are
    int-quantized         `weight` int8; `naive-quantized` is the older name
    float-quantized       `weight` E4M3, a scale per block, group, output or matrix
    nvfp4-pack-quantized  `weight_packed` E2M1, E4M3 scales per 16 inputs, divided by `weight_global_scale`
    mxfp4-pack-quantized  `weight_packed` E2M1, E8M0 scales per 32 inputs
    mxfp8-quantized       `weight` E4M3, E8M0 scales per 32 inputs

`w = (q - weight_zero_point) * weight_scale`. `config_groups` describe the layers; a layer's tensors show which group it
belongs to, and must fit it entirely. nvfp4's own scales are divided by a global scale that is a power of two, if they
can hold the result; with any other global scale, the layer becomes plain bfloat16.

Where a scheme rounds activations or the cache, they are left unrounded, and scales stored for that stay unread.
Sparsity and transforms are refused. Facts from compressed-tensors 0.20.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from runner.checkpoint.quantized.floats import E4M3, Float4, read_scales
from runner.checkpoint.quantized.fp8 import float8_layer
from runner.checkpoint.quantized.layers import Affine, Array, Form, Layer, Read, affine_form, float32, unpack
from runner.checkpoint.quantized.options import Options
from runner.checkpoint.quantized.tensors import FLOATS, Tensors
from runner.errors import ConfigError, WeightsError
from runner.local_files import quoted

FORMATS = (
    "pack-quantized", "int-quantized", "naive-quantized", "float-quantized",
    "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized",
)  # fmt: skip
STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")


@dataclass(frozen=True)
class Group:
    """The quantization that a group of layers has in common.

    Attributes:
        format: one of `FORMATS`.
        type: "int" or "float".
        bits: bits per weight.
        symmetric: layers need not have zero points.
        strategy: one of `STRATEGIES`: which weights share a scale.
        size: inputs per scale, for the strategies "group" and "tensor_group".
        block: (rows, columns) per scale, for the strategy "block".
    """

    format: str
    type: str
    bits: int
    symmetric: bool
    strategy: str
    size: int | None
    block: tuple[int, int] | None

    def grid(self, rows: int, width: int) -> tuple[int, int]:
        """Rows and columns of the blocks that share a scale, in a matrix `[rows, width]`."""
        if self.strategy == "tensor":
            return rows, width
        if self.block is not None:
            return self.block
        return 1, self.size or width


def layers(raw: Mapping[str, Any], tensors: Tensors) -> list[Layer]:
    """List the quantized layers of a checkpoint whose `quantization_config` is `raw`.

    Only small tensors are read: shapes, orders of groups, global scales, and scales that may be powers of two.

    Raises:
        ConfigError: an option is not supported.
        WeightsError: a tensor is missing, or does not fit any of the config groups.
    """
    groups = _groups(raw)
    packed = list(tensors.layers(".weight_packed"))
    plain = [name for name in tensors.layers(".weight_scale") if f"{name}.weight_packed" not in tensors.headers]
    return [_packed(name, groups, tensors) for name in packed] + [_stored(name, groups, tensors) for name in plain]


def _groups(raw: Mapping[str, Any]) -> list[Group]:
    """Read and check `quantization_config`, and list its groups."""
    options = Options(raw, "quantization_config")
    options.harmless("global_compression_ratio", "version", "run_compressed", "config_groups", "ignore", "format")
    options.harmless("kv_cache_scheme")  # how others round the cache
    options.one_of("quant_method", "compressed-tensors")
    options.one_of("quantization_status", "compressed", "frozen")
    options.words("ignore")
    # A sparsity_config may be there without any sparsity: its format is then "dense" or missing.
    sparsity = Options(raw.get("sparsity_config") or {}, "quantization_config.sparsity_config")
    sparsity.one_of("format", "dense")
    sparsity.harmless("global_sparsity", "ignore", "registry_requires_subclass", "sparsity_structure", "targets")
    sparsity.finish()
    options.harmless("sparsity_config")
    options.finish()
    found = Options(raw.get("config_groups") or {}, "quantization_config.config_groups").raw
    if not found:
        raise ConfigError("config.json: quantization_config has no config_groups")
    # A group without weights is one of activations alone.
    weighty = {name: value for name, value in found.items() if not isinstance(value, Mapping) or value.get("weights")}
    if not weighty:
        raise ConfigError("config.json: none of quantization_config.config_groups has weights")
    return [_group(name, value, raw.get("format")) for name, value in weighty.items()]


def _group(name: str, raw: object, common: object) -> Group:
    """Read and check one of the config groups; `common` is the format of groups that do not have their own."""
    where = f"quantization_config.config_groups.{name}"
    options = Options(raw, where)
    options.words("targets")
    own = options.raw.get("format")
    format = Options({"format": own or common}, where if own else "quantization_config").one_of("format", *FORMATS)
    if not own and not common:
        raise ConfigError(f"config.json: {where} has no format")
    options.harmless("format", "weights")
    options.harmless("input_activations", "output_activations")  # how others round what is multiplied
    options.finish()
    weights = Options(options.raw.get("weights"), f"{where}.weights")
    weights.harmless("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
    weights.one_of("dynamic", False)
    weights.one_of("actorder", False, "weight", "static", "group", "dynamic")  # the order itself is in `weight_g_idx`
    kind, bits = weights.one_of("type", "int", "float"), weights.integer("num_bits", 8)
    size, block = weights.raw.get("group_size"), weights.size("block_structure")
    weights.harmless("group_size")
    if size is not None and (type(size) is not int or size < -1):
        raise weights.error("group_size", size, "-1 or a positive integer")
    # Without a strategy, the sizes imply one.
    default = "block" if block else "tensor" if size is None else "channel" if size <= 0 else "group"
    strategy = weights.one_of("strategy", default, *STRATEGIES)
    symmetric = weights.flag("symmetric", True)
    weights.finish()
    grouped = strategy in ("group", "tensor_group")
    if grouped and (not size or size < 0):
        raise weights.error("group_size", size, "a positive integer")
    if strategy == "block" and block is None:
        raise weights.error("block_structure", block, "two positive integers")
    block = block if strategy == "block" else None
    group = Group(format, kind, bits, symmetric, strategy, size if grouped else None, block)
    _check(group, weights)
    return group


def _check(group: Group, options: Options) -> None:
    """Refuse bits, group sizes and strategies that the group's format does not support."""
    form = (group.type, group.bits)
    allowed = {
        "pack-quantized": [("int", 4), ("int", 8)],
        "int-quantized": [("int", 8)],
        "naive-quantized": [("int", 8), ("float", 8)],
        "float-quantized": [("float", 8)],
        "mxfp8-quantized": [("float", 8)],
    }.get(group.format, [("float", 4)])
    if form not in allowed:
        raise options.error(
            "num_bits", group.bits, f"{' or '.join(f'{b} ({t})' for t, b in allowed)} in {group.format}"
        )
    size = {"nvfp4-pack-quantized": 16, "mxfp4-pack-quantized": 32, "mxfp8-quantized": 32}.get(group.format, group.size)
    if size != group.size:
        raise options.error("group_size", group.size, f"{size} in {group.format}")
    if group.type == "float" and not group.symmetric:
        raise options.error("symmetric", False, f"true in {group.format}")
    if group.type == "int" and group.block is not None:
        raise options.error("strategy", "block", f"tensor, channel or group in {group.format}")


def _packed(name: str, groups: list[Group], tensors: Tensors) -> Layer:
    """Check the tensors of a layer that has `weight_packed`: bytes hold E2M1, int32 words hold integers."""
    if tensors.headers[f"{name}.weight_packed"].dtype == "U8":
        return _float4(name, groups, tensors)
    rows, words = tensors.shape(f"{name}.weight_packed", ("I32",), None, None)
    tensors.shape(f"{name}.weight_shape", ("I64", "I32"), 2)
    shape = np.array(tensors.read(f"{name}.weight_shape")).tolist()
    if shape[0] != rows or not 0 < shape[1] <= 8 * words:
        raise WeightsError(f"{name}.weight_shape says {shape}, but {name}.weight_packed is [{rows}, {words}]")
    width = int(shape[1])
    # The number of words per row tells groups of different bits apart.
    fitting = [g for g in groups if g.format == "pack-quantized" and -(-width * g.bits // 32) == words]
    group = _fitting(name, fitting, (rows, width), tensors)
    return _affine(name, group, (rows, width), tensors, f"{name}.weight_packed")


def _stored(name: str, groups: list[Group], tensors: Tensors) -> Layer:
    """Check the tensors of a layer whose `weight` has one element per weight: int8 or E4M3."""
    rows, width = tensors.shape(f"{name}.weight", ("F8_E4M3", "I8"), None, None)
    kind = "int" if tensors.headers[f"{name}.weight"].dtype == "I8" else "float"
    fitting = [g for g in groups if g.type == kind and g.bits == 8 and g.format != "pack-quantized"]
    group = _fitting(name, fitting, (rows, width), tensors)
    if kind == "int":
        return _affine(name, group, (rows, width), tensors, f"{name}.weight")
    exponents = group.format == "mxfp8-quantized"
    if exponents != (tensors.headers[f"{name}.weight_scale"].dtype in ("U8", "F8_E8M0")):
        dtype = tensors.headers[f"{name}.weight_scale"].dtype
        raise WeightsError(f"{name}.weight_scale is {dtype}, which is not a dtype of scales in {group.format}")
    block = group.grid(rows, width)
    return float8_layer(name, (rows, width), f"{name}.weight_scale", block, tensors, powers=exponents)


def _fitting(name: str, groups: list[Group], shape: tuple[int, int], tensors: Tensors) -> Group:
    """The first of the groups that fits the layer's scales and zero points."""
    scale = tensors.headers.get(f"{name}.weight_scale")
    if scale is None:
        raise WeightsError(f"tensor {quoted(f'{name}.weight_scale')} is missing, so its quantized layer cannot be read")
    zeros = f"{name}.weight_zero_point" in tensors.headers
    for group in groups:
        block = group.grid(*shape)
        grid = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
        fits = scale.shape == grid or (grid == (1, 1) and tensors.single(f"{name}.weight_scale"))
        if fits and (group.symmetric or zeros):
            return group
    raise WeightsError(
        f"{name}: weights {list(shape)} with scales {list(scale.shape)} and "
        f"{'' if zeros else 'no '}zero points fit none of the config_groups in config.json"
    )


def _affine(name: str, group: Group, shape: tuple[int, int], tensors: Tensors, codes: str) -> Layer:
    """A layer of integers, which are in the tensor `codes`: packed, or int8."""
    rows, width = shape
    packed = group.format == "pack-quantized"
    scale, zero, index = (f"{name}.weight_{part}" for part in ("scale", "zero_point", "g_idx"))
    block = group.grid(rows, width)
    grid = (-(-rows // block[0]), -(-width // block[1]))
    dtype = tensors.headers[scale].dtype
    if dtype not in FLOATS:
        raise WeightsError(f"tensor {scale} is {dtype}, expected {' or '.join(FLOATS)}")
    # Zero points are packed as the weights are, but along the outputs; or they are int8, one for each scale.
    zeros = zero in tensors.headers
    if zeros and packed:
        tensors.shape(zero, ("I32",), -(-rows * group.bits // 32), grid[1])
    elif zeros and not (grid == (1, 1) and tensors.single(zero) and tensors.headers[zero].dtype == "I8"):
        tensors.shape(zero, ("I8",), *grid)
    ordered = tensors.group_order(index, width, grid[1], block[1], unset=-1)
    form = None if ordered or (zeros and dtype == "F32") else affine_form(group.bits, block[1], width)

    def words(read: Read) -> mx.array:
        if packed:
            return read(codes).view(mx.uint32)
        # int8 q to the unsigned q + 128 that MLX expects: flip the highest bit. Rows are padded to whole words.
        stored = np.zeros((rows, -(-width // 4) * 4), np.uint8)
        stored[:, :width] = np.array(read(codes)).view(np.uint8) ^ 0x80
        return mx.array(stored).view(mx.uint32)

    def affine(read: Read) -> tuple[Array, Array]:
        # Integers are unsigned here, so a zero point of 0 is the middle of their range; packed ones include it already.
        middle = 1 << (group.bits - 1)
        shifts = np.full((rows, grid[1]), middle, np.int16)
        if zeros and packed:
            columns = np.array(read(zero)).view(np.uint32).T
            shifts = unpack(columns, group.bits, rows).T.astype(np.int16)
        elif zeros:
            shifts[:] = np.array(read(zero)).astype(np.int16).reshape(grid) + middle
        return np.broadcast_to(float32(read(scale)).reshape(grid), shifts.shape), shifts

    stored = tuple(n for n in (codes, scale, zero, index, f"{name}.weight_shape") if n in tensors.headers)
    return Affine(
        name,
        shape,
        stored,
        form,
        "F32" if zeros else dtype,
        dtype,
        group.bits,
        block[1],
        words,
        affine,
        (lambda read: np.array(read(index))) if ordered else None,
    )


def _float4(name: str, groups: list[Group], tensors: Tensors) -> Layer:
    """A layer of E2M1 numbers: nvfp4 where it has a global scale, else mxfp4."""
    rows, half = tensors.shape(f"{name}.weight_packed", ("U8",), None, None)
    # Only nvfp4 has a global scale, so its presence tells the two formats apart.
    width, scale, overall = 2 * half, f"{name}.weight_scale", f"{name}.weight_global_scale"
    nvidia = overall in tensors.headers
    format, size = ("nvfp4-pack-quantized", 16) if nvidia else ("mxfp4-pack-quantized", 32)
    if not any(group.format == format for group in groups):
        raise WeightsError(f"{name}.weight_packed: {format}, which none of the config_groups in config.json has")
    if width % size:
        raise WeightsError(f"{name}.weight_packed: {width} inputs do not divide into groups of {size}")
    tensors.shape(scale, ("F8_E4M3",) if nvidia else ("U8", "F8_E8M0"), rows, width // size)
    dtype, divisor = tensors.headers[scale].dtype, np.float32(1)
    if nvidia:
        if not tensors.single(overall) or tensors.headers[overall].dtype != "F32":
            raise WeightsError(f"tensor {quoted(overall)} must be one F32 number")
        divisor = float32(tensors.read(overall)).reshape(-1)[0]
        if not np.isfinite(divisor) or divisor <= 0:
            raise WeightsError(f"{overall} is {divisor}, expected a positive number")

    def factors(read: Read) -> Array:
        with np.errstate(over="ignore"):  # refused when the weights are rounded
            scales: Array = read_scales(read, scale, dtype) / divisor
        return scales

    def bytes_of(read: Read) -> Array:
        return np.array(read(scale)) if divisor == 1 else np.searchsorted(_POSITIVE, factors(read)).astype(np.uint8)

    # MLX needs whole groups of 32 inputs. A divisor goes into the scales if it is a power of two and every quotient is
    # an E4M3 number again.
    form = Form(4, size, "nvfp4" if nvidia else "mxfp4") if width % 32 == 0 else None
    if divisor != 1 and (np.frexp(divisor)[0] != 0.5 or not np.isin(factors(tensors.read), _POSITIVE).all()):
        form = None
    extra = (f"{name}.weight_packed", scale, overall, f"{name}.weight_shape")
    stored = tuple(item for item in extra if item in tensors.headers)
    return Float4(name, (rows, width), stored, form, "U8", "BF16", extra[0], size, factors, bytes_of)


_POSITIVE = E4M3[:127]
"""The non-negative E4M3 numbers in ascending order, so that a number's index is its byte."""
