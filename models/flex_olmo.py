"""FlexOlmo: OLMo 2's attention and order of norms, and OLMoE's experts.

Source: arXiv:2507.07024, and `transformers.models.flex_olmo`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner.config.base import fixed, key
from runner.models import olmo2
from runner.models.olmoe import OlmoeConfig
from runner.nn import blocks
from runner.nn.moe import SwitchMoE
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class FlexOlmoConfig(OlmoeConfig):
    """`config.json` of a FlexOlmo."""

    rms_norm_eps: float = 1e-6
    rope_theta: float = 500000.0
    clip_qkv: float | None = fixed(None)
    num_experts: int = key(also="num_local_experts", default=7)
    num_experts_per_tok: int = 5


@dataclass
class Block(blocks.PostNorm):
    """OLMo 2's attention and experts with a norm after each."""

    self_attn: olmo2.Attention = weight("self_attn")
    mlp: SwitchMoE = weight("mlp")


@dataclass
class FlexOlmo(blocks.Decoder):
    """The model: embeddings, FlexOlmo blocks, RMSNorm, head."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
