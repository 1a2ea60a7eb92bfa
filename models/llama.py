"""Llama 1 to 3.x and the models with its architecture: SmolLM2, TinyLlama, Yi, DeepSeek-LLM, Mistral (sliding window).

Other families subclass what is here and state only what differs. Source: arXiv:2302.13971, arXiv:2407.21783, and
`transformers.models.llama`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from runner.cache.kv import KVCache
from runner.config.decoder import DecoderConfig
from runner.nn.attention import Attend, merge_heads, split_heads
from runner.nn.batch import Batch
from runner.nn.blocks import Decoder, Norm, PreNorm
from runner.nn.fast import RoPE
from runner.nn.linear import HIDDEN, INTERMEDIATE, KV, Linear, Q
from runner.nn.mlp import GLU
from runner.weights.module import Module
from runner.weights.tags import setting, weight


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """`config.json` of a Llama: all of `DecoderConfig`, with its defaults."""


@dataclass(frozen=True, kw_only=True)
class MistralConfig(LlamaConfig):
    """`config.json` of a Mistral: a Llama with sliding-window attention over the last `sliding_window` tokens."""

    num_key_value_heads: int = 8
    max_position_embeddings: int = 131072
    sliding_window: int | None = 4096

    def cache_window(self, index: int) -> int | None:
        return self.sliding_window


@dataclass
class Attention(Module):
    """Grouped-query attention with rotary positions; q, k and v come from one matrix product."""

    rope: RoPE
    attend: Attend
    qkv_proj: Linear = weight("{q,k,v}_proj", (Q, KV, KV), HIDDEN, bias="attention_bias")
    o_proj: Linear = weight("o_proj", HIDDEN, Q, bias="attention_bias")
    num_attention_heads: int = setting()
    num_key_value_heads: int = setting()
    head_dim: int = setting()

    def __call__(self, x: mx.array, batch: Batch, cache: KVCache) -> mx.array:
        q, k, v = self.heads(self.qkv_proj(x), batch)
        return self.o_proj(merge_heads(self.attend(q, cache.append(k, v), batch)))

    def heads(self, qkv: mx.array, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
        """Split `qkv` `[B, L, (H + 2 KV) D]` into q `[B, H, L, D]`, k and v `[B, KV, L, D]`; rotate q and k."""
        heads = split_heads(qkv, self.head_dim)  # [B, H + KV + KV, L, D]
        rotated, v = mx.split(heads, [self.num_attention_heads + self.num_key_value_heads], axis=1)
        # Queries and keys lie side by side, so that one call rotates both.
        q, k = mx.split(
            self.rope(rotated, batch.offset, batch.length, once=batch.once), [self.num_attention_heads], axis=1
        )
        return q, k, v


@dataclass
class NormedAttention(Attention):
    """Attention that normalizes each head's q and k before RoPE (QK-norm); subclasses say with which norm."""

    q_norm: Norm | None = weight("q_norm", "head_dim")
    k_norm: Norm | None = weight("k_norm", "head_dim")
    norm_eps: float = setting()

    def heads(self, qkv: mx.array, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
        if self.q_norm is None or self.k_norm is None:  # a checkpoint whose config switches QK-norm off
            return super().heads(qkv, batch)
        ends = [self.num_attention_heads, self.num_attention_heads + self.num_key_value_heads]
        q, k, v = mx.split(split_heads(qkv, self.head_dim), ends, axis=1)
        return self.normed(q, k, v, batch)

    def normed(self, q: mx.array, k: mx.array, v: mx.array, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
        """Normalize and rotate q `[B, H, L, D]` and k `[B, KV, L, D]`; v stays."""
        assert self.q_norm is not None and self.k_norm is not None
        q = self.rope(self.q_norm(q, self.norm_eps), batch.offset, batch.length, once=batch.once)
        return q, self.rope(self.k_norm(k, self.norm_eps), batch.offset, batch.length, once=batch.once), v


@dataclass
class MLP(Module):
    """The gated MLP (SwiGLU with `silu`); gate and up come from one matrix product."""

    glu: GLU
    gate_up_proj: Linear = weight("{gate,up}_proj", (INTERMEDIATE, INTERMEDIATE), HIDDEN, bias="mlp_bias")
    down_proj: Linear = weight("down_proj", HIDDEN, INTERMEDIATE, bias="mlp_bias")

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self.glu(self.gate_up_proj(x)))


@dataclass
class Block(PreNorm):
    """One Llama block: pre-norm attention, then the gated MLP."""

    self_attn: Attention = weight("self_attn")
    mlp: MLP = weight("mlp")


@dataclass
class Llama(Decoder):
    """The model: embeddings, `num_hidden_layers` blocks, norm, head."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
