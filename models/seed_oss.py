"""Seed-OSS: a Llama with biases on q, k and v, and a separate flag for the bias of the output projection.

Source: `transformers.models.seed_oss`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner.models import llama
from runner.models.llama import LlamaConfig
from runner.nn.linear import HIDDEN, Linear, Q
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class SeedOssConfig(LlamaConfig):
    """`config.json` of a Seed-OSS; `attention_bias` is for q, k and v, `attention_out_bias` for the output."""

    head_dim: int = 128
    max_position_embeddings: int = 524288
    num_key_value_heads: int = 8
    attention_bias: bool = True
    attention_out_bias: bool = False


@dataclass
class Attention(llama.Attention):
    """Llama's attention; the output projection has a bias if `attention_out_bias` says so."""

    o_proj: Linear = weight("o_proj", HIDDEN, Q, bias="attention_out_bias")


@dataclass
class Block(llama.Block):
    """A Llama block with Seed-OSS's attention."""

    self_attn: Attention = weight("self_attn")


@dataclass
class SeedOss(llama.Llama):
    """A Llama made of Seed-OSS blocks."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
