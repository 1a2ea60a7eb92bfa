"""MiniMax M2: OLMo 2's norms over all heads, RoPE on part of each, and Mixtral's experts with DeepSeek V3's router.

Source: `transformers.models.minimax_m2`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from runner.config.base import fixed, key
from runner.config.moe import LocalExpertsConfig
from runner.errors import ConfigError
from runner.models import mixtral, olmo2
from runner.nn import blocks
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class MiniMaxM2Config(LocalExpertsConfig):
    """`config.json` of a MiniMax M2; files say by `rotary_dim` what transformers 5 says by `partial_rotary_factor`."""

    ONLY: ClassVar[Mapping[str, object]] = {
        "use_qk_norm": True, "qk_norm_type": "per_layer", "use_routing_bias": True, "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
    }  # fmt: skip
    INERT: ClassVar[frozenset[str]] = frozenset(
        {"use_mtp", "num_mtp_modules", "mtp_transformer_layers"}
    )  # not in files
    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 196608
    rope_theta: float = 5000000.0
    partial_rotary_factor: float | None = None
    rotary_size: int | None = key("rotary_dim", default=None)
    num_local_experts: int = key(also="num_experts", default=256)
    num_experts_per_tok: int = 8
    router_jitter_noise: float | None = None
    scoring_func: str = fixed("sigmoid")
    attn_type_list: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if set(self.attn_type_list or ()) - {1}:
            raise ConfigError("config.json: attn_type_list has layers without full attention, which are not supported")

    @property
    def rotary_dim(self) -> int:
        factor = self.partial_rotary_factor
        return int(self.head_dim * factor) if factor is not None else self.rotary_size or self.head_dim


@dataclass
class MoE(mixtral.MoE):
    """Mixtral's experts with `e_score_correction_bias`, which affects the choice, not the routing weights."""

    correction: mx.array = weight("e_score_correction_bias", "num_local_experts", exact=True)


@dataclass
class Block(blocks.PreNorm):
    """A Llama block with OLMo 2's attention and MiniMax's experts."""

    self_attn: olmo2.Attention = weight("self_attn")
    mlp: MoE = weight("block_sparse_moe|mlp")


@dataclass
class MiniMaxM2(blocks.Decoder):
    """The model: embeddings, MiniMax blocks, RMSNorm, head."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
