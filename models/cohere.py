"""Command-R and Command-R+: LayerNorms without bias, both sublayers side by side, neighbouring pairs rotated.

Source: `transformers.models.cohere`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from runner.cache import Batch
from runner.models import llama, stablelm
from runner.models.stablelm import LayerNormConfig
from runner.nn import StoredHeadNorms, split_heads
from runner.weights import setting, weight


@dataclass(frozen=True, kw_only=True)
class CohereConfig(LayerNormConfig):
    """`config.json` of a Command-R."""

    logit_scale: float = 0.0625
    tie_word_embeddings: bool = True
    use_qk_norm: bool = False

    @property
    def traditional(self) -> bool:
        """Neighbours are a pair."""
        return True


@dataclass
class Attention(llama.Attention):
    """In Command-R+, a norm for each head."""

    q_norm: StoredHeadNorms | None = weight("q_norm", "num_attention_heads", "head_dim", when="use_qk_norm")
    k_norm: StoredHeadNorms | None = weight("k_norm", "num_key_value_heads", "head_dim", when="use_qk_norm")
    norm_eps: float = setting()

    def heads(self, qkv: mx.array, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
        if self.q_norm is None or self.k_norm is None:
            return super().heads(qkv, batch)
        ends = [self.num_attention_heads, self.num_attention_heads + self.num_key_value_heads]
        q, k, v = mx.split(split_heads(qkv, self.head_dim), ends, axis=1)
        q = self.rope(self.q_norm(q, self.norm_eps), batch.offset, batch.length)
        return q, self.rope(self.k_norm(k, self.norm_eps), batch.offset, batch.length), v


@dataclass
class Block(stablelm.Parallel):
    """Both at once."""

    self_attn: Attention = weight("self_attn")
    mlp: llama.MLP = weight("mlp")


@dataclass
class Cohere(stablelm.Decoder):
    """A LayerNorm frame with those blocks, and scaled logits."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
    logit_scale: float = setting()

    def logits(self, hidden: mx.array) -> mx.array:
        return super().logits(hidden) * self.logit_scale
