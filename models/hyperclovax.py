"""HyperCLOVA X: Granite's multipliers with optional norms after the sublayers, too; logits are multiplied, not divided.

Source: `transformers.models.hyperclovax`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from runner.cache.kv import KVCache
from runner.config.base import key
from runner.models import granite, llama
from runner.models.llama import LlamaConfig
from runner.nn.batch import Batch
from runner.nn.fast import RMSNorm
from runner.nn.linear import HIDDEN
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class HyperCLOVAXConfig(LlamaConfig):
    """`config.json` of a HyperCLOVA X; without an `attention_multiplier`, scores are scaled as in a Llama."""

    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None
    residual_multiplier: float = 1.0
    logits_multiplier: float = key("logits_scaling", default=1.0)
    use_post_norm: bool = True

    @property
    def attention_scale(self) -> float:
        return super().attention_scale if self.attention_multiplier is None else self.attention_multiplier

    @property
    def logits_scaling(self) -> float:
        """What logits are divided by."""
        return 1 / self.logits_multiplier


@dataclass
class Block(granite.ScaledPreNorm):
    """Granite's block; with `use_post_norm`, each sublayer's output is normalized before it is scaled and added."""

    self_attn: llama.Attention = weight("self_attn")
    mlp: llama.MLP = weight("mlp")
    attention_norm: RMSNorm | None = weight("post_norm1", HIDDEN, when="use_post_norm")
    mlp_norm: RMSNorm | None = weight("post_norm2", HIDDEN, when="use_post_norm")

    def __call__(self, x: mx.array, batch: Batch, cache: KVCache) -> mx.array:
        if self.attention_norm is None or self.mlp_norm is None:
            return super().__call__(x, batch, cache)
        eps, scale = self.rms_norm_eps, self.residual_multiplier
        attended = self.attention_norm(self.self_attn(self.input_layernorm(x, eps), batch, cache), eps)
        x, normed = self.post_attention_layernorm.add(x, attended * scale, eps)
        return x + self.mlp_norm(self.mlp(normed), eps) * scale


@dataclass
class HyperCLOVAX(granite.Decoder):
    """The model: scaled embeddings, HyperCLOVA X blocks, RMSNorm, head with scaled logits."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
