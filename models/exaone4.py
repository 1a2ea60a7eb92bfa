"""EXAONE 4: norms behind the sublayers and on q and k; in hybrid models only windowed layers have positions.

Source: arXiv:2507.11407, and `transformers.models.exaone4`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner import blocks, layer_types
from runner.config import FULL, SLIDING, key
from runner.models import llama, qwen3
from runner.models.llama import LlamaConfig
from runner.weights import weight


@dataclass(frozen=True, kw_only=True)
class Exaone4Config(LlamaConfig):
    """`config.json` of an EXAONE 4; the pattern is a number, or letters: L for a window, G for everything."""

    rms_norm_eps: float = 1e-5
    num_key_value_heads: int = 32
    sliding_window: int | None = 4096
    sliding_window_pattern: int | str | None = key(default=4, minimum=0)
    layer_types: tuple[str, ...] | None = None

    def cache_window(self, index: int) -> int | None:
        pattern, count = self.sliding_window_pattern, self.num_hidden_layers
        if self.sliding_window is None or not pattern:
            default = [FULL] * count
        elif isinstance(pattern, str):
            default = [SLIDING if pattern[i % len(pattern)] == "L" else FULL for i in range(count)]
        else:
            default = layer_types.every(pattern, count)
        kinds = layer_types.checked(self.layer_types, count, default)
        return self.sliding_window if kinds[index] == SLIDING else None

    @property
    def rotary_dim(self) -> int:
        hybrid = self.sliding_window is not None and self.layer_index is not None
        return 0 if hybrid and self.cache_window(self.layer_index or 0) is None else self.head_dim


@dataclass
class Block(blocks.PostNorm):
    """OLMo 2's frame, with Qwen 3's attention."""

    self_attn: qwen3.Attention = weight("self_attn")
    mlp: llama.MLP = weight("mlp")


@dataclass
class Exaone4(blocks.Decoder):
    """Llama's frame with those blocks."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
