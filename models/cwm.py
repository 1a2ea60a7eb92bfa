"""CWM: a Llama 3 with a sliding window in three of four layers.

Source: arXiv:2510.02387, and `transformers.models.cwm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner.config.base import fixed
from runner.config.decoder import WindowedConfig
from runner.config.layer_types import FULL, SLIDING
from runner.config.rope import RopeScaling
from runner.models.llama import Llama as Llama

STRETCHED = RopeScaling(
    kind="llama3", factor=16.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=8192
)


@dataclass(frozen=True, kw_only=True)
class CwmConfig(WindowedConfig):
    """`config.json` of a CWM; its attention has no biases."""

    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1000000.0
    rope_scaling: RopeScaling | None = STRETCHED
    attention_bias: bool = fixed(False)
    sliding_window: int | None = 8192

    @property
    def usual_layer_types(self) -> Sequence[str]:
        return [SLIDING if i % 4 else FULL for i in range(self.num_hidden_layers)]
