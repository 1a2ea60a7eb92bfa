"""Muse Glimmer (text): gated attention with norms that have no weight, norms around each sublayer, logits squeezed.

The norms of blocks are stored as the difference from one, the final one is not. Source:
`transformers.models.muse_glimmer`; no paper yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from runner.config.base import fixed, key
from runner.config.layer_types import FULL, SLIDING
from runner.config.layered import ListedRopeConfig
from runner.errors import ConfigError
from runner.models import afmoe, llama
from runner.nn import blocks
from runner.nn.batch import Batch
from runner.nn.fast import PlainRMSNorm, RMSNorm
from runner.nn.linear import HIDDEN
from runner.weights.tags import setting, weight
from runner.weights.transforms import PLUS_ONE


@dataclass(frozen=True, kw_only=True)
class MuseGlimmerConfig(ListedRopeConfig):
    """`config.json` of a Muse Glimmer's text model; `layer_rope_theta` has 0 for a layer without RoPE."""

    num_key_value_heads: int = 2
    head_dim: int = 128
    hidden_act: str = key("hidden_activation", default="silu")
    mlp_bias: bool = fixed(False)
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    post_norm_eps: float = 1e-8
    sliding_window: int | None = 2048
    qk_scale_factor: float = 3.87
    output_multiplier: float = 0.19611613513818404
    final_logit_softcapping: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        # transformers takes any other number for `rope_theta`; no published file has one.
        if set(self.layer_rope_theta or ()) - {0, self.rope_theta}:
            raise ConfigError(f"config.json: layer_rope_theta must have 0 or rope_theta = {self.rope_theta} alone")

    def base(self, index: int) -> float:
        listed = self.layer_rope_theta is not None
        return super().base(index) if listed or self.usual_layer_types[index] == SLIDING else 0

    @property
    def usual_layer_types(self) -> Sequence[str]:
        last = self.num_hidden_layers - 1
        return [SLIDING if (last - i) % 4 else FULL for i in range(self.num_hidden_layers)]

    @property
    def attention_scale(self) -> float:
        return super().attention_scale * self.qk_scale_factor


@dataclass
class Attention(afmoe.GatedAttention):
    """Gated attention with a norm without weight on each head's q and k."""

    q_norm: PlainRMSNorm = weight("q_norm")
    k_norm: PlainRMSNorm = weight("k_norm")


@dataclass
class Block(blocks.BothNorms):
    """Gemma 2's block with Muse Glimmer's attention; the norms behind sublayers have `post_norm_eps`."""

    input_layernorm: RMSNorm = weight("input_layernorm", HIDDEN, transform=PLUS_ONE)
    self_attn: Attention = weight("self_attn")
    attention_norm: RMSNorm = weight("post_attention_layernorm", HIDDEN, transform=PLUS_ONE)
    post_attention_layernorm: RMSNorm = weight("pre_feedforward_layernorm", HIDDEN, transform=PLUS_ONE)
    mlp: llama.MLP = weight("mlp")
    mlp_norm: RMSNorm = weight("post_feedforward_layernorm", HIDDEN, transform=PLUS_ONE)


@dataclass
class MuseGlimmer(blocks.Decoder):
    """The model: normalized embeddings, Muse Glimmer blocks, norm, head; logits are scaled, then soft-capped."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
    embed_norm: PlainRMSNorm = weight("model.embed_norm")
    output_multiplier: float = setting()

    def embed(self, batch: Batch) -> mx.array:
        return self.embed_norm(super().embed(batch), self.norm_eps)

    def logits(self, hidden: mx.array) -> mx.array:
        return super().logits(hidden * self.output_multiplier)
