"""GGUF architectures of older models: LayerNorm, and one matrix for queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runner.checkpoint.gguf import block_names as names
from runner.checkpoint.gguf.architecture import Architecture, Reader

GPT2 = {
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "attn_norm": "ln_1",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
# The names that mlx-lm gives these models, of which no matrix is stored turned around.
GPT2_TOP = {
    "token_embd": "model.wte",
    "position_embd": "model.wpe",
    "output_norm": "model.ln_f",
    "output": "lm_head",
}
GPT2_KEYS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
    "num_key_value_heads": None,
}
EPSILON = {"attention.layer_norm_epsilon": "layer_norm_epsilon"}


def width(reader: Reader) -> dict[str, Any]:
    """The MLP's width by its matrix: converters write four times the hidden size for all models."""
    reader.number("feed_forward_length")
    found = reader.tensors.get("blk.0.ffn_up.weight")
    if found is None:
        raise reader.error("no tensor blk.0.ffn_up.weight")
    return {"intermediate_size": found.shape[0]}


def starcoder(reader: Reader) -> dict[str, Any]:
    """StarCoder: one key for all heads, or one for each."""
    keys, heads = reader.number("attention.head_count_kv"), reader.needs("attention.head_count")
    if keys not in (1, heads):
        raise reader.error(f"{keys} keys for {heads} heads, expected 1 or {heads}")
    return {**width(reader), "multi_query": keys == 1}


FUSED: Mapping[str, Architecture] = {
    "gpt2": Architecture(
        model_type="gpt2",
        class_name="GPT2LMHeadModel",
        blocks=GPT2,
        keys=EPSILON,
        fixed={"activation_function": "gelu_new"},
        prefix="model.h",
        top=GPT2_TOP,
        renames=GPT2_KEYS,
        sized=False,
        rotates=False,
        own=width,
    ),
    "starcoder": Architecture(
        model_type="gpt_bigcode",
        class_name="GPTBigCodeForCausalLM",
        blocks=GPT2,
        keys=EPSILON,
        fixed={"activation_function": "gelu_pytorch_tanh"},
        prefix="model.h",
        top=GPT2_TOP,
        renames=GPT2_KEYS,
        sized=False,
        rotates=False,
        own=starcoder,
    ),
    "gptneox": Architecture(
        model_type="gpt_neox",
        class_name="GPTNeoXForCausalLM",
        blocks={
            "attn_qkv": "attention.query_key_value",
            "attn_output": "attention.dense",
            "attn_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "ffn_up": "mlp.dense_h_to_4h",
            "ffn_down": "mlp.dense_4h_to_h",
        },
        keys=names.LAYER_NORM,
        fixed={"hidden_act": "gelu", "partial_rotary_factor": 1.0},
        flags={"attention_bias": "blk.0.attn_qkv.bias"},
        truths={"use_parallel_residual": "use_parallel_residual"},
        grouped=frozenset({"attn_qkv"}),
        prefix="gpt_neox.layers",
        top={
            "token_embd": "gpt_neox.embed_in",
            "output_norm": "gpt_neox.final_layer_norm",
            "output": "embed_out",
        },
        renames={"num_key_value_heads": None},
        head_dim=False,
    ),
    "bloom": Architecture(
        model_type="bloom",
        class_name="BloomForCausalLM",
        blocks={
            "attn_qkv": "self_attention.query_key_value",
            "attn_output": "self_attention.dense",
            "attn_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "ffn_up": "mlp.dense_h_to_4h",
            "ffn_down": "mlp.dense_4h_to_h",
        },
        keys=EPSILON,
        fixed={},
        grouped=frozenset({"attn_qkv"}),
        prefix="transformer.h",
        top={
            "token_embd": "transformer.word_embeddings",
            "token_embd_norm": "transformer.word_embeddings_layernorm",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        renames={
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "seq_length",
            "intermediate_size": "n_inner",
            "num_key_value_heads": None,
        },
        sized=False,
        rotates=False,
        own=width,
    ),
}
