"""Bamba: Mamba 2 in most layers, in the others attention that rotates half of each head.

Source: `transformers.models.bamba`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from runner.config.base import key
from runner.config.hybrid import HybridConfig
from runner.config.layer_types import FULL, LINEAR
from runner.config.mamba import Mamba2Config
from runner.models import llama
from runner.nn import blocks
from runner.nn.fast import RMSNorm
from runner.nn.linear import HIDDEN
from runner.nn.mamba2 import Mamba2
from runner.nn.mlp import ConfiguredMLP
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class BambaConfig(Mamba2Config, HybridConfig):
    """`config.json` of a Bamba; `attn_layer_indices` lists the layers with attention."""

    INERT: ClassVar[frozenset[str]] = frozenset({"attn_rotary_emb", "num_logits_to_keep", "z_loss_coefficient"})
    ONLY: ClassVar[Mapping[str, object]] = {"partial_rotary_factor": 0.5}
    num_key_value_heads: int = 8
    max_position_embeddings: int = 262144
    rms_norm_eps: float = 1e-5
    attn_layer_indices: tuple[int, ...] | None = None
    layer_types: tuple[str, ...] | None = key(also="layers_block_type", default=None)

    @property
    def usual_layer_types(self) -> Sequence[str]:
        attending = self.attn_layer_indices or ()
        return [FULL if index in attending else LINEAR for index in range(self.num_hidden_layers)]

    @property
    def rotary_dim(self) -> int:
        return self.head_dim // 2

    @property
    def attention_class(self) -> type:
        return llama.Attention if self.attends else Mamba2

    @property
    def mlp_class(self) -> type:
        return llama.MLP


@dataclass
class Block(blocks.ConfiguredPreNorm):
    """The block under Bamba's names."""

    post_attention_layernorm: RMSNorm = weight("pre_ff_layernorm", HIDDEN)
    mlp: ConfiguredMLP = weight("feed_forward")


@dataclass
class Bamba(blocks.Decoder):
    """The model: embeddings, Bamba blocks, RMSNorm, head."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
    norm: RMSNorm = weight("model.final_layernorm", HIDDEN)
