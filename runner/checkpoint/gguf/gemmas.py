"""GGUF's architectures of Gemma 3n and Gemma 4, whose layers have inputs and sizes of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

from runner.checkpoint.gguf import block_names as names
from runner.checkpoint.gguf.architecture import TOP, Architecture, Reader

INFINITE = 1e20
"""From here on, a divisor of RoPE's frequencies means that the pair does not turn; converters write 1e30."""


def one(reader: Reader, values: Sequence[int], what: str) -> int:
    """The one value that all have."""
    if len(set(values)) != 1 or not values[0]:
        raise reader.error(f"{what} {sorted(set(values))[:8]}, expected one number for all layers of a type")
    return values[0]


def gemma4(reader: Reader) -> dict[str, Any]:
    """The settings of Gemma 4; `_swa` is about the layers with a window."""
    layers, windowed = reader.layers, reader.each("attention.sliding_window_pattern")
    heads, widths = reader.each("attention.head_count_kv"), reader.each("feed_forward_length")
    if windowed is None or heads is None or widths is None:
        raise reader.error("attention.sliding_window_pattern, head_count_kv or feed_forward_length is missing")
    local = [index for index in range(layers) if windowed[index]]
    full = [index for index in range(layers) if not windowed[index]]
    sizes = {end: reader.needs(f"attention.key_length{end}") for end in ("", "_swa")}
    for end, size in sizes.items():
        found = (reader.needs(f"attention.value_length{end}"), reader.number(f"rope.dimension_count{end}") or size)
        if found != (size, size):
            raise reader.error(f"keys of {size} numbers, values and RoPE of {found}: they must be equal")
    shared = reader.number("attention.shared_kv_layers") or 0
    if not isinstance(shared, int) or not 0 <= shared < layers:
        raise reader.error(f"attention.shared_kv_layers is {shared}, expected an integer below {layers}")
    first = layers - shared
    width = one(reader, widths[:first], "feed_forward_length is")
    double = shared > 0 and one(reader, widths[first:], "feed_forward_length is") == 2 * width
    if shared and not double and widths[-1] != width:
        raise reader.error(f"feed_forward_length is {width}, then {widths[-1]}, expected the same or twice as much")
    equal = [f"blk.{index}.attn_v.weight" not in reader.tensors for index in full if index < first]
    config = {
        "head_dim": sizes["_swa"],
        "global_head_dim": sizes[""],
        "num_key_value_heads": one(reader, [heads[index] for index in local or full], "attention.head_count_kv is"),
        "intermediate_size": width,
        "use_double_wide_mlp": double,
        "num_kv_shared_layers": shared,
        "attention_k_eq_v": any(equal),
        "rope_parameters": rotations(reader),
        "hidden_size_per_layer_input": reader.number("embedding_length_per_layer_input") or 0,
    }
    if any(equal) and not all(equal):
        raise reader.error("some full-attention layers have attn_v and others don't")
    if full and any(equal):
        config["num_global_key_value_heads"] = one(
            reader, [heads[index] for index in full], "attention.head_count_kv is"
        )
    if "per_layer_token_embd.weight" in reader.tensors:
        config["vocab_size_per_layer_input"] = reader.tensors["per_layer_token_embd.weight"].shape[0]
    if reader.number("expert_count"):
        chosen = (reader.needs(f"expert_{name}") for name in ("count", "used_count", "feed_forward_length"))
        config |= dict(zip(("num_experts", "top_k_experts", "moe_intermediate_size"), chosen, strict=True))
        config["enable_moe_block"] = True
    return config


def gemma3n(reader: Reader) -> dict[str, Any]:
    """The settings of Gemma 3n; how many gates are cut off is stored as a quantile of the normal distribution."""
    first, table = (reader.tensors.get(f"{name}.weight") for name in ("blk.0.laurel_l", "per_layer_token_embd"))
    if first is None or table is None:
        raise reader.error("no tensor blk.0.laurel_l.weight or per_layer_token_embd.weight")
    shared, active = (reader.number(key) or 0 for key in ("attention.shared_kv_layers", "altup.active_idx"))
    quantiles = reader.floats("activation_sparsity_scale") or [-math.inf] * reader.layers
    streams = reader.needs("altup.num_inputs")
    if not isinstance(shared, int) or not 0 <= shared < reader.layers or active not in range(streams):
        raise reader.error(f"{shared} of {reader.layers} layers without keys, stream {active} of {streams}")
    return {
        "num_kv_shared_layers": shared,
        "altup_active_idx": active,
        "altup_num_inputs": streams,
        "altup_correct_scale": True,
        "hidden_size_per_layer_input": reader.needs("embedding_length_per_layer_input"),
        "vocab_size_per_layer_input": table.shape[0],
        "laurel_rank": first.shape[0],
        # As many digits as float32 has: 0.95, not 0.9499999.
        "activation_sparsity_pattern": [float(f"{NormalDist().cdf(one):.6g}") for one in quantiles],
    }


def rotations(reader: Reader) -> dict[str, Any]:
    """RoPE of both types of layers: in full attention, only the first pairs turn, which a table of divisors says."""
    scaling: dict[str, Any] = {"rope_type": "proportional", "partial_rotary_factor": 1.0}
    if "rope_freqs.weight" in reader.tensors:
        table = reader.table("rope_freqs.weight")
        turning = table.count(1.0)
        if table[:turning] != [1.0] * turning or min(table[turning:], default=INFINITE) < INFINITE:
            raise reader.error("rope_freqs.weight is not a number of 1, and then of numbers that stop the others")
        scaling["partial_rotary_factor"] = turning / len(table)
    base, local = (reader.first(f"rope.freq_base{end}", default=10000.0) for end in ("", "_swa"))
    return {
        "full_attention": {**scaling, "rope_theta": base},
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }


LAYER_INPUT = {
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
}
LAYER_INPUTS = {
    **TOP,
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
}

GEMMAS: Mapping[str, Architecture] = {
    "gemma3n": Architecture(
        model_type="gemma3n_text",
        class_name="Gemma3nForCausalLM",
        blocks={
            **names.SANDWICH,
            **names.QK_NORMS,
            **LAYER_INPUT,
            "altup_correct_coef": "altup.correction_coefs",
            "altup_predict_coef": "altup.prediction_coefs",
            "altup_router": "altup.modality_router",
            "altup_router_norm": "altup.router_norm",
            "laurel_l": "laurel.linear_left",
            "laurel_r": "laurel.linear_right",
            "laurel_post_norm": "laurel.post_laurel_norm",
        },
        keys={
            **names.RMS,
            **names.WINDOW,
            "final_logit_softcapping": "final_logit_softcapping",
            "rope.freq_base_swa": "rope_local_base_freq",
        },
        fixed={
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_local_base_freq": 10000.0,
            "final_logit_softcapping": 30.0,
        },
        whole={"altup_correct_scale.weight": "altup.correct_output_scale"},
        piled={"altup_proj": "model.altup_projections", "altup_unembd_proj": "model.altup_unembed_projections"},
        top=LAYER_INPUTS,
        needed=frozenset({"attention.sliding_window"}),
        window_period=5,
        own=gemma3n,
    ),
    "gemma4": Architecture(
        model_type="gemma4_text",
        class_name="Gemma4ForCausalLM",
        blocks={
            **names.SANDWICH,
            **names.QK_NORMS,
            **LAYER_INPUT,
            "ffn_gate_inp": "router.proj",
            "ffn_gate_up_exps": "experts.gate_up_proj",
            "ffn_gate_exps": "experts.switch_glu.gate_proj",
            "ffn_up_exps": "experts.switch_glu.up_proj",
            "ffn_down_exps": "experts.down_proj",
            "post_ffw_norm_1": "post_feedforward_layernorm_1",
            "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
            "post_ffw_norm_2": "post_feedforward_layernorm_2",
        },
        keys={**names.RMS, **names.WINDOW, "final_logit_softcapping": "final_logit_softcapping"},
        fixed={"hidden_activation": "gelu_pytorch_tanh", "final_logit_softcapping": None},
        top=LAYER_INPUTS,
        whole={
            "layer_output_scale.weight": "layer_scalar",
            "ffn_gate_inp.scale": "router.scale",
            "ffn_down_exps.scale": "router.per_expert_scale",
        },
        needed=frozenset({"attention.sliding_window"}),
        window_period=6,
        sized=False,
        rotates=False,
        own=gemma4,
    ),
}
