"""GLM 4 (0414's predecessors, glm-4-9b-chat-hf): half of each head is rotated, in neighbouring pairs.

Source: arXiv:2406.12793, and `transformers.models.glm`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from runner.models import llama
from runner.models.llama import LlamaConfig
from runner.nn.linear import HIDDEN, INTERMEDIATE, KV, Linear, Q
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class GlmConfig(LlamaConfig):
    """`config.json` of a GLM."""

    NULL: ClassVar[Mapping[str, object]] = {**LlamaConfig.NULL, "partial_rotary_factor": 1.0}
    num_key_value_heads: int = 2
    head_dim: int = 128
    max_position_embeddings: int = 131072
    partial_rotary_factor: float = 0.5
    rms_norm_eps: float = 1.5625e-07
    attention_bias: bool = True

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def traditional(self) -> bool:
        """Neighbours are a pair."""
        return True


@dataclass
class Attention(llama.Attention):
    """Biases on the way in, none on the way out."""

    qkv_proj: Linear = weight("{q,k,v}_proj", (Q, KV, KV), HIDDEN, bias="attention_bias")
    o_proj: Linear = weight("o_proj", HIDDEN, Q)


@dataclass
class MLP(llama.MLP):
    """Gate and up are stored as one."""

    gate_up_proj: Linear = weight("gate_up_proj", (INTERMEDIATE, INTERMEDIATE), HIDDEN)
    down_proj: Linear = weight("down_proj", HIDDEN, INTERMEDIATE)


@dataclass
class Block(llama.Block):
    """Llama's, with those two."""

    self_attn: Attention = weight("self_attn")
    mlp: MLP = weight("mlp")


@dataclass
class Glm(llama.Llama):
    """Llama's, with those blocks."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
