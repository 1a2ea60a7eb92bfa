"""DeepSeek V3 and R1: V2's attention; experts are scored by a sigmoid and chosen with a correction that balances them.

Source: arXiv:2412.19437, and `transformers.models.deepseek_v3`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from runner import blocks, moe
from runner.config import key
from runner.errors import ConfigError
from runner.models import deepseek_v2
from runner.models.deepseek_v2 import EXPERTS, DeepseekConfig
from runner.weights import weight


@dataclass(frozen=True, kw_only=True)
class DeepseekV3Config(DeepseekConfig):
    """`config.json` of a DeepSeek V3; layers that predict further tokens are left unread."""

    norm_topk_prob: bool = True
    topk_method: str = "noaux_tc"
    scoring_func: str = "sigmoid"
    num_nextn_predict_layers: int = key(default=0, minimum=0)
    rope_interleave: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topk_method != "noaux_tc" or self.scoring_func != "sigmoid":
            found = f"topk_method {self.topk_method!r}, scoring_func {self.scoring_func!r}"
            raise ConfigError(f"config.json: {found} are not supported for a DeepSeek V3")

    @property
    def traditional(self) -> bool:
        return self.rope_interleave

    def ignores(self, name: str) -> bool:
        further = range(self.num_hidden_layers, self.num_hidden_layers + self.num_nextn_predict_layers)
        return name.startswith(tuple(f"model.layers.{index}." for index in further))


@dataclass
class MoE(deepseek_v2.MoE):
    """Groups are ranked by their two best; the correction takes part in the choice, not in the shares."""

    correction: mx.array = weight("gate.e_score_correction_bias", EXPERTS)

    def route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        scores = mx.sigmoid(self.scores(x))
        choice = moe.in_best_groups(scores + self.correction, self.n_group, self.topk_group, members=2)
        experts = moe.best(choice, self.num_experts_per_tok)
        shares = mx.take_along_axis(scores, experts, axis=-1)
        if self.norm_topk_prob:
            shares = shares / (mx.sum(shares, axis=-1, keepdims=True) + 1e-20)
        return experts, shares * self.routed_scaling_factor


class FeedForward(deepseek_v2.FeedForward):
    """With those experts."""

    @classmethod
    def experts(cls) -> type:
        return MoE


@dataclass
class Block(blocks.PreNorm):
    """Llama's frame, with V2's attention."""

    self_attn: deepseek_v2.Attention = weight("self_attn")
    mlp: FeedForward = weight("mlp")


@dataclass
class DeepseekV3(blocks.Decoder):
    """Llama's frame with those blocks."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
