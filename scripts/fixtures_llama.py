"""The Llama and Mistral fixtures: tests/fixtures. A variation is a line of data."""

from __future__ import annotations

from typing import Any

from fixtures_case import REMOVED, Case

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 32,
    "max_position_embeddings": 128,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.0",
    "use_cache": True,
    "vocab_size": 128,
}
# Two heads of 16: enough frequencies that each scaling treats some of them differently.
ROPE: dict[str, Any] = {**LLAMA, "num_attention_heads": 2, "num_key_value_heads": 1}
GQA: dict[str, Any] = {**LLAMA, "rope_theta": 1000.0}
MISTRAL: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 32,
    "max_position_embeddings": 128,
    "model_type": "mistral",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 128,
}
MLX: dict[str, Any] = {**GQA, "hidden_size": 64, "intermediate_size": 64}

LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 32,
    "rope_type": "llama3",
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
BETAS = {"beta_fast": 16.0, "beta_slow": 0.5, "original_max_position_embeddings": 1792}
LONGROPE = {
    "type": "longrope",
    "factor": 4.0,
    "long_factor": [1.0, 1.3, 1.9, 2.6, 3.2, 5.0, 9.0, 14.0],
    "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5, 1.7],
    "original_max_position_embeddings": 32,
}
SAMPLED = {
    "bos_token_id": 1,
    "do_sample": True,
    "eos_token_id": [2, 5],
    "temperature": 0.6,
    "top_k": 40,
    "top_p": 0.9,
    "transformers_version": "4.46.0",
}


ASCII = {"tokenizer": "ascii", "expect_text": False}  # the same files everywhere: texts in llama-mha alone


def llama(name: str, change: dict[str, Any] | None = None, **case: Any) -> Case:
    return Case(**{"name": f"llama-{name}", "base": LLAMA, "change": change or {}, **tokens(case), **case})


def tokens(case: dict[str, Any]) -> dict[str, Any]:
    return {} if "tokenizer" in case else ASCII


def rope(name: str, scaling: dict[str, Any], **case: Any) -> Case:
    change = {"rope_scaling": scaling, **case.pop("change", {})}
    return llama(f"rope-{name}", change, **{"base": ROPE, **case})


def mistral(name: str, change: dict[str, Any], **case: Any) -> Case:
    return Case(**{"name": f"mistral-{name}", "base": MISTRAL, "change": change, **ASCII, **case})


CASES: tuple[Case, ...] = (
    # Shapes and tensors.
    llama("mha", {"num_key_value_heads": 4}, storage="float32", tokenizer="ascii"),
    llama(
        "v1",
        dict.fromkeys(("num_key_value_heads", "rope_theta", "rope_scaling", "attention_bias", "mlp_bias"), REMOVED),
        spelling="hub",
        extra_tensors=("old_inv_freq",),
        note="a first-generation config.json: neither theta (10000) nor key/value heads (all) are written down",
        inert=("rope_theta", "rope_scaling", "attention_bias", "mlp_bias"),
    ),
    llama("gqa", base=GQA, tokenizer="bpe", change={"vocab_size": 336}),
    llama(
        "gqa-hub",
        base=GQA,
        tokenizer="bpe-hub",
        change={"vocab_size": 336},
        spelling="hub",
        extra_tensors=("old_inv_freq",),
        generation_config=SAMPLED,
        note="the weights of llama-gqa under the old spelling, with sampling defaults and rotary buffers in the file",
    ),
    llama("head-dim", {"head_dim": 16}),
    llama("head-dim-hub", {"head_dim": 16}, spelling="hub", note="the weights of llama-head-dim"),
    llama("attention-bias", {"attention_bias": True}),
    llama("mlp-bias", {"mlp_bias": True}),
    llama("both-biases-tied", {"mlp_bias": True, "attention_bias": True, "tie_word_embeddings": True}),
    llama("tied", {"tie_word_embeddings": True}),
    llama("tied-redundant-head", {"tie_word_embeddings": True}, extra_tensors=("redundant_head",), spelling="hub"),
    llama("sharded", storage="float32", shard_bytes=30000),
    llama("float16", storage="float16"),
    llama("gelu", {"hidden_act": "gelu"}),
    llama("gelu-tanh", {"hidden_act": "gelu_pytorch_tanh"}, spelling="hub"),
    llama("eps", {"rms_norm_eps": 0.03}),
    llama("theta", {"rope_theta": 500.0}, spelling="hub"),
    # Rotary scaling: every long prompt is longer than the original 32 positions.
    rope("default", {"rope_type": "default"}, inert=("rope_scaling",)),
    rope("linear", {"rope_type": "linear", "factor": 4.0}),
    rope("linear-hub", {"type": "linear", "factor": 4.0}, spelling="hub", note="the weights of llama-rope-linear"),
    rope(
        "dynamic",
        {"type": "dynamic", "factor": 4.0},
        spelling="hub",
        change={"max_position_embeddings": 32},
        rope_by_length=True,
        note="frequencies follow the length seen: a cached decode keeps the older keys' frequencies, one pass does not",
    ),
    rope("llama3", LLAMA3),
    rope("llama3-hub", LLAMA3, spelling="hub", note="the weights of llama-rope-llama3"),
    rope("yarn", YARN),
    rope(
        "yarn-hub", {**YARN, "type": "yarn"}, spelling="hub", note="both `type` and `rope_type`, as repositories have"
    ),
    rope("yarn-attention-factor", {**YARN, **BETAS, "attention_factor": 1.4}),
    rope("yarn-mscale", {**YARN, "mscale": 3.0, "mscale_all_dim": 0.7}),
    rope("yarn-untruncated", {**YARN, "truncate": False}),
    rope("longrope", LONGROPE, spelling="hub", rope_by_length=True),
    rope(
        "longrope-attention-factor",
        {**LONGROPE, "attention_factor": 1.3},
        rope_by_length=True,
        inert=("rope_scaling.factor",),  # it only stands in for the attention factor
    ),
    # Tokenizers and end-of-sequence ids.
    llama("spm", {"vocab_size": 384}, spelling="hub", tokenizer="spm", note="tokenizer.model alone"),
    llama("spm-json", {"vocab_size": 384}, tokenizer="spm-json", note="the tokenizer of llama-spm as tokenizer.json"),
    llama("eos", eos_at=9, note="generation_config's second end-of-sequence id is the short prompt's tenth token"),
    # Mistral.
    mistral("window", {"sliding_window": 8}),
    mistral("window-hub", {"sliding_window": 8}, spelling="hub", note="the weights of mistral-window"),
    mistral("no-window", {}),
    mistral("head-dim", {"head_dim": 16, "sliding_window": 8, "rope_theta": 1000.0}, spelling="hub"),
    # MLX affine quantisation: the reference runs on the dequantised weights.
    llama(
        "mlx-4bit",
        base=MLX,
        quantization={"group_size": 32, "bits": 4, "mode": "affine"},
        spelling="hub",
    ),
    llama(
        "mlx-mixed",
        base=MLX,
        quantization={
            "group_size": 64,
            "bits": 4,
            "model.embed_tokens": {"group_size": 32, "bits": 8},
            "model.layers.0.self_attn.q_proj": {"group_size": 32, "bits": 8},
            "model.layers.1.mlp.down_proj": {"group_size": 64, "bits": 8},
            "model.layers.1.self_attn.v_proj": False,
            "lm_head": False,
        },
        spelling="hub",
    ),
    llama(
        "mlx-tied",
        {"tie_word_embeddings": True},
        base=MLX,
        quantization={"group_size": 64, "bits": 8},
        spelling="hub",
        note="a quantised embedding that is the head too",
    ),
)
