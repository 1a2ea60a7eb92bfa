"""`quant_method` "fp8": E4M3 weights with float scales, the format in which DeepSeek V3 and Qwen 3 are published.

`weight` is `[out, in]`. `weight_scale_inv` (or `weight_scale`, the name in vLLM's own files) is what weights are
multiplied by, despite the first name. There is one scale for each block of `weight_block_size` (the last blocks may be
cut short) or, without that option, one for each output `[out, 1]` or one for the matrix. With `scale_fmt` "ue8m0" all
scales are powers of two.

The reference implementation also rounds activations to E4M3, to multiply faster; here they are not rounded. Rounding
them with a scale found beforehand ("static") would also clip them, so that is refused.

Facts from DeepSeek V3's `inference/kernel.py` and transformers 5.23 (`FineGrainedFP8Config`, `Fp8Dequantize`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runner.checkpoint.quantized.floats import Float8, exponents_of, read_scales
from runner.checkpoint.quantized.layers import Form, Layer
from runner.checkpoint.quantized.options import Options
from runner.checkpoint.quantized.tensors import FLOATS, Tensors
from runner.errors import WeightsError

SCALES = (*FLOATS, "F8_E8M0", "U8")


def layers(raw: Mapping[str, Any], tensors: Tensors) -> list[Layer]:
    """List the quantized layers of a checkpoint whose `quantization_config` is `raw`.

    No tensors are read but scales that may be powers of two.

    Raises:
        ConfigError: an option is not supported.
        WeightsError: a tensor is missing or has another dtype or shape.
    """
    options = Options(raw, "quantization_config")
    options.harmless("dequantize")  # whether transformers should dequantize on loading
    options.one_of("quant_method", "fp8")
    options.one_of("activation_scheme", "dynamic")
    options.one_of("fmt", "e4m3")
    options.one_of("expert_dtype", "fp8")
    powers = options.one_of("scale_fmt", "float", "ue8m0") == "ue8m0"
    for name in ("modules_to_not_convert", "ignored_layers", "modules_to_convert"):
        options.words(name)
    block = options.size("weight_block_size")
    options.finish()
    found = [name for name in tensors.layers(".weight") if tensors.headers[f"{name}.weight"].dtype == "F8_E4M3"]
    return [_layer(name, block, powers, tensors) for name in found]


def _layer(name: str, block: tuple[int, int] | None, powers: bool, tensors: Tensors) -> Layer:
    """Find the scales of one layer; without a block size, their number says what they are for."""
    rows, width = tensors.shape(f"{name}.weight", ("F8_E4M3",), None, None)
    names = [f"{name}.{suffix}" for suffix in ("weight_scale_inv", "weight_scale")]
    scale = names[0] if names[0] in tensors.headers or names[1] not in tensors.headers else names[1]
    if block is None:
        block = (rows, width) if tensors.single(scale) else (1, width)
    return float8_layer(name, (rows, width), scale, block, tensors, powers=powers)


def float8_layer(
    name: str, shape: tuple[int, int], scale: str, block: tuple[int, int], tensors: Tensors, *, powers: bool
) -> Layer:
    """Check the tensors of an E4M3 layer, and choose what it becomes.

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
    # A single scale may have any shape: [], [1] or [1, 1].
    if not (grid == (1, 1) and tensors.single(scale)):
        tensors.shape(scale, SCALES, *grid)
    dtype = tensors.headers[scale].dtype
    if dtype not in SCALES:
        raise WeightsError(f"tensor {scale} is {dtype}, expected {' or '.join(SCALES)}")
    # MLX's mxfp8 has a power-of-two scale for each 32 inputs, so blocks must hold whole groups of 32.
    form = None
    if (powers or dtype in ("U8", "F8_E8M0")) and width % 32 == 0 and (block[1] % 32 == 0 or block[1] >= width):
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
    )
