"""Mamba 2 (Codestral Mamba): blocks of one Mamba 2 layer each, and no attention.

Source: arXiv:2405.21060, and `transformers.models.mamba2`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from runner.config.base import key
from runner.config.mamba import Mamba2Config, StackConfig
from runner.nn.blocks import SingleDecoder as SingleDecoder
from runner.nn.mamba2 import Mamba2


@dataclass(frozen=True, kw_only=True)
class StackedMamba2Config(StackConfig, Mamba2Config):
    """`config.json` of a Mamba 2."""

    # How training began, and keys that say again what the model is.
    INERT: ClassVar[frozenset[str]] = StackConfig.INERT | {
        *("time_step_rank", "rms_norm", "norm_before_gate", "intermediate_size"),
    }
    mamba_n_heads: int = key("num_heads", default=128)
    mamba_d_head: int = key("head_dim", default=64)
    mamba_n_groups: int = key("n_groups", default=8)
    mamba_d_state: int = key("state_size", default=128)
    mamba_chunk_size: int = key("chunk_size", default=256)

    @property
    def attention_class(self) -> type:
        return Mamba2
