"""StableLM 2 and 3B: LayerNorms, a quarter of each head rotated, and in some checkpoints both sublayers side by side.

Source: arXiv:2402.17834, and `transformers.models.stablelm`. Its frames serve every family with LayerNorms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from runner.cache import Batch, KVCache
from runner.config import Config
from runner.fast import LayerNorm
from runner.models import llama
from runner.models.llama import HIDDEN, KV, LlamaConfig, Q
from runner.nn import JoinedHeadNorms, Linear, split_heads
from runner.weights import Choice, Chooses, Header, Size, Tree, setting, weight


@dataclass(frozen=True, kw_only=True)
class LayerNormConfig(LlamaConfig):
    """What families with LayerNorms share."""

    layer_norm_eps: float = 1e-5
    partial_rotary_factor: float = 1.0

    @property
    def norm_eps(self) -> float:
        return self.layer_norm_eps

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)


@dataclass
class PreNorm(llama.Layer):
    """Norm, sublayer, add; twice."""

    input_layernorm: LayerNorm = weight("input_layernorm", HIDDEN)
    self_attn: llama.Layer = weight("self_attn")
    post_attention_layernorm: LayerNorm = weight("post_attention_layernorm", HIDDEN)
    mlp: llama.FeedForward = weight("mlp")
    norm_eps: float = setting()

    def __call__(self, x: mx.array, batch: Batch, cache: KVCache) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x, self.norm_eps), batch, cache)
        return x + self.mlp(self.post_attention_layernorm(x, self.norm_eps))


@dataclass
class Parallel(llama.Layer):
    """One norm, both sublayers on what it gives, one sum."""

    input_layernorm: LayerNorm = weight("input_layernorm", HIDDEN)
    self_attn: llama.Layer = weight("self_attn")
    mlp: llama.FeedForward = weight("mlp")
    norm_eps: float = setting()

    def __call__(self, x: mx.array, batch: Batch, cache: KVCache) -> mx.array:
        normed = self.input_layernorm(x, self.norm_eps)
        return x + self.self_attn(normed, batch, cache) + self.mlp(normed)


@dataclass
class Decoder(llama.Frame):
    """A frame with a LayerNorm at the end."""

    norm: LayerNorm = weight("model.norm", HIDDEN)


@dataclass(frozen=True, kw_only=True)
class StableLmConfig(LayerNormConfig):
    """`config.json` of a StableLM."""

    partial_rotary_factor: float = 0.25
    use_qkv_bias: bool = False
    qk_layernorm: bool = False
    use_parallel_residual: bool = False


@dataclass
class Attention(llama.Attention):
    """A flag for the biases of q, k, v, and one for norms of each head."""

    qkv_proj: Linear = weight("{q,k,v}_proj", (Q, KV, KV), HIDDEN, bias="use_qkv_bias")
    o_proj: Linear = weight("o_proj", HIDDEN, Q)
    q_layernorm: JoinedHeadNorms | None = weight(
        "q_layernorm.norms.{num_attention_heads}", "head_dim", when="qk_layernorm"
    )
    k_layernorm: JoinedHeadNorms | None = weight(
        "k_layernorm.norms.{num_key_value_heads}", "head_dim", when="qk_layernorm"
    )
    norm_eps: float = setting()

    def heads(self, qkv: mx.array, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
        if self.q_layernorm is None or self.k_layernorm is None:
            return super().heads(qkv, batch)
        ends = [self.num_attention_heads, self.num_attention_heads + self.num_key_value_heads]
        q, k, v = mx.split(split_heads(qkv, self.head_dim), ends, axis=1)
        q = self.rope(self.q_layernorm(q, self.norm_eps), batch.offset, batch.length)
        return q, self.rope(self.k_layernorm(k, self.norm_eps), batch.offset, batch.length), v


@dataclass
class SequentialBlock(PreNorm):
    """One sublayer after the other."""

    self_attn: Attention = weight("self_attn")
    mlp: llama.MLP = weight("mlp")


@dataclass
class ParallelBlock(Parallel):
    """Both at once."""

    self_attn: Attention = weight("self_attn")
    mlp: llama.MLP = weight("mlp")


class Block(Chooses):
    """One of the two, by `use_parallel_residual`."""

    def __call__(self, x: mx.array, batch: Batch, cache: KVCache) -> mx.array:
        raise NotImplementedError

    @classmethod
    def choose(cls, tree: Tree, shape: tuple[Size, ...], headers: Mapping[str, Header], config: Config) -> Choice:
        assert isinstance(config, StableLmConfig)
        return Choice(ParallelBlock if config.use_parallel_residual else SequentialBlock, {})


@dataclass
class StableLm(Decoder):
    """That frame with those blocks."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
