"""Phi 3, 3.5 and 4 (dense): a Llama that stores q, k, v as one matrix and gate, up as another; LongRoPE and a window.

Source: arXiv:2404.14219, and `transformers.models.phi3`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from runner.models import glm, llama
from runner.models.llama import LlamaConfig
from runner.nn.linear import HIDDEN, KV, Linear, Q
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class Phi3Config(LlamaConfig):
    """`config.json` of a Phi-3; LongRoPE's original context length is a key of its own, outside `rope_scaling`."""

    ONLY: ClassVar[Mapping[str, object]] = {"full_attn_mod": 1, "interpolate_factor": 1}
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    original_max_position_embeddings: int = 4096
    partial_rotary_factor: float = 1.0
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        scaling = self.rope_scaling
        if scaling is not None and scaling.original_max_position_embeddings is None and scaling.kind == "longrope":
            original = self.original_max_position_embeddings
            scaling = dataclasses.replace(scaling, original_max_position_embeddings=original)
            object.__setattr__(self, "rope_scaling", scaling)

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    def cache_window(self, index: int) -> int | None:
        return self.sliding_window


@dataclass
class Attention(llama.Attention):
    """Llama's attention without biases; q, k and v are stored as one matrix."""

    qkv_proj: Linear = weight("qkv_proj", (Q, KV, KV), HIDDEN)
    o_proj: Linear = weight("o_proj", HIDDEN, Q)


@dataclass
class Block(llama.Block):
    """A Llama block with Phi-3's attention and GLM's MLP (gate and up stored as one)."""

    self_attn: Attention = weight("self_attn")
    mlp: glm.MLP = weight("mlp")


@dataclass
class Phi3(llama.Llama):
    """A Llama made of Phi-3 blocks."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
