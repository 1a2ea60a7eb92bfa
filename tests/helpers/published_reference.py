"""The published quantization formats by hand: random layers in each format, and the numbers that they stand for.

Every `*_numbers` is a plain loop over the format's own definition; no code is shared with
`runner.checkpoint.quantized`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from runner.checkpoint.directory import Checkpoint, write_checkpoint

Array = npt.NDArray[Any]


@dataclass
class Case:
    """A quantized layer: its tensors by suffix, the float32 matrix `[out, in]` that they stand for, and its options."""

    tensors: dict[str, mx.array]
    numbers: Array
    options: dict[str, Any] = field(default_factory=dict)


def bits_of(words: Array, start: int, bits: int) -> int:
    """Read the integer of `bits` bits that begins at bit `start` of a row of uint32."""
    value = 0
    for i in range(bits):
        word, place = divmod(start + i, 32)
        value |= (int(words[word]) >> place & 1) << i
    return value


def packed(values: Array, bits: int) -> Array:
    """Pack a row of integers into int32 words, lowest bits first."""
    words = [0] * math.ceil(len(values) * bits / 32)
    for index, value in enumerate(values):
        for i in range(bits):
            word, place = divmod(index * bits + i, 32)
            words[word] |= (int(value) >> i & 1) << place
    return np.array(words, np.uint32).view(np.int32)


def scales_of(rng: np.random.Generator, bits: int, *shape: int) -> Array:
    """Random float16 scales that give weights of the usual size of published models."""
    return (rng.uniform(0.02, 0.5, shape) / 2**bits).astype(np.float16)


def gptq(
    rng: np.random.Generator, rows: int, width: int, *, bits: int = 4, group_size: int = 32, sym: bool = True,
    order: bool = False, version: str = "gptq", index: bool = True,
) -> Case:  # fmt: skip
    """A random layer in AutoGPTQ's layout."""
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
    """A random layer in AutoAWQ's layout, version gemm."""
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


def e4m3(code: int) -> float:
    """Decode an E4M3 byte by its specification."""
    exponent, mantissa = code >> 3 & 15, code & 7
    assert (exponent, mantissa) != (15, 7), "NaN"
    size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -size if code & 128 else size


def e2m1(code: int) -> float:
    """Decode an E2M1 nibble."""
    exponent, mantissa = code >> 1 & 3, code & 1
    size = mantissa * 0.5 if exponent == 0 else (2 + mantissa) * 2.0 ** (exponent - 2)
    return -size if code & 8 else size


def e4m3_codes(rng: np.random.Generator, *shape: int) -> Array:
    """Random E4M3 bytes, none of them NaN."""
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    return np.where(codes & 127 == 127, 0, codes).astype(np.uint8)


def scaled_numbers(codes: Array, scales: Array, block: tuple[int, int]) -> Array:
    """Dequantize E4M3 bytes with a float32 scale per block."""
    result = np.zeros(codes.shape, np.float32)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            result[i, j] = np.float32(e4m3(int(codes[i, j]))) * scales[i // block[0], j // block[1]]
    return result


def float8(
    rng: np.random.Generator, rows: int, width: int, *, block: tuple[int, int] = (16, 16),
    name: str = "weight_scale_inv", powers: bool = False, dtype: mx.Dtype = mx.float32,
) -> Case:  # fmt: skip
    """A random E4M3 layer with a scale per block: E8M0 bytes where `dtype` is uint8, else floats."""
    codes = e4m3_codes(rng, rows, width)
    grid = (math.ceil(rows / block[0]), math.ceil(width / block[1]))
    exponents = rng.integers(118, 122, grid)
    scales = 2.0 ** (exponents - 127.0) if powers else rng.uniform(0.0001, 0.004, grid)
    stored = mx.array(exponents.astype(np.uint8)) if dtype == mx.uint8 else mx.array(scales.astype(np.float32))
    stored = stored.astype(dtype)
    meant = scales.astype(np.float32) if dtype == mx.uint8 else np.array(stored.astype(mx.float32))
    return Case({"weight": mx.array(codes), name: stored}, scaled_numbers(codes, meant, block))


def fp8(rng: np.random.Generator, rows: int, width: int, **kind: Any) -> Case:
    """A random layer in DeepSeek's FP8 layout."""
    case = float8(rng, rows, width, **kind)
    case.options = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
        "weight_block_size": list(kind.get("block", (16, 16))),
        "scale_fmt": "ue8m0" if kind.get("powers") else "float",
    }  # fmt: skip
    return case


def compressed(format: str, weights: dict[str, Any], activations: dict[str, Any] | None = None) -> dict[str, Any]:
    """A `quantization_config` as llm-compressor writes it."""
    group = {
        "targets": ["Linear"], "weights": {"dynamic": False, "observer": "minmax", **weights}, "format": format,
        "input_activations": activations, "output_activations": None,
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*gate$"], "kv_cache_scheme": None, "quantization_status": "compressed",
        "global_compression_ratio": 1.5, "sparsity_config": {}, "transform_config": {}, "version": "0.12.2",
    }  # fmt: skip


def ct_integers(
    rng: np.random.Generator, rows: int, width: int, *, bits: int = 4, group_size: int | None = 32,
    symmetric: bool = True, pack: bool = True, order: bool = False, dtype: mx.Dtype = mx.bfloat16,
) -> Case:  # fmt: skip
    """A random layer, pack-quantized or int-quantized; `group_size` None: one scale per output."""
    size = group_size or width
    groups = math.ceil(width / size)
    low = -(1 << (bits - 1))
    codes = rng.integers(low, -low, (rows, width))
    zeros = np.zeros((rows, groups), int) if symmetric else rng.integers(low, -low, (rows, groups))
    scales = mx.array((rng.uniform(0.02, 0.5, (rows, groups)) / 2**bits).astype(np.float32)).astype(dtype)
    meant = np.array(scales.astype(mx.float32))
    index = rng.permutation(np.arange(width) // size) if order else np.arange(width) // size
    numbers = np.zeros((rows, width), np.float32)
    for i in range(rows):
        for j in range(width):
            numbers[i, j] = meant[i, index[j]] * (codes[i, j] - zeros[i, index[j]])
    tensors = {"weight_scale": scales}
    if pack:
        tensors["weight_packed"] = mx.array(np.stack([packed(row - low, bits) for row in codes]))
        tensors["weight_shape"] = mx.array([rows, width], mx.int64)
        if not symmetric:
            columns = [packed(zeros[:, g] - low, bits) for g in range(groups)]
            tensors["weight_zero_point"] = mx.array(np.stack(columns, axis=1))
    else:
        tensors["weight"] = mx.array(codes.astype(np.int8))
        if not symmetric:
            tensors["weight_zero_point"] = mx.array(zeros.astype(np.int8))
    if order:
        tensors["weight_g_idx"] = mx.array(index.astype(np.int32))
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "group_size": group_size}
    weights |= {"strategy": "group" if group_size else "channel", "actorder": "group" if order else None}
    dynamic = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    options = compressed("pack-quantized" if pack else "int-quantized", weights, None if pack else dynamic)
    return Case(tensors, numbers, options)


def ct_float8(rng: np.random.Generator, rows: int, width: int, *, strategy: str = "channel", size: int = 16) -> Case:
    """A random layer, float-quantized, or mxfp8-quantized where `strategy` is "mx"."""
    block = {"channel": (1, width), "tensor": (rows, width), "block": (size, size), "group": (1, size), "mx": (1, 32)}
    exponents = {"powers": True, "dtype": mx.uint8} if strategy == "mx" else {}
    case = float8(rng, rows, width, block=block[strategy], name="weight_scale", **exponents)
    if strategy == "tensor":
        case.tensors["weight_scale"] = case.tensors["weight_scale"].reshape(1)
    weights: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    if strategy == "block":
        weights["block_structure"] = [size, size]
    if strategy in ("group", "mx"):
        weights |= {"strategy": "group", "group_size": block[strategy][1]}
    dynamic = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    case.options = compressed("mxfp8-quantized" if strategy == "mx" else "float-quantized", weights, dynamic)
    return case


def ct_float4(rng: np.random.Generator, rows: int, width: int, *, overall: float | None = 1000.0) -> Case:
    """A random layer: nvfp4-pack-quantized with the global scale `overall`, mxfp4-pack-quantized where it is None."""
    size = 32 if overall is None else 16
    nibbles = rng.integers(0, 16, (rows, width))
    if overall is None:
        stored = rng.integers(120, 125, (rows, width // size)).astype(np.uint8)
        scales = np.float32([[2.0 ** (int(e) - 127) for e in row] for row in stored])
    else:
        stored = rng.integers(0x50, 0x60, (rows, width // size)).astype(np.uint8)
        scales = np.float32([[np.float32(e4m3(int(e))) / np.float32(overall) for e in row] for row in stored])
    numbers = np.zeros((rows, width), np.float32)
    for i in range(rows):
        for j in range(width):
            numbers[i, j] = np.float32(e2m1(int(nibbles[i, j]))) * scales[i, j // size]
    pairs = (nibbles[:, ::2] | nibbles[:, 1::2] << 4).astype(np.uint8)
    tensors = {"weight_packed": mx.array(pairs), "weight_scale": mx.array(stored)}
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": size, "strategy": "group"}
    if overall is None:
        return Case(tensors, numbers, compressed("mxfp4-pack-quantized", weights))
    tensors["weight_global_scale"] = mx.array([overall], mx.float32)
    tensors["input_global_scale"] = mx.array([3.0], mx.float32)
    local = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local"}
    options = compressed("nvfp4-pack-quantized", {**weights, "strategy": "tensor_group"}, local)
    return Case(tensors, numbers, options)


def bfloat16(numbers: Array) -> Array:
    """Round float32 numbers to bfloat16, to nearest with ties to even; the result is again float32."""
    raw = numbers.astype(np.float32).view(np.uint32)
    return (raw + np.uint32(0x7FFF) + (raw >> 16 & 1) >> 16 << 16).view(np.float32)


def write_model(out: Path, fixture: Path, cases: Mapping[str, Case], options: Mapping[str, Any]) -> Path:
    """Write the checkpoint `fixture` with these layers in their quantized form."""
    source = Checkpoint.open(fixture)
    tensors = {name: source.read(name) for name in source.headers}
    for name, case in cases.items():
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{suffix}": array for suffix, array in case.tensors.items()}
    write_checkpoint(out, tensors.items(), {**source.config, "quantization_config": dict(options)})
    rename_float8(out / "model.safetensors", cases)
    return out


def write_layer(out: Path, case: Case) -> Path:
    """Write a directory with one layer, `a`."""
    tensors = {f"a.{suffix}": array for suffix, array in case.tensors.items()}
    write_checkpoint(out, tensors.items(), {"quantization_config": case.options})
    rename_float8(out / "model.safetensors", {"a": case})
    return out


def is_float8(suffix: str, case: Case) -> bool:
    """Whether a tensor holds E4M3 bytes: the weights of FP8 formats do, and nvfp4's scales."""
    array = case.tensors[suffix]
    return array.dtype == mx.uint8 and (
        suffix == "weight" or (suffix == "weight_scale" and "weight_global_scale" in case.tensors)
    )


def rename_float8(file: Path, cases: Mapping[str, Case]) -> None:
    """Set the dtype of E4M3 tensors in a file's header to F8_E4M3: MLX has no 8-bit floats and wrote U8."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name, case in cases.items():
        for suffix in case.tensors:
            if is_float8(suffix, case):
                header[f"{name}.{suffix}"]["dtype"] = "F8_E4M3"
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def write_plain(out: Path, fixture: Path, cases: Mapping[str, Case]) -> Path:
    """Write the checkpoint `fixture` with these layers dequantized to float32."""
    source = Checkpoint.open(fixture)
    tensors = {name: source.read(name) for name in source.headers}
    tensors |= {f"{name}.weight": mx.array(case.numbers) for name, case in cases.items()}
    write_checkpoint(out, tensors.items(), source.config)
    return out


def linears(fixture: Path) -> dict[str, tuple[int, int]]:
    """Shapes, by layer name, of the matrices in a checkpoint that published quantizations quantize."""
    headers = Checkpoint.open(fixture).headers
    return {
        name.removesuffix(".weight"): (info.shape[0], info.shape[1])
        for name, info in headers.items()
        if len(info.shape) == 2 and "embed" not in name and "lm_head" not in name and "mlp.gate.weight" not in name
    }
