"""Laguna: attention with a gate for each head, head counts and RoPE by the type of layer, DeepSeek V3's experts.

Source: `transformers.models.laguna`; no paper yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from runner.config.base import key
from runner.config.layer_types import FULL
from runner.config.layered import LayeredConfig, LayerRope, of_layer
from runner.config.rope_keys import OF_SLIDING
from runner.errors import ConfigError
from runner.models import afmoe, deepseek_v2
from runner.models.deepseek_v3 import ListedExpertsConfig
from runner.nn.blocks import ConfiguredDecoder as ConfiguredDecoder
from runner.nn.fast import soft_capped
from runner.nn.linear import HIDDEN, Linear
from runner.nn.mlp import GatedMLP
from runner.weights.tags import setting, weight

PLAIN = LayerRope(rope_theta=10000.0, partial_rotary_factor=1.0)


@dataclass(frozen=True, kw_only=True)
class LagunaConfig(ListedExpertsConfig, LayeredConfig):
    """`config.json` of a Laguna; `gating` says how many gates a layer has, one a head unless "per-element"."""

    vocab_size: int = 100352
    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 131072
    rope_theta: float = 500000.0
    partial_rotary_factor: float = 0.5
    sliding_rope: LayerRope | None = key(OF_SLIDING, default=PLAIN)
    sliding_window: int | None = 512
    gating: bool | str = True
    num_attention_heads_per_layer: tuple[int, ...] | None = None
    first_k_dense_replace: int = key(default=1, minimum=0)
    moe_intermediate_size: int = 512
    shared_expert_intermediate_size: int = 512
    num_experts: int = 256
    routed_scaling_factor: float = key("moe_routed_scaling_factor", default=1.0)
    moe_router_logit_softcapping: float = 0.0
    router_aux_loss_coef: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gating not in (True, "per-head", "per-element"):
            raise ConfigError(f"config.json: gating = {self.gating!r} is not supported, only per-head and per-element")
        if self.moe_router_logit_softcapping < 0:
            raise ConfigError("config.json: moe_router_logit_softcapping must not be negative")

    @property
    def usual_layer_types(self) -> Sequence[str]:
        return [FULL] * self.num_hidden_layers

    def layer_settings(self, index: int) -> Mapping[str, Any]:
        heads = self.num_attention_heads_per_layer or self.num_attention_heads
        count = of_layer(heads, index, self.num_hidden_layers, "num_attention_heads_per_layer")
        return {**super().layer_settings(index), "num_attention_heads": count}

    @property
    def gates(self) -> int:
        """How many gates this layer's attention has."""
        return self.num_attention_heads * (self.head_dim if self.gating == "per-element" else 1)

    @property
    def attention_class(self) -> type:
        return Attention

    @property
    def experts_class(self) -> type:
        return MoE


@dataclass
class Attention(afmoe.Attention):
    """Gated attention with the softplus of a gate, for each head or each number."""

    gate_proj: Linear = weight("g_proj", "gates", HIDDEN)

    def opened(self, attended: mx.array, gate: mx.array) -> mx.array:
        return attended * mx.logaddexp(gate, 0)  # of a head, or of each of its numbers


@dataclass
class MoE(deepseek_v2.MoE):
    """V2's experts beside a shared one, chosen with a correction, their scores soft-capped if the config says so."""

    router: Linear = weight("gate.proj|gate", "num_experts", HIDDEN, exact=True)
    correction: mx.array = weight(
        "experts.e_score_correction_bias|gate.e_score_correction_bias", "num_experts", exact=True
    )
    shared: GatedMLP = weight("shared_expert|shared_experts", "shared_expert_intermediate_size")
    cap: float = setting("moe_router_logit_softcapping")

    def logits(self, x: mx.array) -> mx.array:
        found = super().logits(x)
        return soft_capped(found, self.cap) if self.cap else found
