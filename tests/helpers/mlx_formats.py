"""MLX's quantized formats, dequantized with NumPy from their definitions: the reference for tests and tables.

The codes of a row form one stream of bits, the first code in the lowest bits. `affine`: unsigned codes, `scale * code +
bias` for each group. `mxfp4`, `mxfp8` (OCP Microscaling Formats 1.0): E2M1 or E4M3 numbers, with a power of two as the
scale per 32 numbers. `nvfp4`: E2M1 numbers, with an E4M3 number as the scale per 16.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from runner.families import find
from runner.weights.plan import plan
from runner.weights.tree import leaf_shapes


@dataclass(frozen=True)
class Format:
    """How a matrix is quantized: the arguments of `mx.quantize`."""

    bits: int
    group_size: int
    mode: str = "affine"

    @property
    def name(self) -> str:
        return f"affine {self.bits} bit, groups of {self.group_size}" if self.mode == "affine" else self.mode

    @property
    def entry(self) -> dict[str, int | str]:
        """The entry in config.json's `quantization`; mlx-lm leaves out the mode where it is affine."""
        entry: dict[str, int | str] = {"group_size": self.group_size, "bits": self.bits}
        return entry if self.mode == "affine" else {**entry, "mode": self.mode}

    def pack(self, name: str, matrix: mx.array) -> dict[str, mx.array]:
        """Quantize `matrix`: the tensors of layer `name` that hold it."""
        parts = mx.quantize(matrix, group_size=self.group_size, bits=self.bits, mode=self.mode)
        return {f"{name}.{leaf}": part for leaf, part in zip(("weight", "scales", "biases"), parts, strict=False)}


FORMATS = [
    *(Format(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)),
    Format(4, 32, "mxfp4"),
    Format(8, 32, "mxfp8"),
    Format(4, 16, "nvfp4"),
]


LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "attention_bias": True,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
}  # fmt: skip
MOE: dict[str, Any] = {
    "model_type": "qwen3_moe", "vocab_size": 64, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "moe_intermediate_size": 128, "num_experts": 4,
    "num_experts_per_tok": 2, "mlp_only_layers": [1], "norm_topk_prob": True, "decoder_sparse_step": 1,
    "tie_word_embeddings": False, "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
}  # fmt: skip


def small_float(code: int, exponent: int, mantissa: int) -> float:
    """Decode a float of a sign, `exponent` and `mantissa` bits; no infinity, and E4M3 is NaN where all bits are set."""
    sign = -1.0 if code >> (exponent + mantissa) else 1.0
    power, fraction = (code >> mantissa) & ((1 << exponent) - 1), code & ((1 << mantissa) - 1)
    bias = (1 << (exponent - 1)) - 1
    if exponent == 4 and (power, fraction) == (15, 7):
        return math.nan
    if power == 0:
        return sign * math.ldexp(fraction, 1 - bias - mantissa)
    return sign * math.ldexp((1 << mantissa) + fraction, power - bias - mantissa)


E2M1 = np.array([small_float(code, 2, 1) for code in range(16)])
E4M3 = np.array([small_float(code, 4, 3) for code in range(256)])


def unpacked(parts: dict[str, mx.array], name: str, form: Format) -> np.ndarray:
    """Dequantize the layer `name` of `parts` to float64."""
    words = np.array(parts[f"{name}.weight"])
    stream = np.unpackbits(words.view(np.uint8).reshape(words.shape[0], -1), axis=-1, bitorder="little")
    codes = stream.reshape(words.shape[0], -1, form.bits) @ (1 << np.arange(form.bits))
    scales = parts[f"{name}.scales"]
    if form.mode == "affine":
        scale, bias = (
            np.array(part.astype(mx.float32), dtype=np.float64) for part in (scales, parts[f"{name}.biases"])
        )
        return np.repeat(scale, form.group_size, -1) * codes + np.repeat(bias, form.group_size, -1)
    bytes_ = np.array(scales)
    powers = E4M3[bytes_] if form.mode == "nvfp4" else 2.0 ** (bytes_.astype(np.float64) - 127)
    numbers = E4M3[codes] if form.bits == 8 else E2M1[codes]
    return numbers * np.repeat(powers, form.group_size, -1)


def floats(raw: dict[str, Any]) -> dict[str, mx.array]:
    """A checkpoint of random numbers, in which the norms' weights are around one."""
    config_class, model_class = find(raw)
    shapes = {
        leaf.name: shape
        for array in plan(model_class, config_class.from_dict(raw), None).arrays()
        for leaf, shape in leaf_shapes(array.tree, array.sizes)
    }
    tensors = {}
    for index, (name, shape) in enumerate(sorted(shapes.items())):
        noise = mx.random.normal(shape, key=mx.random.key(index))
        tensors[name] = 1 + 0.3 * noise if "norm" in name else 1.3 * noise / shape[-1] ** 0.5
    return tensors


def packed(
    tensors: dict[str, mx.array], form: Format, others: dict[str, Format | None] | None = None
) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    """Quantize a checkpoint's matrices as `form` or `others` say; returns the tensors, and their values dequantized."""
    stored, meant = {}, {}
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        own = (others or {}).get(layer, form)
        if tensor.ndim != 2 or own is None:
            stored[name] = meant[name] = tensor
            continue
        parts = own.pack(layer, tensor)
        stored |= parts
        meant[name] = mx.array(unpacked(parts, layer, own).astype(np.float32))
    return stored, meant


def stacked(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """Stack the tensors of each layer's experts into one tensor, as mlx-lm writes them."""
    result: dict[str, mx.array] = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(.*)\.experts\.(\d+)\.(.*)", name)
        if found is None:
            result[name] = tensor
        elif found[2] == "0":
            parts = [tensors[f"{found[1]}.experts.{index}.{found[3]}"] for index in range(MOE["num_experts"])]
            result[f"{found[1]}.switch_mlp.{found[3]}"] = mx.stack(parts)
    return result
