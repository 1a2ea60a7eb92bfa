"""Phi 1, 1.5 and 2: both sublayers side by side, LayerNorms and biases everywhere, part of each head rotated.

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
    """A flag for norms shared by all heads."""

    o_proj: Linear = weight("dense", HIDDEN, Q, bias=True)
    q_norm: LayerNorm | None = weight("q_layernorm", "head_dim", when="qk_layernorm")
    k_norm: LayerNorm | None = weight("k_layernorm", "head_dim", when="qk_layernorm")


@dataclass
class MLP(PlainMLP):
    """Under its own names."""

    up_proj: Linear = weight("fc1", INTERMEDIATE, HIDDEN, bias=True)
    down_proj: Linear = weight("fc2", HIDDEN, INTERMEDIATE, bias=True)


@dataclass
class Block(Parallel):
    """Both at once."""

    input_layernorm: LayerNorm = weight("input_layernorm", HIDDEN)
    self_attn: Attention = weight("self_attn")
    mlp: MLP = weight("mlp")


@dataclass
class Phi(LayerNormDecoder):
    """A stack of those blocks; the head has a bias."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
    norm: LayerNorm = weight("model.final_layernorm", HIDDEN)
    lm_head: Linear = weight("lm_head", VOCAB, HIDDEN, bias=True)
