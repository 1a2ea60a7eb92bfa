"""OLMoE: OLMo 2's QK-norm, then OLMo's clipping of q, k and v, and a mixture of experts in every layer.

Source: arXiv:2409.02060, and `transformers.models.olmoe`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner.config.base import key
from runner.config.moe import check_routing
from runner.models import olmo, olmo2
from runner.models.llama import LlamaConfig
from runner.nn import blocks
from runner.nn.moe import SwitchMoE
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class OlmoeConfig(LlamaConfig):
    """`config.json` of an OLMoE; the `router_*` keys matter in training only."""

    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 4096
    clip_qkv: float | None = None
    num_experts: int = key(also="num_local_experts", default=64)
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = False
    router_aux_loss_coef: float | None = None
    output_router_logits: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_routing(self.num_experts, self.num_experts_per_tok)

    @property
    def moe_intermediate_size(self) -> int:
        """Hidden width of each expert: OLMoE's `intermediate_size`."""
        return self.intermediate_size


@dataclass
class Attention(olmo2.Attention, olmo.Attention):
    """Llama's attention that normalizes q and k (OLMo 2), then clips q, k and v (OLMo), then rotates."""


@dataclass
class Block(blocks.PreNorm):
    """A Llama block with OLMoE's attention, and experts instead of the MLP."""

    self_attn: Attention = weight("self_attn")
    mlp: SwitchMoE = weight("mlp")


@dataclass
class Olmoe(blocks.Decoder):
    """The model: embeddings, OLMoE blocks, RMSNorm, head."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
