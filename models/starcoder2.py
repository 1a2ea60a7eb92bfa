"""StarCoder 2: LayerNorms, biases everywhere, a feed-forward layer without a gate, and a window.

Source: arXiv:2402.19173, and `transformers.models.starcoder2`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from runner.config import key
from runner.errors import ConfigError
from runner.models import llama, stablelm
from runner.models.llama import HIDDEN, INTERMEDIATE
from runner.models.stablelm import LayerNormConfig
from runner.nn import Activation, Linear
from runner.weights import weight


@dataclass(frozen=True, kw_only=True)
class Starcoder2Config(LayerNormConfig):
    """`config.json` of a StarCoder 2."""

    layer_norm_eps: float = key("norm_epsilon", default=1e-5)
    hidden_act: str = "gelu_pytorch_tanh"
    num_key_value_heads: int = 2
    tie_word_embeddings: bool = True
    sliding_window: int | None = None
    use_bias: bool = True
    mlp_type: str = "default"
    norm_type: str = "layer_norm"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "attention_bias", self.use_bias)
        if (self.mlp_type, self.norm_type) != ("default", "layer_norm"):
            found = f"mlp_type {self.mlp_type!r}, norm_type {self.norm_type!r}"
            raise ConfigError(f"config.json: {found}: only 'default' and 'layer_norm' are supported")

    def cache_window(self, index: int) -> int | None:
        return self.sliding_window


@dataclass
class MLP:
    """Up, activation, down."""

    act: Activation
    c_fc: Linear = weight("c_fc", INTERMEDIATE, HIDDEN, bias="use_bias")
    c_proj: Linear = weight("c_proj", HIDDEN, INTERMEDIATE, bias="use_bias")

    def __call__(self, x: mx.array) -> mx.array:
        return self.c_proj(self.act(self.c_fc(x)))


@dataclass
class Block(stablelm.PreNorm):
    """Llama's attention and that MLP."""

    self_attn: llama.Attention = weight("self_attn")
    mlp: MLP = weight("mlp")


@dataclass
class Starcoder2(stablelm.Decoder):
    """A LayerNorm frame with those blocks."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
