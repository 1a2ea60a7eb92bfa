"""The published formats by hand: what their tensors mean, number by number, and how random ones are written.

Every `*_numbers` is a plain loop over the format's own definition; nothing here is shared with `runner.published`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from runner.checkpoint import Checkpoint, write_checkpoint

Array = npt.NDArray[Any]


@dataclass
class Case:
    """A quantised layer: its tensors by suffix, what they mean in float32 `[out, in]`, and its options."""

    tensors: dict[str, mx.array]
    numbers: Array
    options: dict[str, Any] = field(default_factory=dict)


def bits_of(words: Array, start: int, bits: int) -> int:
    """The integer of `bits` bits at bit `start` of a row of uint32."""
    value = 0
    for i in range(bits):
        word, place = divmod(start + i, 32)
        value |= (int(words[word]) >> place & 1) << i
    return value


def packed(values: Array, bits: int) -> Array:
    """A row of integers as int32 words, lowest bits first."""
    words = [0] * math.ceil(len(values) * bits / 32)
    for index, value in enumerate(values):
        for i in range(bits):
            word, place = divmod(index * bits + i, 32)
            words[word] |= (int(value) >> i & 1) << place
    return np.array(words, np.uint32).view(np.int32)


def scales_of(rng: np.random.Generator, bits: int, *shape: int) -> Array:
    """float16 scales that give weights of the size that published ones have."""
    return (rng.uniform(0.02, 0.5, shape) / 2**bits).astype(np.float16)


def gptq(
    rng: np.random.Generator, rows: int, width: int, *, bits: int = 4, group_size: int = 32, sym: bool = True,
    order: bool = False, version: str = "gptq", index: bool = True,
) -> Case:  # fmt: skip
    """AutoGPTQ's layout."""
    size = width if group_size == -1 else group_size
    groups = math.ceil(width / size)
    codes = rng.integers(0, 1 << bits, (width, rows))
    zeros = np.full((groups, rows), 1 << (bits - 1)) if sym else rng.integers(0, 1 << bits, (groups, rows))
    scales = scales_of(rng, bits, groups, rows)
    g_idx = np.arange(width) // size
    if order:
        g_idx = rng.permutation(g_idx)
    stored = (zeros - 1) % (1 << bits) if version == "gptq" else zeros
    tensors = {
        "qweight": np.stack([packed(codes[:, j], bits) for j in range(rows)], axis=1),
        "qzeros": np.stack([packed(stored[g], bits) for g in range(groups)]),
        "scales": scales,
        "g_idx": g_idx.astype(np.int32),
    }
    if not index:
        del tensors["g_idx"]
    options = {
        "quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": sym, "desc_act": order,
        "checkpoint_format": version,
    }  # fmt: skip
    return Case({k: mx.array(v) for k, v in tensors.items()}, gptq_numbers(tensors, bits, version, size), options)


def gptq_numbers(tensors: Mapping[str, Array], bits: int, version: str, size: int) -> Array:
    qweight, qzeros = tensors["qweight"].view(np.uint32), tensors["qzeros"].view(np.uint32)
    width, rows = qweight.shape[0] * 32 // bits, qweight.shape[1]
    result = np.zeros((rows, width), np.float32)
    for j in range(rows):
        for i in range(width):
            group = int(tensors["g_idx"][i]) if "g_idx" in tensors else i // size
            zero = bits_of(qzeros[group], j * bits, bits)
            zero = (zero + 1) % (1 << bits) if version == "gptq" else zero
            result[j, i] = np.float32(tensors["scales"][group, j]) * (bits_of(qweight[:, j], i * bits, bits) - zero)
    return result


def awq(rng: np.random.Generator, rows: int, width: int, *, group_size: int = 32) -> Case:
    """AutoAWQ's layout, version gemm."""
    size = width if group_size == -1 else group_size
    groups = math.ceil(width / size)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def interleaved(values: Array) -> Array:
        return packed(np.concatenate([values[k : k + 8][order] for k in range(0, len(values), 8)]), 4)

    codes, zeros = rng.integers(0, 16, (width, rows)), rng.integers(0, 16, (groups, rows))
    scales = scales_of(rng, 4, groups, rows)
    numbers = np.zeros((rows, width), np.float32)
    for j in range(rows):
        for i in range(width):
            group = i // size
            numbers[j, i] = np.float32(scales[group, j]) * (codes[i, j] - zeros[group, j])
    tensors = {
        "qweight": np.stack([interleaved(row) for row in codes]),
        "qzeros": np.stack([interleaved(row) for row in zeros]),
        "scales": scales,
    }
    options = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
    return Case({k: mx.array(v) for k, v in tensors.items()}, numbers, options)


def write_model(out: Path, fixture: Path, cases: Mapping[str, Case], options: Mapping[str, Any]) -> Path:
    """The checkpoint `fixture` with these layers in their quantised form."""
    source = Checkpoint.open(fixture)
    tensors = {name: source.read(name) for name in source.headers}
    for name, case in cases.items():
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{suffix}": array for suffix, array in case.tensors.items()}
    write_checkpoint(out, tensors.items(), {**source.config, "quantization_config": dict(options)})
    return out


def write_plain(out: Path, fixture: Path, cases: Mapping[str, Case]) -> Path:
    """The checkpoint `fixture` with what these layers mean, in float32."""
    source = Checkpoint.open(fixture)
    tensors = {name: source.read(name) for name in source.headers}
    tensors |= {f"{name}.weight": mx.array(case.numbers) for name, case in cases.items()}
    write_checkpoint(out, tensors.items(), source.config)
    return out


def linears(fixture: Path) -> dict[str, tuple[int, int]]:
    """The matrices of a checkpoint that published quantisations quantise."""
    headers = Checkpoint.open(fixture).headers
    return {
        name.removesuffix(".weight"): (info.shape[0], info.shape[1])
        for name, info in headers.items()
        if len(info.shape) == 2 and "embed" not in name and "lm_head" not in name and "mlp.gate.weight" not in name
    }
