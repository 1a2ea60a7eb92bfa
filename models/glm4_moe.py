"""GLM-4.5, 4.6 and 4.7: GLM's half-rotated attention with optional QK-norm, and DeepSeek V3's experts.

Source: arXiv:2508.06471, and `transformers.models.glm4_moe`. RoPE turns pairs (i, i + dims/2), not GLM's neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from runner.config.base import key
from runner.models import glm, llama
from runner.models.deepseek_v3 import BalancedConfig
from runner.nn import blocks
from runner.nn.fast import RMSNorm
from runner.nn.mlp import ConfiguredMLP
from runner.nn.prediction import Predicting
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class Glm4MoeConfig(BalancedConfig):
    """`config.json` of a GLM-4.5; layer `num_hidden_layers` of its files is for multi-token prediction."""

    NULL: ClassVar[Mapping[str, object]] = {**BalancedConfig.NULL, "partial_rotary_factor": 1.0}
    num_key_value_heads: int = 8
    max_position_embeddings: int = 131072
    partial_rotary_factor: float = 0.5
    rms_norm_eps: float = 1e-5
    use_qk_norm: bool = False
    first_k_dense_replace: int = key(default=1, minimum=0)
    moe_intermediate_size: int = 1408
    num_experts: int = key("n_routed_experts", also="num_local_experts", default=128)
    num_nextn_predict_layers: int = key(also="num_mtp_layers", default=1, minimum=0)

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def prediction_class(self) -> type:
        return PredictingBlock


@dataclass
class Attention(glm.Attention, llama.NormedAttention):
    """GLM's attention (biases on q, k and v only); `use_qk_norm` adds an RMSNorm on q and one on k, as in Qwen 3."""

    q_norm: RMSNorm | None = weight("q_norm", "head_dim", when="use_qk_norm")
    k_norm: RMSNorm | None = weight("k_norm", "head_dim", when="use_qk_norm")


@dataclass
class Block(blocks.PreNorm):
    """A Llama block with GLM-4.5's attention, and experts instead of the MLP in sparse layers."""

    self_attn: Attention = weight("self_attn")
    mlp: ConfiguredMLP = weight("mlp")


@dataclass
class PredictingBlock(Block, Predicting):
    """The layer for multi-token prediction."""


@dataclass
class Glm4Moe(blocks.Decoder):
    """The model: embeddings, GLM-4.5 blocks, RMSNorm, head."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
