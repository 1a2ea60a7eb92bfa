"""Qwen 3.5 MoE: Qwen 3.5 with routed experts and a shared one, which has a gate, in place of the MLP.

Source: `transformers.models.qwen3_5_moe`.
"""

from __future__ import annotations

from dataclasses import dataclass

from runner.config.base import fixed
from runner.models.qwen2_moe import SharedExpertConfig
from runner.models.qwen3_5 import Qwen35 as Qwen35
from runner.models.qwen3_5 import Qwen35Config


@dataclass(frozen=True, kw_only=True)
class Qwen35MoeConfig(SharedExpertConfig, Qwen35Config):
    """`config.json` of a Qwen3.5-MoE's text model: all layers have experts, so there is no width of an MLP."""

    num_key_value_heads: int = 2
    intermediate_size: int = fixed(1)
    decoder_sparse_step: int = fixed(1)
    mlp_only_layers: tuple[int, ...] = fixed(())
    moe_intermediate_size: int = 512
    shared_expert_intermediate_size: int = 512
    num_experts: int = 256
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = fixed(True)
