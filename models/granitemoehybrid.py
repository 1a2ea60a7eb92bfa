"""Granite 4: Granite's multipliers, Mamba 2 in most layers, and beside the experts, if there are any, a shared MLP.

Source: `transformers.models.granitemoehybrid`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from runner.config.base import key
from runner.config.hybrid import HybridConfig
from runner.config.layer_types import LINEAR
from runner.config.mamba import Mamba2Config
from runner.models import granite, granitemoe, llama
from runner.models.granitemoe import GraniteMoeConfig
from runner.nn.blocks import ConfiguredAttention
from runner.nn.linear import HIDDEN, Linear
from runner.nn.mamba2 import Mamba2
from runner.nn.mlp import ConfiguredMLP, FeedForward, GatedMLP
from runner.weights.module import Module
from runner.weights.tags import weight

SHARED = "shared_intermediate_size"


@dataclass(frozen=True, kw_only=True)
class GraniteMoeHybridConfig(Mamba2Config, HybridConfig, GraniteMoeConfig):
    """`config.json` of a Granite 4; no experts are `num_local_experts` 0, and only "rope" means RoPE."""

    INERT: ClassVar[frozenset[str]] = frozenset({"init_method"})
    ONLY: ClassVar[Mapping[str, object]] = {"normalization_function": "rmsnorm"}
    layer_types: tuple[str, ...] | None = key(also="layers_block_type", default=None)
    num_local_experts: int = key(default=8, minimum=0)
    shared_intermediate_size: int = 1024
    position_embedding_type: str | None = None

    @property
    def usual_layer_types(self) -> Sequence[str]:
        return [LINEAR] * self.num_hidden_layers

    @property
    def rotary_dim(self) -> int:
        return self.head_dim if self.position_embedding_type == "rope" else 0

    @property
    def attention_class(self) -> type:
        return llama.Attention if self.attends else Mamba2

    @property
    def mlp_class(self) -> type:
        return MoE if self.num_local_experts else MLP


@dataclass
class SharedMLP(GatedMLP):
    """The gated MLP with gate and up in one matrix (mlx-lm: two, where there are no experts)."""

    gate_up_proj: Linear = weight("input_linear|{gate,up}_proj", (SHARED, SHARED), HIDDEN)
    down_proj: Linear = weight("output_linear|down_proj", HIDDEN, SHARED)


@dataclass
class MLP(Module, FeedForward):
    """The shared MLP alone."""

    shared: SharedMLP = weight("shared_mlp|mlp")

    def __call__(self, x: mx.array) -> mx.array:
        return self.shared(x)


@dataclass
class MoE(MLP):
    """The experts and the shared MLP, summed."""

    experts: granitemoe.MoE = weight("block_sparse_moe")

    def __call__(self, x: mx.array) -> mx.array:
        return self.experts(x) + self.shared(x)


@dataclass
class Block(granite.ScaledPreNorm):
    """A Granite block with attention or Mamba 2, and experts or the shared MLP alone."""

    self_attn: ConfiguredAttention = weight("{mixer}")
    mlp: ConfiguredMLP = weight("")


@dataclass
class GraniteMoeHybrid(granite.Decoder):
    """The model: scaled embeddings, Granite 4 blocks, RMSNorm, head with scaled logits."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
