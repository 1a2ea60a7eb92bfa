"""DeepSeek V3 and R1: V2 with sigmoid scores for experts, chosen with a per-expert correction that balances their load.

Source: arXiv:2412.19437, and `transformers.models.deepseek_v3`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import mlx.core as mx

from runner.config.base import key
from runner.config.moe import check_listed
from runner.errors import ConfigError
from runner.models import deepseek_v2
from runner.models.deepseek_v2 import DeepseekV2 as DeepseekV2
from runner.models.deepseek_v2 import RoutedConfig
from runner.nn.mla import LatentConfig
from runner.nn.prediction import Predicting
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class BalancedConfig(RoutedConfig):
    """The keys about experts of a DeepSeek V3; the layers for multi-token prediction are left unread."""

    moe_intermediate_size: int = 2048
    num_experts: int = key("n_routed_experts", also="num_local_experts", default=256)
    n_shared_experts: int = key(default=1, minimum=0)
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = True
    topk_method: str = "noaux_tc"
    scoring_func: str = "sigmoid"
    num_nextn_predict_layers: int = key(also="num_mtp_layers", default=0, minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topk_method != "noaux_tc" or self.scoring_func != "sigmoid":
            found = f"topk_method {self.topk_method!r}, scoring_func {self.scoring_func!r}"
            raise ConfigError(f"config.json: {found} are not supported for {type(self).__name__}")

    @property
    def group_members(self) -> int:
        return 2

    @property
    def experts_class(self) -> type:
        return MoE

    @property
    def prediction_layer(self) -> str:
        return str(self.num_hidden_layers)

    def ignores(self, name: str) -> bool:
        found = re.match(r"model\.layers\.(\d{1,9})\.", name)
        # Compared as numbers: a file can claim any number of further layers.
        return found is not None and 0 <= int(found[1]) - self.num_hidden_layers < self.num_nextn_predict_layers


@dataclass(frozen=True, kw_only=True)
class DeepseekV3Config(BalancedConfig, LatentConfig):
    """`config.json` of a DeepSeek V3."""

    max_position_embeddings: int = 4096
    first_k_dense_replace: int = key(default=3, minimum=0)
    n_group: int | None = 8
    topk_group: int | None = 4
    routed_scaling_factor: float = 2.5
    rope_interleave: bool = True

    @property
    def traditional(self) -> bool:
        return self.rope_interleave

    @property
    def prediction_class(self) -> type:
        return PredictingBlock


@dataclass(frozen=True, kw_only=True)
class ListedExpertsConfig(BalancedConfig):
    """V3's keys, and `mlp_layer_types`, which transformers 5 writes for `first_k_dense_replace`."""

    mlp_layer_types: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_listed(self.mlp_layer_types, self.num_hidden_layers)

    @property
    def sparse(self) -> bool:
        return (
            super().sparse if self.mlp_layer_types is None else self.mlp_layer_types[self.layer_index or 0] == "sparse"
        )


@dataclass
class PredictingBlock(deepseek_v2.Block, Predicting):
    """The layer for multi-token prediction."""


@dataclass
class MoE(deepseek_v2.MoE):
    """V2's experts with `e_score_correction_bias`, which affects the choice of experts, not their routing weights."""

    correction: mx.array = weight("gate.e_score_correction_bias", "num_experts", exact=True)
