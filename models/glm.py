"""GLM 4 (glm-4-9b-chat-hf, before 0414): a Llama with RoPE on half of each head, on neighbouring pairs.

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
    """`config.json` of a GLM; a null `partial_rotary_factor` means 1."""

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
        """RoPE rotates pairs (2i, 2i+1)."""
        return True


@dataclass
class Attention(llama.Attention):
    """Llama's attention; `attention_bias` is for q, k and v, and the output projection has none."""

    qkv_proj: Linear = weight("{q,k,v}_proj", (Q, KV, KV), HIDDEN, bias="attention_bias")
    o_proj: Linear = weight("o_proj", HIDDEN, Q)


@dataclass
class MLP(llama.MLP):
    """Llama's MLP; gate and up are stored as one matrix."""

    gate_up_proj: Linear = weight("gate_up_proj", (INTERMEDIATE, INTERMEDIATE), HIDDEN)
    down_proj: Linear = weight("down_proj", HIDDEN, INTERMEDIATE)


@dataclass
class Block(llama.Block):
    """A Llama block with GLM's attention and MLP."""

    self_attn: Attention = weight("self_attn")
    mlp: MLP = weight("mlp")


@dataclass
class Glm(llama.Llama):
    """A Llama made of GLM blocks."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
