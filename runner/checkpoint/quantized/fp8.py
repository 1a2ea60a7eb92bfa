"""`quant_method` "fp8": E4M3 weights under float scales, as DeepSeek V3 and Qwen 3 are published.

`weight` is `[out, in]`; `weight_scale_inv` (or `weight_scale`, the name vLLM's own files have) is what a weight is
multiplied with, despite the first name: one for each block of `weight_block_size` (the last ones may be cut short),
or without one, for each output `[out, 1]` or for the whole matrix. With `scale_fmt` "ue8m0" scales are powers of two.

The reference rounds activations to E4M3 as well, to multiply faster; here they are not rounded. Rounding them with a
scale found beforehand ("static") clips them, too, so that is refused.

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
    """The quantised layers of a checkpoint whose `quantization_config` is `raw`; of tensors, only scales that may be
    powers of two are read.

    Raises:
        ConfigError: an option is not supported.
        WeightsError: a tensor is missing or has another dtype or shape.
    """
    options = Options(raw, "quantization_config")
    options.harmless("dequantize")  # whether transformers should unpack it
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
    rows, width = tensors.shape(f"{name}.weight", ("F8_E4M3",), None, None)
    names = [f"{name}.{suffix}" for suffix in ("weight_scale_inv", "weight_scale")]
    scale = names[0] if names[0] in tensors.headers or names[1] not in tensors.headers else names[1]
    if block is None:
        block = (rows, width) if tensors.single(scale) else (1, width)
    return float8_layer(name, (rows, width), scale, block, tensors, powers=powers)


def float8_layer(
    name: str, shape: tuple[int, int], scale: str, block: tuple[int, int], tensors: Tensors, *, powers: bool
) -> Layer:
    """E4M3 `name.weight` under the scales in the tensor `scale`; `powers`: they may be powers of two.

    Raises:
        WeightsError: the scales are missing, or not as many as there are blocks.
    """
    (rows, width), grid = shape, (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    if not (grid == (1, 1) and tensors.single(scale)):
        tensors.shape(scale, SCALES, *grid)
    dtype = tensors.headers[scale].dtype
    if dtype not in SCALES:
        raise WeightsError(f"tensor {scale} is {dtype}, expected {' or '.join(SCALES)}")
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
