"""K-EXAONE: EXAONE 4's attention (RoPE in windowed layers only) behind one norm, and DeepSeek V3's experts.

Source: `transformers.models.exaone_moe`.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from runner.config.base import key
from runner.models import deepseek_v3, qwen3
from runner.models.deepseek_v3 import ListedExpertsConfig
from runner.models.exaone4 import Exaone4Config
from runner.nn.blocks import ConfiguredDecoder as ConfiguredDecoder
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class ExaoneMoeConfig(ListedExpertsConfig, Exaone4Config):
    """`config.json` of a K-EXAONE; the tensors below `mtp`, for multi-token prediction, are left unread."""

    num_key_value_heads: int = 32
    rms_norm_eps: float = 1e-5
    first_k_dense_replace: int = key(default=1, minimum=0)
    moe_intermediate_size: int = 1024
    num_experts: int = key("num_experts", also="num_local_experts", default=64)
    n_shared_experts: int = key("num_shared_experts", also="n_shared_experts", default=1, minimum=0)
    routed_scaling_factor: float = 2.5
    is_moe_layer: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        if self.mlp_layer_types is None and self.is_moe_layer is not None:
            kinds = tuple("sparse" if sparse else "dense" for sparse in self.is_moe_layer)
            object.__setattr__(self, "mlp_layer_types", kinds)
        super().__post_init__()

    @property
    def attention_class(self) -> type:
        return qwen3.Attention

    @property
    def experts_class(self) -> type:
        return MoE

    def ignores(self, name: str) -> bool:
        return name.startswith("mtp.") or super().ignores(name)


@dataclass
class MoE(deepseek_v3.MoE):
    """V3's experts; the correction is stored beside the router, not below it."""

    correction: mx.array = weight("e_score_correction_bias|gate.e_score_correction_bias", "num_experts", exact=True)
