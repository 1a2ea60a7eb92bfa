"""Mistral Small 4: DeepSeek's latent attention with Ministral 3's temperature, and experts scored by softmax.

Source: `transformers.models.mistral4`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import mlx.core as mx

from runner.config.base import fixed, key
from runner.config.rope import RopeScaling
from runner.errors import ConfigError
from runner.models import ministral3
from runner.models.deepseek_v2 import RoutedConfig
from runner.models.ministral3 import TemperedConfig
from runner.nn.batch import Batch
from runner.nn.blocks import ConfiguredDecoder as ConfiguredDecoder
from runner.nn.mla import LatentAttention, LatentConfig
from runner.nn.positions import Temperature

STRETCHED = dataclasses.replace(ministral3.STRETCHED, factor=128.0, original_max_position_embeddings=8192)


@dataclass(frozen=True, kw_only=True)
class Mistral4Config(TemperedConfig, RoutedConfig, LatentConfig):
    """`config.json` of a Mistral Small 4. RoPE turns `qk_rope_head_dim` numbers of a head: `head_dim` (the whole head)
    and `partial_rotary_factor` can only say the same.
    """

    NULL: ClassVar[Mapping[str, object]] = {
        **LatentConfig.NULL, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "rope_interleave": False,
    }  # fmt: skip
    max_position_embeddings: int = 1048576
    q_lora_rank: int | None = 1024
    kv_lora_rank: int = 256
    qk_nope_head_dim: int = 64
    moe_intermediate_size: int = 2048
    num_experts: int = key("n_routed_experts", also="num_local_experts", default=128)
    n_shared_experts: int = key(default=1, minimum=0)
    num_experts_per_tok: int = 4
    norm_topk_prob: bool = True
    topk_method: str = fixed("in groups")
    scoring_func: str = fixed("softmax")
    group_members: int = fixed(2)
    rope_interleave: bool = True
    partial_rotary_factor: float | None = None
    rope_scaling: RopeScaling | None = STRETCHED

    def __post_init__(self) -> None:
        size = self.qk_nope_head_dim + self.qk_rope_head_dim
        if self.head_dim == size:
            object.__setattr__(self, "head_dim", self.qk_rope_head_dim)
        super().__post_init__()
        factor = self.partial_rotary_factor
        if factor is not None and int(size * factor) != self.qk_rope_head_dim:
            raise ConfigError(
                f"config.json: partial_rotary_factor {factor} of {size} is not qk_rope_head_dim {self.qk_rope_head_dim}"
            )

    @property
    def attention_class(self) -> type:
        return Attention

    @property
    def traditional(self) -> bool:
        return self.rope_interleave


@dataclass
class Attention(LatentAttention):
    """Latent attention; queries are multiplied by their position's temperature."""

    temperature: Temperature = field(kw_only=True)

    def project(self, x: mx.array, batch: Batch) -> mx.array:
        return self.temperature(super().project(x, batch), batch)
