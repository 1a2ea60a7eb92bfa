"""LFM2 MoE: LFM2's blocks with experts instead of the MLP in all but the first layers.

Source: `transformers.models.lfm2_moe`.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from runner.config.base import fixed, key
from runner.config.moe import check_routing
from runner.models import lfm2
from runner.models.lfm2 import ConvConfig
from runner.models.lfm2 import Lfm2 as Lfm2
from runner.nn import moe
from runner.nn.linear import HIDDEN
from runner.nn.moe import EXPERT, ExpertLinear
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class Lfm2MoeConfig(ConvConfig):
    """`config.json` of an LFM2 MoE; the router's scores are sigmoids."""

    intermediate_size: int = 7168
    moe_intermediate_size: int = 1792
    num_dense_layers: int = key(default=2, minimum=0)
    num_experts: int = 32
    num_experts_per_tok: int = 4
    use_expert_bias: bool = True
    norm_topk_prob: bool = True
    norm_topk_eps: float = fixed(1e-6)
    routed_scaling_factor: float = 1.0
    scoring_func: str = fixed("sigmoid")
    output_router_logits: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_routing(self.num_experts, self.num_experts_per_tok)

    @property
    def mlp_class(self) -> type:
        return lfm2.MLP if (self.layer_index or 0) < self.num_dense_layers else MoE


@dataclass
class MoE(moe.SwitchMoE):
    """Experts under LFM2's names; `expert_bias` affects the choice of experts, not their routing weights."""

    gate_up_proj: ExpertLinear = weight(
        "experts.{num_experts}.{w1,w3}|switch_mlp.{gate,up}_proj[num_experts]|experts.gate_up_proj[num_experts]",
        (EXPERT, EXPERT),
        HIDDEN,
    )
    down_proj: ExpertLinear = weight(
        "experts.{num_experts}.w2|switch_mlp.down_proj[num_experts]|experts.down_proj[num_experts]", HIDDEN, EXPERT
    )
    correction: mx.array | None = weight("expert_bias", "num_experts", when="use_expert_bias", exact=True)
