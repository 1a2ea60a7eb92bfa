"""What llama.cpp's converters write for families whose settings are worked out: hybrids, Llama 4, Gemma 4, GPT-2 ...

Source: llama.cpp's `conversion/*.py` (0.3.36 of llama-cpp-python); the files that these converters themselves make of
the same fixtures were read with the same logits. Independent of `runner.checkpoint.gguf`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import gguf
import gguf_writer as writer
import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf_bytes import Metadata, file_bytes, vocabulary
from gguf_families import latents

ARCHITECTURES = {
    "granitemoehybrid": "GRANITE_HYBRID", "falcon_h1": "FALCON_H1", "mamba": "MAMBA", "falcon_mamba": "MAMBA",
    "gpt2": "GPT2", "gpt_bigcode": "STARCODER", "gpt_neox": "GPTNEOX", "bloom": "BLOOM", "afmoe": "AFMOE",
    "exaone_moe": "EXAONE_MOE", "hunyuan_v1_moe": "HUNYUAN_MOE", "minicpm3": "MINICPM3", "gemma3n_text": "GEMMA3N",
    "jais2": "JAIS2", "mellum": "QWEN3MOE", "glm_moe_dsa": "GLM_DSA",
    "deepseek_v32": "GLM_DSA",
    "mamba2": "MAMBA2", "jamba": "JAMBA", "qwen3_next": "QWEN3NEXT", "gemma4_text": "GEMMA4", "llama4_text": "LLAMA4",
}  # fmt: skip
NEWER = {"mellum": "mellum", "deepseek_v32": "deepseek32"}
"""Architectures that the package does not know yet, whose tensors have the names of those above."""

Weights = Mapping[str, np.ndarray]


def architecture(config: Metadata) -> gguf.MODEL_ARCH:
    if config["model_type"] == "nemotron_h":
        return (
            gguf.MODEL_ARCH.NEMOTRON_H_MOE if "E" in config["hybrid_override_pattern"] else gguf.MODEL_ARCH.NEMOTRON_H
        )
    return gguf.MODEL_ARCH[ARCHITECTURES[config["model_type"]]]


def layers_of(config: Metadata) -> int:
    return int(config.get("num_hidden_layers") or config["n_layer"])


def keys_of(config: Metadata) -> dict[str, Any]:
    """The keys below the architecture's name."""
    family, layers = config["model_type"], layers_of(config)
    hidden = config.get("hidden_size", 0)
    heads = config.get("num_attention_heads", 0)
    size = config.get("head_dim") or hidden // heads if heads else None
    keys: dict[str, Any] = {
        "block_count": layers, "embedding_length": hidden, "attention.head_count": heads,
        "context_length": config.get("max_position_embeddings", 1 << 20),
        "attention.head_count_kv": config.get("num_key_value_heads"),
        "feed_forward_length": config.get("intermediate_size", 0), "rope.freq_base": config.get("rope_theta"),
        "attention.layer_norm_rms_epsilon": config.get("rms_norm_eps", config.get("layer_norm_epsilon")),
        "attention.key_length": size, "attention.value_length": size,
        "expert_used_count": config.get("num_experts_per_tok"),
        "expert_count": config.get("num_local_experts", config.get("num_experts", config.get("n_routed_experts"))),
        "expert_feed_forward_length": config.get("moe_intermediate_size"),
    }  # fmt: skip
    if family in ("granitemoehybrid", "jamba"):
        kinds = config.get("layer_types")
        if kinds is None:
            period, offset = config["attn_layer_period"], config["attn_layer_offset"]
            kinds = ["attention" if index % period == offset else "mamba" for index in range(layers)]
        keys["attention.head_count_kv"] = [config["num_key_value_heads"] if k == "attention" else 0 for k in kinds]
    if "mamba_d_state" in config or "state_size" in config or "ssm_state_size" in config:
        keys |= {
            "ssm.conv_kernel": config.get("mamba_d_conv", config.get("conv_kernel")),
            "ssm.state_size": config.get("mamba_d_state", config.get("state_size", config.get("ssm_state_size"))),
            "ssm.inner_size": inner(config),
            "ssm.group_count": config.get("mamba_n_groups", config.get("n_groups")),
            "ssm.time_step_rank": next(
                config[name]
                for name in ("mamba_n_heads", "num_heads", "mamba_num_heads", "mamba_dt_rank", "time_step_rank")
                if name in config
            ),
        }
    if family == "granitemoehybrid":
        keys |= {
            "attention.scale": config["attention_multiplier"], "embedding_scale": config["embedding_multiplier"],
            "residual_scale": config["residual_multiplier"], "logit_scale": config["logits_scaling"],
            "expert_shared_feed_forward_length": config["shared_intermediate_size"], "rope.dimension_count": size,
            "rope.scaling.finetuned": False,
        }  # fmt: skip
    elif family in ("mamba", "falcon_mamba", "mamba2"):
        keys |= {"attention.head_count": 0, "feed_forward_length": 0}
        if family != "mamba2":
            keys["ssm.dt_b_c_rms"] = family == "falcon_mamba"
    elif family == "nemotron_h":
        pattern = config["hybrid_override_pattern"]
        wide = config["moe_intermediate_size"] if "E" in pattern else config["intermediate_size"]
        keys |= {
            "attention.head_count_kv": [config["num_key_value_heads"] if kind == "*" else 0 for kind in pattern],
            "feed_forward_length": [wide if kind in "-E" else 0 for kind in pattern],
            "attention.layer_norm_epsilon": config["layer_norm_epsilon"], "rope.dimension_count": size,
        }  # fmt: skip
        if "E" in pattern:
            keys |= {
                "expert_shared_feed_forward_length": config["moe_shared_expert_intermediate_size"],
                "expert_shared_count": config["n_shared_experts"], "expert_weights_norm": config["norm_topk_prob"],
                "expert_weights_scale": config["routed_scaling_factor"], "expert_group_count": config["n_group"],
            }  # fmt: skip
        else:
            for name in ("count", "used_count", "feed_forward_length"):
                keys.pop(f"expert_{name}")
    elif family == "qwen3_next":
        values = config["linear_num_value_heads"]
        keys |= {
            "ssm.conv_kernel": config["linear_conv_kernel_dim"], "ssm.state_size": config["linear_key_head_dim"],
            "ssm.group_count": config["linear_num_key_heads"], "ssm.time_step_rank": values,
            "ssm.inner_size": values * config["linear_value_head_dim"],
            "full_attention_interval": config["full_attention_interval"],
            "rope.dimension_count": int(config["head_dim"] * config["partial_rotary_factor"]),
            "expert_shared_feed_forward_length": config["shared_expert_intermediate_size"],
        }  # fmt: skip
    elif family == "llama4_text":
        keys |= {
            "interleave_moe_layer_step": config["interleave_moe_layer_step"], "rope.dimension_count": size,
            "expert_feed_forward_length": config["intermediate_size"],
            "feed_forward_length": config["intermediate_size_mlp"],
        }  # fmt: skip
    elif family == "gemma4_text":
        keys |= gemma4(config)
    elif family == "gemma3n_text":
        keys |= gemma3n(config)
    else:
        keys |= others(config)
    name = NEWER.get(family) or gguf.MODEL_ARCH_NAMES[architecture(config)]
    return {
        "general.architecture": name,
        **{f"{name}.{key}": found for key, found in keys.items() if found is not None},
    }


def others(config: Metadata) -> dict[str, Any]:
    """Keys of families with experts, and of older ones: these write four times the hidden size for the MLP's width."""
    family = config["model_type"]
    if family in ("gpt2", "gpt_bigcode", "bloom"):
        hidden = config.get("n_embd") or config.get("n_embed") or config["hidden_size"]
        heads = config.get("n_head") or config["num_attention_heads"]
        return {
            "attention.head_count": heads, "feed_forward_length": 4 * hidden, "embedding_length": hidden,
            "block_count": config["n_layer"], "context_length": config.get("n_positions", 2048),
            "attention.head_count_kv": {"gpt_bigcode": 1, "bloom": heads}.get(family),
            "attention.layer_norm_epsilon": config["layer_norm_epsilon"],
            "attention.layer_norm_rms_epsilon": None, "attention.key_length": None, "attention.value_length": None,
        }  # fmt: skip
    if family == "gpt_neox":
        size = config["hidden_size"] // config["num_attention_heads"]
        factor = (config.get("rope_parameters") or config).get("partial_rotary_factor", config.get("rotary_pct"))
        return {
            "rope.dimension_count": int(factor * size), "attention.key_length": None,
            "attention.layer_norm_epsilon": config["layer_norm_eps"], "attention.value_length": None,
            "use_parallel_residual": config["use_parallel_residual"],
        }  # fmt: skip
    if family == "minicpm3":
        rotated = config["qk_rope_head_dim"]
        return {
            "attention.key_length": config["qk_nope_head_dim"] + rotated, "rope.dimension_count": rotated,
            "attention.value_length": None, "attention.q_lora_rank": config["q_lora_rank"],
            "attention.kv_lora_rank": config["kv_lora_rank"],
        }  # fmt: skip
    if family == "hunyuan_v1_moe":
        return {
            "expert_used_count": config["moe_topk"][0], "expert_shared_count": config["num_shared_expert"][0],
            "expert_feed_forward_length": config["moe_intermediate_size"][0],
            "expert_shared_feed_forward_length": config["intermediate_size"],
        }  # fmt: skip
    if family == "mellum":
        full, local = (config["rope_parameters"][f"{kind}_attention"] for kind in ("full", "sliding"))
        return {
            "attention.sliding_window": config["sliding_window"],
            "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in config["layer_types"]],
            "rope.freq_base": full["rope_theta"], "rope.freq_base_swa": local["rope_theta"],
            "rope.scaling.type": "yarn", "rope.scaling.factor": full["factor"],
            "rope.scaling.original_context_length": full["original_max_position_embeddings"],
            "rope.scaling.yarn_beta_fast": full["beta_fast"], "rope.scaling.yarn_beta_slow": full["beta_slow"],
        }  # fmt: skip
    if family == "jais2":
        return {"attention.layer_norm_epsilon": config["layer_norm_eps"], "rope.dimension_count": config["head_dim"]}
    if family in ("glm_moe_dsa", "deepseek_v32"):
        sizes = {"head_count": "index_n_heads", "key_length": "index_head_dim", "top_k": "index_topk"}
        return {
            **latents(config), **{f"attention.indexer.{key}": config[name] for key, name in sizes.items()},
            "attention.indexer.types": [True, True] if family == "glm_moe_dsa" else None,
        }  # fmt: skip
    if family not in ("afmoe", "exaone_moe"):
        return {}
    trinity = family == "afmoe"
    pattern = {} if trinity else {"attention.sliding_window_pattern": [True, True, False]}
    return {
        "expert_gating_func": 2, "expert_shared_count": config["num_shared_experts"],
        "expert_weights_norm": config["route_norm" if trinity else "norm_topk_prob"],
        "expert_weights_scale": config["route_scale" if trinity else "routed_scaling_factor"],
        "leading_dense_block_count": config["num_dense_layers" if trinity else "first_k_dense_replace"],
        "expert_group_count": 1, "expert_group_used_count": 1, "attention.sliding_window": config["sliding_window"],
        **pattern,
    }  # fmt: skip


def inner(config: Metadata) -> int:
    """Width of a Mamba layer inside."""
    if "mamba_num_heads" in config:
        return int(config["mamba_num_heads"] * config["mamba_head_dim"])
    expand = config.get("mamba_expand", config.get("expand"))
    given = config.get("mamba_d_ssm") or (config.get("intermediate_size") if "state_size" in config else None)
    return int(given or expand * config["hidden_size"])


def gemma4(config: Metadata) -> dict[str, Any]:
    """`Gemma4Model.set_gguf_parameters`."""
    layers, shared = config["num_hidden_layers"], config["num_kv_shared_layers"]
    local = [kind == "sliding_attention" for kind in config["layer_types"]]
    heads, everywhere = config["num_key_value_heads"], config["num_global_key_value_heads"]
    rope, size, full = config["rope_parameters"], config["head_dim"], config["global_head_dim"]
    width, wide = config["intermediate_size"], config["use_double_wide_mlp"]
    return {
        "attention.head_count_kv": heads if everywhere is None else [heads if one else everywhere for one in local],
        "attention.key_length": full, "attention.value_length": full, "attention.key_length_swa": size,
        "attention.value_length_swa": size, "rope.dimension_count": full, "rope.dimension_count_swa": size,
        "attention.sliding_window": config["sliding_window"], "attention.sliding_window_pattern": local,
        "attention.shared_kv_layers": shared, "rope.freq_base": rope["full_attention"]["rope_theta"],
        "rope.freq_base_swa": rope["sliding_attention"]["rope_theta"],
        "final_logit_softcapping": config["final_logit_softcapping"],
        "embedding_length_per_layer_input": config["hidden_size_per_layer_input"] or 0,
        "feed_forward_length": [2 * width if wide and i >= layers - shared else width for i in range(layers)],
        "expert_used_count": config["top_k_experts"],
    }  # fmt: skip


def gemma3n(config: Metadata) -> dict[str, Any]:
    """`Gemma3NModel.set_gguf_parameters`."""
    shares = config["activation_sparsity_pattern"]
    return {
        "feed_forward_length": config["intermediate_size"], "rope.freq_base_swa": config["rope_local_base_freq"],
        "attention.sliding_window": config["sliding_window"],
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in config["layer_types"]],
        "attention.shared_kv_layers": config["num_kv_shared_layers"], "altup.active_idx": config["altup_active_idx"],
        "altup.num_inputs": config["altup_num_inputs"],
        "embedding_length_per_layer_input": config["hidden_size_per_layer_input"],
        "activation_sparsity_scale": [NormalDist().inv_cdf(one) if one else -math.inf for one in shares],
        "final_logit_softcapping": config["final_logit_softcapping"],
    }  # fmt: skip


def stacked(weights: Weights) -> dict[str, np.ndarray]:
    """All experts' matrices of a layer as one tensor."""
    found: dict[str, np.ndarray] = {}
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name, array in weights.items():
        stream = re.fullmatch(r"(model\.altup_\w*projections)\.(\d+)\.weight", name)
        if stream is not None:
            stacks.setdefault(f"{stream[1]}.weight", {})[int(stream[2])] = array
            continue
        expert = re.fullmatch(r"(?:model|backbone)(\.layers\.\d+)\.\w+\.experts\.(\d+)\.(\w+\.weight)", name)
        if expert is None:
            found[name] = array
        else:
            stacks.setdefault(f"model{expert[1]}.mlp.experts.{expert[3]}", {})[int(expert[2])] = array
    return found | {name: np.stack([parts[i] for i in range(len(parts))]) for name, parts in stacks.items()}


def split(name: str, array: np.ndarray, config: Metadata) -> dict[str, np.ndarray]:
    """A tensor as the converter renames, turns, cuts and multiplies it, by names that `gguf`'s map knows."""
    family = config["model_type"]
    if family == "granitemoehybrid" and "input_linear" in name:
        gate, up = np.split(array, 2, axis=-2)
        shared = "shared_mlp" in name
        end = "mlp.shared_expert" if shared and config["num_local_experts"] else "mlp" if shared else "mlp.experts"
        stem = name[: name.index(".", len("model.layers."))]
        return {f"{stem}.{end}.gate_proj.weight": gate, f"{stem}.{end}.up_proj.weight": up}
    if family == "granitemoehybrid" and name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        paired = array.reshape(heads, 2, array.shape[0] // heads // 2, -1)
        return {name: np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(array.shape)}
    if family == "llama4_text" and name.endswith("experts.gate_up_proj"):
        gate, up = np.split(array.swapaxes(1, 2), 2, axis=1)
        return {name.replace("gate_up", part) + ".weight": each for part, each in (("gate", gate), ("up", up))}
    if family == "llama4_text" and name.endswith("experts.down_proj"):
        return {f"{name}.weight": array.swapaxes(1, 2)}
    if family == "qwen3_next" and "in_proj_qkvz" in name:
        keys, values, size = (config[f"linear_{part}"] for part in ("key_head_dim", "value_head_dim", "num_key_heads"))
        share = values * config["linear_num_value_heads"] // size
        by_head = array.reshape(size, -1, array.shape[-1])
        parts = np.split(by_head, [keys, 2 * keys, 2 * keys + share], axis=1)
        *qkv, z = (part.reshape(-1, array.shape[-1]) for part in parts)
        return {name.replace("qkvz", "qkv"): np.concatenate(qkv), name.replace("qkvz", "z"): z}
    if family == "falcon_h1":
        array = multiplied(name, array, config)
    if family == "gpt2" and re.search(r"c_(attn|proj|fc)\.weight", name):
        return {name: array.T}
    if family in ("gpt_neox", "bloom") and "query_key_value" in name:
        heads = config.get("n_head") or config["num_attention_heads"]
        by_head = array.reshape(heads, 3, -1, *array.shape[1:])
        return {name.removeprefix("transformer."): by_head.swapaxes(0, 1).reshape(array.shape)}
    if name.endswith("expert_bias"):
        return {f"{name}.bias": array}
    if family in ("glm_moe_dsa", "deepseek_v32") and name.endswith("kv_b_proj.weight"):
        heads = array.reshape(config["num_attention_heads"], -1, config["kv_lora_rank"])
        keys, values = np.split(heads, [config["qk_nope_head_dim"]], axis=1)
        return {name.replace("kv_b", "k_b"): keys.swapaxes(1, 2), name.replace("kv_b", "v_b"): values}
    if name.endswith("correct_output_scale"):
        return {f"{name}.weight": array}
    if family == "gemma4_text" and (name.endswith("layer_scalar") or ".experts." in name):
        return {f"{name}.weight": array}
    if "conv1d.weight" in name:
        array = array.squeeze(1)
    if name.endswith("A_log"):
        array = -np.exp(array)
    if config["model_type"] not in ("mamba", "falcon_mamba", "jamba", "qwen3_next"):
        if name.endswith(("A_log", ".D")):
            array = array[:, None]
        if re.search(r"(mamba|mixer)\.norm\.weight", name):
            array = array.reshape(config.get("mamba_n_groups", config.get("n_groups")), -1)
    if family == "qwen3_next" and name.endswith("norm.weight") and "linear_attn" not in name:
        array = array + 1
    if name.endswith("shared_expert_gate.weight"):
        array = array.squeeze(0)
    if family == "bloom":
        name = name.removeprefix("transformer.")
    return {name.replace(".dt_bias", ".dt_proj.bias").replace("score_correction_bias", "score_correction.bias"): array}


def multiplied(name: str, array: np.ndarray, config: Metadata) -> np.ndarray:
    """`FalconH1Model.modify_tensors`."""
    factors = {
        "down_proj": config["mlp_multipliers"][1], "gate_proj": config["mlp_multipliers"][0],
        "k_proj": config["key_multiplier"] * config["attention_in_multiplier"],
        "q_proj": config["attention_in_multiplier"], "v_proj": config["attention_in_multiplier"],
        "o_proj": config["attention_out_multiplier"], "out_proj": config["ssm_out_multiplier"],
        "in_proj": config["ssm_in_multiplier"], "lm_head": config["lm_head_multiplier"],
        "embed_tokens": config["embedding_multiplier"],
    }  # fmt: skip
    part = next((part for part in factors if f"{part}." in name), None)
    array = array if part is None else array * factors[part]
    if part == "in_proj":
        width, state = inner(config), config["mamba_n_groups"] * config["mamba_d_state"]
        rows = np.split(array, [width, 2 * width, 2 * width + state, 2 * width + 2 * state])
        array = np.concatenate([each * f for each, f in zip(rows, config["ssm_multipliers"], strict=True)])
    return array


def write(path: Path, config: Metadata, weights: Weights, **changes: Any) -> Path:
    """A checkpoint as one GGUF file; `changes` are of metadata, by whole keys, None to leave one out."""
    names = gguf.get_tensor_name_map(architecture(config), layers_of(config))
    tensors: dict[str, tuple[np.ndarray, Type]] = {}
    for stored, whole in stacked(weights).items():
        for name, array in split(stored, whole, config).items():
            scaled = re.fullmatch(r"model\.layers\.(\d+)\.router\.(scale|per_expert_scale)", name)
            if scaled is not None:
                found = f"blk.{scaled[1]}.{'ffn_gate_inp' if scaled[2] == 'scale' else 'ffn_down_exps'}.scale"
            else:
                found = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if found is None:
                beyond = re.match(r"model\.layers\.(\d+)\.", name)
                assert (
                    name.startswith("mtp.")
                    or (beyond and int(beyond[1]) >= layers_of(config))
                    or name.endswith((".attn.bias", "attention.bias", "masked_bias", "inv_freq"))
                ), name
                continue
            tensors[found] = (np.ascontiguousarray(array, np.float32), Type.F32)
    if config["model_type"] == "gemma4_text":
        half = config["global_head_dim"] // 2
        turning = int(half * config["rope_parameters"]["full_attention"]["partial_rotary_factor"])
        tensors["rope_freqs.weight"] = (np.float32([1.0] * turning + [1e30] * (half - turning)), Type.F32)
    tensors |= writer._rope_tables(config) if config["model_type"] == "llama4_text" else {}
    metadata = {**keys_of(config), **vocabulary(config["vocab_size"]), **changes}
    path.write_bytes(file_bytes({key: value for key, value in metadata.items() if value is not None}, tensors))
    return path


def cut(source: Path, target: Path, layers: Sequence[int], **changes: Any) -> Metadata:
    """A fixture made of some of its layers, in any order, with other settings; None leaves one out."""
    config = json.loads((source / "config.json").read_text())
    config |= {"num_hidden_layers" if "num_hidden_layers" in config else "n_layer": len(layers)} | changes
    config = {key: value for key, value in config.items() if value is not None}
    weights: dict[str, mx.array] = {}
    for name, array in writer.weights_of(source).items():
        found = re.match(r"(.*\blayers\.)(\d+)(\..*)", name)
        places = [i for i, layer in enumerate(layers) if found and layer == int(found[2])]
        if not name.startswith("mtp."):
            new = [f"{found[1]}{place}{found[3]}" for place in places] if found else [name]
            weights |= {each: mx.array(array) for each in new}
    if (
        config.get("tie_word_embeddings") is False
        and config["model_type"] == "falcon_h1"
        and "lm_head.weight" not in weights
    ):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"][::-1]
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(target / "model.safetensors"), weights, {"format": "pt"})
    return config
