"""ERNIE 4.5 MoE: ERNIE 4.5's attention, and experts scored by softmax, chosen with a correction.

Source: `transformers.models.ernie4_5_moe`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from runner.config.base import fixed, key
from runner.config.moe import check_routing
from runner.errors import ConfigError
from runner.models import deepseek_v2, llama
from runner.models.ernie4_5 import Ernie45Config
from runner.nn.blocks import ConfiguredDecoder as ConfiguredDecoder
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class Ernie45MoeConfig(Ernie45Config):
    """`config.json` of an ERNIE 4.5 MoE; `model.mtp_*` tensors, for multi-token prediction, are left unread."""

    ONLY: ClassVar[Mapping[str, object]] = {"moe_gate": "topk", "moe_use_aux_free": True}
    INERT: ClassVar[frozenset[str]] = frozenset({"moe_capacity", "num_nextn_predict_layers"})  # of training; see above
    num_key_value_heads: int = 4
    head_dim: int = 0
    use_bias: bool = False
    moe_intermediate_size: int = 1536
    num_experts_per_tok: int = key("moe_k", also="num_experts_per_tok", default=6)
    num_experts: int = key("moe_num_experts", also="num_experts", default=64)
    n_shared_experts: int = key("moe_num_shared_experts", default=2, minimum=0)
    moe_layer_start_index: int = key(default=1, minimum=0)
    moe_layer_end_index: int = key(default=-1, minimum=-1)
    moe_layer_interval: int = 1
    moe_norm_min: float = 1e-12
    norm_topk_prob: bool = fixed(True)
    router_aux_loss_coef: float | None = None
    output_router_logits: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_routing(self.num_experts, self.num_experts_per_tok)
        if self.use_bias or self.moe_norm_min > 1e-6:
            found = f"use_bias {self.use_bias}, moe_norm_min {self.moe_norm_min}"
            raise ConfigError(f"config.json: {found} are not supported for an ERNIE 4.5 MoE")

    @property
    def attention_class(self) -> type:
        return llama.Attention

    @property
    def mlp_class(self) -> type:
        index, end = self.layer_index or 0, self.moe_layer_end_index
        sparse = (index + 1) % self.moe_layer_interval == 0 and index >= self.moe_layer_start_index
        return MoE if sparse and (end == -1 or index <= end) else llama.MLP

    def ignores(self, name: str) -> bool:
        return name.startswith("model.mtp_")


@dataclass
class MoE(deepseek_v2.MoE):
    """Routed and shared experts, with a correction that affects the choice of experts, not their routing weights."""

    correction: mx.array = weight(
        "moe_statics.e_score_correction_bias|gate.moe_statics.e_score_correction_bias", 1, "num_experts", exact=True
    )
