"""Mellum 2: a Qwen 3 MoE with windowed layers, and RoPE by the type of layer.

Source: `transformers.models.mellum`; no paper yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from runner.config.base import fixed, key
from runner.config.layer_types import FULL
from runner.config.layered import LayeredConfig, LayerRope
from runner.config.moe import check_listed
from runner.config.rope_keys import OF_SLIDING
from runner.models import llama
from runner.models.qwen2_moe import SharedExpertConfig
from runner.models.qwen3_moe import Qwen3Moe as Qwen3Moe
from runner.nn.moe import SwitchMoE

PLAIN = LayerRope(rope_theta=10000.0)


@dataclass(frozen=True, kw_only=True)
class MellumConfig(SharedExpertConfig, LayeredConfig):
    """`config.json` of a Mellum 2; its layer for multi-token prediction is left unread."""

    INERT: ClassVar[frozenset[str]] = frozenset({"num_mtp_layers", "mtp_layer_types", "mtp_mlp_layer_types"})
    head_dim: int = 128
    max_position_embeddings: int = 131072
    rope_theta: float = 500000.0
    sliding_rope: LayerRope | None = key(OF_SLIDING, default=PLAIN)
    sliding_window: int | None = 1024
    num_key_value_heads: int = 4
    moe_intermediate_size: int = 896
    shared_expert_intermediate_size: int = fixed(1)
    num_experts: int = key(also="num_local_experts", default=64)
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = True
    mlp_layer_types: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_listed(self.mlp_layer_types, self.num_hidden_layers)

    @property
    def usual_layer_types(self) -> Sequence[str]:
        return [FULL] * self.num_hidden_layers

    @property
    def sparse(self) -> bool:
        kinds = self.mlp_layer_types
        return kinds is None or kinds[self.layer_index or 0] == "sparse"

    @property
    def mlp_class(self) -> type:
        return SwitchMoE if self.sparse else llama.MLP

    def ignores(self, name: str) -> bool:
        return name.startswith("mtp.") or super().ignores(name)
