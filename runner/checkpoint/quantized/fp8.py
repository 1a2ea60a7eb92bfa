"""Float8 weights with scales: `quant_method` "fp8" (DeepSeek V3, Qwen 3), and any other whose tensors are the same.

`weight` is `[out, in]`. `weight_scale_inv` (or `weight_scale`, the name in vLLM's own files) is what weights are
multiplied by, despite the first name. There is one scale for each block of `weight_block_size` (the last blocks may be
cut short) or, without that option, for what its shape says: the matrix, each output `[out]` or `[out, 1]`, or blocks.
With `scale_fmt` "ue8m0" all scales are powers of two.

The reference implementations also round activations and caches to E4M3, to multiply faster, with scales found at run
time or stored (`input_scale`, `k_scale`); here they are not rounded, and stored scales of that kind stay unread.

Facts from DeepSeek V3's `inference/kernel.py`, transformers 5.23 (`FineGrainedFP8Config`, `Fp8Dequantize`,
`FbgemmFp8Linear`) and NVIDIA's modelopt 0.39 (`export/quant_utils.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runner.checkpoint.quantized.evidence import FLOAT8, float8_layers, scale_of
from runner.checkpoint.quantized.floats import E4M3, E5M2, Float8, exponents_of, read_scales
from runner.checkpoint.quantized.layers import Form, Layer
from runner.checkpoint.quantized.options import Options
from runner.checkpoint.quantized.tensors import FLOATS, Tensors
from runner.errors import WeightsError

SCALES = (*FLOATS, "F8_E8M0", "U8")
COMMON_BLOCK = 128
"""Rows and columns of a block in published models; tells blocks that are cut short from others of equal number."""


def layers(raw: Mapping[str, Any], tensors: Tensors) -> list[Layer]:
    """List the quantized layers of a checkpoint whose `quantization_config` is `raw`.

    No tensors are read but scales that may be powers of two.

    Raises:
        ConfigError: an option is not supported.
        WeightsError: a tensor is missing or has another dtype or shape.
    """
    options = Options(raw, "quantization_config")
    options.harmless("dequantize")  # whether transformers should dequantize on loading
    options.harmless("kv_cache_scheme")  # how others round the cache
    options.one_of("quant_method", "fp8")
    options.one_of("activation_scheme", "dynamic", "static")
    options.one_of("fmt", "e4m3")
    options.one_of("expert_dtype", "fp8")
    powers = options.one_of("scale_fmt", "float", "ue8m0") == "ue8m0"
    for name in ("modules_to_not_convert", "ignored_layers", "modules_to_convert"):
        options.words(name)
    block = options.size("weight_block_size")
    options.finish()
    found = [name for name in tensors.layers(".weight") if tensors.headers[f"{name}.weight"].dtype == "F8_E4M3"]
    return [_layer(name, block, powers, tensors) for name in found]


def scaled(raw: object, tensors: Tensors) -> list[Layer]:
    """List the float8 layers that have scales, by their tensors; a `weight_block_size` in `raw` counts where it fits.

    Raises:
        ConfigError: `weight_block_size` is no size.
        WeightsError: scales have a dtype or shape that does not say what they are for.
    """
    block = Options(raw, "quantization_config").size("weight_block_size") if isinstance(raw, Mapping) else None
    return [_layer(name, _fitting(name, block, tensors), True, tensors) for name in float8_layers(tensors.headers)]


def _fitting(name: str, block: tuple[int, int] | None, tensors: Tensors) -> tuple[int, int] | None:
    """`block` if the layer has one scale for each, else None."""
    rows, width = tensors.shape(f"{name}.weight", FLOAT8, None, None)
    scales = _grid_shape(tensors.headers[scale_of(name, tensors.headers)].shape)
    return block if block is not None and scales == (-(-rows // block[0]), -(-width // block[1])) else None


def _layer(name: str, block: tuple[int, int] | None, powers: bool, tensors: Tensors) -> Layer:
    """Find the scales of one layer; without a block size, their shape says what they are for."""
    rows, width = tensors.shape(f"{name}.weight", FLOAT8, None, None)
    scale = scale_of(name, tensors.headers)
    if block is None:
        block = (rows, width) if tensors.single(scale) else _block(rows, width, scale, tensors)
    return float8_layer(name, (rows, width), scale, block, tensors, powers=powers)


def _block(rows: int, width: int, scale: str, tensors: Tensors) -> tuple[int, int]:
    """Rows and columns that share one of the scales, as the shape of the scales implies them."""
    header = tensors.headers.get(scale)
    shape = () if header is None else _grid_shape(header.shape)
    if len(shape) != 2 or shape == (rows, 1):
        return 1, width
    if shape == (-(-rows // COMMON_BLOCK), -(-width // COMMON_BLOCK)):
        return COMMON_BLOCK, COMMON_BLOCK
    if not all(shape) or rows % shape[0] or width % shape[1]:
        raise WeightsError(
            f"tensor {scale} is {list(shape)}: it does not divide {[rows, width]} weights into equal blocks, and "
            "config.json has no weight_block_size that does"
        )
    return rows // shape[0], width // shape[1]


def _grid_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of scales as `[rows, columns]` of blocks, where they are written in another way for the same order."""
    if len(shape) == 1:
        return (*shape, 1)
    if len(shape) == 4 and shape[1] == shape[3] == 1:  # modelopt: blocks by rows and columns inside
        return shape[::2]
    return shape


def float8_layer(
    name: str, shape: tuple[int, int], scale: str, block: tuple[int, int], tensors: Tensors, *, powers: bool
) -> Layer:
    """Check the tensors of a float8 layer, and choose what it becomes.

    Args:
        name: name of the layer, whose numbers are in `name.weight`.
        shape: (out, in).
        scale: name of the tensor of scales.
        block: rows and columns that share a scale.
        powers: the scales may all be powers of two, even if their dtype does not say so.

    Raises:
        WeightsError: the scales are missing, have another dtype, or are not one per block.
    """
    (rows, width), grid = shape, (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    header = tensors.headers.get(scale)
    # A single scale may have any shape: [], [1] or [1, 1].
    whole = grid == (1, 1) and tensors.single(scale)
    if not whole and (header is None or header.dtype not in SCALES or _grid_shape(header.shape) != grid):
        tensors.shape(scale, SCALES, *grid)
    dtype = tensors.headers[scale].dtype
    if dtype not in SCALES:
        raise WeightsError(f"tensor {scale} is {dtype}, expected {' or '.join(SCALES)}")
    wide = tensors.headers[f"{name}.weight"].dtype == "F8_E5M2"
    # MLX's mxfp8 has E4M3 and a power-of-two scale for each 32 inputs, so blocks must hold whole groups of 32.
    form = None
    fits = width % 32 == 0 and (block[1] % 32 == 0 or block[1] >= width)
    if fits and not wide and (powers or dtype in ("U8", "F8_E8M0")):
        exponents = exponents_of(read_scales(tensors.read, scale, dtype))
        form = None if exponents is None else Form(8, 32, "mxfp8")
    return Float8(
        name,
        (rows, width),
        (f"{name}.weight", scale),
        form,
        "U8",
        "BF16",
        f"{name}.weight",
        block,
        lambda read: read_scales(read, scale, dtype).reshape(grid),
        E5M2 if wide else E4M3,
    )
