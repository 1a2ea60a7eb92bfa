"""Qwen 3 Next: Qwen 3.5 MoE with the DeltaNet's projections in two matrices, sorted by key heads.

Source: `transformers.models.qwen3_next`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from runner.config.base import Config
from runner.models import qwen3_5
from runner.models.qwen2_moe import SharedExpertConfig
from runner.models.qwen3_5 import Qwen35 as Qwen35
from runner.models.qwen3_5 import Qwen35Config
from runner.nn import delta_rule
from runner.nn.delta_rule import CHANNELS, HEADS, VALUES, Projected
from runner.nn.linear import HIDDEN, Linear
from runner.weights.tags import Choice, Header, weight
from runner.weights.transforms import permute_rows
from runner.weights.tree import Join, Size, Tree


@dataclass(frozen=True, kw_only=True)
class Qwen3NextConfig(SharedExpertConfig, Qwen35Config):
    """`config.json` of a Qwen3-Next."""

    num_key_value_heads: int = 2
    moe_intermediate_size: int = 512
    shared_expert_intermediate_size: int = 512
    num_experts: int = 512
    num_experts_per_tok: int = 10
    norm_topk_prob: bool = True

    @property
    def attention_class(self) -> type:
        return qwen3_5.Attention if self.attends else GatedDeltaNet


class ByKeyHead(Linear):
    """A matrix whose rows are sorted by key head: each one's parts one after the other.

    Reading puts the parts in order, each with the rows of all heads: queries, keys, values, z; or b, a. Parts that are
    stored apart (GGUF: z, and the three others) are in order.
    """

    @classmethod
    def choose(cls, tree: Tree, shape: tuple[Size, ...], headers: Mapping[str, Header], config: Config) -> Choice:
        assert isinstance(config, Qwen3NextConfig)
        choice, heads, parts = Linear.choose(tree, shape, headers, config), config.linear_num_key_heads, shape[0]
        assert isinstance(parts, tuple)
        if isinstance(tree, Join):
            return choice
        if parts[0] == config.linear_channels:
            keys = heads * config.linear_key_head_dim
            parts = (keys, keys, parts[0] - 2 * keys, parts[1])
        order = permute_rows(f"{parts} of {heads} heads", lambda rows: by_part(parts, heads))
        return Choice(choice.cls, {**choice.scope, "transform": order})


def by_part(parts: Sequence[int], heads: int) -> list[int]:
    """The stored row of each row of the parts, whose rows lie head by head: a share of each part in every head."""
    shares = [part // heads for part in parts]
    starts = [sum(shares[:index]) for index in range(len(parts))]
    head = sum(shares)
    places = [(h * head + start, share) for start, share in zip(starts, shares, strict=True) for h in range(heads)]
    return [first + i for first, share in places for i in range(share)]


@dataclass
class GatedDeltaNet(delta_rule.GatedDeltaNet):
    """The layer with one matrix for queries, keys, values and the output's gate, and one for the state's gates."""

    in_proj_qkvz: ByKeyHead = weight("in_proj_qkvz|in_proj_{qkv,z}", (CHANNELS, VALUES), HIDDEN)
    in_proj_ba: ByKeyHead = weight("in_proj_ba", (HEADS, HEADS), HIDDEN)

    def project(self, x: mx.array) -> Projected:
        qkv, z = mx.split(self.in_proj_qkvz(x), [self.linear_channels], axis=-1)
        return Projected(qkv, z, *mx.split(self.in_proj_ba(x), 2, axis=-1))
