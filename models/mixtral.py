"""Mixtral: Mistral's attention, and a mixture of experts instead of the MLP.

Source: arXiv:2401.04088, and `transformers.models.mixtral`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner.config.base import key
from runner.config.moe import LocalExpertsConfig
from runner.models import llama
from runner.models.llama import MistralConfig
from runner.nn import blocks, moe
from runner.nn.linear import HIDDEN, INTERMEDIATE, Linear
from runner.nn.moe import ExpertLinear
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class MixtralConfig(LocalExpertsConfig, MistralConfig):
    """`config.json` of a Mixtral; `router_jitter_noise` matters in training only."""

    num_key_value_heads: int = 8
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1000000.0
    sliding_window: int | None = None
    num_local_experts: int = key(also="num_experts", default=8)
    router_jitter_noise: float | None = None


@dataclass
class MoE(moe.MoE):
    """Experts stored as w1 (gate), w3 (up) and w2 (down), or stacked under Llama's names."""

    router: Linear = weight("gate", "num_local_experts", HIDDEN, exact=True)
    gate_up_proj: ExpertLinear = weight(
        "experts.{num_local_experts}.{w1,w3}|switch_mlp.{gate,up}_proj[num_local_experts]"
        "|experts.gate_up_proj[num_local_experts]",
        (INTERMEDIATE, INTERMEDIATE),
        HIDDEN,
    )
    down_proj: ExpertLinear = weight(
        "experts.{num_local_experts}.w2|switch_mlp.down_proj[num_local_experts]|experts.down_proj[num_local_experts]",
        HIDDEN,
        INTERMEDIATE,
    )


@dataclass
class Block(blocks.PreNorm):
    """A Llama block with experts instead of the MLP."""

    self_attn: llama.Attention = weight("self_attn")
    mlp: MoE = weight("block_sparse_moe|mlp")


@dataclass
class Mixtral(blocks.Decoder):
    """The model: embeddings, Mixtral blocks, RMSNorm, head."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
