"""Apertus: a Llama with QK-norm, and an MLP without a gate whose activation, xIELU, has trained parameters.

Source: arXiv:2509.14233, xIELU arXiv:2411.13010, and `transformers.models.apertus`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from runner.config.rope import RopeScaling
from runner.models import qwen3
from runner.models.llama import LlamaConfig
from runner.nn import blocks
from runner.nn.fast import RMSNorm
from runner.nn.linear import HIDDEN, INTERMEDIATE, Linear
from runner.nn.xielu import XIELU
from runner.weights.module import Module
from runner.weights.tags import weight

STRETCHED = RopeScaling(
    kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)


@dataclass(frozen=True, kw_only=True)
class ApertusConfig(LlamaConfig):
    """`config.json` of an Apertus; RoPE is scaled as Llama 3.1's unless it says otherwise."""

    ACTS: ClassVar[frozenset[str]] = frozenset({"xielu"})
    ONLY: ClassVar[Mapping[str, object]] = {"qk_norm": True, "post_norm": False}
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 65536
    rope_theta: float = 12000000.0
    rope_scaling: RopeScaling | None = STRETCHED
    hidden_act: str = "xielu"


@dataclass
class MLP(Module):
    """An MLP without a gate, whose xIELU activation has tensors of its own."""

    act_fn: XIELU = weight("act_fn")
    up_proj: Linear = weight("up_proj", INTERMEDIATE, HIDDEN)
    down_proj: Linear = weight("down_proj", HIDDEN, INTERMEDIATE)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self.act_fn(self.up_proj(x)))


@dataclass
class Block(blocks.PreNorm):
    """A Llama block with Qwen 3's attention and the xIELU MLP; its norms are stored under other names."""

    input_layernorm: RMSNorm = weight("attention_layernorm", HIDDEN)
    self_attn: qwen3.Attention = weight("self_attn")
    post_attention_layernorm: RMSNorm = weight("feedforward_layernorm", HIDDEN)
    mlp: MLP = weight("mlp")


@dataclass
class Apertus(blocks.Decoder):
    """The model: embeddings, Apertus blocks, RMSNorm, head."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
