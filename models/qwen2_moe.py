"""Qwen 2 MoE: Qwen 2's attention, routed experts, and one shared expert that every token passes, scaled by a gate.

Source: `transformers.models.qwen2_moe`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from runner.config.base import key
from runner.config.decoder import DecoderConfig
from runner.config.moe import check_routing
from runner.models import llama, qwen2
from runner.models.qwen2 import Qwen2Config
from runner.nn import blocks
from runner.nn.linear import HIDDEN, KV, Linear, Q
from runner.nn.mlp import ConfiguredMLP, GatedMLP
from runner.nn.moe import SwitchMoE
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class SharedExpertConfig(DecoderConfig):
    """The keys of `config.json` about experts of which one serves every token; `router_*` matter in training only."""

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
        """Whether this layer has experts instead of a plain MLP."""
        index = self.layer_index or 0
        return index not in self.mlp_only_layers and (index + 1) % self.decoder_sparse_step == 0

    @property
    def mlp_class(self) -> type:
        return MoE if self.sparse else llama.MLP


@dataclass(frozen=True, kw_only=True)
class Qwen2MoeConfig(SharedExpertConfig, Qwen2Config):
    """`config.json` of a Qwen2-MoE."""

    sliding_window: int | None = key(default=4096, minimum=0)  # 0 in published files where no layer has a window
    qkv_bias: bool = True


@dataclass
class MoE(SwitchMoE):
    """Routed experts, plus the shared expert times the sigmoid of its gate."""

    shared: GatedMLP = weight("shared_expert", "shared_expert_intermediate_size")
    shared_gate: Linear = weight("shared_expert_gate", 1, HIDDEN)

    def __call__(self, x: mx.array) -> mx.array:
        return self.ops.add_gated(super().__call__(x), self.shared_gate(x), self.shared(x))


@dataclass
class Attention(qwen2.Attention):
    """Qwen 2's attention; the biases on q, k and v depend on `qkv_bias`."""

    qkv_proj: Linear = weight("{q,k,v}_proj", (Q, KV, KV), HIDDEN, bias="qkv_bias")


@dataclass
class Block(blocks.PreNorm):
    """A Llama block with Qwen 2 MoE's attention, and experts instead of the MLP in sparse layers."""

    self_attn: Attention = weight("self_attn")
    mlp: ConfiguredMLP = weight("mlp")


@dataclass
class Qwen2Moe(blocks.Decoder):
    """The model: embeddings, Qwen 2 MoE blocks, RMSNorm, head."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
