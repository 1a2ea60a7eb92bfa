"""Qwen 2 MoE: Qwen 2's attention, experts, and one expert that every token passes, weighed by a gate of its own.

Source: `transformers.models.qwen2_moe`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from runner.config.base import key
from runner.config.moe import check_routing
from runner.models import llama, qwen2
from runner.models.qwen2 import Qwen2Config
from runner.nn import blocks
from runner.nn.linear import HIDDEN, KV, Linear, Q
from runner.nn.mlp import ConfiguredMLP, GatedMLP
from runner.nn.moe import SwitchMoE
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class Qwen2MoeConfig(Qwen2Config):
    """`config.json` of a Qwen2-MoE; the `router_*` keys are about training."""

    sliding_window: int | None = key(default=4096, minimum=0)
    qkv_bias: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    moe_intermediate_size: int = 1408
    shared_expert_intermediate_size: int = 5632
    num_experts: int = 60
    num_experts_per_tok: int = 4
    norm_topk_prob: bool = False
    router_aux_loss_coef: float | None = None
    output_router_logits: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_routing(self.num_experts, self.num_experts_per_tok)

    @property
    def sparse(self) -> bool:
        """Whether this layer has experts."""
        index = self.layer_index or 0
        return index not in self.mlp_only_layers and (index + 1) % self.decoder_sparse_step == 0

    @property
    def mlp_class(self) -> type:
        return MoE if self.sparse else llama.MLP


@dataclass
class MoE(SwitchMoE):
    """Experts, and the one for all."""

    shared: GatedMLP = weight("shared_expert", "shared_expert_intermediate_size")
    shared_gate: Linear = weight("shared_expert_gate", 1, HIDDEN)

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x) + mx.sigmoid(self.shared_gate(x)) * self.shared(x)


@dataclass
class Attention(qwen2.Attention):
    """The biases on the way in have a flag."""

    qkv_proj: Linear = weight("{q,k,v}_proj", (Q, KV, KV), HIDDEN, bias="qkv_bias")


@dataclass
class Block(blocks.PreNorm):
    """Llama's frame, with experts in some layers."""

    self_attn: Attention = weight("self_attn")
    mlp: ConfiguredMLP = weight("mlp")


@dataclass
class Qwen2Moe(blocks.Decoder):
    """Llama's frame with those blocks."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
