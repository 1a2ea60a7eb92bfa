"""Qwen 2 and 2.5: a Llama with biases on q, k and v, and in some checkpoints a sliding window in the upper layers.

Source: arXiv:2407.10671, and `transformers.models.qwen2`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner.config.base import key
from runner.config.decoder import WindowedConfig
from runner.config.layer_types import FULL, SLIDING
from runner.models import llama
from runner.nn.linear import HIDDEN, KV, Linear, Q
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class Qwen2Config(WindowedConfig):
    """`config.json` of a Qwen2; `use_sliding_window` windows the layers from `max_window_layers` on."""

    num_key_value_heads: int = 32
    max_position_embeddings: int = 32768
    use_sliding_window: bool = False
    max_window_layers: int = key(default=28, minimum=0)

    @property
    def usual_layer_types(self) -> Sequence[str]:
        windowed = self.use_sliding_window and self.sliding_window is not None
        return [SLIDING if windowed and i >= self.max_window_layers else FULL for i in range(self.num_hidden_layers)]


@dataclass
class Attention(llama.Attention):
    """Llama's attention with biases on q, k and v, and none on the output projection."""

    qkv_proj: Linear = weight("{q,k,v}_proj", (Q, KV, KV), HIDDEN, bias=True)
    o_proj: Linear = weight("o_proj", HIDDEN, Q)


@dataclass
class Block(llama.Block):
    """A Llama block with Qwen 2's attention."""

    self_attn: Attention = weight("self_attn")


@dataclass
class Qwen2(llama.Llama):
    """A Llama made of Qwen 2 blocks."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
