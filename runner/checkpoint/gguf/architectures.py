"""GGUF architectures as tables: what llama.cpp's converters renamed, reordered or left out, and how to undo it.

Source: llama.cpp's conversion scripts and model loaders (0.3.36 of llama-cpp-python) and transformers' config classes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How GGUF files with one value of `general.architecture` differ from transformers' checkpoints.

    Attributes:
        model_type, class_name: transformers' names for the family.
        blocks: a layer's tensors: GGUF's name -> transformers' name below `model.layers.N`.
        keys: metadata key below `<architecture>.` -> key of config.json, in addition to `COMMON_KEYS`.
        fixed: keys of config.json whose values the files do not carry.
        flags: boolean key of config.json -> the tensor whose presence makes it true.
        interleaved: tensors whose rows llama.cpp reordered for the RoPE pairs (2i, 2i+1) -> the config key that gives
            their number of heads.
        norms_plus_one: norm weights are stored with 1 added, which transformers' model adds when it runs.
        top: tensors outside layers: GGUF's name -> transformers' name.
        head_dim: config.json has the key `head_dim`; other families derive the head size.
        windowed: model_type and class of files that have a sliding window, where they differ from the others'.
        window_period: each `window_period`-th layer has full attention and the others a sliding window, unless the file
            says otherwise.
        period_key: config key that holds another period; None where the family's config has no such key.
        query_scalar: not None where config.json has query_pre_attn_scalar, which the files leave out. Its value is the
            head size, but hidden_size / num_attention_heads in models with `query_scalar` layers (the 27B).
        whole: a layer's tensors whose names have another end in transformers than in GGUF, by their whole names there.
        plain_norms: norms to which nothing is added all the same.
        negated_exp: tensors that are stored as minus their exponential.
        value_heads: tensors whose value heads llama.cpp sorted -> how (`runner.checkpoint.gguf.value_heads`).
        truths: boolean metadata key -> key of config.json.
        only: metadata keys that do not affect the results if they have this value, the family's own.
        needed: metadata keys that llama.cpp may do without, but whose absence means another value to transformers.
        yarn: keys of a YaRN's `rope_scaling` whose values the files do not carry.
        layer_kinds: layer_types of layers without and with key-value heads, a number per layer in the files.
        log_multiplier: what files multiply YaRN's `mscale_all_dim` by; None: they do not have it.
        tempered: files may have the scale of the queries' temperature, which config.json has below its RoPE settings.
        latent: attention has DeepSeek's latents, of which the files give other sizes than config.json.
        with_experts: the architecture of files that have experts, under the same name.
        flattened: matrices of one row that are stored as vectors.
        predicts: files may have layers for multi-token prediction behind the others, which are left unread.
        rstrip: where not None, control tokens take the white space after them, except these tokens (as in the family's
            tokenizer.json).
    """

    model_type: str
    class_name: str
    blocks: Mapping[str, str]
    keys: Mapping[str, str]
    fixed: Mapping[str, Any]
    flags: Mapping[str, str] = field(default_factory=dict)
    interleaved: Mapping[str, str] = field(default_factory=dict)
    norms_plus_one: bool = False
    top: Mapping[str, str] = field(default_factory=lambda: TOP)
    head_dim: bool = True
    windowed: tuple[str, str] | None = None
    window_period: int | None = None
    period_key: str | None = None
    query_scalar: int | None = None
    whole: Mapping[str, str] = field(default_factory=dict)
    plain_norms: frozenset[str] = frozenset()
    negated_exp: frozenset[str] = frozenset()
    value_heads: Mapping[str, str] = field(default_factory=dict)
    truths: Mapping[str, str] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)
    needed: frozenset[str] = frozenset()
    yarn: Mapping[str, Any] = field(default_factory=dict)
    layer_kinds: tuple[str, str] | None = None
    log_multiplier: float | None = None
    tempered: bool = False
    latent: bool = False
    with_experts: Architecture | None = None
    flattened: frozenset[str] = frozenset()
    predicts: bool = False
    rstrip: tuple[str, ...] | None = None


ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
IGNORED = re.compile(r"blk\.\d+\.(attn_rot_embd|rope_freqs)(\.weight)?")
"""Names of the RoPE frequency tables per layer that old converters wrote and nothing reads."""

ZERO_MEANS_NONE = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")

COMMON_KEYS: Mapping[str, str] = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "context_length": "max_position_embeddings",
}

HARMLESS: Mapping[str, tuple[Any, ...] | None] = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_feed_forward_length": None,  # the tensors' own width, which is checked against the other sizes
    "rope.scaling.finetuned": None,
    "tensor_data_layout": None,
    "vocab_size": None,
}
"""Metadata keys that do not affect the results if they have one of these values (None: any value)."""

_RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
}
_GATED = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_PRE = {**_ATTENTION, **_GATED, "ffn_norm": "post_attention_layernorm"}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.switch_mlp.gate_proj",
    "ffn_up_exps": "mlp.switch_mlp.up_proj",
    "ffn_down_exps": "mlp.switch_mlp.down_proj",
}
_SHARED_EXPERTS = {
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
_CORRECTION = {"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"}
_STACKED = {
    "ffn_gate_exps": "block_sparse_moe.switch_mlp.gate_proj",
    "ffn_up_exps": "block_sparse_moe.switch_mlp.up_proj",
    "ffn_down_exps": "block_sparse_moe.switch_mlp.down_proj",
}
_GATED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_CHOSEN = {"expert_used_count": "num_experts_per_tok"}
_BALANCED = {
    **_CHOSEN,
    "expert_count": "n_routed_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_count": "n_shared_experts",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
    "leading_dense_block_count": "first_k_dense_replace",
}
_LOCAL = {
    **_CHOSEN,
    "expert_count": "num_local_experts",
    "expert_feed_forward_length": "intermediate_size",
}
_MANY = {
    **_CHOSEN,
    "expert_count": "num_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
_NORMALIZED = {"expert_weights_norm": "norm_topk_prob"}
_SIGMOID = {"expert_gating_func": 2}  # llama.cpp's number of it
_POST = {
    **{name: found for name, found in _ATTENTION.items() if name != "attn_norm"},
    **_GATED,
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PARALLEL = {name: found for name, found in _PRE.items() if name != "ffn_norm"}
_PAIRED = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
_LAYER_NORM = {"attention.layer_norm_epsilon": "layer_norm_eps"}
_BIASES = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_SCALES = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
_SHORT_CONVOLUTIONS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.out_proj",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
    "shortconv.conv": "conv.conv",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.out_proj": "conv.out_proj",
    "attn_norm": "operator_norm",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
}
_SANDWICH = {
    **_ATTENTION,
    **_GATED,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}

_DELTA = {
    **_ATTENTION,
    **_QK_NORMS,
    "post_attention_norm": "post_attention_layernorm",
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
_DELTA_SIZES = {
    **_RMS,
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
}
_DELTA_FLOATS = {"ssm_a": "linear_attn.A_log", "ssm_dt.bias": "linear_attn.dt_bias"}
_DELTA_HEADS = {
    "attn_qkv": "mixed",
    "ssm_conv1d": "mixed",
    "attn_gate": "values",
    "ssm_beta": "heads",
    "ssm_alpha": "heads",
    "ssm_a": "heads",
    "ssm_dt": "heads",
    "ssm_out": "columns",
}
_LATENTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b": "self_attn.embed_q",
    "attn_v_b": "self_attn.unembed_out",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        model_type="llama",
        class_name="LlamaForCausalLM",
        blocks=_PRE,
        keys={**_RMS, "attention.sliding_window": "sliding_window"},
        fixed={"hidden_act": "silu"},
        flags={"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_gate.bias"},
        interleaved=_PAIRED,
        windowed=("mistral", "MistralForCausalLM"),
        with_experts=Architecture(
            model_type="mixtral",
            class_name="MixtralForCausalLM",
            blocks={
                **_ATTENTION,
                **_STACKED,
                "ffn_norm": "post_attention_layernorm",
                "ffn_gate_inp": "block_sparse_moe.gate",
            },
            keys={**_RMS, **_WINDOW, **_LOCAL},
            fixed={"hidden_act": "silu", "sliding_window": None},
            interleaved=_PAIRED,
        ),
    ),
    "mistral3": Architecture(
        model_type="ministral3",
        class_name="Ministral3ForCausalLM",
        blocks=_PRE,
        keys=_RMS,
        fixed={"hidden_act": "silu", "sliding_window": None, "rope_scaling": {"rope_type": "default"}},
        interleaved=_PAIRED,
        log_multiplier=1.0,
        tempered=True,
    ),
    "qwen2": Architecture(
        model_type="qwen2",
        class_name="Qwen2ForCausalLM",
        blocks=_PRE,
        keys=_RMS,
        fixed={"hidden_act": "silu"},
        head_dim=False,
    ),
    "qwen3": Architecture(
        model_type="qwen3",
        class_name="Qwen3ForCausalLM",
        blocks={**_PRE, **_QK_NORMS},
        keys=_RMS,
        fixed={"hidden_act": "silu"},
        flags={"attention_bias": "blk.0.attn_q.bias"},
    ),
    "qwen3moe": Architecture(
        model_type="qwen3_moe",
        class_name="Qwen3MoeForCausalLM",
        blocks={**_ATTENTION, **_QK_NORMS, **_EXPERTS, "ffn_norm": "post_attention_layernorm"},
        keys={**_RMS, **_CHOSEN, "expert_count": "num_experts", "expert_feed_forward_length": "moe_intermediate_size"},
        fixed={"hidden_act": "silu", "norm_topk_prob": True},
        flags={"attention_bias": "blk.0.attn_q.bias"},
    ),
    "olmoe": Architecture(
        model_type="olmoe",
        class_name="OlmoeForCausalLM",
        blocks={**_ATTENTION, **_QK_NORMS, **_EXPERTS, "ffn_norm": "post_attention_layernorm"},
        keys={**_RMS, **_CHOSEN, "expert_count": "num_experts"},
        fixed={"hidden_act": "silu", "norm_topk_prob": False},
        flags={"attention_bias": "blk.0.attn_q.bias"},
        head_dim=False,
    ),
    "dots1": Architecture(
        model_type="dots1",
        class_name="Dots1ForCausalLM",
        blocks={**_PRE, **_QK_NORMS, **_EXPERTS, **_SHARED_EXPERTS},
        keys={**_RMS, **_BALANCED},
        fixed={"hidden_act": "silu", "sliding_window": None},
        flags={"attention_bias": "blk.0.attn_q.bias"},
        whole=_CORRECTION,
        truths=_NORMALIZED,
        only=_SIGMOID,
    ),
    "glm4moe": Architecture(
        model_type="glm4_moe",
        class_name="Glm4MoeForCausalLM",
        blocks={
            **_ATTENTION,
            **_GATED,
            **_QK_NORMS,
            **_EXPERTS,
            **_SHARED_EXPERTS,
            "post_attention_norm": "post_attention_layernorm",
        },
        keys={**_RMS, **_BALANCED},
        fixed={"hidden_act": "silu", "num_nextn_predict_layers": 0, "partial_rotary_factor": 1.0},
        flags={"attention_bias": "blk.0.attn_q.bias", "use_qk_norm": "blk.0.attn_q_norm.weight"},
        whole=_CORRECTION,
        truths=_NORMALIZED,
        only=_SIGMOID,
        predicts=True,
    ),
    "arcee": Architecture(
        model_type="arcee",
        class_name="ArceeForCausalLM",
        blocks={
            **_ATTENTION,
            "ffn_norm": "post_attention_layernorm",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        },
        keys=_RMS,
        fixed={"hidden_act": "relu2"},
        flags={"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"},
        interleaved=_PAIRED,
    ),
    "gpt-oss": Architecture(
        model_type="gpt_oss",
        class_name="GptOssForCausalLM",
        blocks={
            **_ATTENTION,
            "post_attention_norm": "post_attention_layernorm",
            "ffn_gate_inp": "mlp.router",
            "ffn_gate_exps": "mlp.experts.gate_proj",
            "ffn_up_exps": "mlp.experts.up_proj",
            "ffn_down_exps": "mlp.experts.down_proj",
        },
        keys={**_RMS, **_WINDOW, **_LOCAL},
        fixed={"hidden_act": "silu", "swiglu_limit": 7.0, "rope_scaling": {"rope_type": "default"}},
        flags={"attention_bias": "blk.0.attn_q.bias"},
        whole={"attn_sinks.weight": "self_attn.sinks"},
        window_period=2,
        needed=frozenset({"attention.sliding_window"}),
        # llama.cpp rounds the bounds of YaRN's ramp to whole dimensions; the model was trained with them as they are.
        yarn={"truncate": False},
    ),
    "seed_oss": Architecture(
        model_type="seed_oss",
        class_name="SeedOssForCausalLM",
        blocks={**_ATTENTION, **_GATED, "post_attention_norm": "post_attention_layernorm"},
        keys=_RMS,
        fixed={"hidden_act": "silu"},
        flags={**_BIASES, "attention_out_bias": "blk.0.attn_output.bias"},
    ),
    "smollm3": Architecture(
        model_type="smollm3",
        class_name="SmolLM3ForCausalLM",
        blocks=_PRE,
        keys=_RMS,
        fixed={"hidden_act": "silu"},
        flags=_BIASES,
        interleaved=_PAIRED,
    ),
    "glm4": Architecture(
        model_type="glm4",
        class_name="Glm4ForCausalLM",
        blocks={
            **_ATTENTION,
            "post_attention_norm": "post_self_attn_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
            "post_ffw_norm": "post_mlp_layernorm",
        },
        keys=_RMS,
        fixed={"hidden_act": "silu", "partial_rotary_factor": 1.0},
        flags={"attention_bias": "blk.0.attn_q.bias"},
    ),
    "ernie4_5": Architecture(
        model_type="ernie4_5",
        class_name="Ernie4_5ForCausalLM",
        blocks=_PRE,
        keys=_RMS,
        fixed={"hidden_act": "silu"},
        flags={"use_bias": "blk.0.attn_q.bias"},
    ),
    "ernie4_5-moe": Architecture(
        model_type="ernie4_5_moe",
        class_name="Ernie4_5_MoeForCausalLM",
        blocks={**_PRE, **_EXPERTS, **_SHARED_EXPERTS},
        keys={
            **_RMS,
            "expert_count": "moe_num_experts",
            "expert_used_count": "moe_k",
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_count": "moe_num_shared_experts",
            "interleave_moe_layer_step": "moe_layer_interval",
            "leading_dense_block_count": "moe_layer_start_index",
        },
        fixed={"hidden_act": "silu", "moe_layer_start_index": 0, "moe_num_shared_experts": 0},
        whole={"exp_probs_b.bias": "mlp.moe_statics.e_score_correction_bias"},
        flattened=frozenset({"exp_probs_b"}),
    ),
    "olmo": Architecture(
        model_type="olmo",
        class_name="OlmoForCausalLM",
        blocks={name: found for name, found in _PRE.items() if "norm" not in name},
        keys={"attention.clamp_kqv": "clip_qkv"},
        fixed={"hidden_act": "silu"},
        flags={"attention_bias": "blk.0.attn_q.bias"},
        interleaved=_PAIRED,
        only={"attention.layer_norm_epsilon": float(np.float32(1e-5))},
        head_dim=False,
    ),
    "hunyuan-dense": Architecture(
        model_type="hunyuan_v1_dense",
        class_name="HunYuanDenseV1ForCausalLM",
        blocks={**_PRE, "attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"},
        keys=_RMS,
        fixed={"hidden_act": "silu"},
        flags=_BIASES,
    ),
    "granite": Architecture(
        model_type="granite",
        class_name="GraniteForCausalLM",
        blocks=_PRE,
        keys={**_RMS, **_SCALES},
        fixed={"hidden_act": "silu"},
        flags=_BIASES,
        interleaved=_PAIRED,
        only={"rope.scaling.finetuned": True},  # False: no RoPE at all
        needed=frozenset({"attention.scale", "logit_scale"}),
    ),
    "olmo2": Architecture(
        model_type="olmo2",
        class_name="Olmo2ForCausalLM",
        blocks={**_POST, **_QK_NORMS},
        keys={**_RMS, **_WINDOW},
        fixed={"hidden_act": "silu"},
        flags={"attention_bias": "blk.0.attn_q.bias"},
        head_dim=False,
        windowed=("olmo3", "Olmo3ForCausalLM"),
        window_period=4,
    ),
    "exaone4": Architecture(
        model_type="exaone4",
        class_name="Exaone4ForCausalLM",
        blocks={**_POST, **_QK_NORMS},
        keys={**_RMS, **_WINDOW},
        fixed={"hidden_act": "silu", "sliding_window": None},
        window_period=4,
        period_key="sliding_window_pattern",
    ),
    "command-r": Architecture(
        model_type="cohere",
        class_name="CohereForCausalLM",
        blocks={**_PARALLEL, **_QK_NORMS},
        keys={**_LAYER_NORM, "logit_scale": "logit_scale"},
        fixed={"hidden_act": "silu"},
        flags={"attention_bias": "blk.0.attn_q.bias", "use_qk_norm": "blk.0.attn_q_norm.weight"},
        head_dim=False,
        needed=frozenset({"logit_scale"}),
    ),
    "cohere2": Architecture(
        model_type="cohere2",
        class_name="Cohere2ForCausalLM",
        blocks=_PARALLEL,
        keys={**_LAYER_NORM, **_WINDOW, "logit_scale": "logit_scale"},
        fixed={"hidden_act": "silu"},
        flags={"attention_bias": "blk.0.attn_q.bias"},
        window_period=4,
        period_key="sliding_window_pattern",
        needed=frozenset({"attention.sliding_window", "logit_scale"}),
    ),
    "nemotron": Architecture(
        model_type="nemotron",
        class_name="NemotronForCausalLM",
        blocks={
            **_ATTENTION,
            "ffn_norm": "post_attention_layernorm",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        },
        keys={"attention.layer_norm_epsilon": "norm_eps"},
        fixed={"hidden_act": "relu2", "partial_rotary_factor": 1.0},
        flags=_BIASES,
        norms_plus_one=True,
    ),
    "phi2": Architecture(
        model_type="phi",
        class_name="PhiForCausalLM",
        blocks={
            **_ATTENTION,
            "attn_output": "self_attn.dense",
            "ffn_up": "mlp.fc1",
            "ffn_down": "mlp.fc2",
        },
        keys=_LAYER_NORM,
        fixed={"hidden_act": "gelu_new", "partial_rotary_factor": 1.0},
        top={**TOP, "output_norm": "model.final_layernorm"},
        head_dim=False,
    ),
    "stablelm": Architecture(
        model_type="stablelm",
        class_name="StableLmForCausalLM",
        blocks=_PRE,
        keys=_LAYER_NORM,
        fixed={"hidden_act": "silu", "partial_rotary_factor": 1.0},
        flags={"use_qkv_bias": "blk.0.attn_q.bias"},
        truths={"use_parallel_residual": "use_parallel_residual"},
        head_dim=False,
    ),
    "lfm2": Architecture(
        model_type="lfm2",
        class_name="Lfm2ForCausalLM",
        blocks=_SHORT_CONVOLUTIONS,
        keys={"attention.layer_norm_rms_epsilon": "norm_eps", "shortconv.l_cache": "conv_L_cache"},
        fixed={"block_auto_adjust_ff_dim": False},  # what the files give is the adjusted width
        flags={"conv_bias": "blk.0.shortconv.in_proj.bias"},
        top={**TOP, "token_embd_norm": "model.embedding_norm"},
        head_dim=False,
        layer_kinds=("conv", "full_attention"),
    ),
    "lfm2moe": Architecture(
        model_type="lfm2_moe",
        class_name="Lfm2MoeForCausalLM",
        blocks={
            **_SHORT_CONVOLUTIONS,
            "ffn_gate_inp": "feed_forward.gate",
            "ffn_gate_exps": "feed_forward.switch_mlp.gate_proj",
            "ffn_up_exps": "feed_forward.switch_mlp.up_proj",
            "ffn_down_exps": "feed_forward.switch_mlp.down_proj",
        },
        keys={
            **_CHOSEN,
            "attention.layer_norm_rms_epsilon": "norm_eps",
            "shortconv.l_cache": "conv_L_cache",
            "expert_count": "num_experts",
            "expert_feed_forward_length": "moe_intermediate_size",
            "leading_dense_block_count": "num_dense_layers",
            "expert_weights_scale": "routed_scaling_factor",
        },
        fixed={"norm_topk_prob": True, "use_expert_bias": True},
        flags={"conv_bias": "blk.0.shortconv.in_proj.bias"},
        whole={"exp_probs_b.bias": "feed_forward.expert_bias"},
        only=_SIGMOID,
        top={**TOP, "token_embd_norm": "model.embedding_norm"},
        head_dim=False,
        layer_kinds=("conv", "full_attention"),
        needed=frozenset({"leading_dense_block_count"}),
    ),
    "qwen35": Architecture(
        model_type="qwen3_5_text",
        class_name="Qwen3_5ForCausalLM",
        blocks={**_DELTA, **_GATED},
        keys=_DELTA_SIZES,
        fixed={"hidden_act": "silu", "partial_rotary_factor": 1.0},
        norms_plus_one=True,
        whole=_DELTA_FLOATS,
        plain_norms=frozenset({"ssm_norm"}),
        negated_exp=frozenset({"ssm_a"}),
        value_heads=_DELTA_HEADS,
        predicts=True,
    ),
    "qwen35moe": Architecture(
        model_type="qwen3_5_moe_text",
        class_name="Qwen3_5MoeForCausalLM",
        blocks={**_DELTA, **_EXPERTS, **_GATED_EXPERT},
        keys={**_DELTA_SIZES, **_MANY},
        fixed={"hidden_act": "silu", "partial_rotary_factor": 1.0},
        norms_plus_one=True,
        whole=_DELTA_FLOATS,
        plain_norms=frozenset({"ssm_norm"}),
        negated_exp=frozenset({"ssm_a"}),
        value_heads=_DELTA_HEADS,
        flattened=frozenset({"ffn_gate_inp_shexp"}),
        predicts=True,
    ),
    "qwen2moe": Architecture(
        model_type="qwen2_moe",
        class_name="Qwen2MoeForCausalLM",
        blocks={**_PRE, **_EXPERTS, **_GATED_EXPERT},
        keys={**_RMS, **_MANY},
        fixed={"hidden_act": "silu", "norm_topk_prob": False, "use_sliding_window": False},
        flags={"qkv_bias": "blk.0.attn_q.bias"},
        head_dim=False,
        flattened=frozenset({"ffn_gate_inp_shexp"}),
    ),
    "granitemoe": Architecture(
        model_type="granitemoe",
        class_name="GraniteMoeForCausalLM",
        blocks={
            **_ATTENTION,
            **_STACKED,
            "ffn_norm": "post_attention_layernorm",
            "ffn_gate_inp": "block_sparse_moe.router.layer",
        },
        keys={**_RMS, **_SCALES, **_LOCAL},
        fixed={"hidden_act": "silu"},
        flags={"attention_bias": "blk.0.attn_q.bias"},
        interleaved=_PAIRED,
        only={"rope.scaling.finetuned": True},
        needed=frozenset({"attention.scale", "logit_scale"}),
    ),
    "minimax-m2": Architecture(
        model_type="minimax_m2",
        class_name="MiniMaxM2ForCausalLM",
        blocks={
            **_ATTENTION,
            **_QK_NORMS,
            **_STACKED,
            "ffn_norm": "post_attention_layernorm",
            "ffn_gate_inp": "block_sparse_moe.gate",
        },
        keys={**_RMS, **_LOCAL},
        fixed={"hidden_act": "silu"},
        whole={"exp_probs_b.bias": "block_sparse_moe.e_score_correction_bias"},
        only=_SIGMOID,
    ),
    "deepseek2": Architecture(
        model_type="deepseek_v2",
        class_name="DeepseekV2ForCausalLM",
        blocks={**_LATENTS, **_GATED, **_EXPERTS, **_SHARED_EXPERTS},
        keys={
            **_RMS,
            **_BALANCED,
            "attention.kv_lora_rank": "kv_lora_rank",
            "attention.q_lora_rank": "q_lora_rank",
        },
        fixed={
            "hidden_act": "silu",
            "first_k_dense_replace": 0,
            "routed_scaling_factor": 1.0,
            "q_lora_rank": None,
        },
        whole=_CORRECTION,
        truths=_NORMALIZED,
        needed=frozenset({"expert_count", "expert_shared_count", "attention.kv_lora_rank", "rope.dimension_count"}),
        head_dim=False,
        log_multiplier=0.1,
        latent=True,
        predicts=True,
    ),
    "gemma": Architecture(
        model_type="gemma",
        class_name="GemmaForCausalLM",
        blocks=_PRE,
        keys=_RMS,
        fixed=_GELU,
        norms_plus_one=True,
    ),
    "gemma2": Architecture(
        model_type="gemma2",
        class_name="Gemma2ForCausalLM",
        blocks=_SANDWICH,
        keys={
            **_RMS,
            "attention.sliding_window": "sliding_window",
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        fixed={**_GELU, "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        norms_plus_one=True,
        window_period=2,
        query_scalar=46,
    ),
    "gemma3": Architecture(
        model_type="gemma3_text",
        class_name="Gemma3ForCausalLM",
        blocks={**_SANDWICH, **_QK_NORMS},
        keys={
            **_RMS,
            "attention.sliding_window": "sliding_window",
            "final_logit_softcapping": "final_logit_softcapping",
            "rope.freq_base_swa": "rope_local_base_freq",
        },
        fixed={"hidden_activation": "gelu_pytorch_tanh", "rope_local_base_freq": 10000.0},
        norms_plus_one=True,
        window_period=6,
        period_key="sliding_window_pattern",
        query_scalar=62,
    ),
    "phi3": Architecture(
        model_type="phi3",
        class_name="Phi3ForCausalLM",
        blocks={
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "attn_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
        keys={
            **_RMS,
            "attention.sliding_window": "sliding_window",
            "rope.scaling.original_context_length": "original_max_position_embeddings",
        },
        fixed={"hidden_act": "silu"},
        head_dim=False,
        rstrip=("<unk>", "<s>", "<|endoftext|>"),
    ),
    "starcoder2": Architecture(
        model_type="starcoder2",
        class_name="Starcoder2ForCausalLM",
        blocks={**_ATTENTION, "ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        keys={"attention.layer_norm_epsilon": "norm_epsilon", "attention.sliding_window": "sliding_window"},
        # The converters drop the window of 4096; llama.cpp attends to everything, and so does a file without the key.
        fixed={"hidden_act": "gelu_pytorch_tanh", "sliding_window": None},
        flags={"use_bias": "blk.0.attn_q.bias"},
        head_dim=False,
    ),
}
"""The supported architectures, by `general.architecture`."""
