"""AWQ (arXiv:2306.00978) as AutoAWQ writes it: version "gemm", 4 bits.

`qweight` `[in, out / 8]` int32 is packed along the outputs; the eight integers of a word belong to outputs 0, 2, 4, 6,
1, 3, 5, 7, lowest bits first. `qzeros` `[groups, out / 8]` is packed the same way; `scales` is `[groups, out]`. Zero
points differ from group to group, so MLX's scales and biases are float32.

Facts from AutoAWQ 0.2.9 (`modules/linear/gemm.py`, `utils/packing_utils.py`) and transformers 5.23 (`AwqConfig`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from runner.checkpoint.quantized.gptq import TRAINING
from runner.checkpoint.quantized.layers import Affine, Array, Layer, Read, affine_form, float32
from runner.checkpoint.quantized.options import Options
from runner.checkpoint.quantized.tensors import FLOATS, Tensors
from runner.errors import WeightsError

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs each 4-bit place of a word belongs to, lowest bits first."""


def layers(raw: Mapping[str, Any], tensors: Tensors) -> list[Layer]:
    """List the quantized layers of a checkpoint whose `quantization_config` is `raw`; no tensor is read.

    Raises:
        ConfigError: an option is not supported.
        WeightsError: a tensor is missing or has another dtype or shape.
    """
    options = Options(raw, "quantization_config")
    options.harmless(*TRAINING, "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config", "lm_head")
    options.one_of("quant_method", "awq")
    options.one_of("method", "awq")
    options.one_of("pack_dtype", "int32")
    options.one_of("bits", BITS)
    options.one_of("w_bit", BITS)
    options.one_of("zero_point", True)
    options.one_of("version", "gemm")
    options.one_of("format", "gemm")
    options.one_of("checkpoint_format", "gemm")
    options.one_of("backend", "autoawq", "auto")
    options.one_of("desc_act", False)
    options.harmless("sym")  # an option of GPTQConfig that AwqConfig inherits; zero points are stored in any case
    options.words("modules_to_not_convert")
    group_size = options.integer("group_size", 128)
    if group_size < -1 or group_size == 0:
        raise options.error("group_size", group_size, "-1 or a positive integer")
    options.finish()
    return [_layer(name, group_size, tensors) for name in tensors.layers(".qweight")]


def _layer(name: str, group_size: int, tensors: Tensors) -> Layer:
    """Check the tensors of one layer, and choose what it becomes."""
    width, words = tensors.shape(f"{name}.qweight", ("I32",), None, None)
    rows = words * 8
    size = width if group_size == -1 else group_size
    groups, _ = tensors.shape(f"{name}.scales", FLOATS, None, rows)
    tensors.shape(f"{name}.qzeros", ("I32",), groups, words)
    if groups != -(-width // size):
        raise WeightsError(
            f"{name}.scales: {groups} groups for {width} inputs, but config.json says {size} inputs per group"
        )
    if width % 8:
        raise WeightsError(f"{name}.qweight: {width} inputs, expected a multiple of 8")
    dtype = tensors.headers[f"{name}.scales"].dtype

    def codes(read: Read) -> mx.array:
        # AWQ's words hold eight outputs of one input, MLX's eight inputs of one output. For each place in AWQ's words,
        # the integers there of eight inputs in a row are gathered into one of MLX's words.
        stored = np.array(read(f"{name}.qweight")).view(np.uint32).reshape(width // 8, 8, words)
        result = np.zeros((rows, width // 8), np.uint32)
        for place, output in enumerate(ORDER):
            gathered = np.zeros((width // 8, words), np.uint32)
            for index in range(8):
                gathered |= (stored[:, index] >> np.uint32(4 * place) & np.uint32(15)) << np.uint32(4 * index)
            result[output::8] = gathered.T
        return mx.array(result)

    def affine(read: Read) -> tuple[Array, Array]:
        stored = np.array(read(f"{name}.qzeros")).view(np.uint32)
        zeros = np.zeros((groups, rows), np.int16)
        for place, output in enumerate(ORDER):
            zeros[:, output::8] = stored >> np.uint32(4 * place) & np.uint32(15)
        return float32(read(f"{name}.scales")).T, zeros.T

    # With float32 scales, the product s z can need more bits than float32 has.
    form = None if dtype == "F32" else affine_form(BITS, size, width)
    stored = tuple(f"{name}.{part}" for part in ("qweight", "qzeros", "scales"))
    return Affine(name, (rows, width), stored, form, "F32", dtype, BITS, size, codes, affine)
