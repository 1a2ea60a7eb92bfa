"""EXAONE 4: norms after the sublayers, QK-norm, and in hybrid models RoPE in the windowed layers only.

Source: arXiv:2507.11407, and `transformers.models.exaone4`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner.config import layer_types
from runner.config.base import key
from runner.config.decoder import WindowedConfig
from runner.config.layer_types import FULL, SLIDING
from runner.models import llama, qwen3
from runner.nn import blocks
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class Exaone4Config(WindowedConfig):
    """`config.json` of an EXAONE 4. `sliding_window_pattern` is a number n (every n-th layer has full attention) or a
    string to repeat: L for a windowed layer, G for full attention.
    """

    rms_norm_eps: float = 1e-5
    num_key_value_heads: int = 32
    sliding_window_pattern: int | str | None = key(default=4, minimum=0)

    @property
    def usual_layer_types(self) -> Sequence[str]:
        pattern, count = self.sliding_window_pattern, self.num_hidden_layers
        if self.sliding_window is None or not pattern:
            return [FULL] * count
        if isinstance(pattern, str):
            return [SLIDING if pattern[i % len(pattern)] == "L" else FULL for i in range(count)]
        return layer_types.every(pattern, count)

    @property
    def rotary_dim(self) -> int:
        hybrid = self.sliding_window is not None and self.layer_index is not None  # else every layer rotates
        return 0 if hybrid and self.cache_window(self.layer_index or 0) is None else self.head_dim


@dataclass
class Block(blocks.PostNorm):
    """OLMo 2's block (norms after the sublayers) with Qwen 3's attention."""

    self_attn: qwen3.Attention = weight("self_attn")
    mlp: llama.MLP = weight("mlp")


@dataclass
class Exaone4(blocks.Decoder):
    """The model: embeddings, EXAONE 4 blocks, RMSNorm, head."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
