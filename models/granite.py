"""Granite 3: a Llama with multipliers on embeddings, attention scores, residual branches and logits.

Source: arXiv:2405.04324, and `transformers.models.granite`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from runner.models import llama
from runner.models.llama import LlamaConfig
from runner.nn import blocks
from runner.nn.batch import Batch
from runner.weights.tags import setting, weight


@dataclass(frozen=True, kw_only=True)
class GraniteConfig(LlamaConfig):
    """`config.json` of a Granite; `attention_multiplier` replaces 1 / sqrt(head_dim)."""

    embedding_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0

    @property
    def attention_scale(self) -> float:
        return self.attention_multiplier


@dataclass
class ScaledPreNorm(blocks.PreNorm):
    """A pre-norm block that multiplies each sublayer's output by `residual_multiplier` before adding it."""

    residual_multiplier: float = setting()

    def __call__(self, x: mx.array, batch: Batch, cache: Any) -> mx.array:
        attended = self.self_attn(self.input_layernorm(x, self.rms_norm_eps), batch, cache)
        x, normed = self.post_attention_layernorm.add(x, attended * self.residual_multiplier, self.rms_norm_eps)
        return x + self.mlp(normed) * self.residual_multiplier


@dataclass
class Block(ScaledPreNorm):
    """Granite's scaled residual branches around Llama's attention and MLP."""

    self_attn: llama.Attention = weight("self_attn")
    mlp: llama.MLP = weight("mlp")


@dataclass
class Decoder(blocks.Decoder):
    """A decoder that multiplies embeddings by `embedding_multiplier` and divides logits by `logits_scaling`."""

    embedding_multiplier: float = setting()
    logits_scaling: float = setting()

    def embed(self, batch: Batch) -> mx.array:
        return super().embed(batch) * self.embedding_multiplier

    def logits(self, hidden: mx.array) -> mx.array:
        return super().logits(hidden) / self.logits_scaling


@dataclass
class Granite(Decoder):
    """The model: scaled embeddings, Granite blocks, RMSNorm, head with scaled logits."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
