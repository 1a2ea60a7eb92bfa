"""Converting transformers' checkpoints to the GGUF files that llama.cpp's converters would write.

Names come from the `gguf` package's own maps (0.19.0); what is permuted, added or renamed follows llama.cpp's
`conversion/*.py` of the same release. Shares no code with `runner.checkpoint.gguf`, which tests compare with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf_bytes import Metadata, file_bytes, vocabulary
from gguf_families import ARCHITECTURES as OTHERS
from gguf_families import PERMUTED, changed, keys_of, mapped

from runner.config.rope import RopeScaling, attention_factor, inverse_frequencies
from runner.config.rope_keys import normalise

ARCHITECTURES = {
    "llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "gemma": "GEMMA", "gemma2": "GEMMA2",
    "gemma3_text": "GEMMA3", "phi3": "PHI3", "starcoder2": "STARCODER2",
    "qwen3_5_text": "QWEN35", "qwen3_5_moe_text": "QWEN35MOE", "qwen3_moe": "QWEN3MOE",
    "olmoe": "OLMOE", "dots1": "DOTS1", "glm4_moe": "GLM4_MOE",
    "arcee": "ARCEE", "solar_open": "GLM4_MOE", "internlm3": "LLAMA",
    "iquestcoder": "LLAMA", **OTHERS,
}  # fmt: skip

ONE_ADDED = ("gemma", "qwen3_5", "nemotron")
"""Families to whose norms the converters add 1."""


def _scaling(config: Metadata) -> tuple[Metadata | None, float | None]:
    """The config's `rope_scaling`, and its local RoPE base where it has one below `rope_parameters`."""
    nested = config.get("rope_parameters") or {}
    if "full_attention" in nested:
        return nested["full_attention"], nested["sliding_attention"]["rope_theta"]
    return normalise(config).get("rope_scaling"), config.get("rope_local_base_freq")


def _theta(config: Metadata) -> float:
    nested = config.get("rope_parameters") or {}
    return float(nested.get("full_attention", nested).get("rope_theta", config.get("rope_theta", 10000.0)))


def metadata_of(config: Metadata) -> dict[str, Any]:
    """The metadata keys below the architecture's name, as llama.cpp's converter of the family writes them."""
    family = config["model_type"]
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or hidden // heads
    scaling, local = _scaling(config)
    scaling = scaling or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    keys: dict[str, Any] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": hidden,
        "feed_forward_length": config.get("intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "rope.freq_base": _theta(config),
        "attention.layer_norm_rms_epsilon": config.get("rms_norm_eps"),
        "attention.layer_norm_epsilon": config.get("norm_epsilon"),
        "vocab_size": config["vocab_size"],
    }
    if config.get("head_dim"):
        keys |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}
    if kind == "yarn":
        keys["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
        keys["rope.scaling.yarn_attn_factor"] = scaling.get("attention_factor")
        keys["rope.scaling.yarn_beta_fast"] = scaling.get("beta_fast")
        keys["rope.scaling.yarn_beta_slow"] = scaling.get("beta_slow")
    if family in ("llama", "mistral", "arcee"):
        keys["rope.dimension_count"] = head_dim
    if family.startswith("qwen3_5"):
        keys |= {
            "ssm.conv_kernel": config["linear_conv_kernel_dim"], "ssm.state_size": config["linear_key_head_dim"],
            "ssm.group_count": config["linear_num_key_heads"], "ssm.time_step_rank": config["linear_num_value_heads"],
            "ssm.inner_size": config["linear_num_value_heads"] * config["linear_value_head_dim"],
            "attention.recurrent_layers": [kind == "linear_attention" for kind in config["layer_types"]],
            "full_attention_interval": config["full_attention_interval"],
            "rope.dimension_count": int(head_dim * config["rope_parameters"]["partial_rotary_factor"]),
            "rope.dimension_sections": [*config["rope_parameters"]["mrope_section"], 0],
        }  # fmt: skip
    keys |= keys_of(config, head_dim, _theta(config)) or _experts(config)
    if family in ("mistral", "mixtral", "gemma2", "gemma3_text", "phi3", "starcoder2"):
        keys["attention.sliding_window"] = config.get("sliding_window") or 0
    if family == "gemma2":
        keys["attn_logit_softcapping"] = config["attn_logit_softcapping"] or 0.0
        keys["final_logit_softcapping"] = config["final_logit_softcapping"] or 0.0
    if family == "gemma3_text":
        keys["attention.sliding_window_pattern"] = config["sliding_window_pattern"]
        keys["rope.freq_base_swa"] = local
    if family in ("gemma2", "gemma3_text"):
        keys["attention.scale"] = config["query_pre_attn_scalar"] ** -0.5
    if family == "phi3":
        keys["rope.dimension_count"] = int(head_dim * config.get("partial_rotary_factor", 1.0))
        keys["rope.scaling.original_context_length"] = config["original_max_position_embeddings"]
        if kind == "longrope":
            original = {"original_max_position_embeddings": config["original_max_position_embeddings"]}
            parsed = RopeScaling.from_dict({**normalise(config)["rope_scaling"], **original})
            limit = config["max_position_embeddings"]
            keys["rope.scaling.attn_factor"] = attention_factor(parsed, max_position_embeddings=limit)
    name = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[ARCHITECTURES[family]]]
    return {"general.architecture": name, **{f"{name}.{k}": v for k, v in keys.items() if v is not None}}


def _experts(config: Metadata) -> dict[str, Any]:
    """Keys about experts: of `Qwen2MoeModel`, and of `Glm4MoeModel` and `Dots1Model` for DeepSeek's way of choosing."""
    routed = config.get("n_routed_experts")
    if not (routed or config.get("num_experts")):
        return {}
    keys = {
        "expert_count": routed or config["num_experts"], "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": config.get("moe_intermediate_size"),
        "expert_shared_feed_forward_length": config.get("shared_expert_intermediate_size"),
    }  # fmt: skip
    if routed:
        keys |= {
            "leading_dense_block_count": config["first_k_dense_replace"],
            "expert_shared_count": config["n_shared_experts"], "expert_weights_scale": config["routed_scaling_factor"],
            "expert_weights_norm": config["norm_topk_prob"], "expert_gating_func": 2,
            "expert_group_count": config.get("n_group"), "expert_group_used_count": config.get("topk_group"),
        }  # fmt: skip
    if config["model_type"] in ("glm4_moe", "solar_open"):
        factor = (config.get("rope_parameters") or config).get("partial_rotary_factor", 1.0)
        predicting = config.get("num_nextn_predict_layers", 0)
        keys |= {
            "rope.dimension_count": int(config["head_dim"] * factor), "nextn_predict_layers": predicting,
            "block_count": config["num_hidden_layers"] + predicting,
        }  # fmt: skip
    return keys


def stacked(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The converters put all experts' matrices of a layer into one tensor, and a correction's name has another end."""
    found: dict[str, np.ndarray] = {}
    for name, array in weights.items():
        layer, _, expert = name.partition(".mlp.experts.")
        if not expert[:1].isdigit():
            found[name.replace("e_score_correction_bias", "e_score_correction.bias")] = array
        elif expert.startswith("0."):
            count = sum(other.startswith(f"{layer}.mlp.experts.") and other.endswith(expert[2:]) for other in weights)
            parts = [weights[f"{layer}.mlp.experts.{index}.{expert[2:]}"] for index in range(count)]
            found[f"{layer}.mlp.experts.{expert[2:]}"] = np.stack(parts)
    return found


def tensors_of(
    config: Metadata, weights: Mapping[str, np.ndarray], kind: Callable[[str], Type] = lambda name: Type.F32
) -> dict[str, tuple[np.ndarray, Type]]:
    """A checkpoint's tensors under GGUF's names; `kind` maps a matrix's GGUF name to its type, and vectors are F32."""
    family = config["model_type"]
    layers = config["num_hidden_layers"] + (config.get("num_nextn_predict_layers") or 0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[family]], layers)
    heads = {"attn_q": config["num_attention_heads"]}
    heads["attn_k"] = config.get("num_key_value_heads") or heads["attn_q"]
    result = {}
    for name, stored in stacked(changed(config, weights)).items():
        array = stored.astype(np.float32)
        if family.startswith("qwen3_5"):
            name, array = _delta(name, array, config)
        found = names.get_name(mapped(name), try_suffixes=(".weight", ".bias"))
        if found is None:
            assert "inv_freq" in name, name
            continue
        part = found.split(".")[-2]
        if family in PERMUTED and part in heads:
            paired = array.reshape(heads[part], 2, array.shape[0] // heads[part] // 2, *array.shape[1:])
            array = np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(array.shape)
        if family.startswith(ONE_ADDED) and name.endswith("norm.weight") and "linear_attn" not in name:
            array = array + 1
        if name.endswith(("shared_expert_gate.weight", "moe_statics.e_score_correction.bias")):
            array = array.squeeze(0)
        chosen = kind(found) if array.ndim > 1 else Type.F32
        result[found] = (gguf.quantize(array, chosen), chosen)
    return result | _rope_tables(config)


def _delta(name: str, array: np.ndarray, config: Metadata) -> tuple[str, np.ndarray]:
    """A tensor of Qwen 3.5 as `_LinearAttentionVReorderBase` and `Qwen3NextModel` make it, but for norms."""
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    before = 2 * keys * config["linear_key_head_dim"]

    def sorted_heads(part: np.ndarray, size: int) -> np.ndarray:
        """Value heads of one key head after the other -> the first of each key head, the second of each, ..."""
        return part.reshape(keys, values // keys, size, *part.shape[1:]).swapaxes(0, 1).reshape(part.shape)

    if "linear_attn" not in name:
        return name, array
    if name.endswith("conv1d.weight"):
        array = array.squeeze(1)
    if name.endswith(("conv1d.weight", "in_proj_qkv.weight")):
        rows = sorted_heads(array[before:], config["linear_value_head_dim"])
        array = np.concatenate([array[:before], rows])
    elif name.endswith("in_proj_z.weight"):
        array = sorted_heads(array, config["linear_value_head_dim"])
    elif name.endswith("out_proj.weight"):
        array = np.ascontiguousarray(sorted_heads(array.T, config["linear_value_head_dim"]).T)
    elif name.endswith(("in_proj_a.weight", "in_proj_b.weight", "A_log", "dt_bias")):
        array = sorted_heads(array, 1)
    array = -np.exp(array) if name.endswith("A_log") else array
    return name.replace("dt_bias", "dt_proj.bias"), array


def _rope_tables(config: Metadata) -> dict[str, tuple[np.ndarray, Type]]:
    scaling = _scaling(config)[0] or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "longrope":
        factors = {f"rope_factors_{n}.weight": np.float32(scaling[f"{n}_factor"]) for n in ("long", "short")}
        return {name: (table, Type.F32) for name, table in factors.items()}
    if kind != "llama3":
        return {}
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    size = {"dims": head_dim, "base": _theta(config), "max_position_embeddings": config["max_position_embeddings"]}
    plain = inverse_frequencies(RopeScaling(), **size)
    scaled = inverse_frequencies(RopeScaling.from_dict({k: v for k, v in scaling.items() if k != "rope_theta"}), **size)
    return {"rope_freqs.weight": (np.float32([p / s for p, s in zip(plain, scaled, strict=True)]), Type.F32)}


def weights_of(directory: Path) -> dict[str, np.ndarray]:
    """Read every tensor of a safetensors checkpoint as float32."""
    found = mx.load(str(directory / "model.safetensors"))
    assert isinstance(found, dict)
    return {name: np.array(array.astype(mx.float32)) for name, array in found.items()}


def write_model(
    path: Path, config: Metadata, weights: Mapping[str, np.ndarray], kind: Callable[[str], Type] = lambda name: Type.F32
) -> Path:
    """Write a checkpoint as one GGUF file, with a vocabulary of the right size."""
    metadata = {**metadata_of(config), **vocabulary(config["vocab_size"])}
    path.write_bytes(file_bytes(metadata, tensors_of(config, weights, kind)))
    return path
