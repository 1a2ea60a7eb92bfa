"""Qwen 2 MoE: Qwen 2's attention, experts, and one expert that every token passes, weighed by a gate of its own.

Source: `transformers.models.qwen2_moe`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from runner import blocks, moe
from runner.blocks import HIDDEN
from runner.config import Config, key
from runner.models import llama, qwen2
from runner.models.qwen2 import Qwen2Config
from runner.moe import ExpertLinear
from runner.nn import GLU, Linear
from runner.weights import Choice, Chooses, Header, Size, Tree, weight

EXPERT, SHARED = "moe_intermediate_size", "shared_expert_intermediate_size"


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

    @property
    def sparse(self) -> bool:
        """Whether this layer has experts."""
        index = self.layer_index or 0
        return index not in self.mlp_only_layers and (index + 1) % self.decoder_sparse_step == 0


class FeedForward(Chooses):
    """Experts or one dense layer: `[B, L, hidden_size]` to the same."""

    def __call__(self, x: mx.array) -> mx.array:
        raise NotImplementedError

    @classmethod
    def choose(cls, tree: Tree, shape: tuple[Size, ...], headers: Mapping[str, Header], config: Config) -> Choice:
        assert isinstance(config, Qwen2MoeConfig)
        return Choice(cls.experts() if config.sparse else llama.MLP, {})

    @classmethod
    def experts(cls) -> type:
        """What a sparse layer is."""
        return SharedMoE


@dataclass
class MoE(moe.MoE):
    """Experts as Qwen names them, or stacked by mlx-lm."""

    router: Linear = weight("gate", "num_experts", HIDDEN)
    gate_up_proj: ExpertLinear = weight(
        "experts.{num_experts}.{gate,up}_proj|switch_mlp.{gate,up}_proj[num_experts]", (EXPERT, EXPERT), HIDDEN
    )
    down_proj: ExpertLinear = weight(
        "experts.{num_experts}.down_proj|switch_mlp.down_proj[num_experts]", HIDDEN, EXPERT
    )


@dataclass
class SharedExpert:
    """The feed-forward layer of all tokens."""

    glu: GLU
    gate_up_proj: Linear = weight("{gate,up}_proj", (SHARED, SHARED), HIDDEN)
    down_proj: Linear = weight("down_proj", HIDDEN, SHARED)


@dataclass
class SharedMoE(MoE):
    """Experts, and the one for all."""

    shared: SharedExpert = weight("shared_expert")
    shared_gate: Linear = weight("shared_expert_gate", 1, HIDDEN)

    def __call__(self, x: mx.array) -> mx.array:
        everyone = self.shared.down_proj(self.shared.glu(self.shared.gate_up_proj(x)))
        return super().__call__(x) + mx.sigmoid(self.shared_gate(x)) * everyone


@dataclass
class Block(blocks.PreNorm):
    """Llama's frame, with experts in some layers."""

    self_attn: qwen2.Attention = weight("self_attn")
    mlp: FeedForward = weight("mlp")


@dataclass
class Qwen2Moe(blocks.Decoder):
    """Llama's frame with those blocks."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
