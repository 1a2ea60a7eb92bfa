"""DeepSeek V2: multi-head latent attention, and fine-grained experts in groups beside shared experts.

Source: arXiv:2405.04434, and `transformers.models.deepseek_v2`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from runner.config.base import key
from runner.config.decoder import DecoderConfig
from runner.config.moe import check_routing
from runner.errors import ConfigError
from runner.models import llama
from runner.nn import blocks
from runner.nn.mla import LatentAttention, LatentConfig
from runner.nn.mlp import ConfiguredMLP, GatedMLP
from runner.nn.moe import SwitchMoE
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class RoutedConfig(DecoderConfig):
    """The keys of `config.json` about experts as DeepSeek has them: small, in groups, beside shared ones.

    `ep_size`, the `aux` keys and `output_router_logits` matter in training only.
    """

    first_k_dense_replace: int = key(default=0, minimum=0)
    moe_layer_freq: int = 1
    moe_intermediate_size: int = 1407
    num_experts: int = key("n_routed_experts", also="num_experts", default=64)
    n_shared_experts: int = key(default=2, minimum=0)
    num_experts_per_tok: int
    n_group: int | None = 1
    topk_group: int | None = 1
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = False
    topk_method: str = "greedy"
    scoring_func: str = "softmax"
    ep_size: int | None = None
    aux_loss_alpha: float | None = None
    seq_aux: bool | None = None
    output_router_logits: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "n_group", self.n_group or 1)
        object.__setattr__(self, "topk_group", self.topk_group or 1)
        # Greedy top-k looks at all experts at once, whatever the groups.
        groups = (1, 1) if self.topk_method == "greedy" else (self.n_group or 1, self.topk_group or 1)
        check_routing(self.num_experts, self.num_experts_per_tok, *groups, self.group_members)

    @property
    def group_members(self) -> int:
        """How many of its best experts a group's rank is the sum of."""
        return 1

    @property
    def sparse(self) -> bool:
        """Whether this layer has experts instead of a plain MLP."""
        index = self.layer_index or 0
        return index >= self.first_k_dense_replace and index % self.moe_layer_freq == 0

    @property
    def mlp_class(self) -> type:
        return self.experts_class if self.sparse else llama.MLP

    @property
    def experts_class(self) -> type:
        """The MoE class of the sparse layers."""
        return MoE


@dataclass(frozen=True, kw_only=True)
class DeepseekV2Config(RoutedConfig, LatentConfig):
    """`config.json` of a DeepSeek V2: softmax scores, experts chosen from all or within the best groups."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topk_method not in ("greedy", "group_limited_greedy") or self.scoring_func != "softmax":
            found = f"topk_method {self.topk_method!r}, scoring_func {self.scoring_func!r}"
            raise ConfigError(f"config.json: {found} are not supported for a DeepSeek V2")
        if self.norm_topk_prob:
            raise ConfigError("config.json: norm_topk_prob is not supported for a DeepSeek V2")
        if self.topk_method == "greedy":
            object.__setattr__(self, "n_group", 1)
            object.__setattr__(self, "topk_group", 1)


@dataclass
class MoE(SwitchMoE):
    """Routed experts, plus the shared experts (stored as one gated MLP) that every token passes."""

    shared: GatedMLP | None = weight(
        "shared_experts", "n_shared_experts*moe_intermediate_size", when="n_shared_experts"
    )

    def __call__(self, x: mx.array) -> mx.array:
        routed = super().__call__(x)
        return routed if self.shared is None else routed + self.shared(x)


@dataclass
class Block(blocks.PreNorm):
    """A Llama block with latent attention, and experts instead of the MLP in sparse layers."""

    self_attn: LatentAttention = weight("self_attn")
    mlp: ConfiguredMLP = weight("mlp")


@dataclass
class DeepseekV2(blocks.Decoder):
    """The model: embeddings, DeepSeek blocks, RMSNorm, head."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
