"""Command-R and Command-R+: LayerNorms without bias, attention and MLP in parallel, RoPE on neighbouring pairs.

Source: `transformers.models.cohere`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from runner.config.base import fixed
from runner.config.decoder import LayerNormConfig
from runner.models import llama
from runner.nn.attention import StoredHeadNorms
from runner.nn.blocks import BaseDecoder, Parallel
from runner.nn.fast import ScaledLayerNorm
from runner.nn.linear import HIDDEN
from runner.weights.tags import setting, weight


@dataclass(frozen=True, kw_only=True)
class CohereConfig(LayerNormConfig):
    """`config.json` of a Command-R; defaults are those of `transformers.CohereConfig`."""

    max_position_embeddings: int = 8192
    model_max_length: int | None = None
    rope_theta: float = 500000.0
    partial_rotary_factor: float = fixed(1.0)
    logit_scale: float = 0.0625
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    use_qk_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_max_length is not None and self.rope_scaling is None:
            # The context length the authors state. Without RoPE scaling, no formula uses the other number.
            object.__setattr__(self, "max_position_embeddings", self.model_max_length)

    @property
    def traditional(self) -> bool:
        """RoPE rotates pairs (2i, 2i+1)."""
        return True


@dataclass
class Attention(llama.NormedAttention):
    """Llama's attention; with `use_qk_norm` (Command-R+) a LayerNorm with its own weights on each head's q and k."""

    q_norm: StoredHeadNorms | None = weight("q_norm", "num_attention_heads", "head_dim", when="use_qk_norm")
    k_norm: StoredHeadNorms | None = weight("k_norm", "num_key_value_heads", "head_dim", when="use_qk_norm")


@dataclass
class Block(Parallel):
    """Attention and MLP in parallel, behind one LayerNorm without bias."""

    input_layernorm: ScaledLayerNorm = weight("input_layernorm", HIDDEN)
    self_attn: Attention = weight("self_attn")
    mlp: llama.MLP = weight("mlp")


@dataclass
class ScaledDecoder(BaseDecoder):
    """A decoder whose logits are multiplied by `logit_scale`."""

    logit_scale: float = setting()

    def logits(self, hidden: mx.array) -> mx.array:
        return super().logits(hidden) * self.logit_scale


@dataclass
class Cohere(ScaledDecoder):
    """The model: a stack of parallel blocks, a final LayerNorm without bias, and scaled logits."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
    norm: ScaledLayerNorm = weight("model.norm", HIDDEN)
