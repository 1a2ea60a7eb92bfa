"""Mamba and Falcon Mamba: blocks of one Mamba layer each, and no attention.

Source: arXiv:2312.00752, arXiv:2410.05355, `transformers.models.mamba` and `falcon_mamba`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from runner.config.base import key
from runner.config.mamba import Mamba1Config, StackConfig
from runner.nn import mamba
from runner.nn.blocks import SingleDecoder as SingleDecoder
from runner.weights.tags import setting


@dataclass(frozen=True, kw_only=True)
class MambaConfig(StackConfig, Mamba1Config):
    """`config.json` of a Mamba."""

    # How training began, and how other programs compute.
    INERT: ClassVar[frozenset[str]] = StackConfig.INERT | {
        *("time_step_scale", "time_step_init_scheme", "use_mambapy", "use_falcon_mambapy", "use_associative_scan"),
    }
    tie_word_embeddings: bool = True
    intermediate_size: int | None = None
    mamba_dt_rank: int | str = key("time_step_rank", default="auto")

    @property
    def mamba_inner(self) -> int:
        return self.intermediate_size or super().mamba_inner

    @property
    def attention_class(self) -> type:
        return mamba.Mamba


@dataclass(frozen=True, kw_only=True)
class FalconMambaConfig(MambaConfig):
    """`config.json` of a Falcon Mamba."""

    mixer_rms_eps: float = 1e-6

    @property
    def attention_class(self) -> type:
        return FalconMamba


@dataclass
class FalconMamba(mamba.Mamba):
    """The layer with norms without weights on what steps, B and C are made of."""

    mixer_rms_eps: float = setting()

    def normed(self, dt: mx.array, b: mx.array, c: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        dt, b, c = (self.ops.rms_norm(part, None, self.mixer_rms_eps) for part in (dt, b, c))
        return dt, b, c
