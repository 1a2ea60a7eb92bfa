"""Gemma 3 (text): Gemma 2 with QK-norm, five windowed layers to each full-attention one, and a RoPE base for each kind.

Source: arXiv:2503.19786, and `transformers.models.gemma3`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from runner.models import gemma2, qwen3
from runner.models.gemma2 import Gemma2Config
from runner.nn.fast import RMSNorm
from runner.weights.tags import weight
from runner.weights.transforms import PLUS_ONE


@dataclass(frozen=True, kw_only=True)
class Gemma3Config(Gemma2Config):
    """`config.json` of a Gemma 3; windowed layers use the base `rope_local_base_freq`, without RoPE scaling.

    `_sliding_window_pattern` is a copy of the pattern that transformers 5 writes beside `layer_types`.
    """

    INERT: ClassVar[frozenset[str]] = Gemma2Config.INERT | {"_sliding_window_pattern"}
    ONLY: ClassVar[Mapping[str, object]] = {"attn_logit_softcapping": None}
    max_position_embeddings: int = 131072
    rope_theta: float = 1000000.0
    rope_local_base_freq: float = 10000.0
    sliding_window_pattern: int = 6
    attn_logit_softcapping: float | None = field(init=False, default=None)
    final_logit_softcapping: float | None = None

    @property
    def pattern(self) -> int:
        """Every `sliding_window_pattern`-th layer has full attention."""
        return self.sliding_window_pattern

    @property
    def context_length(self) -> int:
        # Published files count the stretched length in `max_position_embeddings` already, whatever the type.
        return self.max_position_embeddings

    def layer_settings(self, index: int) -> Mapping[str, Any]:
        windowed = self.cache_window(index) is not None
        return {"rope_theta": self.rope_local_base_freq, "rope_scaling": None} if windowed else {}


@dataclass
class Attention(qwen3.Attention):
    """Qwen 3's attention (an RMSNorm on each head's q and k); the norms add one to the stored weight."""

    q_norm: RMSNorm = weight("q_norm", "head_dim", transform=PLUS_ONE)
    k_norm: RMSNorm = weight("k_norm", "head_dim", transform=PLUS_ONE)


@dataclass
class Block(gemma2.Block):
    """A Gemma 2 block with Gemma 3's attention."""

    self_attn: Attention = weight("self_attn")


@dataclass
class Gemma3(gemma2.Gemma2):
    """A Gemma 2 made of Gemma 3 blocks."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
