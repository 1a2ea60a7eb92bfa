"""GGUF architectures with Mamba layers, alone or beside attention.

llama.cpp's `ssm.time_step_rank` is the number of heads in Mamba 2 layers, and the rank of the steps in those of the
first kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runner.checkpoint.gguf import block_names as names
from runner.checkpoint.gguf.architecture import TOP, Architecture, Reader

BACKBONE = {"token_embd": "backbone.embeddings", "output_norm": "backbone.norm_f", "output": "lm_head"}


def has(reader: Reader, end: str) -> bool:
    """Whether any layer has the tensor."""
    return any(name.endswith(f".{end}") for name in reader.tensors)


def heads_of(reader: Reader) -> tuple[int, int]:
    """Number of a Mamba 2 layer's heads, and their size."""
    heads, inner = reader.needs("ssm.time_step_rank"), reader.needs("ssm.inner_size")
    if inner % heads:
        raise reader.error(f"{inner} numbers in {heads} heads")
    return heads, inner // heads


def expansion(reader: Reader) -> int:
    """How many times as wide as the model a Mamba layer is inside."""
    inner, hidden = reader.needs("ssm.inner_size"), reader.needs("embedding_length")
    if inner % hidden:
        raise reader.error(f"Mamba layers of {inner} numbers in a model of {hidden}")
    return inner // hidden


def beside_attention(reader: Reader) -> dict[str, Any]:
    """The settings of Mamba 2 layers by the names that Bamba gave them."""
    heads, size = heads_of(reader)
    return {
        "mamba_n_heads": heads,
        "mamba_d_head": size,
        "mamba_conv_bias": has(reader, "ssm_conv1d.bias"),
        "mamba_proj_bias": has(reader, "ssm_in.bias"),
    }


def granite(reader: Reader) -> dict[str, Any]:
    """Granite 4: without experts, files have as many as none, and none chosen.

    Bambas, whose attention has RoPE, go by the same architecture.
    """
    if reader.get("rope.scaling.finetuned") is not False:
        raise reader.error(
            "rope.scaling.finetuned is not false, as in a Bamba: its attention with RoPE is not supported"
        )
    experts = {"num_local_experts": reader.number("expert_count") or 0}
    if reader.number("expert_used_count"):
        experts["num_experts_per_tok"] = reader.needs("expert_used_count")
    return {**beside_attention(reader), "mamba_expand": expansion(reader), **experts}


def falcon(reader: Reader) -> dict[str, Any]:
    """Falcon-H1, whose multipliers the converter multiplied the weights by; a tied head would need another one."""
    if "output.weight" not in reader.tensors:
        raise reader.error("a Falcon-H1 without output.weight: such files have lost the factor of the logits")
    return {
        **beside_attention(reader),
        "mamba_d_ssm": reader.needs("ssm.inner_size"),
        "mamba_rms_norm": has(reader, "ssm_norm.weight"),
    }


def stacked(reader: Reader) -> dict[str, Any]:
    """What both kinds of Mamba stacks have."""
    return {
        "expand": expansion(reader),
        "use_conv_bias": has(reader, "ssm_conv1d.bias"),
        "use_bias": has(reader, "ssm_in.bias"),
    }


def mamba(reader: Reader) -> dict[str, Any]:
    """Mamba and Falcon Mamba, which normalizes what steps, B and C are made of."""
    config = {**stacked(reader), "intermediate_size": reader.needs("ssm.inner_size")}
    if reader.truth("ssm.dt_b_c_rms"):
        config |= {"model_type": "falcon_mamba", "architectures": ["FalconMambaForCausalLM"]}
    return config


def mamba2(reader: Reader) -> dict[str, Any]:
    """Mamba 2."""
    heads, size = heads_of(reader)
    return {**stacked(reader), "num_heads": heads, "head_dim": size}


def nemotron(reader: Reader) -> dict[str, Any]:
    """Nemotron-H: layers with key-value heads attend, those with a width are MLPs or experts, all others are Mambas."""
    heads, widths = reader.each("attention.head_count_kv"), reader.each("feed_forward_length")
    if heads is None or widths is None or not any(heads):
        raise reader.error("attention.head_count_kv or feed_forward_length is missing, or no layer attends")
    sparse = reader.number("expert_count")
    kinds = ["*" if h else ("E" if sparse else "-") if width else "M" for h, width in zip(heads, widths, strict=True)]
    count, size = heads_of(reader)
    groups, kept = reader.number("expert_group_count") or 1, reader.number("expert_group_used_count")
    if groups != 1 and kept is None:
        raise reader.error(f"experts in {groups} groups, but no expert_group_used_count")
    return {
        "hybrid_override_pattern": "".join(kinds),
        "num_key_value_heads": max(heads),
        "intermediate_size": max(widths) or 1,
        "mamba_num_heads": count,
        "mamba_head_dim": size,
        "use_conv_bias": has(reader, "ssm_conv1d.bias"),
        "use_bias": has(reader, "ssm_in.bias"),
        "mlp_bias": has(reader, "ffn_up.bias") or has(reader, "ffn_up_shexp.bias"),
        "topk_group": kept or 1,
    }


def jamba(reader: Reader) -> dict[str, Any]:
    """Jamba: where the experts are, by the layers that have a router."""
    sparse = [index for index in range(reader.layers) if f"blk.{index}.ffn_gate_inp.weight" in reader.tensors]
    config: dict[str, Any] = {
        "mamba_expand": expansion(reader),
        "mamba_conv_bias": has(reader, "ssm_conv1d.bias"),
        "mamba_proj_bias": has(reader, "ssm_in.bias"),
        "num_experts": reader.number("expert_count") if sparse else 1,
    }
    if not sparse:
        return config
    offset, period = sparse[0], sparse[1] - sparse[0] if len(sparse) > 1 else reader.layers
    if sparse != list(range(offset, reader.layers, period)):
        raise reader.error(f"layers {sparse[:8]} have experts, which is not every n-th")
    return {**config, "expert_layer_offset": offset, "expert_layer_period": period}


def recurrent(name: str) -> dict[str, str]:
    """The matrices and norms of a Mamba 2 layer, which transformers calls `name`."""
    parts = {"ssm_in": "in_proj", "ssm_conv1d": "conv1d", "ssm_norm": "norm", "ssm_out": "out_proj"}
    return {gguf: f"{name}.{part}" for gguf, part in parts.items()}


def floats(name: str) -> dict[str, str]:
    """The vectors of a Mamba 2 layer."""
    return {"ssm_a": f"{name}.A_log", "ssm_d": f"{name}.D", "ssm_dt.bias": f"{name}.dt_bias"}


def first_kind(name: str) -> dict[str, str]:
    """The matrices of a Mamba layer of the first kind."""
    return {**recurrent(name), "ssm_x": f"{name}.x_proj", "ssm_dt": f"{name}.dt_proj"}


SIZES = {"ssm.state_size": "mamba_d_state", "ssm.conv_kernel": "mamba_d_conv"}
STACK_SIZES = {
    "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
    "ssm.state_size": "state_size",
    "ssm.conv_kernel": "conv_kernel",
}
FOLDED = frozenset({"ssm_a", "ssm_d", "ssm_norm"})
NEGATED = frozenset({"ssm_a"})
ONE_SUBLAYER = {
    **recurrent("mixer"),
    **{gguf: name.replace("self_attn", "mixer") for gguf, name in names.ATTENTION.items()},
    "attn_norm": "norm",
    "ffn_up": "mixer.up_proj",
    "ffn_down": "mixer.down_proj",
}
NEMOTRON_KEYS = {
    "attention.layer_norm_epsilon": "layer_norm_epsilon",  # as the next, which counts where there are both
    "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
    "ssm.group_count": "n_groups",
    "ssm.state_size": "ssm_state_size",
    "ssm.conv_kernel": "conv_kernel",
}

HYBRIDS: Mapping[str, Architecture] = {
    "granitehybrid": Architecture(
        model_type="granitemoehybrid",
        class_name="GraniteMoeHybridForCausalLM",
        blocks={
            **names.ATTENTION,
            **recurrent("mamba"),
            **names.STACKED,
            "ffn_norm": "post_attention_layernorm",
            "ffn_gate_inp": "block_sparse_moe.router.layer",
            "ffn_gate_shexp": "shared_mlp.gate_proj",
            "ffn_up_shexp": "shared_mlp.up_proj",
            "ffn_down_shexp": "shared_mlp.output_linear",
            "ffn_gate": "shared_mlp.gate_proj",
            "ffn_up": "shared_mlp.up_proj",
            "ffn_down": "shared_mlp.output_linear",
        },
        keys={
            **names.RMS,
            **names.SCALES,
            **SIZES,
            "ssm.group_count": "mamba_n_groups",
            "expert_shared_feed_forward_length": "shared_intermediate_size",
        },
        fixed={"hidden_act": "silu", "position_embedding_type": "nope"},
        flags={"attention_bias": "blk.0.attn_q.bias"},
        interleaved=names.PAIRED,
        whole=floats("mamba"),
        negated_exp=NEGATED,
        folded=FOLDED,
        needed=frozenset({"attention.scale", "logit_scale"}),
        layer_kinds=("mamba", "attention"),
        own=granite,
    ),
    "falcon-h1": Architecture(
        model_type="falcon_h1",
        class_name="FalconH1ForCausalLM",
        blocks={
            **names.ATTENTION,
            **recurrent("mamba"),
            "ffn_norm": "pre_ff_layernorm",
            "ffn_gate": "feed_forward.gate_proj",
            "ffn_up": "feed_forward.up_proj",
            "ffn_down": "feed_forward.down_proj",
        },
        keys={**names.RMS, **SIZES, "ssm.group_count": "mamba_n_groups"},
        fixed={"hidden_act": "silu", "mamba_norm_before_gate": False},
        flags={"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"},
        whole={**floats("mamba"), "ffn_norm": "pre_ff_layernorm.weight"},  # without an end in this family's files
        negated_exp=NEGATED,
        folded=FOLDED,
        top={**TOP, "output_norm": "model.final_layernorm"},
        own=falcon,
    ),
    "nemotron_h": Architecture(
        model_type="nemotron_h",
        class_name="NemotronHForCausalLM",
        blocks=ONE_SUBLAYER,
        keys=NEMOTRON_KEYS,
        fixed={"mlp_hidden_act": "relu2"},
        prefix="backbone.layers",
        top=BACKBONE,
        whole=floats("mixer"),
        negated_exp=NEGATED,
        folded=FOLDED,
        own=nemotron,
    ),
    "nemotron_h_moe": Architecture(
        model_type="nemotron_h",
        class_name="NemotronHForCausalLM",
        blocks={
            **ONE_SUBLAYER,
            "ffn_gate_inp": "mixer.gate",
            "ffn_up_exps": "mixer.switch_mlp.fc1",
            "ffn_down_exps": "mixer.switch_mlp.fc2",
            "ffn_up_shexp": "mixer.shared_experts.up_proj",
            "ffn_down_shexp": "mixer.shared_experts.down_proj",
            "ffn_latent_down": "mixer.fc1_latent_proj",
            "ffn_latent_up": "mixer.fc2_latent_proj",
        },
        keys={
            **NEMOTRON_KEYS,
            **names.CHOSEN,
            "expert_count": "n_routed_experts",
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_feed_forward_length": "moe_shared_expert_intermediate_size",
            "expert_shared_count": "n_shared_experts",
            "expert_weights_scale": "routed_scaling_factor",
            "expert_group_count": "n_group",
            "moe_latent_size": "moe_latent_size",
        },
        fixed={"mlp_hidden_act": "relu2"},
        prefix="backbone.layers",
        top=BACKBONE,
        whole={**floats("mixer"), "exp_probs_b.bias": "mixer.gate.e_score_correction_bias"},
        negated_exp=NEGATED,
        folded=FOLDED,
        truths=names.NORMALIZED,
        only=names.SIGMOID,
        predicts=True,
        own=nemotron,
    ),
    "mamba": Architecture(
        model_type="mamba",
        class_name="MambaForCausalLM",
        blocks={**first_kind("mixer"), "attn_norm": "norm"},
        keys={**STACK_SIZES, "ssm.time_step_rank": "time_step_rank"},
        fixed={"hidden_act": "silu"},
        prefix="backbone.layers",
        top=BACKBONE,
        whole={"ssm_a": "mixer.A_log", "ssm_d": "mixer.D"},
        negated_exp=NEGATED,
        attends=False,
        sized=False,
        rotates=False,
        own=mamba,
    ),
    "mamba2": Architecture(
        model_type="mamba2",
        class_name="Mamba2ForCausalLM",
        blocks={**recurrent("mixer"), "attn_norm": "norm"},
        keys={**STACK_SIZES, "ssm.group_count": "n_groups"},
        fixed={"hidden_act": "silu"},
        prefix="backbone.layers",
        top=BACKBONE,
        whole=floats("mixer"),
        negated_exp=NEGATED,
        folded=FOLDED,
        attends=False,
        sized=False,
        rotates=False,
        own=mamba2,
    ),
    "jamba": Architecture(
        model_type="jamba",
        class_name="JambaForCausalLM",
        blocks={
            **names.ATTENTION,
            **first_kind("mamba"),
            "ssm_dt_norm": "mamba.dt_layernorm",
            "ssm_b_norm": "mamba.b_layernorm",
            "ssm_c_norm": "mamba.c_layernorm",
            "ffn_norm": "pre_ff_layernorm",
            "ffn_gate": "feed_forward.gate_proj",
            "ffn_up": "feed_forward.up_proj",
            "ffn_down": "feed_forward.down_proj",
            "ffn_gate_inp": "feed_forward.router",
            "ffn_gate_exps": "feed_forward.switch_mlp.gate_proj",
            "ffn_up_exps": "feed_forward.switch_mlp.up_proj",
            "ffn_down_exps": "feed_forward.switch_mlp.down_proj",
        },
        keys={**names.RMS, **names.CHOSEN, **SIZES, "ssm.time_step_rank": "mamba_dt_rank"},
        fixed={"hidden_act": "silu"},
        top={**TOP, "output_norm": "model.final_layernorm"},
        whole={"ssm_a": "mamba.A_log", "ssm_d": "mamba.D"},
        negated_exp=NEGATED,
        layer_kinds=("mamba", "attention"),
        own=jamba,
    ),
}
