"""Qwen 3: a Llama with QK-norm, an RMSNorm on each head's queries and keys before RoPE.

Source: arXiv:2505.09388, and `transformers.models.qwen3`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner.models import llama
from runner.models.qwen2 import Qwen2Config
from runner.nn.fast import RMSNorm
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(Qwen2Config):
    """`config.json` of a Qwen3: Qwen 2's keys with other defaults."""

    head_dim: int = 128
    num_key_value_heads: int = 32


@dataclass
class Attention(llama.NormedAttention):
    """Llama's attention with an RMSNorm of `head_dim` weights on q and one on k, shared by all heads."""

    q_norm: RMSNorm = weight("q_norm", "head_dim")
    k_norm: RMSNorm = weight("k_norm", "head_dim")


@dataclass
class Block(llama.Block):
    """A Llama block with Qwen 3's attention."""

    self_attn: Attention = weight("self_attn")


@dataclass
class Qwen3(llama.Llama):
    """A Llama made of Qwen 3 blocks."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
