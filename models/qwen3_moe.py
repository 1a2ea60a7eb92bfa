"""Qwen 3 MoE: Qwen 3's attention, and Qwen 2 MoE's routed experts without the shared one.

Source: arXiv:2505.09388, and `transformers.models.qwen3_moe`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner.models import llama, qwen3
from runner.models.qwen2_moe import Qwen2MoeConfig
from runner.nn import blocks
from runner.nn.mlp import ConfiguredMLP
from runner.nn.moe import SwitchMoE
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(Qwen2MoeConfig):
    """`config.json` of a Qwen3-MoE; transformers 5 writes `num_local_experts` for `num_experts`."""

    num_key_value_heads: int = 4
    moe_intermediate_size: int = 768
    num_experts: int = 128
    num_local_experts: int | None = None
    num_experts_per_tok: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_experts", self.num_local_experts or self.num_experts)
        super().__post_init__()

    @property
    def mlp_class(self) -> type:
        return SwitchMoE if self.sparse else llama.MLP


@dataclass
class Block(blocks.PreNorm):
    """A Llama block with Qwen 3's attention, and experts instead of the MLP in sparse layers."""

    self_attn: qwen3.Attention = weight("self_attn")
    mlp: ConfiguredMLP = weight("mlp")


@dataclass
class Qwen3Moe(blocks.Decoder):
    """The model: embeddings, Qwen 3 MoE blocks, RMSNorm, head."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
