"""What llama.cpp's converters do to the families beyond renaming, and the keys that they write for them.

Source: llama.cpp's `conversion/*.py` (0.3.36 of llama-cpp-python). Independent of `runner.checkpoint.gguf`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from gguf_bytes import Metadata

ARCHITECTURES = {
    "gpt_oss": "GPT_OSS", "seed_oss": "SEED_OSS", "smollm3": "SMOLLM3", "glm4": "GLM4", "ernie4_5": "ERNIE4_5",
    "hunyuan_v1_dense": "HUNYUAN_DENSE", "granite": "GRANITE", "olmo2": "OLMO2", "olmo3": "OLMO2",
    "exaone4": "EXAONE4", "cohere": "COMMAND_R", "cohere2": "COHERE2", "nemotron": "NEMOTRON", "phi": "PHI2",
    "stablelm": "STABLELM", "lfm2": "LFM2", "lfm2_moe": "LFM2MOE", "mixtral": "LLAMA", "granitemoe": "GRANITE_MOE",
    "minimax_m2": "MINIMAXM2", "qwen2_moe": "QWEN2MOE", "deepseek_v2": "DEEPSEEK2", "deepseek_v3": "DEEPSEEK2",
    "kimi_k2": "DEEPSEEK2", "glm4_moe_lite": "DEEPSEEK2", "ministral3": "MISTRAL3", "olmo": "OLMO",
    "ernie4_5_moe": "ERNIE4_5_MOE",
}  # fmt: skip

LATENT = ("deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite")
PERMUTED = (
    "llama",
    "mistral",
    "arcee",
    "smollm3",
    "granite",
    "granitemoe",
    "mixtral",
    "internlm3",
    "iquestcoder",
    "ministral3",
    "olmo",
)
"""Families whose query and key rows the converters reorder for the RoPE pairs (2i, 2i+1)."""


def _partial(config: Metadata) -> float:
    return float((config.get("rope_parameters") or config).get("partial_rotary_factor", config.get("rotary_pct", 1.0)))


def _windows(config: Metadata) -> dict[str, Any]:
    """The window, and which layers have it: of `Olmo2Model` and `Exaone4Model`."""
    if not config.get("sliding_window"):
        return {}
    flags = [kind == "sliding_attention" for kind in config["layer_types"]]
    return {"attention.sliding_window": config["sliding_window"], "attention.sliding_window_pattern": flags}


def _lfm2_width(config: Metadata) -> int:
    """`LFM2Model._add_feed_forward_length`."""
    width: int = config.get("block_ff_dim") or config["intermediate_size"]
    if config.get("block_auto_adjust_ff_dim"):
        multiple, width = config["block_multiple_of"], int(2 * width / 3)
        width = int((config["block_ffn_dim_multiplier"] or 1) * width)
        width = multiple * ((width + multiple - 1) // multiple)
    return width


def keys_of(config: Metadata, head_dim: int, theta: float) -> dict[str, Any]:
    """Keys below the architecture's name that only this family's converter writes."""
    family, scale = config["model_type"], config.get("logits_scaling", config.get("logit_scale"))
    if family not in ARCHITECTURES:
        return {}
    keys: dict[str, Any] = {
        "attention.layer_norm_epsilon": config.get("layer_norm_eps", config.get("norm_eps")),
        "logit_scale": scale,
    }
    if family in ("glm4", "nemotron", "phi", "stablelm", "cohere2"):
        keys["rope.dimension_count"] = int(_partial(config) * head_dim)
    if family == "ministral3":
        keys["rope.scaling.yarn_log_multiplier"] = config["rope_parameters"]["mscale_all_dim"]
        keys["attention.temperature_scale"] = config["rope_parameters"]["llama_4_scaling_beta"]
    if family == "olmo":
        keys |= {"attention.layer_norm_epsilon": 1e-5, "attention.clamp_kqv": config.get("clip_qkv")}
    if family == "ernie4_5_moe":
        keys |= {
            "expert_count": config["moe_num_experts"], "expert_used_count": config["moe_k"],
            "interleave_moe_layer_step": config["moe_layer_interval"],
            "leading_dense_block_count": config["moe_layer_start_index"],
            "expert_feed_forward_length": config["moe_intermediate_size"],
            "expert_shared_count": config["moe_num_shared_experts"],
            "expert_shared_feed_forward_length": config["intermediate_size"] // config["num_key_value_heads"],
        }  # fmt: skip
    if family == "gpt_oss":
        keys["attention.sliding_window"] = config["sliding_window"]
    if family in ("gpt_oss", "mixtral", "granitemoe", "minimax_m2"):
        keys |= {"expert_count": config["num_local_experts"], "expert_used_count": config["num_experts_per_tok"]}
    if family in ("gpt_oss", "minimax_m2"):
        keys["expert_feed_forward_length"] = config["intermediate_size"]
    if family == "minimax_m2":
        keys |= {"expert_gating_func": 2, "rope.dimension_count": rotary_dim(config)}
    elif family in LATENT:
        keys |= latents(config)
    elif family == "qwen2_moe":
        keys |= {
            "expert_count": config["num_experts"], "expert_used_count": config["num_experts_per_tok"],
            "expert_feed_forward_length": config["moe_intermediate_size"],
            "expert_shared_feed_forward_length": config["shared_expert_intermediate_size"],
        }  # fmt: skip
    elif family in ("granite", "granitemoe"):
        keys |= {
            "attention.scale": config["attention_multiplier"], "embedding_scale": config["embedding_multiplier"],
            "residual_scale": config["residual_multiplier"], "rope.dimension_count": head_dim,
        }  # fmt: skip
    elif family in ("cohere", "cohere2", "nemotron"):
        keys["rope.scaling.type"] = "none"
    elif family == "stablelm":
        keys["use_parallel_residual"] = config["use_parallel_residual"]
    elif family == "hunyuan_v1_dense":
        scaled = (config.get("rope_parameters") or config.get("rope_scaling") or {}).get("alpha", 1.0)
        keys["rope.freq_base"] = theta * scaled ** (head_dim / (head_dim - 2))
        keys |= {"rope.scaling.type": "none", "rope.scaling.factor": 1.0}
    if family in ("olmo3", "exaone4"):
        keys |= _windows(config)
    if family == "cohere2":  # the pattern is read where it is there; every 4th layer is full where it is not
        keys |= _windows({"layer_types": _every(config), **config})
    if family in ("lfm2", "lfm2_moe"):
        layers = config["num_hidden_layers"]
        attends = config.get("full_attn_idxs")
        if attends is None:
            attends = [index for index in range(layers) if config["layer_types"][index] == "full_attention"]
        heads = config["num_key_value_heads"]
        keys |= {
            "attention.layer_norm_rms_epsilon": config["norm_eps"], "attention.layer_norm_epsilon": None,
            "shortconv.l_cache": config["conv_L_cache"], "feed_forward_length": _lfm2_width(config),
            "attention.head_count_kv": [heads if index in attends else 0 for index in range(layers)],
        }  # fmt: skip
    if family == "lfm2_moe":
        keys |= {
            "expert_count": config["num_experts"], "expert_used_count": config["num_experts_per_tok"],
            "expert_feed_forward_length": config["moe_intermediate_size"], "expert_gating_func": 2,
            "leading_dense_block_count": config["num_dense_layers"],
        }  # fmt: skip
    return keys


def rotary_dim(config: Metadata) -> int:
    """Of a MiniMax M2."""
    factor = config.get("partial_rotary_factor") or (config.get("rope_parameters") or {}).get("partial_rotary_factor")
    return int(config.get("rotary_dim") or config["head_dim"] * (factor or 1.0))


def latents(config: Metadata) -> dict[str, Any]:
    """`DeepseekV2Model.set_gguf_parameters`."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    latent, rotated = config["kv_lora_rank"], config["qk_rope_head_dim"]
    sigmoid = config.get("scoring_func", "sigmoid") == "sigmoid"
    return {
        "attention.head_count_kv": 1, "leading_dense_block_count": config["first_k_dense_replace"],
        "attention.q_lora_rank": config["q_lora_rank"], "attention.kv_lora_rank": latent,
        "attention.key_length": latent + rotated, "attention.value_length": latent,
        "attention.key_length_mla": config["qk_nope_head_dim"] + rotated,
        "attention.value_length_mla": config["v_head_dim"], "rope.dimension_count": rotated,
        "expert_count": config["n_routed_experts"], "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_count": config["n_shared_experts"], "expert_weights_scale": config["routed_scaling_factor"],
        "expert_weights_norm": config["norm_topk_prob"] or None, "expert_gating_func": 2 if sigmoid else 1,
        "expert_group_count": config.get("n_group"), "expert_group_used_count": config.get("topk_group"),
        "rope.scaling.yarn_log_multiplier": 0.1 * scaling["mscale_all_dim"] if "mscale_all_dim" in scaling else None,
    }  # fmt: skip


def _every(config: Metadata) -> list[str]:
    period = config.get("sliding_window_pattern") or 4
    kinds = ("full_attention", "sliding_attention")
    return [kinds[(index + 1) % period != 0] for index in range(config["num_hidden_layers"])]


def changed(config: Metadata, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A checkpoint's tensors as the converter splits, turns and squeezes them; names are still transformers'."""
    family, found = config["model_type"], dict(weights)
    if family == "gpt_oss":
        found = {}
        for name, array in weights.items():
            for end in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"):
                if not name.endswith(f".experts.{end}"):
                    continue
                stem, kind = name.removesuffix("_bias"), "bias" if end.endswith("bias") else "weight"
                turned = array if kind == "bias" else array.swapaxes(-1, -2)
                if "gate_up" in end:
                    found[f"{stem.replace('gate_up', 'gate')}.{kind}"] = np.ascontiguousarray(turned[:, ::2])
                    found[f"{stem.replace('gate_up', 'up')}.{kind}"] = np.ascontiguousarray(turned[:, 1::2])
                else:
                    found[f"{stem}.{kind}"] = np.ascontiguousarray(turned)
                break
            else:
                found[name] = array
    if family in LATENT:
        found = {name: array for name, array in weights.items() if ".2." not in name[:16]}  # for prediction
        for name in [name for name in found if name.endswith("kv_b_proj.weight")]:
            heads = found.pop(name).reshape(config["num_attention_heads"], -1, config["kv_lora_rank"])
            keys, values = np.split(heads, [config["qk_nope_head_dim"]], axis=1)
            found[name.replace("kv_b_proj", "embed_q")] = np.ascontiguousarray(keys.swapaxes(1, 2))
            found[name.replace("kv_b_proj", "unembed_out")] = np.ascontiguousarray(values)
    if family == "ernie4_5_moe":
        found = {name: array for name, array in found.items() if not name.startswith("model.mtp_")}
    if family in ("granitemoe", "qwen3_5_moe_text", "glm4_moe_lite", "ernie4_5_moe"):
        for name in list(found):
            stem = re.sub(r"(experts\.gate_up_proj|input_linear\.weight)$", "", name)
            if stem != name:
                gate, up = np.split(found.pop(name), 2, axis=1)
                found |= {f"{stem}switch_mlp.gate_proj.weight": gate, f"{stem}switch_mlp.up_proj.weight": up}
        ends = ("experts.down_proj", "output_linear.weight")
        for name in [name for name in found if name.endswith(ends)]:
            stem = re.sub(r"(experts\.down_proj|output_linear\.weight)$", "", name)
            found[f"{stem}switch_mlp.down_proj.weight"] = found.pop(name)
    if family in ("lfm2", "lfm2_moe"):
        found = {name: array.squeeze(1) if "conv.conv.weight" in name else array for name, array in found.items()}
    if family in ("lfm2_moe", "mixtral", "minimax_m2"):
        stacks: dict[str, dict[int, np.ndarray]] = {}
        for name in [name for name in found if ".experts." in name]:
            layer, _, rest = name.partition(".experts.")
            index, _, end = rest.partition(".")
            names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
            stacks.setdefault(f"{layer}.switch_mlp.{names[end[:2]]}.weight", {})[int(index)] = found.pop(name)
        found |= {name: np.stack([parts[i] for i in range(len(parts))]) for name, parts in stacks.items()}
    return found


def mapped(name: str) -> str:
    """A name of `changed` as `gguf`'s map knows it."""
    if name.endswith((".sinks", ".expert_bias")):
        return f"{name}.{'weight' if name.endswith('sinks') else 'bias'}"
    for end, short in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
        name = name.replace(f"block_sparse_moe.switch_mlp.{end}", f"block_sparse_moe.experts.{short}")
    name = name.replace("self_attn.embed_q", "self_attn.k_b_proj").replace(
        "self_attn.unembed_out", "self_attn.v_b_proj"
    )
    return name.replace(".switch_mlp.", ".experts.")
