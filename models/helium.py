"""Helium: a Llama whose RoPE rotates neighbouring pairs, and whose output projection never has a bias.

Source: `transformers.models.helium`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner.models import llama
from runner.models.llama import LlamaConfig
from runner.nn.linear import HIDDEN, Linear, Q
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class HeliumConfig(LlamaConfig):
    """`config.json` of a Helium: Llama's keys with other defaults."""

    num_key_value_heads: int = 20
    head_dim: int = 128
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-8
    rope_theta: float = 100000.0

    @property
    def traditional(self) -> bool:
        """RoPE rotates pairs (2i, 2i+1)."""
        return True


@dataclass
class Attention(llama.Attention):
    """Llama's attention without a bias on the output projection."""

    o_proj: Linear = weight("o_proj", HIDDEN, Q)


@dataclass
class Block(llama.Block):
    """A Llama block with Helium's attention."""

    self_attn: Attention = weight("self_attn")


@dataclass
class Helium(llama.Llama):
    """A Llama made of Helium blocks."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
