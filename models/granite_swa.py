"""Granite with sliding windows: Granite's multipliers, sinks in all layers, and a RoPE base for each layer.

Source: `transformers.models.granite_swa`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner.config.layer_types import FULL, SLIDING
from runner.config.layered import ListedRopeConfig
from runner.models import gpt_oss, granite, llama
from runner.models.granite import GraniteConfig
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class GraniteSWAConfig(GraniteConfig, ListedRopeConfig):
    """`config.json` of a Granite with windows."""

    num_key_value_heads: int = 4
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    sliding_window: int | None = 128

    @property
    def usual_layer_types(self) -> Sequence[str]:
        return [SLIDING if i % 4 else FULL for i in range(self.num_hidden_layers)]


@dataclass
class Block(granite.ScaledPreNorm):
    """Granite's scaled residual branches around attention with sinks and Llama's MLP."""

    self_attn: gpt_oss.Attention = weight("self_attn")
    mlp: llama.MLP = weight("mlp")


@dataclass
class GraniteSWA(granite.Decoder):
    """The model: scaled embeddings, Granite blocks with windows, RMSNorm, head with scaled logits."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
