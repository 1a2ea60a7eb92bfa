"""OLMo 1: a Llama with LayerNorms that have no weights, and in some checkpoints q, k and v clipped.

Source: arXiv:2402.00838, and `transformers.models.olmo`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from runner.config.base import fixed
from runner.config.decoder import LayerNormConfig
from runner.models import llama
from runner.nn.batch import Batch
from runner.nn.blocks import BaseDecoder, Sequential
from runner.nn.fast import PlainLayerNorm
from runner.weights.tags import setting, weight


@dataclass(frozen=True, kw_only=True)
class OlmoConfig(LayerNormConfig):
    """`config.json` of an OLMo; the norms' epsilon is fixed and has no key."""

    layer_norm_eps: float = fixed(1e-5)
    partial_rotary_factor: float = fixed(1.0)
    attention_bias: bool = False
    clip_qkv: float | None = None


@dataclass
class Attention(llama.Attention):
    """Llama's attention; q, k and v are clipped to [-`clip_qkv`, `clip_qkv`] before RoPE."""

    clip_qkv: float | None = setting()

    def heads(self, qkv: mx.array, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
        clip = self.clip_qkv
        return super().heads(qkv if clip is None else mx.clip(qkv, -clip, clip), batch)


@dataclass
class Block(Sequential):
    """A Llama block with LayerNorms that have neither weight nor bias, so no tensors."""

    input_layernorm: PlainLayerNorm = weight("")
    self_attn: Attention = weight("self_attn")
    post_attention_layernorm: PlainLayerNorm = weight("")
    mlp: llama.MLP = weight("mlp")


@dataclass
class Olmo(BaseDecoder):
    """The model: embeddings, OLMo blocks, a LayerNorm without tensors, head."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
    norm: PlainLayerNorm = weight("")
