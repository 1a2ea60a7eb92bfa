"""The rotary reference table: tests/data/rope_reference.json.

Inverse frequencies and attention factor of each rope type with published parameter sets, from transformers'
ROPE_INIT_FUNCTIONS, and cos/sin at far positions. Cosines are taken in float64 from the float32 frequencies: in float32
the angle itself is only known to 0.004 at position 60000, so implementations there agree to about that and no better.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
from fixtures_files import RECIPE
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

POSITIONS = (0, 1000, 8000, 60000)
# Phi-3.5-mini-instruct's published factors.
PHI35_LONG = [1.0800000429153442, 1.1100000143051147, 1.1399999856948853, 1.340000033378601, 1.5899999141693115,
              1.600000023841858, 1.6200000047683716, 2.620000123977661, 3.2300000190734863, 3.2300000190734863,
              4.789999961853027, 7.400000095367432, 7.700000286102295, 9.09000015258789, 12.199999809265137,
              17.670000076293945, 24.46000099182129, 28.57000160217285, 30.420001983642578, 30.840002059936523,
              32.590003967285156, 32.93000411987305, 42.320003509521484, 44.96000289916992, 50.340003967285156,
              50.45000457763672, 57.55000305175781, 57.93000411987305, 58.21000289916992, 60.1400032043457,
              62.61000442504883, 62.62000274658203, 62.71000289916992, 63.1400032043457, 63.1400032043457,
              63.77000427246094, 63.93000411987305, 63.96000289916992, 63.970001220703125, 64.02999877929688,
              64.06999969482422, 64.08000183105469, 64.12000274658203, 64.41000366210938, 64.4800033569336,
              64.51000213623047, 64.52999877929688, 64.83999633789062]  # fmt: skip
PHI35_SHORT = [1.0, 1.0199999809265137, 1.0299999713897705, 1.0299999713897705, *[1.0499999523162842] * 5,
               1.0699999332427979, 1.0999999046325684, 1.1099998950958252, 1.1599998474121094, 1.1599998474121094,
               1.1699998378753662, 1.2899998426437378, 1.339999794960022, 1.679999828338623, 1.7899998426437378,
               1.8199998140335083, 1.8499997854232788, 1.8799997568130493, 1.9099997282028198, 1.9399996995925903,
               1.9899996519088745, *[2.0199997425079346] * 6, *[2.0299997329711914] * 9, 2.0799996852874756,
               2.0899996757507324, 2.189999580383301, 2.2199995517730713, 2.5899994373321533, 2.729999542236328,
               2.749999523162842, 2.8399994373321533]  # fmt: skip

# name: (head_dim, rope_theta, max_position_embeddings, rope_scaling in hub spelling, lengths seen)
CASES: dict[str, tuple[int, float, int, dict[str, Any] | None, tuple[int | None, ...]]] = {
    "default (TinyLlama)": (64, 10000.0, 2048, None, (None,)),
    "default (SmolLM2)": (64, 100000.0, 8192, None, (None,)),
    "default, large theta (Qwen3)": (128, 1000000.0, 40960, None, (None,)),
    "linear": (64, 10000.0, 16384, {"type": "linear", "factor": 4.0}, (None,)),
    "dynamic": (64, 10000.0, 4096, {"type": "dynamic", "factor": 2.0}, (1000, 4096, 8000, 60000)),
    "llama3 (Llama-3.1-8B)": (
        128, 500000.0, 131072,
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192}, (None,),
    ),
    "llama3 (Llama-3.2-1B)": (
        64, 500000.0, 131072,
        {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192}, (None,),
    ),
    "yarn (Qwen2.5)": (
        128, 1000000.0, 32768,
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, (None,),
    ),
    "yarn, mscale (DeepSeek-V2-Lite)": (
        64, 10000.0, 163840,
        {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
         "original_max_position_embeddings": 4096}, (None,),
    ),
    "yarn, mscale without mscale_all_dim": (
        64, 10000.0, 163840,
        {"type": "yarn", "factor": 40, "mscale": 0.707, "original_max_position_embeddings": 4096}, (None,),
    ),
    "yarn, two mscales": (
        64, 10000.0, 163840,
        {"type": "yarn", "factor": 40, "mscale": 1.2, "mscale_all_dim": 0.8,
         "original_max_position_embeddings": 4096}, (None,),
    ),
    "yarn, attention_factor and betas": (
        64, 10000.0, 65536,
        {"rope_type": "yarn", "factor": 16.0, "attention_factor": 1.1, "beta_fast": 16.0, "beta_slow": 2.0,
         "original_max_position_embeddings": 4096}, (None,),
    ),
    "yarn, not truncated (gpt-oss)": (
        64, 150000.0, 131072,
        {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
         "original_max_position_embeddings": 4096}, (None,),
    ),
    "longrope (Phi-3.5-mini)": (
        96, 10000.0, 131072,
        {"type": "longrope", "factor": 32.0, "long_factor": PHI35_LONG, "short_factor": PHI35_SHORT,
         "original_max_position_embeddings": 4096}, (1000, 4096, 8000, 60000),
    ),
    "longrope, attention_factor": (
        96, 10000.0, 131072,
        {"type": "longrope", "factor": 32.0, "long_factor": PHI35_LONG, "short_factor": PHI35_SHORT,
         "original_max_position_embeddings": 4096, "attention_factor": 1.5}, (1000, 8000),
    ),
    "proportional": (
        64, 1000000.0, 131072,
        {"rope_type": "proportional", "partial_rotary_factor": 0.25, "factor": 2.0}, (None,),
    ),
}  # fmt: skip


def entry(name: str) -> dict[str, Any]:
    """One row: the config keys as a repository has them, and what transformers computes from them."""
    head_dim, theta, length, scaling, seen = CASES[name]
    config = {
        "hidden_size": 2 * head_dim,
        "num_attention_heads": 2,
        "head_dim": head_dim,
        "max_position_embeddings": length,
        "rope_theta": theta,
        "rope_scaling": scaling,
    }
    rows = []
    for seq_len in seen:
        parsed = LlamaConfig.from_dict(copy.deepcopy(config))
        kind = parsed.rope_parameters["rope_type"]
        function = ROPE_INIT_FUNCTIONS.get(kind, LlamaRotaryEmbedding.compute_default_rope_parameters)
        inv_freq, factor = function(parsed, device="cpu", seq_len=seq_len) if seq_len else function(parsed)
        rows.append({"seq_len": seq_len, "attention_factor": float(factor), **table(inv_freq.numpy())})
    return {"name": name, "config": config, "by_length": rows}


def table(inv_freq: np.ndarray) -> dict[str, Any]:
    """Frequencies as float32 (shortest decimals that read back exactly), cos and sin [position][frequency]."""
    exact = inv_freq.astype(np.float64)
    angles = np.array(POSITIONS, dtype=np.float64)[:, None] * exact
    return {
        "inv_freq": [float(str(value)) for value in inv_freq.astype(np.float32)],
        "cos": np.round(np.cos(angles), 7).tolist(),
        "sin": np.round(np.sin(angles), 7).tolist(),
    }


def write(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {
        "recipe": {**RECIPE, "reference": "transformers ROPE_INIT_FUNCTIONS in float32; cos and sin in float64"},
        "positions": list(POSITIONS),
        "note": "cos and sin are not multiplied by attention_factor; seq_len null: independent of the length",
    }
    rows = [json.dumps(entry(name)) for name in CASES]
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    body = ",\n".join(f"    {row}" for row in rows)
    path.write_text("{\n" + ",\n".join(lines) + ',\n  "entries": [\n' + body + "\n  ]\n}\n", encoding="utf-8")
    return path.stat().st_size
