"""Qwen 3 Next: Qwen 3.5 MoE with the DeltaNet's projections in two matrices, sorted by key heads.

Source: `transformers.models.qwen3_next`.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from runner.models import qwen3_5
from runner.models.qwen2_moe import SharedExpertConfig
from runner.models.qwen3_5 import Qwen35 as Qwen35
from runner.models.qwen3_5 import Qwen35Config
from runner.nn import delta_rule
from runner.nn.delta_rule import CHANNELS, HEADS, VALUES, ByKeyHead, Projected
from runner.nn.linear import HIDDEN
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class Qwen3NextConfig(SharedExpertConfig, Qwen35Config):
    """`config.json` of a Qwen3-Next."""

    num_key_value_heads: int = 2
    moe_intermediate_size: int = 512
    shared_expert_intermediate_size: int = 512
    num_experts: int = 512
    num_experts_per_tok: int = 10
    norm_topk_prob: bool = True

    @property
    def attention_class(self) -> type:
        return qwen3_5.Attention if self.attends else GatedDeltaNet


@dataclass
class GatedDeltaNet(delta_rule.GatedDeltaNet):
    """The layer with one matrix for queries, keys, values and the output's gate, and one for the state's gates."""

    in_proj_qkvz: ByKeyHead = weight("in_proj_qkvz|in_proj_{qkv,z}", (CHANNELS, VALUES), HIDDEN)
    in_proj_ba: ByKeyHead = weight("in_proj_ba", (HEADS, HEADS), HIDDEN)

    def project(self, x: mx.array) -> Projected:
        qkv, z = mx.split(self.in_proj_qkvz(x), [self.linear_channels], axis=-1)
        return Projected(qkv, z, *mx.split(self.in_proj_ba(x), 2, axis=-1))
