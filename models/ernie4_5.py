"""ERNIE 4.5 (dense): a Llama whose RoPE rotates neighbouring pairs, with one flag, `use_bias`, for all biases.

Source: `transformers.models.ernie4_5`.
"""

from __future__ import annotations

from dataclasses import dataclass

from runner.models.llama import Llama as Llama
from runner.models.llama import LlamaConfig


@dataclass(frozen=True, kw_only=True)
class Ernie45Config(LlamaConfig):
    """`config.json` of an ERNIE 4.5; `use_bias` sets both `attention_bias` and `mlp_bias`."""

    num_key_value_heads: int = 2
    head_dim: int = 128
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    tie_word_embeddings: bool = True
    use_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "attention_bias", self.use_bias)
        object.__setattr__(self, "mlp_bias", self.use_bias)

    @property
    def traditional(self) -> bool:
        """RoPE rotates pairs (2i, 2i+1)."""
        return True
