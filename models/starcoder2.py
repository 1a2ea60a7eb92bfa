"""StarCoder 2: LayerNorms, biases everywhere, an MLP without a gate, and a sliding window.

Source: arXiv:2402.19173, and `transformers.models.starcoder2`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from runner.config.base import key
from runner.config.decoder import LayerNormConfig
from runner.errors import ConfigError
from runner.models import llama
from runner.nn.blocks import LayerNormDecoder, Sequential
from runner.nn.fast import LayerNorm
from runner.nn.linear import HIDDEN, INTERMEDIATE, Linear
from runner.nn.mlp import PlainMLP
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class Starcoder2Config(LayerNormConfig):
    """`config.json` of a StarCoder 2; defaults are those of `transformers.Starcoder2Config`."""

    INERT: ClassVar = frozenset(
        [
            "activation_function",
            "attention_softmax_in_fp32",
            "layer_norm_epsilon",
            "scale_attention_softmax_in_fp32",
            "scale_attn_weights",
        ]
    )
    """Left over from the first StarCoder's config; the model's code reads none of them."""

    max_position_embeddings: int = 4096
    layer_norm_eps: float = key("norm_epsilon", default=1e-5)
    hidden_act: str = "gelu_pytorch_tanh"
    num_key_value_heads: int = 2
    tie_word_embeddings: bool = True
    sliding_window: int | None = None
    attention_bias: bool = key("use_bias", default=True)
    mlp_type: str = "default"
    norm_type: str = "layer_norm"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.mlp_type, self.norm_type) != ("default", "layer_norm"):
            found = f"mlp_type {self.mlp_type!r}, norm_type {self.norm_type!r}"
            raise ConfigError(f"config.json: {found}: only 'default' and 'layer_norm' are supported")

    def cache_window(self, index: int) -> int | None:
        return self.sliding_window


@dataclass
class MLP(PlainMLP):
    """An MLP without a gate, stored as `c_fc` (up) and `c_proj` (down); `use_bias` covers its biases too."""

    up_proj: Linear = weight("c_fc", INTERMEDIATE, HIDDEN, bias="attention_bias")
    down_proj: Linear = weight("c_proj", HIDDEN, INTERMEDIATE, bias="attention_bias")


@dataclass
class Block(Sequential):
    """Pre-norm block with LayerNorms: Llama's attention, then an MLP without a gate."""

    input_layernorm: LayerNorm = weight("input_layernorm", HIDDEN)
    self_attn: llama.Attention = weight("self_attn")
    post_attention_layernorm: LayerNorm = weight("post_attention_layernorm", HIDDEN)
    mlp: MLP = weight("mlp")


@dataclass
class Starcoder2(LayerNormDecoder):
    """The model: embeddings, StarCoder 2 blocks, LayerNorm, head."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
