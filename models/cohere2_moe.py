"""Command A+: Command-R7B's parallel blocks with experts, whose first layers are dense and may have a window, too.

Source: `transformers.models.cohere2_moe`; no paper yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from runner.config import layer_types
from runner.config.base import Config, key
from runner.config.moe import check_listed, check_routing
from runner.errors import ConfigError
from runner.models import cohere, llama
from runner.models.cohere2 import Cohere2Config
from runner.nn.blocks import Parallel
from runner.nn.fast import RMSNorm, ScaledLayerNorm
from runner.nn.linear import HIDDEN
from runner.nn.mlp import ConfiguredMLP, GatedMLP
from runner.nn.moe import SwitchMoE
from runner.weights.tags import Choice, Chooses, Header, setting, weight
from runner.weights.tree import Size, Tree


@dataclass(frozen=True, kw_only=True)
class Cohere2MoeConfig(Cohere2Config):
    """`config.json` of a Command A+; `rms_norm_eps`, if set, makes all norms RMSNorms."""

    head_dim: int = 128
    rms_norm_eps: float | None = None  # type: ignore[assignment]
    num_experts: int = 8
    num_experts_per_tok: int = 2
    num_shared_experts: int = key(default=0, minimum=0)
    shared_expert_combination_strategy: str = "average"
    scoring_func: str = key("expert_selection_fn", default="softmax")
    norm_topk_prob: bool = True
    first_k_dense_replace: int = key(default=0, minimum=0)
    mlp_layer_types: tuple[str, ...] | None = None
    prefix_dense_sliding_window_pattern: int = 1
    prefix_dense_intermediate_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_routing(self.num_experts, self.num_experts_per_tok)
        check_listed(self.mlp_layer_types, self.num_hidden_layers)
        if self.scoring_func not in ("softmax", "sigmoid"):
            raise ConfigError(f"config.json: expert_selection_fn {self.scoring_func!r} is not softmax or sigmoid")
        if self.shared_expert_combination_strategy not in ("average", "sum"):
            found = self.shared_expert_combination_strategy
            raise ConfigError(f"config.json: shared_expert_combination_strategy {found!r} is not average or sum")
        # Softmax over the chosen experts alone: as if over all, then scaled to a sum of one.
        object.__setattr__(self, "norm_topk_prob", self.norm_topk_prob or self.scoring_func == "softmax")

    @property
    def usual_layer_types(self) -> Sequence[str]:
        dense = min(self.first_k_dense_replace, self.num_hidden_layers)
        prefix = layer_types.every(self.prefix_dense_sliding_window_pattern, dense)
        return [*prefix, *layer_types.every(self.sliding_window_pattern, self.num_hidden_layers - dense)]

    def dense(self, index: int) -> bool:
        """Whether layer `index` has a plain MLP instead of experts."""
        kinds = self.mlp_layer_types
        return index < self.first_k_dense_replace if kinds is None else kinds[index] == "dense"

    def layer_settings(self, index: int) -> Mapping[str, Any]:
        width = self.prefix_dense_intermediate_size if self.dense(index) else None
        changed = {} if width is None else {"intermediate_size": width}
        return {**super().layer_settings(index), **changed}

    @property
    def rotary_dim(self) -> int:
        index = self.layer_index
        turns = index is not None and self.dense(index) and self.prefix_dense_sliding_window_pattern == 1
        return self.head_dim if turns else super().rotary_dim

    @property
    def norm_eps(self) -> float:
        return self.layer_norm_eps if self.rms_norm_eps is None else self.rms_norm_eps

    @property
    def moe_intermediate_size(self) -> int:
        """The width of an expert."""
        return self.intermediate_size

    @property
    def mlp_class(self) -> type:
        if self.dense(self.layer_index or 0):
            return llama.MLP
        return MoE if self.num_shared_experts else SwitchMoE


class EitherNorm(Chooses):
    """A LayerNorm without bias, or an RMSNorm where the config has an epsilon for one."""

    def __call__(self, x: mx.array, eps: float) -> mx.array:
        raise NotImplementedError

    @classmethod
    def choose(cls, tree: Tree, shape: tuple[Size, ...], headers: Mapping[str, Header], config: Config) -> Choice:
        assert isinstance(config, Cohere2MoeConfig)
        return Choice(ScaledLayerNorm if config.rms_norm_eps is None else RMSNorm, {})


@dataclass
class MoE(SwitchMoE):
    """Routed experts, and shared ones (stored as one gated MLP) that every token passes: their sum, or its half."""

    shared: GatedMLP = weight("shared_experts", "num_shared_experts*intermediate_size")
    combination: str = setting("shared_expert_combination_strategy")

    def __call__(self, x: mx.array) -> mx.array:
        total = super().__call__(x) + self.shared(x)
        return total / 2 if self.combination == "average" else total


@dataclass
class Block(Parallel):
    """Cohere's block with a norm of either kind, and experts instead of the MLP in sparse layers."""

    input_layernorm: EitherNorm = weight("input_layernorm", HIDDEN)
    self_attn: cohere.Attention = weight("self_attn")
    mlp: ConfiguredMLP = weight("mlp")


@dataclass
class Cohere2Moe(cohere.ScaledDecoder):
    """Cohere's model made of Command A+ blocks."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
    norm: EitherNorm = weight("model.norm", HIDDEN)
