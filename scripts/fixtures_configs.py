"""One small `config.json` per family, with the keys (also the unused ones) that its published repositories have."""

from __future__ import annotations

from typing import Any

from fixtures_case import REMOVED

Config = dict[str, Any]


def base(model_type: str, architecture: str, **keys: Any) -> Config:
    """What nearly all families have, small; `keys` in the family's own words, REMOVED takes one out."""
    config: Config = {
        "architectures": [architecture],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 32,
        "max_position_embeddings": 128,
        "model_type": model_type,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.0",
        "use_cache": True,
        "vocab_size": 48,
    }
    config |= keys
    return {key: value for key, value in config.items() if value is not REMOVED}


# Chosen so that each number moves the truncated correction range of 8 frequencies.
BETAS = {"beta_fast": 16.0, "beta_slow": 0.5, "original_max_position_embeddings": 1792}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
TIED = {"tie_word_embeddings": True}
WINDOW = {"sliding_window": 8}
NO_WINDOW = ("sliding_window",)  # inert: the key is there and switched off
LAYERS = {"num_hidden_layers": 3}
HALF = {"num_attention_heads": 2, "num_key_value_heads": 1}  # heads of 16

QWEN2 = base(
    "qwen2", "Qwen2ForCausalLM", max_window_layers=2, sliding_window=128, use_sliding_window=False, **TIED
)  # fmt: skip
QWEN3 = base(
    "qwen3", "Qwen3ForCausalLM", attention_bias=False, head_dim=16, max_window_layers=2, rope_scaling=None,
    sliding_window=None, use_sliding_window=False, **TIED,
)  # fmt: skip
QWEN2_MOE = base(
    "qwen2_moe", "Qwen2MoeForCausalLM", decoder_sparse_step=1, max_window_layers=2, moe_intermediate_size=16,
    norm_topk_prob=False, num_experts=4, num_experts_per_tok=2, output_router_logits=False, router_aux_loss_coef=0.001,
    shared_expert_intermediate_size=24, sliding_window=128, use_sliding_window=False,
)  # fmt: skip
QWEN3_MOE = base(
    "qwen3_moe", "Qwen3MoeForCausalLM", attention_bias=False, decoder_sparse_step=1, head_dim=16, max_window_layers=2,
    mlp_only_layers=[], moe_intermediate_size=16, norm_topk_prob=True, num_experts=4, num_experts_per_tok=2,
    output_router_logits=False, rope_scaling=None, router_aux_loss_coef=0.001, sliding_window=None,
    use_sliding_window=False,
)  # fmt: skip
MIXTRAL = base(
    "mixtral", "MixtralForCausalLM", intermediate_size=24, num_experts_per_tok=2, num_local_experts=4,
    output_router_logits=False, router_aux_loss_coef=0.02, sliding_window=None, rms_norm_eps=1e-05,
)  # fmt: skip
GEMMA = base(
    "gemma", "GemmaForCausalLM", attention_bias=False, head_dim=16, hidden_act="gelu", num_key_value_heads=1,
    pad_token_id=0, rope_scaling=None, tie_word_embeddings=REMOVED,
)  # fmt: skip
GEMMA2 = base(
    "gemma2", "Gemma2ForCausalLM", attention_bias=False, attn_logit_softcapping=2.0, cache_implementation="hybrid",
    final_logit_softcapping=3.0, head_dim=16, hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh",
    num_hidden_layers=3, pad_token_id=0, query_pre_attn_scalar=8, tie_word_embeddings=REMOVED, **WINDOW,
)  # fmt: skip
GEMMA3 = base(
    "gemma3_text", "Gemma3ForCausalLM", attention_bias=False, attn_logit_softcapping=None,
    cache_implementation="hybrid",
    final_logit_softcapping=None, head_dim=16, hidden_act=REMOVED, hidden_activation="gelu_pytorch_tanh",
    num_hidden_layers=3, num_key_value_heads=1, pad_token_id=0, query_pre_attn_scalar=8, rope_local_base_freq=100.0,
    rope_scaling=None, rope_theta=10000, sliding_window_pattern=3, tie_word_embeddings=REMOVED, **WINDOW,
)  # fmt: skip
PHI = base(
    "phi", "PhiForCausalLM", embd_pdrop=0.0, hidden_act="gelu_new", layer_norm_eps=1e-05, num_key_value_heads=None,
    num_attention_heads=2, partial_rotary_factor=0.4, qk_layernorm=False, resid_pdrop=0.1, rms_norm_eps=REMOVED,
    rope_scaling=None,
)  # fmt: skip
PHI3 = base(
    "phi3", "Phi3ForCausalLM", attention_bias=False, embd_pdrop=0.0, num_attention_heads=2, num_key_value_heads=2,
    original_max_position_embeddings=32, pad_token_id=0, resid_pdrop=0.0, rope_scaling=None, **WINDOW,
)  # fmt: skip
PHI3_LONG = {
    "type": "longrope",
    "long_factor": [1.0, 1.3, 1.9, 2.6, 3.2, 5.0, 9.0, 14.0],
    "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5, 1.7],
}
SMOLLM3 = base(
    "smollm3", "SmolLM3ForCausalLM", attention_bias=False, layer_types=["full_attention"] * 3, max_window_layers=3,
    mlp_bias=False, no_rope_layer_interval=4, no_rope_layers=[1, 1, 0], num_hidden_layers=3, pad_token_id=None,
    rope_scaling=None, sliding_window=None, use_sliding_window=False, **TIED,
)  # fmt: skip
OLMO = base(
    "olmo", "OlmoForCausalLM", attention_bias=False, clip_qkv=None, num_key_value_heads=4, pad_token_id=0,
    rms_norm_eps=REMOVED, rope_scaling=None,
)  # fmt: skip
OLMO2 = base("olmo2", "Olmo2ForCausalLM", attention_bias=False, pad_token_id=0, rope_scaling=None)
# transformers 5.23 gives sliding layers 500000 whatever the old spelling says: no other theta is tried.
OLMO3 = base(
    "olmo3", "Olmo3ForCausalLM", attention_bias=False, pad_token_id=0, num_hidden_layers=3,
    layer_types=["sliding_attention", "sliding_attention", "full_attention"], rope_scaling=None,
    rope_theta=500000, **HALF, **WINDOW,
)  # fmt: skip
OLMOE = base(
    "olmoe", "OlmoeForCausalLM", attention_bias=False, clip_qkv=None, intermediate_size=16, norm_topk_prob=False,
    num_experts=4, num_experts_per_tok=2, output_router_logits=False, pad_token_id=0, rms_norm_eps=1e-05,
    rope_scaling=None, router_aux_loss_coef=0.01,
)  # fmt: skip
GRANITE = base(
    "granite", "GraniteForCausalLM", attention_bias=False, attention_multiplier=0.5, embedding_multiplier=3.0,
    logits_scaling=2.0, mlp_bias=False, residual_multiplier=0.6, rope_scaling=None, **TIED,
)  # fmt: skip
GRANITEMOE = base(
    "granitemoe", "GraniteMoeForCausalLM", attention_bias=False, attention_multiplier=0.5, embedding_multiplier=3.0,
    intermediate_size=16, logits_scaling=2.0, num_experts_per_tok=2, num_local_experts=4, output_router_logits=False,
    residual_multiplier=0.6, rope_scaling=None, router_aux_loss_coef=0.001, **TIED,
)  # fmt: skip
STABLELM = base(
    "stablelm", "StableLmForCausalLM", hidden_dropout=0.0, layer_norm_eps=1e-05, num_attention_heads=2,
    num_key_value_heads=2, partial_rotary_factor=0.25, qk_layernorm=False, rms_norm_eps=REMOVED, rope_scaling=None,
    use_parallel_residual=False, use_qkv_bias=False,
)  # fmt: skip
STARCODER2 = base(
    "starcoder2", "Starcoder2ForCausalLM", embedding_dropout=0.0, hidden_act="gelu_pytorch_tanh",
    mlp_type="default", norm_epsilon=1e-05, norm_type="layer_norm", residual_dropout=0.0, rms_norm_eps=REMOVED,
    tie_word_embeddings=REMOVED, use_bias=True, **WINDOW,
)  # fmt: skip
GPT_NEOX = base(
    "gpt_neox", "GPTNeoXForCausalLM", attention_bias=True, classifier_dropout=0.1, hidden_act="gelu",
    hidden_dropout=0.0,
    layer_norm_eps=1e-05, num_attention_heads=2, num_key_value_heads=REMOVED, rms_norm_eps=REMOVED, rope_scaling=None,
    rope_theta=REMOVED, rotary_emb_base=10000, rotary_pct=0.25, use_parallel_residual=True,
)  # fmt: skip
GPT2: Config = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 1,
    "embd_pdrop": 0.1, "eos_token_id": 2, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
    "n_ctx": 80, "n_embd": 32, "n_head": 4, "n_inner": 32, "n_layer": 2, "n_positions": 80, "resid_pdrop": 0.1,
    "summary_type":
    "cls_index", "torch_dtype": "bfloat16", "vocab_size": 48,
}  # fmt: skip
COHERE = base(
    "cohere", "CohereForCausalLM", attention_bias=False, layer_norm_eps=1e-05, logit_scale=0.0625, pad_token_id=0,
    rms_norm_eps=REMOVED, tie_word_embeddings=REMOVED, use_qk_norm=False,
)  # fmt: skip
COHERE2 = base(
    "cohere2", "Cohere2ForCausalLM", attention_bias=False, cache_implementation="hybrid", head_dim=8,
    layer_norm_eps=1e-05,
    layer_switch=3, logit_scale=0.25, num_hidden_layers=3, order_of_interleaved_layers="local_attn_first",
    pad_token_id=0, position_embedding_type="rope_gptj", rms_norm_eps=REMOVED, rope_scaling=None, rotary_pct=1.0,
    sliding_window_pattern=3, tie_word_embeddings=REMOVED, use_embedding_sharing=True, use_gated_activation=True,
    use_parallel_block=True, use_parallel_embedding=False, use_qk_norm=False, **WINDOW,
)  # fmt: skip
GLM = base(
    "glm", "GlmForCausalLM", attention_bias=True, eos_token_id=[2, 3], head_dim=16, pad_token_id=0,
    partial_rotary_factor=0.5, rms_norm_eps=1.5625e-07,
)  # fmt: skip
GLM4 = {**GLM, "model_type": "glm4", "architectures": ["Glm4ForCausalLM"]}
NEMOTRON = base(
    "nemotron", "NemotronForCausalLM", attention_bias=False, head_dim=16, hidden_act="relu2", mlp_bias=False,
    norm_eps=1e-05, partial_rotary_factor=0.5, rms_norm_eps=REMOVED, rope_scaling=None,
)  # fmt: skip
GPT_OSS = base(
    "gpt_oss", "GptOssForCausalLM", attention_bias=True, experts_per_token=2, head_dim=16, initial_context_length=32,
    intermediate_size=32, layer_types=["sliding_attention", "full_attention"], num_experts_per_tok=2,
    num_local_experts=4, output_router_logits=False, pad_token_id=0, rms_norm_eps=1e-05,
    rope_scaling={**YARN, **BETAS, "original_max_position_embeddings": 512, "truncate": False}, rope_theta=150000,
    router_aux_loss_coef=0.9, swiglu_limit=1.5, **WINDOW,
)  # fmt: skip
MLA: Config = {
    "attention_bias": False, "aux_loss_alpha": 0.001, "ep_size": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16,
    "moe_intermediate_size": 16, "moe_layer_freq": 1, "n_routed_experts": 8, "n_shared_experts": 2,
    "num_experts_per_tok": 2, "num_key_value_heads": 4, "pretraining_tp": 1, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "rope_scaling": None, "seq_aux": True, "v_head_dim": 8,
}  # fmt: skip
DEEPSEEK_V2 = base(
    "deepseek_v2", "DeepseekV2ForCausalLM", **MLA, n_group=1, norm_topk_prob=False, q_lora_rank=None,
    routed_scaling_factor=1.0, scoring_func="softmax", topk_group=1, topk_method="greedy",
)  # fmt: skip
DEEPSEEK_V3 = base(
    "deepseek_v3", "DeepseekV3ForCausalLM", **MLA, n_group=2, norm_topk_prob=True, num_nextn_predict_layers=1,
    q_lora_rank=16, routed_scaling_factor=2.5, scoring_func="sigmoid", topk_group=1, topk_method="noaux_tc",
)  # fmt: skip
DEEPSEEK_YARN = {
    **BETAS, "factor": 8, "mscale": 1.0, "mscale_all_dim": 1.0, "type": "yarn",
}  # fmt: skip
EXAONE4 = base(
    "exaone4", "Exaone4ForCausalLM", head_dim=8, layer_types=["full_attention"] * 2, rope_scaling=None,
    sliding_window=None, sliding_window_pattern=None, **TIED,
)  # fmt: skip
ERNIE4_5 = base(
    "ernie4_5", "Ernie4_5ForCausalLM", head_dim=16, pad_token_id=0, rope_theta=500000.0, use_bias=False, **TIED
)  # fmt: skip
HUNYUAN = base(
    "hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", attention_bias=False, head_dim=16, mlp_bias=False, pad_token_id=0,
    rope_scaling={
        "alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "type": "dynamic",
    }, use_qk_norm=True, **TIED,
)  # fmt: skip
HUNYUAN_INERT = tuple(f"rope_scaling.{key}" for key in ("beta_fast", "beta_slow", "factor", "mscale", "mscale_all_dim"))
SEED_OSS = base(
    "seed_oss", "SeedOssForCausalLM", attention_bias=True, attention_out_bias=False, head_dim=16, mlp_bias=False,
    pad_token_id=0, residual_dropout=0.1, rope_scaling={"rope_type": "default"},
)  # fmt: skip
APERTUS = base(
    "apertus", "ApertusForCausalLM", attention_bias=False, hidden_act="xielu", mlp_bias=False, pad_token_id=3,
    post_norm=False, qk_norm=True, rope_theta=12000000, **HALF,
    rope_scaling={
        "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 128,
        "rope_type": "llama3", "type": "llama3",
    },
)  # fmt: skip
HELIUM = base(
    "helium", "HeliumForCausalLM", attention_bias=False, head_dim=8, mlp_bias=False, num_key_value_heads=4,
    pad_token_id=3, rms_norm_eps=1e-08, rope_theta=100000.0,
)  # fmt: skip
FALCON: Config = {
    "alibi": False, "apply_residual_connection_post_layernorm": False, "architectures": ["FalconForCausalLM"],
    "attention_dropout": 0.0, "bias": False, "bos_token_id": 1, "eos_token_id": 2, "hidden_dropout": 0.0,
    "hidden_size": 32, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "falcon",
    "multi_query": True, "new_decoder_architecture": False, "num_attention_heads": 4, "num_hidden_layers": 2,
    "num_kv_heads": 4, "parallel_attn": True, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 48,
}  # fmt: skip
OPT: Config = {
    "_remove_final_layer_norm": False, "activation_dropout": 0.0, "activation_function": "relu", "architectures":
    ["OPTForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 2, "do_layer_norm_before": True, "dropout": 0.1,
    "eos_token_id": 2, "ffn_dim": 64, "hidden_size": 32, "init_std": 0.02, "layerdrop": 0.0,
    "max_position_embeddings": 80, "model_type": "opt", "num_attention_heads": 4, "num_hidden_layers": 2,
    "pad_token_id": 1, "prefix": "</s>", "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 48,
    "word_embed_proj_dim": 32,
}  # fmt: skip
BLOOM: Config = {
    "apply_residual_connection_post_layernorm": False, "architectures": ["BloomForCausalLM"], "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_dropout": 0.0, "hidden_size": 32, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
    "masked_softmax_fusion": True, "model_type": "bloom", "n_head": 4, "n_inner": None, "n_layer": 2,
    "offset_alibi": 100, "pad_token_id": 3, "pretraining_tp": 1, "seq_length": 2048, "skip_bias_add": True,
    "skip_bias_add_qkv": False, "slow_but_exact": False, "torch_dtype": "bfloat16", "unk_token_id": 0,
    "use_cache": True, "vocab_size": 48,
}  # fmt: skip
