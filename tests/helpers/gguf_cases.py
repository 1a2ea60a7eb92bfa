"""Ingredients of the GGUF files that tests write: random blocks and small configs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gguf_writer as writer
import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf_bytes import Tensors, file_bytes, vocabulary
from places import TESTS

from runner.checkpoint.gguf import GGUF
from runner.checkpoint.gguf.blocks import FORMATS
from runner.checkpoint.gguf.formats import Format

SCALES = {
    "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,),
    "TQ1_0": (52,), "TQ2_0": (64,), "IQ1_M": (48,),
}  # fmt: skip
"""The bytes at which a block has its float16 scales; other formats at 0. Those of MXFP4 and NVFP4 are bytes."""


def scale_places(form: Format) -> tuple[int, ...]:
    return () if form.dtype == "U8" else SCALES.get(form.name, (0,))


def put_scale(form: Format, raw: np.ndarray, place: int, scales: np.ndarray) -> None:
    """Write the float16 `scales [blocks, 1]` into blocks `[blocks, size]`."""
    halves = scales.astype(np.float16)
    if form.name == "IQ1_M":  # the lowest four bits are the highest of the first word, and so on
        bits = (halves.view(np.uint16) >> np.array([0, 4, 8, 12], np.uint16) & 15).astype(np.uint8)
        raw[:, place + 1 :: 2] = raw[:, place + 1 :: 2] & 15 | bits << 4
    else:
        raw[:, place : place + 2] = halves.view(np.uint8)


def put_byte_scales(form: Format, raw: np.ndarray, sizes: np.ndarray) -> None:
    """Write scales of about `sizes [blocks, groups of a block]`: powers of two (MXFP4), or E4M3 (NVFP4)."""
    logarithms = np.log2(np.abs(sizes) + 1e-9)
    eighths = form.name == "NVFP4"
    raw[:, : sizes.shape[1]] = np.clip(8 * (logarithms + 7), 0, 126) if eighths else 127 + np.floor(logarithms)


BY_HAND = (41, 42)
"""Q1_0 and Q2_0, which gguf 0.19 does not dequantize."""


def by_hand(number: int, raw: np.ndarray) -> np.ndarray:
    """The numbers of Q1_0 (41) and Q2_0 (42) blocks, float32 `[rows, columns]`, computed one at a time.

    As `dequantize_row_q1_0` and `dequantize_row_q2_0`; llama.cpp b11549 gives the same.
    """
    found = []
    for block in raw.reshape(-1, 18):
        scale, data = float(block[:2].view(np.float16)[0]), int.from_bytes(block[2:].tobytes(), "little")
        if number == 41:
            found += [scale if data >> place & 1 else -scale for place in range(128)]
        else:
            found += [scale * ((data >> 2 * place & 3) - 1) for place in range(64)]
    return np.array(found, np.float32).reshape(len(raw), -1)


def blocks(kind: int, rows: int, columns: int, seed: int = 0, spread: float = 0.02) -> np.ndarray:
    """Random blocks `[rows, bytes]`: every bit random but for the scales, which are normal numbers."""
    form = FORMATS[kind]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows * columns // form.count, form.size), dtype=np.uint8)
    for place in scale_places(form):
        put_scale(form, raw, place, rng.normal(0, spread, (len(raw), 1)))
    if form.dtype == "U8":
        put_byte_scales(form, raw, rng.normal(0, spread, (len(raw), 4 if form.name == "NVFP4" else 1)))
    return raw.reshape(rows, -1)


def unpacked(found: GGUF, name: str) -> np.ndarray:
    """Dequantize a tensor to float32, in the way that a kernel would."""
    stem = name.removesuffix(".weight")
    if f"{stem}.scales" not in found.headers:
        return np.array(found.read(name).astype(mx.float32))
    form = found.headers[name].entry.format
    parts = {part: found.read(f"{stem}{part}") for part in form.parts((form.count,))}
    return matrix_of(form, parts)


def matrix_of(form: Format, parts: Mapping[str, mx.array]) -> np.ndarray:
    """The numbers, float32, of the arrays that a quantized tensor became."""
    assert form.quantized is not None
    options = asdict(form.quantized)
    if options["mode"] != "affine":
        return np.array(mx.dequantize(parts[".weight"], parts[".scales"], **options, dtype=mx.float32))
    scales, biases = (parts[part].astype(mx.float32) for part in (".scales", ".biases"))
    return np.array(mx.dequantize(parts[".weight"], scales, biases, **options))


MIXES: Mapping[str, Mapping[str, str]] = {
    "Q4_0": {}, "Q4_1": {}, "Q5_0": {}, "Q5_1": {}, "Q8_0": {}, "Q2_K": {}, "Q3_K": {}, "Q6_K": {},
    "Q4_K": {"attn_v": "Q6_K", "ffn_down": "Q6_K", "output": "Q6_K"},  # as llama.cpp's Q4_K_M mixes
    "Q5_K": {"attn_v": "Q8_0", "attn_k": "Q4_K", "token_embd": "Q6_K", "ffn_up": "F16"},
    "IQ1_S": {"attn_v": "Q4_K", "attn_output": "IQ2_XXS", "ffn_down": "Q2_K", "token_embd": "Q2_K", "output": "Q5_K"},
    "IQ1_M": {"attn_v": "Q4_K", "attn_output": "IQ2_XXS", "token_embd": "Q2_K", "output": "Q5_K"},
    "IQ2_XXS": {}, "IQ2_XS": {"attn_v": "Q4_K"}, "IQ2_S": {"attn_output": "IQ3_S"},
    "IQ3_XXS": {"attn_q": "IQ2_S", "token_embd": "IQ3_S"}, "IQ3_S": {"output": "Q6_K"},
    "IQ4_NL": {}, "IQ4_XS": {"attn_v": "Q5_K", "output": "Q6_K"},
    "TQ1_0": {"token_embd": "Q4_K", "output": "Q6_K"}, "TQ2_0": {"token_embd": "Q4_K", "output": "Q6_K"},
    "Q1_0": {"token_embd": "Q4_K", "output": "Q6_K"},
    "MXFP4": {"attn_v": "Q8_0", "token_embd": "Q8_0"}, "NVFP4": {"ffn_down": "MXFP4"},
}  # fmt: skip
"""Models of tests: the type of most matrices, and those of others."""

_SIZES = {
    "Q4_0": 4, "Q4_1": 4, "Q4_K": 9, "Q5_0": 5, "Q5_1": 5, "Q5_K": 10, "Q8_0": 7, "Q2_K": 4, "Q3_K": 8, "Q6_K": 10,
    "IQ1_S": 3, "IQ1_M": 3, "IQ2_XXS": 6, "IQ2_XS": 6, "IQ2_S": 6, "IQ3_XXS": 7, "IQ3_S": 7, "IQ4_NL": 6, "IQ4_XS": 10,
    "MXFP4": 1, "NVFP4": 1,
}  # fmt: skip
"""The numbers of a block are about 2 to this power times its scale."""


def mixed_model(path: Path, name: str) -> dict[str, Any]:
    """Write a Llama of one layer to `path`, with the tensor types of `MIXES[name]`."""
    config = config_of_llama()
    rng = np.random.default_rng(5)
    shapes = {
        "token_embd": (300, 256), "output": (300, 256), "blk.0.attn_q": (256, 256), "blk.0.attn_k": (128, 256),
        "blk.0.attn_v": (128, 256), "blk.0.attn_output": (256, 256), "blk.0.ffn_gate": (512, 256),
        "blk.0.ffn_up": (512, 256), "blk.0.ffn_down": (256, 512),
    }  # fmt: skip
    norms = ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")
    tensors: dict[str, Any] = {f"{n}.weight": (rng.normal(1, 0.2, 256).astype(np.float32), Type.F32) for n in norms}
    for seed, (tensor, shape) in enumerate(shapes.items()):
        kind = Type[MIXES[name].get(tensor.split(".")[-1], name)]
        # Scales such that the numbers are of the size that weights are.
        spread = 0.05 * 2.0 ** -_SIZES.get(kind.name, 0)
        plain = rng.normal(0, 0.05, shape).astype(np.float16)
        tensors[f"{tensor}.weight"] = (plain if kind == Type.F16 else blocks(kind, *shape, seed, spread), kind)
    write(path, tensors, **writer.metadata_of(config), **vocabulary(300))
    return tensors


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


ADJUSTED: dict[str, dict[str, Any]] = {
    **{f"gpt_oss-{name}": {"swiglu_limit": 7.0} for name in ("base", "plain-rope")},
    "smollm3-base": {"no_rope_layers": None}, "smollm3-bias": {"no_rope_layers": None},
}  # fmt: skip
"""Fixtures of which GGUF knows one value only: that value, with which their logits are ours from safetensors."""


def config_of(path: Path) -> dict[str, Any]:
    """The fixture's config, as far as GGUF has words for it."""
    result: dict[str, Any] = json.loads((path / "config.json").read_text())
    return result | ADJUSTED.get(path.name, {})


def written_otherwise(config: Mapping[str, Any]) -> set[str]:
    """Keys that come back with another value of the same meaning."""
    found = set()
    if isinstance(config.get("sliding_window_pattern"), str):
        found.add("sliding_window_pattern")  # as a period
    if (config.get("rope_scaling") or {}).get("alpha"):
        found.add("rope_theta")  # multiplied
    if config["model_type"] in ("phi", "glm4_moe_lite", "minimax_m2", "solar_open"):
        found.add("partial_rotary_factor")  # of as many whole dimensions, which may be another key
    return found


NOT_IN_GGUF = {
    "llama-gelu", "llama-gelu-tanh", "llama-rope-dynamic", "llama-rope-longrope",
    "llama-rope-longrope-attention-factor", "llama-rope-yarn-mscale", "llama-rope-yarn-untruncated",
    "llama-sharded", "llama-mlx-4bit", "llama-mlx-mixed", "llama-mlx-tied", "qwen2-window", "qwen3-window",
    "gemma2-gelu", "qwen3_moe-mixed", "olmoe-clipped", "dots1-v5", "gpt_oss-mxfp4", "gpt_oss-v5",
    "smollm3-window", "stablelm-parallel", "phi-qk-norm", "lfm2_moe-v5", "qwen2_moe-mixed", "qwen2_moe-normalised",
    "deepseek_v3-v5", "deepseek_v3-defaults", "mixtral-default-theta", "qwen3_5_moe_text-v5",
    "glm4_moe_lite-v5", "minimax_m2-v5", "internlm3-base", "ministral3-v5", "ernie4_5_moe-v5",
}  # fmt: skip
"""Fixtures whose config cannot be expressed in GGUF, and fixtures that are about safetensors."""

FIXTURES = [
    path.parent
    for path in sorted([*TESTS.glob("fixtures/llama/*/config.json"), *TESTS.glob("fixtures/families/*/config.json")])
    if json.loads(path.read_text())["model_type"] in writer.ARCHITECTURES and path.parent.name not in NOT_IN_GGUF
]
