"""GPT-NeoX and Pythia: both sublayers side by side, each behind a norm of its own; q, k and v of a head lie together.

Source: arXiv:2204.06745, and `transformers.models.gpt_neox`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import mlx.core as mx

from runner.cache import Batch, KVCache
from runner.fast import LayerNorm
from runner.models import llama, stablelm
from runner.models.llama import HIDDEN, INTERMEDIATE, VOCAB, Q
from runner.models.stablelm import LayerNormConfig
from runner.nn import Activation, Embedding, Linear, interleaved_heads
from runner.weights import setting, weight

OLD_NAMES = {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"}


@dataclass(frozen=True, kw_only=True)
class GPTNeoXConfig(LayerNormConfig):
    """`config.json` of a GPT-NeoX; two keys have older names."""

    hidden_act: str = "gelu"
    partial_rotary_factor: float = 0.25
    attention_bias: bool = True
    mlp_bias: bool = True
    use_parallel_residual: bool = True

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        return super().from_dict({OLD_NAMES.get(name, name): value for name, value in raw.items()})


@dataclass
class Attention(llama.Attention):
    """q, k and v in turn, head by head."""

    qkv_proj: Linear = weight("query_key_value", f"3*{Q}", HIDDEN, bias="attention_bias")
    o_proj: Linear = weight("dense", HIDDEN, Q, bias="attention_bias")

    def heads(self, qkv: mx.array, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
        q, k, v = interleaved_heads(qkv, self.num_key_value_heads, self.head_dim)
        return self.rope(q, batch.offset, batch.length), self.rope(k, batch.offset, batch.length), v


@dataclass
class MLP:
    """Up, activation, down."""

    act: Activation
    up: Linear = weight("dense_h_to_4h", INTERMEDIATE, HIDDEN, bias="mlp_bias")
    down: Linear = weight("dense_4h_to_h", HIDDEN, INTERMEDIATE, bias="mlp_bias")

    def __call__(self, x: mx.array) -> mx.array:
        return self.down(self.act(self.up(x)))


@dataclass
class Block(stablelm.PreNorm):
    """The MLP sees the block's input where `use_parallel_residual`, else what attention left."""

    self_attn: Attention = weight("attention")
    mlp: MLP = weight("mlp")
    use_parallel_residual: bool = setting()

    def __call__(self, x: mx.array, batch: Batch, cache: KVCache) -> mx.array:
        if not self.use_parallel_residual:
            return super().__call__(x, batch, cache)
        attended = self.self_attn(self.input_layernorm(x, self.norm_eps), batch, cache)
        return x + attended + self.mlp(self.post_attention_layernorm(x, self.norm_eps))


@dataclass
class GPTNeoX(stablelm.Decoder):
    """A LayerNorm frame under its own names."""

    embed_tokens: Embedding = weight("gpt_neox.embed_in", VOCAB, HIDDEN)
    layers: Sequence[Block] = weight("gpt_neox.layers", length="num_hidden_layers")
    norm: LayerNorm = weight("gpt_neox.final_layer_norm", HIDDEN)
    lm_head: Linear = weight("embed_out|gpt_neox.embed_in", VOCAB, HIDDEN, otherwise="tie_word_embeddings")
