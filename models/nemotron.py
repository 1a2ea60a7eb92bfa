"""Nemotron (and Minitron): LayerNorms stored as the difference from one, half of each head rotated, squared ReLU.

Source: arXiv:2402.16819, and `transformers.models.nemotron`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from runner.config import key
from runner.fast import LayerNorm
from runner.models import llama, stablelm
from runner.models.llama import HIDDEN, INTERMEDIATE
from runner.models.stablelm import LayerNormConfig
from runner.nn import Activation, Linear
from runner.transforms import PLUS_ONE
from runner.weights import tensor, weight


@dataclass(frozen=True, kw_only=True)
class NemotronConfig(LayerNormConfig):
    """`config.json` of a Nemotron."""

    layer_norm_eps: float = key("norm_eps", default=1e-5)
    hidden_act: str = "relu2"
    partial_rotary_factor: float = 0.5


@dataclass
class LayerNorm1P(LayerNorm):
    """Its weight is one more than what is stored."""

    weight: mx.array = tensor("weight", "$0", transform=PLUS_ONE)


@dataclass
class MLP:
    """Up, activation, down."""

    act: Activation
    up_proj: Linear = weight("up_proj", INTERMEDIATE, HIDDEN, bias="mlp_bias")
    down_proj: Linear = weight("down_proj", HIDDEN, INTERMEDIATE, bias="mlp_bias")

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self.act(self.up_proj(x)))


@dataclass
class Block(stablelm.PreNorm):
    """Llama's attention and that MLP, between those norms."""

    input_layernorm: LayerNorm1P = weight("input_layernorm", HIDDEN)
    self_attn: llama.Attention = weight("self_attn")
    post_attention_layernorm: LayerNorm1P = weight("post_attention_layernorm", HIDDEN)
    mlp: MLP = weight("mlp")


@dataclass
class Nemotron(stablelm.Decoder):
    """A LayerNorm frame with those blocks."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
    norm: LayerNorm1P = weight("model.norm", HIDDEN)
