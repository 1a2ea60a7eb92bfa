"""gpt_oss as published: its experts in MXFP4, packed here in NumPy and unpacked by transformers for the reference.

Values are E2M1 (0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign bit), 32 of a row share a scale 2 ** (s - 127), and a byte holds
two, the first in the low bits: blocks [E, out, in / 32, 16] and scales [E, out, in / 32], both uint8.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fixtures_case import Case
from fixtures_files import Tensors, read_tensors, write_config
from fixtures_model import build
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

LEVELS = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=np.float32)
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
GROUP = 32


def encode(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes [.., groups, 32] (0 to 15) and scales [.., groups] of a [.., out, in] array."""
    groups = matrix.reshape(*matrix.shape[:-1], -1, GROUP)
    largest = np.abs(groups).max(-1)
    exponent = np.floor(np.log2(np.maximum(largest, 1e-30))) - 2  # the largest level, 6, has exponent 2
    scaled = groups / np.exp2(exponent)[..., None]
    codes = np.abs(np.abs(scaled)[..., None] - LEVELS).argmin(-1) + 8 * (scaled < 0)
    return codes.astype(np.uint8), (exponent + 127).astype(np.uint8)


def decode(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[.., out, in] float32 from what `encode` gave."""
    values = LEVELS[codes & 7] * np.where(codes & 8, -1, 1)
    wide: np.ndarray = values * np.exp2(scales.astype(np.float32) - 127)[..., None]
    return wide.reshape(*wide.shape[:-2], -1).astype(np.float32, copy=False)


def quantize_model(model: Any) -> None:
    """Replaces each expert matrix ([E, in, out] in transformers) by what its packed form stands for."""
    for name, tensor in model.named_parameters():
        if name.endswith(EXPERTS):
            values = decode(*encode(tensor.transpose(1, 2).numpy()))
            tensor.copy_(torch.from_numpy(values).transpose(1, 2))


def write_and_read_back(case: Case, directory: Path) -> Any:
    """Packs the experts of the directory's file, and returns a model on the weights that transformers unpacks."""
    tensors: Tensors = {}
    for name, tensor in read_tensors(directory).items():
        if not name.endswith(EXPERTS):
            tensors[name] = tensor
            continue
        codes, scales = encode(tensor.float().transpose(1, 2).numpy())
        tensors[f"{name}_blocks"] = torch.from_numpy(codes[..., 0::2] | codes[..., 1::2] << 4)
        tensors[f"{name}_scales"] = torch.from_numpy(scales)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    write_config(path, {**config, "quantization_config": dict(case.quantization or {})})
    back = build(case.config)
    back.load_state_dict(unpack(read_tensors(directory)))
    return back


def unpack(stored: Tensors) -> Tensors:
    """float32 tensors of a file with packed experts, by transformers' own conversion."""
    state: Tensors = {}
    for name, tensor in stored.items():
        stem = name.removesuffix("_blocks")
        if stem != name:
            state[stem] = convert_moe_packed_tensors(tensor, stored[f"{stem}_scales"]).float()
        elif not name.endswith("_scales"):
            state[name] = tensor.float()
    return state
