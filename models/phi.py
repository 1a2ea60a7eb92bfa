"""Phi 1, 1.5 and 2: attention and MLP in parallel, LayerNorms, biases everywhere, RoPE on part of each head.

Source: arXiv:2309.05463, and `transformers.models.phi`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner.config.base import fixed
from runner.config.decoder import LayerNormConfig
from runner.errors import ConfigError
from runner.models import llama
from runner.nn.blocks import LayerNormDecoder, Parallel
from runner.nn.fast import LayerNorm
from runner.nn.linear import HIDDEN, INTERMEDIATE, VOCAB, Linear, Q
from runner.nn.mlp import PlainMLP
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class PhiConfig(LayerNormConfig):
    """`config.json` of a Phi; defaults are those of `transformers.PhiConfig`."""

    hidden_act: str = "gelu_new"
    partial_rotary_factor: float = 0.5
    attention_bias: bool = fixed(True)
    qk_layernorm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tie_word_embeddings:
            raise ConfigError("config.json: tie_word_embeddings is not supported for Phi, whose head has a bias")


@dataclass
class Attention(llama.NormedAttention):
    """Llama's attention with biases; `qk_layernorm` adds a LayerNorm on q and one on k, shared by all heads."""

    o_proj: Linear = weight("dense", HIDDEN, Q, bias=True)
    q_norm: LayerNorm | None = weight("q_layernorm", "head_dim", when="qk_layernorm")
    k_norm: LayerNorm | None = weight("k_layernorm", "head_dim", when="qk_layernorm")


@dataclass
class MLP(PlainMLP):
    """An MLP without a gate, stored as `fc1` (up) and `fc2` (down)."""

    up_proj: Linear = weight("fc1", INTERMEDIATE, HIDDEN, bias=True)
    down_proj: Linear = weight("fc2", HIDDEN, INTERMEDIATE, bias=True)


@dataclass
class Block(Parallel):
    """Attention and MLP in parallel, behind one LayerNorm."""

    input_layernorm: LayerNorm = weight("input_layernorm", HIDDEN)
    self_attn: Attention = weight("self_attn")
    mlp: MLP = weight("mlp")


@dataclass
class Phi(LayerNormDecoder):
    """The model: embeddings, parallel blocks, LayerNorm, and a head with a bias."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
    norm: LayerNorm = weight("model.final_layernorm", HIDDEN)
    lm_head: Linear = weight("lm_head", VOCAB, HIDDEN, bias=True)
