"""Phi 1, 1.5 and 2: both sublayers side by side, LayerNorms and biases everywhere, part of each head rotated.

Source: arXiv:2309.05463, and `transformers.models.phi`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from runner.cache import Batch
from runner.fast import LayerNorm
from runner.models import llama, stablelm
from runner.models.llama import HIDDEN, INTERMEDIATE, KV, VOCAB, Q
from runner.models.stablelm import LayerNormConfig
from runner.nn import Activation, Linear, split_heads
from runner.weights import setting, weight


@dataclass(frozen=True, kw_only=True)
class PhiConfig(LayerNormConfig):
    """`config.json` of a Phi."""

    hidden_act: str = "gelu_new"
    partial_rotary_factor: float = 0.5
    qk_layernorm: bool = False


@dataclass
class Attention(llama.Attention):
    """Biases everywhere, and a flag for norms shared by all heads."""

    qkv_proj: Linear = weight("{q,k,v}_proj", (Q, KV, KV), HIDDEN, bias=True)
    o_proj: Linear = weight("dense", HIDDEN, Q, bias=True)
    q_layernorm: LayerNorm | None = weight("q_layernorm", "head_dim", when="qk_layernorm")
    k_layernorm: LayerNorm | None = weight("k_layernorm", "head_dim", when="qk_layernorm")
    norm_eps: float = setting()

    def heads(self, qkv: mx.array, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
        if self.q_layernorm is None or self.k_layernorm is None:
            return super().heads(qkv, batch)
        ends = [self.num_attention_heads, self.num_attention_heads + self.num_key_value_heads]
        q, k, v = mx.split(split_heads(qkv, self.head_dim), ends, axis=1)
        q = self.rope(self.q_layernorm(q, self.norm_eps), batch.offset, batch.length)
        return q, self.rope(self.k_layernorm(k, self.norm_eps), batch.offset, batch.length), v


@dataclass
class MLP:
    """Up, activation, down."""

    act: Activation
    fc1: Linear = weight("fc1", INTERMEDIATE, HIDDEN, bias=True)
    fc2: Linear = weight("fc2", HIDDEN, INTERMEDIATE, bias=True)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self.act(self.fc1(x)))


@dataclass
class Block(stablelm.Parallel):
    """Both at once."""

    self_attn: Attention = weight("self_attn")
    mlp: MLP = weight("mlp")


@dataclass
class Phi(stablelm.Decoder):
    """A LayerNorm frame with those blocks; the head has a bias."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
    norm: LayerNorm = weight("model.final_layernorm", HIDDEN)
    lm_head: Linear = weight("lm_head", VOCAB, HIDDEN, bias=True)
