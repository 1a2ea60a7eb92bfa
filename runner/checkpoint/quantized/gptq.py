"""GPTQ (arXiv:2210.17323) as AutoGPTQ, optimum and GPTQModel write it.

`qweight` `[in * bits / 32, out]` int32 is packed along the inputs, lowest bits first; transposed, it equals MLX's
packing word for word (also for 3 bits: 32 integers in three words). `qzeros` `[groups, out * bits / 32]` is packed
along the outputs; `scales` is `[groups, out]`; `g_idx` `[in]` gives the group of each input. `checkpoint_format` "gptq"
stores zero points minus one, modulo 2^bits; "gptq_v2" stores them as they are. Where the inputs were quantized in the
order of their activations (`desc_act`), `g_idx` is not `i // group_size`, and the layer becomes plain numbers.

Facts from GPTQModel 7.7 (`nn_modules/qlinear/torch.py`, `utils/model.py`) and transformers 5.23 (`GPTQConfig`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from runner.checkpoint.quantized.layers import BITS, Affine, Array, Layer, Read, affine_form, float32, unpack
from runner.checkpoint.quantized.options import Options
from runner.checkpoint.quantized.tensors import FLOATS, Tensors
from runner.errors import ConfigError, WeightsError

TRAINING = (
    "tokenizer", "dataset", "damp_percent", "damp_auto_increment", "act_group_aware", "true_sequential",
    "static_groups", "mse", "model_seqlen", "block_name_to_quantize", "module_name_preceding_first_block",
    "batch_size", "pad_token_id", "max_input_length", "cache_block_outputs", "modules_in_block_to_quantize", "meta",
    "model_name_or_path", "model_file_base_name",
)  # fmt: skip
"""Options that say how the numbers were found when the model was quantized."""
KERNELS = ("backend", "use_cuda_fp16", "use_exllama", "disable_exllama", "exllama_config", "lm_head", "desc_act")
"""Options that choose a kernel, or that repeat what the tensors show."""


@dataclass(frozen=True)
class Settings:
    """Options that hold for all layers.

    Attributes:
        bits: the bits per integer that a layer may have.
        group_size: inputs per group; -1: one group for all inputs.
        middle: symmetric: every zero point is the middle of the range, 2^(bits - 1).
        less_one: zero points are stored minus one.
        mixed: some layers have options of their own (`dynamic`), so a layer's group size may differ.
    """

    bits: tuple[int, ...]
    group_size: int
    middle: bool
    less_one: bool
    mixed: bool


def layers(raw: Mapping[str, Any], tensors: Tensors) -> list[Layer]:
    """List the quantized layers of a checkpoint whose `quantization_config` is `raw`; only `g_idx` tensors are read.

    Raises:
        ConfigError: an option is not supported.
        WeightsError: a tensor is missing, has another dtype or shape, or is a `g_idx` with a number that is no group's.
    """
    settings = _settings(raw)
    return [_layer(name, settings, tensors) for name in tensors.layers(".qweight")]


def _settings(raw: Mapping[str, Any]) -> Settings:
    """Read and check `quantization_config`."""
    options = Options(raw, "quantization_config")
    options.harmless(*TRAINING, *KERNELS)
    options.one_of("quant_method", "gptq")
    options.one_of("method", "gptq")
    options.one_of("pack_dtype", "int32")
    # `format` and `checkpoint_format` are two names for one option; the second is older and more widely read.
    format = options.one_of("checkpoint_format" if raw.get("checkpoint_format") else "format", "gptq", "gptq_v2")
    options.harmless("format", "checkpoint_format")
    other = raw.get("format")
    if other is not None and other != format:
        raise ConfigError(f"config.json: quantization_config.format {other!r} and checkpoint_format disagree")
    bits, group_size = options.integer("bits"), options.integer("group_size", 128)
    if bits not in BITS:
        raise options.error("bits", bits, ", ".join(map(str, BITS)))
    if group_size < -1 or group_size == 0:
        raise options.error("group_size", group_size, "-1 or a positive integer")
    middle = options.flag("sym", False)
    # `dynamic` maps patterns of module names to options for those layers. The patterns need not be matched: a layer's
    # tensors show its bits and group size, so only the set of possible bits is collected here.
    found = {bits}
    dynamic = options.raw.get("dynamic") or {}
    options.harmless("dynamic")
    for pattern, override in Options(dynamic, "quantization_config.dynamic").raw.items():
        if override in ({}, False, None):
            continue  # the layer is not quantized, or has no options of its own
        inner = Options(override, f"quantization_config.dynamic[{pattern!r}]")
        inner.harmless("desc_act", "mse", "damp_percent", "static_groups", "adapter", "act_group_aware")
        inner.integer("group_size", 128)
        found.add(inner.integer("bits", bits))
        middle = middle and inner.flag("sym", True)
        inner.finish()
    options.finish()
    if not found <= set(BITS):
        raise options.error("dynamic", sorted(found), f"bits of {', '.join(map(str, BITS))}")
    return Settings(tuple(sorted(found)), group_size, middle, format == "gptq", bool(dynamic))


def _layer(name: str, settings: Settings, tensors: Tensors) -> Layer:
    """Check the tensors of one layer, and choose what it becomes."""
    words, rows = tensors.shape(f"{name}.qweight", ("I32",), None, None)
    bits, width = _bits(name, words, settings, tensors)
    groups, _ = tensors.shape(f"{name}.scales", FLOATS, None, rows)
    if rows * bits % 32:
        raise WeightsError(f"{name}: {rows} outputs of {bits} bits do not fill whole 32-bit words of qzeros")
    tensors.shape(f"{name}.qzeros", ("I32",), groups, rows * bits // 32)
    # MLX's form needs groups of neighbouring inputs, of a size it has, and an exact bias; else None: plain numbers.
    group_size = _group_size(name, width, groups, settings)
    form = affine_form(bits, group_size, width)
    ordered = tensors.group_order(f"{name}.g_idx", width, groups, group_size)
    if ordered:
        form = None
    dtype = tensors.headers[f"{name}.scales"].dtype
    if dtype == "F32" and not settings.middle:
        form = None  # the product s z can need more bits than float32 has

    def affine(read: Read) -> tuple[Array, Array]:
        zeros = unpack(np.array(read(f"{name}.qzeros")), bits, rows).astype(np.int16)
        zeros = (zeros + settings.less_one) % (1 << bits)  # undo the "minus one" of checkpoint_format "gptq"
        if settings.middle and (zeros != 1 << (bits - 1)).any():
            raise WeightsError(
                f"{name}.qzeros: zero points are not all {1 << (bits - 1)}, but config.json says sym = true"
            )
        return float32(read(f"{name}.scales")).T, zeros.T

    parts = ("qweight", "qzeros", "scales", "g_idx")
    return Affine(
        name,
        (rows, width),
        tuple(f"{name}.{part}" for part in parts if f"{name}.{part}" in tensors.headers),
        form,
        dtype if settings.middle else "F32",
        dtype,
        bits,
        group_size,
        lambda read: mx.contiguous(read(f"{name}.qweight").T).view(mx.uint32),
        affine,
        (lambda read: np.array(read(f"{name}.g_idx"))) if ordered else None,
    )


def _bits(name: str, words: int, settings: Settings, tensors: Tensors) -> tuple[int, int]:
    """Bits per integer and number of inputs of a layer; where several bits are possible, the length of `g_idx` decides.

    `words` is the number of rows of `qweight`.
    """
    fitting = [bits for bits in settings.bits if words * 32 % bits == 0]
    if f"{name}.g_idx" in tensors.headers:
        (width,) = tensors.shape(f"{name}.g_idx", ("I32", "I64"), None)
        fitting = [bits for bits in fitting if words * 32 == width * bits]
    if len(fitting) != 1:
        raise WeightsError(
            f"{name}.qweight: its {words} rows fit no or several of the bits that config.json has {settings.bits}"
        )
    return fitting[0], words * 32 // fitting[0]


def _group_size(name: str, width: int, groups: int, settings: Settings) -> int:
    """Inputs per group of a layer: as config.json says, or in a mixed checkpoint as the tensors show."""
    size = width if settings.group_size == -1 else settings.group_size
    if groups == -(-width // size):  # the last group may be smaller
        return size
    if settings.mixed and width % groups == 0:
        return width // groups
    raise WeightsError(
        f"{name}.scales: {groups} groups for {width} inputs, but config.json says {size} inputs per group"
    )
