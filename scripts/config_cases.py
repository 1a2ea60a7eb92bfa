"""Configs to be read as transformers reads them: as hub repositories publish them, and with keys left out or null.

Ids of special tokens are left out (transformers checks them against the vocabulary, and no number depends on them).
LongRoPE's factors are shortened to a formula; everything else is as published, the keys nobody reads included.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]
FULL, SLIDING = "full_attention", "sliding_attention"
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def config(model_type: str, *shape: int, **keys: Any) -> Config:
    """`shape`: vocab_size, hidden_size, intermediate_size, layers, heads and (0: not in the config) key-value heads."""
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    given = {name: size for name, size in zip(names.split(), shape, strict=False) if size}
    return {"model_type": model_type, **given, **NO_IDS, **keys}


def bare(model_type: str, **keys: Any) -> Config:
    """Only what no default can give; 160 heads are a multiple of every family's default of key-value heads."""
    return config(model_type, 96, 640, 48, 6, 160, **keys)


SMALL_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
NULL_HEADS = {"num_key_value_heads": None, "head_dim": None}

GEMMA2_9B = config(
    "gemma2", 256000, 3584, 14336, 42, 16, 8, attention_bias=False, attention_dropout=0.0, attn_logit_softcapping=50.0,
    cache_implementation="hybrid", final_logit_softcapping=30.0, head_dim=256, hidden_act="gelu_pytorch_tanh",
    hidden_activation="gelu_pytorch_tanh", initializer_range=0.02, max_position_embeddings=8192,
    query_pre_attn_scalar=256, rms_norm_eps=1e-06, rope_theta=10000.0, sliding_window=4096, sliding_window_size=4096,
    torch_dtype="bfloat16", use_cache=True,
)  # fmt: skip
GEMMA3_1B = config(
    "gemma3_text", 262144, 1152, 6912, 26, 4, 1, attention_bias=False, attention_dropout=0.0,
    attn_logit_softcapping=None, cache_implementation="hybrid", final_logit_softcapping=None, head_dim=256,
    hidden_activation="gelu_pytorch_tanh", initializer_range=0.02, max_position_embeddings=32768,
    query_pre_attn_scalar=256, rms_norm_eps=1e-06, rope_local_base_freq=10000, rope_scaling=None, rope_theta=1000000,
    sliding_window=512, sliding_window_pattern=6, torch_dtype="bfloat16", use_cache=True,
)  # fmt: skip
PHI4_MINI = config(
    "phi3", 200064, 3072, 8192, 32, 24, 8, attention_bias=False, attention_dropout=0.0, embd_pdrop=0.0,
    auto_map={"AutoConfig": "configuration_phi3.Phi3Config"}, full_attn_mod=1, hidden_act="silu",
    initializer_range=0.02, interpolate_factor=1, lm_head_bias=False, max_position_embeddings=131072, mlp_bias=False,
    original_max_position_embeddings=4096, partial_rotary_factor=0.75, resid_pdrop=0.0, rms_norm_eps=1e-05,
    rope_scaling={
        "long_factor": [1.0 + i * i / 64 for i in range(48)], "short_factor": [1.0] * 48, "type": "longrope",
    }, rope_theta=10000.0, sliding_window=262144, tie_word_embeddings=True, torch_dtype="bfloat16", use_cache=True,
)  # fmt: skip
HUNYUAN_7B = config(
    "hunyuan_v1_dense", 128167, 4096, 14336, 32, 32, 8, add_classification_head=False, attention_bias=False,
    attention_dropout=0.1, attention_head_dim=128, cla_share_factor=2, class_num=0, dense_list=[4096, 0], head_dim=128,
    hidden_act="silu", im_end_id=5, im_newline_id=11, im_start_id=4, initializer_range=0.02, mask_init_id=12,
    max_position_embeddings=32768, mlp_bias=False, norm_type="rms", org_vocab_size=128167, pad_id=127961,
    pool_type="last", pretraining_tp=1, rms_norm_eps=1e-05, rope_scaling={
        "alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "type": "dynamic",
    }, rope_theta=10000.0, text_end_id=7, text_start_id=6, tie_word_embeddings=True, torch_dtype="bfloat16",
    use_cache=False, use_cla=False, use_qk_norm=True, use_rotary_pos_emb=True,
)  # fmt: skip
EXAONE4_32B = config(
    "exaone4", 102400, 5120, 27392, 64, 40, 8, attention_dropout=0.0, head_dim=128, hidden_act="silu",
    initializer_range=0.02, layer_types=[SLIDING, SLIDING, SLIDING, FULL] * 16, max_position_embeddings=131072,
    rms_norm_eps=1e-05, rope_scaling={**LLAMA3, "factor": 16.0, "rope_type": "llama3"}, rope_theta=1000000,
    sliding_window=4096, sliding_window_pattern="LLLG", tie_word_embeddings=False, torch_dtype="bfloat16",
    use_cache=True,
)  # fmt: skip
EXAONE4_1B = EXAONE4_32B | {
    "hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 30, "num_attention_heads": 32, "head_dim": 64,
    "layer_types": [FULL] * 30, "sliding_window": None, "sliding_window_pattern": None, "tie_word_embeddings": True,
}  # fmt: skip
SMOLLM3_3B = config(
    "smollm3", 128256, 2048, 11008, 36, 16, 4, attention_bias=False, attention_dropout=0.0, hidden_act="silu",
    initializer_range=0.02, layer_types=[FULL] * 36, max_position_embeddings=65536, max_window_layers=28,
    mlp_bias=False, no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0] * 9, pretraining_tp=2, rms_norm_eps=1e-06,
    rope_scaling=None, rope_theta=5000000.0, sliding_window=None, torch_dtype="bfloat16", use_cache=True,
    use_sliding_window=False,
)  # fmt: skip
OLMO3_7B = config(
    "olmo3", 100278, 4096, 11008, 32, 32, 32, attention_bias=False, attention_dropout=0.0, hidden_act="silu",
    initializer_range=0.02, layer_types=[SLIDING, SLIDING, SLIDING, FULL] * 8, max_position_embeddings=65536,
    rms_norm_eps=1e-06, rope_scaling={
        "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
        "original_max_position_embeddings": 8192, "rope_type": "yarn",
    }, rope_theta=500000, sliding_window=4096, tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True,
)  # fmt: skip
ERNIE_300M = config(
    "ernie4_5", 103424, 1024, 3072, 18, 16, 2, auto_map={"AutoConfig": "configuration_ernie4_5.Ernie4_5_Config"},
    head_dim=128, hidden_act="silu", max_position_embeddings=131072, rms_norm_eps=1e-05, rope_theta=500000,
    tie_word_embeddings=True, torch_dtype="bfloat16", use_bias=False, use_cache=False,
)  # fmt: skip
HELIUM_2B = config(
    "helium", 48000, 2560, 7040, 24, 20, 20, attention_bias=False, attention_dropout=0.0, head_dim=128,
    hidden_act="silu", initializer_range=0.02, max_position_embeddings=4096, mlp_bias=False, pretraining_tp=1,
    rms_norm_eps=1e-08, rope_theta=100000.0, tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True,
)  # fmt: skip
SEED_OSS_36B = config(
    "seed_oss", 155136, 5120, 27648, 64, 80, 8, attention_bias=True, attention_dropout=0.1, attention_out_bias=False,
    head_dim=128, hidden_act="silu", initializer_range=0.02, max_position_embeddings=524288, mlp_bias=False,
    pretraining_tp=1, residual_dropout=0.1, rms_norm_eps=1e-06, rope_scaling={"rope_type": "default"},
    rope_theta=10000000.0, tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True,
)  # fmt: skip
APERTUS_8B = config(
    "apertus", 131072, 4096, 21504, 32, 32, 8, attention_bias=False, attention_dropout=0.0, hidden_act="xielu",
    hidden_dropout=0.0, initializer_range=0.02, max_position_embeddings=65536, mlp_bias=False, post_norm=False,
    qk_norm=True, rms_norm_eps=1e-05, rope_scaling={**LLAMA3, "factor": 8.0, "rope_type": "llama3", "type": "llama3"},
    rope_theta=12000000, tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True,
)  # fmt: skip
GLM4_9B = config(
    "glm4", 151552, 4096, 13696, 40, 32, 2, attention_bias=True, attention_dropout=0.0, head_dim=128,
    hidden_act="silu", initializer_range=0.02, max_position_embeddings=32768, partial_rotary_factor=0.5,
    rms_norm_eps=1e-05, rope_theta=10000.0, tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True,
)  # fmt: skip
LLAMA_1B = config(
    "llama", 128256, 2048, 8192, 16, 32, 8, attention_bias=False, attention_dropout=0.0, head_dim=64,
    hidden_act="silu", initializer_range=0.02, max_position_embeddings=131072, mlp_bias=False, pretraining_tp=1,
    rms_norm_eps=1e-05, rope_scaling={**LLAMA3, "factor": 32.0, "rope_type": "llama3"}, rope_theta=500000.0,
    tie_word_embeddings=True, torch_dtype="bfloat16", use_cache=True,
)  # fmt: skip

BARE = (
    "llama", "mistral", "qwen2", "qwen3", "granite", "gemma", "gemma2", "gemma3_text", "smollm3", "olmo2", "olmo3",
    "phi3", "glm", "glm4", "ernie4_5", "seed_oss", "apertus", "exaone4",
)  # fmt: skip

CASES: dict[str, Config] = {
    "gemma-2-9b-it": GEMMA2_9B,
    "gemma-3-1b-it": GEMMA3_1B,
    "Phi-4-mini-instruct": PHI4_MINI,
    "Hunyuan-7B-Instruct": HUNYUAN_7B,
    "EXAONE-4.0-32B": EXAONE4_32B,
    "EXAONE-4.0-1.2B": EXAONE4_1B,
    "SmolLM3-3B": SMOLLM3_3B,
    "Olmo-3-7B": OLMO3_7B,
    "ERNIE-4.5-0.3B": ERNIE_300M,
    "helium-1-preview-2b": HELIUM_2B,
    "Seed-OSS-36B": SEED_OSS_36B,
    "Apertus-8B": APERTUS_8B,
    "GLM-4-9B-0414": GLM4_9B,
    "glm-4-9b-chat-hf": GLM4_9B | {"model_type": "glm", "rms_norm_eps": 1.5625e-07, "max_position_embeddings": 131072},
    "Llama-3.2-1B": LLAMA_1B,
    **{f"{name}-bare": bare(name) for name in BARE},
    "helium-bare": bare("helium", head_dim=4),
    "hunyuan_v1_dense-bare": bare("hunyuan_v1_dense", head_dim=16),
    "gemma2-uncapped": bare("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None, **SMALL_HEADS),
    "gemma3_text-linear": bare("gemma3_text", rope_scaling={"rope_type": "linear", "factor": 8.0}, **SMALL_HEADS),
    "gemma3_text-partly-nested": bare(
        "gemma3_text", rope_parameters={FULL: {"rope_type": "linear", "factor": 2.0}, SLIDING: {"rope_theta": 100.0}}
    ),
    "gemma3_text-full-only": bare("gemma3_text", rope_parameters={FULL: {"rope_theta": 5000.0}}),
    "smollm3-interval": bare("smollm3", no_rope_layer_interval=3, use_sliding_window=True, sliding_window=8),
    "smollm3-long-list": bare("smollm3", no_rope_layers=[1, 0] * 4),
    "olmo3-no-layer-types": bare("olmo3", sliding_window=32, rope_scaling={"rope_type": "yarn", "factor": 4.0}),
    "olmo2-linear": bare("olmo2", rope_scaling={"type": "linear", "factor": 2.0}, num_key_value_heads=2),
    "phi3-no-original": bare(
        "phi3", rope_scaling={"type": "longrope", "long_factor": [2.0] * 2, "short_factor": [1.0] * 2}
    ),
    "phi3-null-kv": bare("phi3", num_key_value_heads=None),
    "glm-whole-head": bare("glm", partial_rotary_factor=1.0, **SMALL_HEADS),
    "ernie4_5-null-heads": bare("ernie4_5", **NULL_HEADS),
    "seed_oss-null-heads": bare("seed_oss", **NULL_HEADS),
    "apertus-null-kv": bare("apertus", num_key_value_heads=None),
    "mistral-null-head": bare("mistral", num_key_value_heads=2, head_dim=None, sliding_window=None),
    "qwen3-null-kv": bare("qwen3", num_key_value_heads=None, head_dim=16),
    "rope_parameters-without-theta": bare("llama", rope_parameters={"rope_type": "linear", "factor": 3.0}),
}
