"""LFM3: LFM2 with gated attention, windows in some layers, RoPE by the type of layer, norms around each sublayer.

Source: `transformers.models.lfm3`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from runner.config import layer_types
from runner.config.base import key
from runner.config.layer_types import CONV, FULL, SLIDING
from runner.config.layered import LayeredConfig, LayerRope
from runner.config.memory import Memory
from runner.config.rope import RopeScaling
from runner.config.rope_keys import OF_SLIDING
from runner.models import afmoe, lfm2
from runner.models.lfm2 import ConvConfig
from runner.nn import blocks
from runner.nn.blocks import ConfiguredAttention
from runner.nn.fast import RMSNorm
from runner.nn.gated_conv import GatedConv
from runner.nn.linear import HIDDEN, Linear
from runner.weights.tags import weight

HALF = RopeScaling(kind="proportional", partial_rotary_factor=0.5)
PLAIN = LayerRope(rope_theta=10000.0)


@dataclass(frozen=True, kw_only=True)
class Lfm3Config(ConvConfig, LayeredConfig):
    """`config.json` of an LFM3."""

    ONLY: ClassVar[Mapping[str, object]] = {"use_attention_gate": True, "use_sandwich_norm": True}
    num_key_value_heads: int = 4
    head_dim: int = 128
    intermediate_size: int = 7680
    tie_word_embeddings: bool = True
    rope_scaling: RopeScaling | None = HALF
    sliding_rope: LayerRope | None = key(OF_SLIDING, default=PLAIN)
    sliding_window: int | None = 256
    conv_L_cache: int = key(default=7, minimum=2)

    @property
    def usual_layer_types(self) -> Sequence[str]:
        return [
            FULL if index % 4 == 2 else SLIDING if index % 4 == 0 and index else CONV
            for index in range(self.num_hidden_layers)
        ]

    @property
    def kinds(self) -> Sequence[str]:
        known = (FULL, SLIDING, CONV)
        return layer_types.checked(self.layer_types, self.num_hidden_layers, self.usual_layer_types, known)

    @property
    def attends(self) -> bool:
        return self.kinds[self.layer_index or 0] != CONV

    def memory(self, index: int) -> tuple[Memory, ...]:
        return (self.state,) if self.kinds[index] == CONV else LayeredConfig.memory(self, index)

    @property
    def attention_class(self) -> type:
        return Attention if self.attends else GatedConv


@dataclass
class Attention(afmoe.Attention):
    """Attention whose heads' outputs are scaled by the sigmoid of a gate each."""

    gate_proj: Linear = weight("gate_proj|g_proj", "num_attention_heads", HIDDEN)

    def opened(self, attended: mx.array, gate: mx.array) -> mx.array:
        return attended * mx.sigmoid(gate)


@dataclass
class Block(blocks.BothNorms):
    """Gemma 2's order of norms under LFM3's names."""

    input_layernorm: RMSNorm = weight("operator_norm", HIDDEN)
    self_attn: ConfiguredAttention = weight("{mixer}")
    attention_norm: RMSNorm = weight("post_operator_norm", HIDDEN)
    post_attention_layernorm: RMSNorm = weight("ffn_norm", HIDDEN)
    mlp: lfm2.MLP = weight("feed_forward")
    mlp_norm: RMSNorm = weight("post_ffn_norm", HIDDEN)


@dataclass
class Lfm3(blocks.Decoder):
    """The model: embeddings, LFM3 blocks, RMSNorm, head."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
    norm: RMSNorm = weight("model.embedding_norm", HIDDEN)
