"""Hunyuan A13B: Hunyuan's attention, and in every layer a shared MLP beside experts.

Source: `transformers.models.hunyuan_v1_moe`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from runner.config.base import fixed, key
from runner.config.moe import check_routing
from runner.config.problems import short
from runner.errors import ConfigError
from runner.models import deepseek_v2, hunyuan_v1_dense
from runner.models.hunyuan_v1_dense import HunyuanConfig
from runner.nn import blocks
from runner.nn.linear import HIDDEN, Linear
from runner.nn.mlp import GatedMLP
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class HunyuanMoeConfig(HunyuanConfig):
    """`config.json` of a Hunyuan A13B. Three of its keys may be lists, with a number for each layer; transformers reads
    `moe_topk` alone, as experts and shared MLP of the published model are as wide as `intermediate_size`.
    """

    ONLY: ClassVar[Mapping[str, object]] = {
        **HunyuanConfig.ONLY, "group_limited_greedy": False, "moe_layer_num_skipped": 0, "norm_topk_prob": True,
        "routed_scaling_factor": 1.0, "use_mixed_mlp_moe": True,
    }  # fmt: skip
    INERT: ClassVar[frozenset[str]] = HunyuanConfig.INERT | {"capacity_factor", "moe_drop_tokens"}
    num_experts: int = key(also="num_local_experts", default=1)
    moe_topk: int | tuple[int, ...] = key(also="num_experts_per_tok", default=1)
    expert_widths: int | tuple[int, ...] | None = key("moe_intermediate_size", default=None)
    num_shared_expert: int | tuple[int, ...] | None = None
    norm_topk_prob: bool = fixed(True)
    output_router_logits: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("moe_topk", "expert_widths", "num_shared_expert"):
            found = getattr(self, name)
            if isinstance(found, tuple) and (len(found) != self.num_hidden_layers or min(found, default=0) < 1):
                raise ConfigError(
                    f"config.json: {self.key_of(name)} needs a positive number for each of {self.num_hidden_layers} "
                    f"layers, not {short(list(found))}"
                )
        for index in range(self.num_hidden_layers):
            check_routing(self.num_experts, self.for_layer(index).num_experts_per_tok)

    def of_layer(self, value: int | tuple[int, ...] | None, default: int) -> int:
        """The number for this layer of a key that may have one for each, or none."""
        return value[self.layer_index or 0] if isinstance(value, tuple) else default if value is None else value

    @property
    def num_experts_per_tok(self) -> int:
        """How many experts a token of this layer passes."""
        return self.of_layer(self.moe_topk, 1)

    @property
    def moe_intermediate_size(self) -> int:
        """Hidden width of each expert of this layer."""
        return self.of_layer(self.expert_widths, self.intermediate_size)

    @property
    def shared_experts(self) -> int:
        """How many experts wide this layer's shared MLP is."""
        return self.of_layer(self.num_shared_expert, 1)


@dataclass
class MoE(deepseek_v2.MoE):
    """Routed experts, plus the shared MLP that every token passes."""

    router: Linear = weight("gate.wg", "num_experts", HIDDEN, exact=True)
    shared: GatedMLP = weight("shared_mlp", "shared_experts*moe_intermediate_size")


@dataclass
class Block(blocks.PreNorm):
    """A Llama block with Hunyuan's attention, and experts instead of the MLP."""

    self_attn: hunyuan_v1_dense.Attention = weight("self_attn")
    mlp: MoE = weight("mlp")


@dataclass
class HunyuanMoe(blocks.Decoder):
    """The model: embeddings, Hunyuan A13B blocks, RMSNorm, head."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
