"""Names that mlx-lm expects in quantized checkpoints: it renames the hub's tensors only while they are plain.

Sources: `sanitize` of mlx_lm/models/*.py, version 0.32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SUFFIX = re.compile(r"(\.weight|\.scales|\.biases|\.bias|_blocks|_scales|_bias)$")
"""What follows a layer's name in a tensor's; the suffixes with underscores are gpt-oss's."""

_DOTTED = {"": ".weight", "_blocks": ".weight", "_scales": ".scales", "_bias": ".bias"}
_EXPERT = re.compile(r"^(.*)\.experts\.(\d+)\.(\w+)$")
_STACKED = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_FIRST_AND_SECOND = {"up_proj": "fc1", "down_proj": "fc2"}
STACKED: Mapping[str, Mapping[str, str]] = {"nemotron_h": _FIRST_AND_SECOND}
"""By model type: names of a stack's matrices, where they are not those of most."""

WITHOUT_EXPERTS = " without experts"
"""What the tables below have behind the type of a model that could have experts, but has none."""


RENAMED: Mapping[str, tuple[tuple[str, str], ...]] = {
    "gpt2": ((r"^(transformer\.)?(?=(wte|wpe|h|ln_f)\b)", "model."),),
    "lfm2_moe": (
        (r"(?<=feed_forward)\.w1(?=\.)", ".gate_proj"),
        (r"(?<=feed_forward)\.w3(?=\.)", ".up_proj"),
        (r"(?<=feed_forward)\.w2(?=\.)", ".down_proj"),
    ),
    "nemotron_h": ((r"^model\.", "backbone."),),
    "gpt_neox": ((r"^gpt_neox\.layers\.", "model.h."), (r"^(gpt_neox\.)?(?=(embed_in|embed_out|final)\w*)", "model.")),
}
"""By model type: patterns in a tensor's name, and their replacements."""

_FUSED = {
    "experts.gate_up_proj": ("switch_mlp.gate_proj", "switch_mlp.up_proj"),
    "experts.down_proj": ("switch_mlp.down_proj",),
}
SPLIT: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "granitemoe": {
        "input_linear": ("switch_mlp.gate_proj", "switch_mlp.up_proj"),
        "output_linear": ("switch_mlp.down_proj",),
    },
    "granitemoehybrid": {
        "block_sparse_moe.input_linear": (
            "block_sparse_moe.switch_mlp.gate_proj",
            "block_sparse_moe.switch_mlp.up_proj",
        ),
        "block_sparse_moe.output_linear": ("block_sparse_moe.switch_mlp.down_proj",),
    },
    f"granitemoehybrid{WITHOUT_EXPERTS}": {
        "shared_mlp.input_linear": ("mlp.gate_proj", "mlp.up_proj"),
        "shared_mlp.output_linear": ("mlp.down_proj",),
    },
    "lfm2_moe": _FUSED,
    "nemotron_h": {f"experts.{name}": (f"switch_mlp.{part}",) for name, part in _FIRST_AND_SECOND.items()},
    "qwen3_5_moe_text": _FUSED,
    "qwen3_next": _FUSED,
    "gpt_oss": {"gate_up_proj": ("gate_proj", "up_proj")},
    "gemma4_text": {
        "experts.gate_up_proj": ("experts.switch_glu.gate_proj", "experts.switch_glu.up_proj"),
        "experts.down_proj": ("experts.switch_glu.down_proj",),
    },
}
"""By model type and last words of a layer's name: the layers that mlx-lm splits it into, each with as many rows."""

TYPES: Mapping[str, str] = {"qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5_moe"}
"""Text models that mlx-lm knows by the name of their wrapper only, whose config it reads flat as well."""

AFFINE_ONLY: Mapping[str, tuple[str, ...]] = {"deepseek_v3": ("kv_b_proj",)}
"""By model type: last words of layers that mlx-lm dequantizes itself, in affine mode only; else they stay plain."""


@dataclass(frozen=True)
class Target:
    """The tensors that a stored one becomes, with equal shares of its rows; `slot`: its place in a stack of experts."""

    names: tuple[str, ...]
    slot: int | None = None


def spelled(raw: Mapping[str, Any]) -> str:
    """What the tables call the model of a `config.json`: its `model_type`, perhaps without experts."""
    return str(raw["model_type"]) + (WITHOUT_EXPERTS if raw.get("num_local_experts") == 0 else "")


def layer_target(model_type: str, name: str) -> Target:
    """Where a layer's tensor goes: `...experts.3.w1.weight` becomes row 3 of `...switch_mlp.gate_proj.weight`."""
    found = SUFFIX.search(name)
    suffix = "" if found is None else found[1]
    stem = name.removesuffix(suffix)
    suffix = _DOTTED.get(suffix, suffix)
    expert = _EXPERT.match(stem)
    if expert is not None:
        own = STACKED.get(model_type, _STACKED)
        stacked = f"{expert[1]}.switch_mlp.{own.get(expert[3], expert[3])}"
        return Target((renamed(model_type, stacked + suffix),), int(expert[2]))
    for last, parts in SPLIT.get(model_type, {}).items():
        if stem.endswith(f".{last}"):
            start = stem.removesuffix(last)
            return Target(tuple(renamed(model_type, f"{start}{part}{suffix}") for part in parts))
    return Target((renamed(model_type, stem + suffix),))


def renamed(model_type: str, name: str) -> str:
    """mlx-lm's name for a tensor, once it is stacked or split."""
    for pattern, replacement in RENAMED.get(model_type, ()):
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    return name
