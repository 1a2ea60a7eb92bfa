"""Jais 2: Llama's attention with biases, LayerNorms, and an MLP without a gate that squares what it lets through.

Source: `transformers.models.jais2`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner.config.base import fixed
from runner.config.decoder import LayerNormConfig
from runner.models import llama
from runner.nn.blocks import LayerNormDecoder, Sequential
from runner.nn.fast import LayerNorm
from runner.nn.linear import HIDDEN
from runner.nn.mlp import PlainMLP
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class Jais2Config(LayerNormConfig):
    """`config.json` of a Jais 2."""

    hidden_act: str = "relu2"
    max_position_embeddings: int = 8192
    attention_bias: bool = True
    mlp_bias: bool = True
    partial_rotary_factor: float = fixed(1.0)


@dataclass
class Block(Sequential):
    """Pre-norm block with LayerNorms."""

    input_layernorm: LayerNorm = weight("input_layernorm", HIDDEN)
    self_attn: llama.Attention = weight("self_attn")
    post_attention_layernorm: LayerNorm = weight("post_attention_layernorm", HIDDEN)
    mlp: PlainMLP = weight("mlp")


@dataclass
class Jais2(LayerNormDecoder):
    """The model: embeddings, Jais 2 blocks, LayerNorm, head."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
