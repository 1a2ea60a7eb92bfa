"""GLM-4.7-Flash: DeepSeek V3 under another name, of other sizes.

Source: `transformers.models.glm4_moe_lite`.
"""

from __future__ import annotations

from dataclasses import dataclass

from runner.config.base import key
from runner.models.deepseek_v3 import DeepseekV2 as DeepseekV2
from runner.models.deepseek_v3 import DeepseekV3Config, ListedExpertsConfig


@dataclass(frozen=True, kw_only=True)
class Glm4MoeLiteConfig(ListedExpertsConfig, DeepseekV3Config):
    """`config.json` of a GLM-4.7-Flash; layer `num_hidden_layers` of its files is for multi-token prediction."""

    first_k_dense_replace: int = key(default=1, minimum=0)
    moe_intermediate_size: int = 1536
    num_experts: int = key("n_routed_experts", also="num_local_experts", default=64)
    num_experts_per_tok: int = 4
    n_group: int | None = 1
    topk_group: int | None = 1
    routed_scaling_factor: float = 1.8
    num_nextn_predict_layers: int = key(also="num_mtp_layers", default=1, minimum=0)
    q_lora_rank: int | None = 768
    qk_nope_head_dim: int = 192
    v_head_dim: int = 256
    max_position_embeddings: int = 202752
    rms_norm_eps: float = 1e-5
