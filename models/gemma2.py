"""Gemma 2: a norm before and after each sublayer, a sliding window in every other layer, soft-capped scores and logits.

Source: arXiv:2408.00118, and `transformers.models.gemma2`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from runner.config import layer_types
from runner.config.base import key
from runner.config.decoder import WindowedConfig
from runner.models import gemma, llama
from runner.models.gemma import GemmaConfig
from runner.nn import blocks
from runner.nn.fast import RMSNorm
from runner.nn.linear import HIDDEN
from runner.weights.tags import weight
from runner.weights.transforms import PLUS_ONE


@dataclass(frozen=True, kw_only=True)
class Gemma2Config(GemmaConfig, WindowedConfig):
    """`config.json` of a Gemma 2; `cache_implementation` concerns transformers' memory only."""

    INERT: ClassVar[frozenset[str]] = frozenset({"cache_implementation"})
    num_key_value_heads: int = 4
    query_pre_attn_scalar: float = 256.0
    sliding_window: int = key(also="sliding_window_size", default=4096)  # published files have both names
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0

    @property
    def activation(self) -> str:
        """The activation of the MLP; Gemma 2 never reads `hidden_act`."""
        return self.hidden_activation or "gelu_pytorch_tanh"

    @property
    def attention_scale(self) -> float:
        return float(self.query_pre_attn_scalar**-0.5)

    @property
    def pattern(self) -> int:
        """Every `pattern`-th layer has full attention, the others a window."""
        return 2

    @property
    def usual_layer_types(self) -> Sequence[str]:
        return layer_types.every(self.pattern, self.num_hidden_layers)


@dataclass
class Block(blocks.BothNorms):
    """A Gemma block with RMSNorms before and after each sublayer."""

    input_layernorm: RMSNorm = weight("input_layernorm", HIDDEN, transform=PLUS_ONE)
    self_attn: llama.Attention = weight("self_attn")
    attention_norm: RMSNorm = weight("post_attention_layernorm", HIDDEN, transform=PLUS_ONE)
    post_attention_layernorm: RMSNorm = weight("pre_feedforward_layernorm", HIDDEN, transform=PLUS_ONE)
    mlp: llama.MLP = weight("mlp")
    mlp_norm: RMSNorm = weight("post_feedforward_layernorm", HIDDEN, transform=PLUS_ONE)


@dataclass
class Gemma2(gemma.Decoder):
    """Gemma's decoder made of Gemma 2 blocks."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
