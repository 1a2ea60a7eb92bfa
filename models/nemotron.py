"""Nemotron, Minitron: LayerNorms stored as the difference from one, RoPE on half of each head, squared ReLU, no gate.

Source: arXiv:2402.16819, and `transformers.models.nemotron`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from runner.config.base import key
from runner.config.decoder import LayerNormConfig
from runner.models import llama
from runner.nn.blocks import LayerNormDecoder, Sequential
from runner.nn.fast import LayerNorm
from runner.nn.linear import HIDDEN
from runner.nn.mlp import PlainMLP
from runner.weights.tags import tensor, weight
from runner.weights.transforms import PLUS_ONE


@dataclass(frozen=True, kw_only=True)
class NemotronConfig(LayerNormConfig):
    """`config.json` of a Nemotron; defaults are those of `transformers.NemotronConfig`."""

    max_position_embeddings: int = 4096
    layer_norm_eps: float = key("norm_eps", default=1e-5)
    hidden_act: str = "relu2"
    partial_rotary_factor: float = 0.5
    attention_bias: bool = False
    mlp_bias: bool = False


@dataclass
class LayerNorm1P(LayerNorm):
    """A LayerNorm whose weight is the stored tensor plus one."""

    weight: mx.array = tensor("weight", "$0", transform=PLUS_ONE)


@dataclass
class Block(Sequential):
    """Pre-norm block: Llama's attention and an MLP without a gate, behind `LayerNorm1P`."""

    input_layernorm: LayerNorm1P = weight("input_layernorm", HIDDEN)
    self_attn: llama.Attention = weight("self_attn")
    post_attention_layernorm: LayerNorm1P = weight("post_attention_layernorm", HIDDEN)
    mlp: PlainMLP = weight("mlp")


@dataclass
class Nemotron(LayerNormDecoder):
    """The model: embeddings, Nemotron blocks, `LayerNorm1P`, head."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
    norm: LayerNorm1P = weight("model.norm", HIDDEN)
