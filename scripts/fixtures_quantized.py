"""MLX affine checkpoints: quantised by mlx, dequantised here in NumPy for the reference.

A group of `group_size` weights of a row shares a scale and a bias: w = scale * q + bias. Each uint32 holds 32 / bits
values, the first in the lowest bits (bits 2, 4, 8; the others straddle words and are not used here).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from fixtures_case import Case
from fixtures_files import Tensors, read_tensors, write_config
from fixtures_model import build
from safetensors.torch import save_file


def options(case: Case, path: str) -> tuple[int, int] | None:
    """Group size and bits of one module, or None where it stays plain."""
    assert case.quantization is not None
    entry: Any = case.quantization.get(path, case.quantization)
    return None if entry is False else (entry["group_size"], entry["bits"])


def is_matrix(name: str, tensor: torch.Tensor) -> bool:
    return name.endswith(".weight") and tensor.ndim == 2


def quantize(tensor: torch.Tensor, settings: tuple[int, int]) -> tuple[mx.array, mx.array, mx.array]:
    values = mx.array(tensor.float().numpy()).astype(mx.bfloat16)
    packed, scales, biases = mx.quantize(values, group_size=settings[0], bits=settings[1])
    return packed, scales, biases


def dequantize(packed: np.ndarray, scales: np.ndarray, biases: np.ndarray, settings: tuple[int, int]) -> np.ndarray:
    """[out, in] float32 from [out, in * bits / 32] uint32 and [out, in / group_size] scales and biases."""
    group_size, bits = settings
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    values = ((packed[..., None] >> shifts) & np.uint32(2**bits - 1)).reshape(packed.shape[0], -1)
    scale, bias = (np.repeat(part, group_size, -1).astype(np.float32) for part in (scales, biases))
    result: np.ndarray = scale * values.astype(np.float32) + bias
    return result


def quantize_model(case: Case, model: Any) -> None:
    """Replaces each matrix by what its quantised form stands for."""
    for name, tensor in model.named_parameters():
        settings = options(case, name.removesuffix(".weight")) if is_matrix(name, tensor) else None
        if settings is not None:
            packed, scales, biases = quantize(tensor, settings)
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
            values = dequantize(np.array(packed), np.array(scales), np.array(biases), settings)
            theirs = np.array(mx.dequantize(packed, scales, biases, group_size=settings[0], bits=settings[1]))
            assert np.abs(values - theirs).max() < 1e-5
            tensor.copy_(torch.from_numpy(values))


def to_torch(array: mx.array) -> torch.Tensor:
    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(array.astype(mx.float32))).bfloat16()
    return torch.from_numpy(np.array(array))


def pack(case: Case, originals: Tensors) -> Tensors:
    """Tensors of the file: `weight` uint32 with `scales` and `biases` for quantised modules, bfloat16 for the rest."""
    tensors: Tensors = {}
    for name, tensor in originals.items():
        path = name.removesuffix(".weight")
        settings = options(case, path) if is_matrix(name, tensor) else None
        if settings is None:
            tensors[name] = tensor.bfloat16()
            continue
        for leaf, part in zip(("weight", "scales", "biases"), quantize(tensor, settings), strict=True):
            tensors[f"{path}.{leaf}"] = to_torch(part)
    return tensors


def write_and_read_back(case: Case, originals: Tensors, directory: Path) -> Any:
    """Packs the directory's file, and returns a model on the weights unpacked from it."""
    packed = pack(case, originals)
    save_file(packed, directory / "model.safetensors", metadata={"format": "mlx"})
    path = directory / "config.json"
    config = json.loads(path.read_text())
    quantization = dict(case.quantization or {})
    write_config(path, {**config, "quantization": quantization, "quantization_config": quantization})
    stored = read_tensors(directory)
    state: Tensors = {}
    for name, tensor in stored.items():
        stem = name.removesuffix(".weight")
        if name.endswith((".scales", ".biases")):
            continue
        settings = options(case, stem) if f"{stem}.scales" in stored else None
        if settings is None:
            state[name] = tensor.float()
            continue
        scales, biases = (stored[f"{stem}.{leaf}"].float().numpy() for leaf in ("scales", "biases"))
        state[name] = torch.from_numpy(dequantize(tensor.numpy(), scales, biases, settings))
    back = build(case.config)
    if case.config["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    back.load_state_dict(state)
    return back
