"""Granite with sliding windows: Granite's multipliers, sinks in all layers, and a RoPE base for each layer.

Source: `transformers.models.granite_swa`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from runner.config.decoder import WindowedConfig
from runner.config.layer_types import FULL, SLIDING
from runner.config.ranges import check_range
from runner.errors import ConfigError
from runner.models import gpt_oss, granite, llama
from runner.models.granite import GraniteConfig
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class GraniteSWAConfig(GraniteConfig, WindowedConfig):
    """`config.json` of a Granite with windows. A layer whose `layer_rope_theta` is 0 has no RoPE."""

    num_key_value_heads: int = 4
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    sliding_window: int | None = 128
    layer_rope_theta: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        bases = self.layer_rope_theta
        if bases is not None and len(bases) != self.num_hidden_layers:
            raise ConfigError(
                f"config.json: layer_rope_theta has {len(bases)} entries, but there are {self.num_hidden_layers} layers"
            )
        for base in filter(None, bases or ()):
            check_range("rope_theta", base, "layer_rope_theta")

    @property
    def usual_layer_types(self) -> Sequence[str]:
        return [SLIDING if i % 4 else FULL for i in range(self.num_hidden_layers)]

    def for_layer(self, index: int) -> Self:
        layer = super().for_layer(index)
        if self.layer_rope_theta is not None:
            object.__setattr__(layer, "rope_theta", self.layer_rope_theta[index] or self.rope_theta)
        return layer

    @property
    def rotary_dim(self) -> int:
        bases, index = self.layer_rope_theta, self.layer_index
        return 0 if bases is not None and index is not None and not bases[index] else self.head_dim


@dataclass
class Block(granite.ScaledPreNorm):
    """Granite's scaled residual branches around attention with sinks and Llama's MLP."""

    self_attn: gpt_oss.Attention = weight("self_attn")
    mlp: llama.MLP = weight("mlp")


@dataclass
class GraniteSWA(granite.Decoder):
    """The model: scaled embeddings, Granite blocks with windows, RMSNorm, head with scaled logits."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
