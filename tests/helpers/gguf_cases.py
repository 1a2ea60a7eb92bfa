"""GGUF files of tests: random blocks, small configs, and where they are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf_bytes import Tensors, file_bytes

from runner.checkpoint.gguf.blocks import FORMATS

HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}  # where a block keeps its float16 scales; else at 0 and 2

ONE_SCALE = ("Q4_0", "Q5_0", "Q8_0")


def blocks(kind: Type, rows: int, columns: int, seed: int = 0, spread: float = 0.02) -> np.ndarray:
    """Random blocks `[rows, bytes]`: every bit random but for the float16 scales, which are normal numbers."""
    form = FORMATS[kind]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows * columns // form.count, form.size), dtype=np.uint8)
    for place in HALVES.get(form.name, (0,) if form.name in ONE_SCALE else (0, 2)):
        raw[:, place : place + 2] = rng.normal(0, spread, (len(raw), 1)).astype(np.float16).view(np.uint8)
    return raw.reshape(rows, -1)


def write(path: Path, tensors: Tensors, **metadata: Any) -> Path:
    path.write_bytes(file_bytes(metadata, tensors))
    return path


def config_of_llama(hidden: int = 256, layers: int = 1, vocab: int = 300) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "vocab_size": vocab, "tie_word_embeddings": False,
    }  # fmt: skip


UNRENAMED = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "norm_epsilon",
    "sliding_window",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "rope_local_base_freq",
    "sliding_window_pattern",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "use_bias",
    "attention_bias",
    "mlp_bias",
    "vocab_size",
    "rope_theta",
]


def config_of(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((path / "config.json").read_text())
    return result
