"""Persimmon: GPT-NeoX's fused projections in a sequential block, a LayerNorm on each head's q and k, and relu squared.

Source: `transformers.models.persimmon`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner.config.base import fixed
from runner.config.decoder import LayerNormConfig
from runner.models import gpt_neox, llama
from runner.nn.blocks import LayerNormDecoder, Sequential
from runner.nn.fast import LayerNorm
from runner.nn.linear import HIDDEN
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class PersimmonConfig(LayerNormConfig):
    """`config.json` of a Persimmon; its linear layers all have biases."""

    num_key_value_heads: int = fixed(0)
    head_dim: int = fixed(0)
    hidden_act: str = "relu2"
    max_position_embeddings: int = 16384
    partial_rotary_factor: float = 0.5
    attention_bias: bool = fixed(True)
    mlp_bias: bool = fixed(True)
    qk_layernorm: bool = True


@dataclass
class Attention(gpt_neox.Attention, llama.NormedAttention):
    """GPT-NeoX's attention; `qk_layernorm` adds a LayerNorm on q and one on k, shared by all heads."""

    q_norm: LayerNorm | None = weight("q_layernorm", "head_dim", when="qk_layernorm")
    k_norm: LayerNorm | None = weight("k_layernorm", "head_dim", when="qk_layernorm")


@dataclass
class Block(Sequential):
    """Pre-norm block with LayerNorms."""

    input_layernorm: LayerNorm = weight("input_layernorm", HIDDEN)
    self_attn: Attention = weight("self_attn")
    post_attention_layernorm: LayerNorm = weight("post_attention_layernorm", HIDDEN)
    mlp: gpt_neox.MLP = weight("mlp")


@dataclass
class Persimmon(LayerNormDecoder):
    """The model: embeddings, Persimmon blocks, LayerNorm, head."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
    norm: LayerNorm = weight("model.final_layernorm", HIDDEN)
