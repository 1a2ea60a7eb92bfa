"""Jamba: Mamba in most layers, attention without RoPE in the others, and experts in place of every other MLP.

Source: arXiv:2403.19887, and `transformers.models.jamba`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from runner.config.base import fixed, key
from runner.config.hybrid import HybridConfig
from runner.config.layer_types import FULL, LINEAR
from runner.config.mamba import Mamba1Config
from runner.config.moe import check_routing
from runner.models import llama
from runner.models.bamba import Bamba as Bamba
from runner.nn import mamba, moe
from runner.nn.fast import RMSNorm
from runner.nn.linear import HIDDEN, Linear
from runner.nn.mamba import RANK, STATES
from runner.weights.tags import setting, weight


@dataclass(frozen=True, kw_only=True)
class JambaConfig(Mamba1Config, HybridConfig):
    """`config.json` of a Jamba; periods and offsets say which layers attend, and which have experts."""

    INERT: ClassVar[frozenset[str]] = frozenset(
        {"num_logits_to_keep", "use_mamba_kernels", "use_mambapy", "use_associative_scan"}
    )
    num_key_value_heads: int = 8
    max_position_embeddings: int = 262144
    layer_types: tuple[str, ...] | None = key(also="layers_block_type", default=None)
    attn_layer_period: int = 8
    attn_layer_offset: int = key(default=4, minimum=0)
    expert_layer_period: int = 2
    expert_layer_offset: int = key(default=1, minimum=0)
    num_experts: int = key(also="num_local_experts", default=16)
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = fixed(False)
    rotary_dim: int = fixed(0, minimum=0)
    output_router_logits: bool | None = None
    router_aux_loss_coef: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts > 1:
            check_routing(self.num_experts, self.num_experts_per_tok)

    @property
    def usual_layer_types(self) -> Sequence[str]:
        period, offset = self.attn_layer_period, self.attn_layer_offset
        return [FULL if index % period == offset else LINEAR for index in range(self.num_hidden_layers)]

    @property
    def moe_intermediate_size(self) -> int:
        """Width of an expert."""
        return self.intermediate_size

    @property
    def attention_class(self) -> type:
        return llama.Attention if self.attends else Mamba

    @property
    def mlp_class(self) -> type:
        sparse = (self.layer_index or 0) % self.expert_layer_period == self.expert_layer_offset
        return MoE if sparse and self.num_experts > 1 else llama.MLP


@dataclass
class Mamba(mamba.Mamba):
    """The layer with norms on what steps, B and C are made of."""

    dt_layernorm: RMSNorm = weight("dt_layernorm", RANK)
    b_layernorm: RMSNorm = weight("b_layernorm", STATES)
    c_layernorm: RMSNorm = weight("c_layernorm", STATES)
    rms_norm_eps: float = setting()

    def normed(self, dt: mx.array, b: mx.array, c: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        eps = self.rms_norm_eps
        return self.dt_layernorm(dt, eps), self.b_layernorm(b, eps), self.c_layernorm(c, eps)


@dataclass
class MoE(moe.SwitchMoE):
    """Experts whose routing weights are left as the softmax has them."""

    router: Linear = weight("router", "num_experts", HIDDEN, exact=True)
