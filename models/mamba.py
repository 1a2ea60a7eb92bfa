"""Mamba and Falcon Mamba: blocks of one Mamba layer each, and no attention.

Source: arXiv:2312.00752, arXiv:2410.05355, `transformers.models.mamba` and `falcon_mamba`. `residual_in_fp32` only says
how finely the sum of all layers is rounded, which is as finely as all else here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from runner.config.activations import check_activation
from runner.config.base import fixed, key
from runner.config.memory import Memory
from runner.models import nemotron_h
from runner.models.nemotron_h import NemotronH as NemotronH
from runner.nn import mamba
from runner.weights.tags import setting, weight


@dataclass(frozen=True, kw_only=True)
class MambaConfig(mamba.MambaConfig):
    """`config.json` of a Mamba. It knows no longest sequence: a million tokens stand for any number."""

    # How training began, and how other programs compute.
    INERT: ClassVar[frozenset[str]] = frozenset(
        {
            *("rescale_prenorm_residual", "residual_in_fp32", "time_step_min", "time_step_max", "time_step_floor"),
            *("time_step_scale", "time_step_init_scheme", "use_mambapy", "use_falcon_mambapy", "use_associative_scan"),
        }
    )
    num_attention_heads: int = fixed(1)
    max_position_embeddings: int = fixed(1 << 20)
    tie_word_embeddings: bool = True
    rms_norm_eps: float = key("layer_norm_epsilon", default=1e-5)
    intermediate_size: int | None = None
    mamba_d_state: int = key("state_size", default=16)
    mamba_d_conv: int = key("conv_kernel", default=4)
    mamba_expand: int = key("expand", default=2)
    mamba_dt_rank: int | str = key("time_step_rank", default="auto")
    mamba_conv_bias: bool = key("use_conv_bias", default=True)
    mamba_proj_bias: bool = key("use_bias", default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_activation(self.hidden_act)

    @property
    def mamba_inner(self) -> int:
        return self.intermediate_size or super().mamba_inner

    @property
    def norm_eps(self) -> float:
        """Epsilon of all norms."""
        return self.rms_norm_eps

    def memory(self, index: int) -> tuple[Memory, ...]:
        return (self.mamba_state,)

    @property
    def block_class(self) -> type:
        return Block


@dataclass(frozen=True, kw_only=True)
class FalconMambaConfig(MambaConfig):
    """`config.json` of a Falcon Mamba."""

    mixer_rms_eps: float = 1e-6

    @property
    def block_class(self) -> type:
        return FalconBlock


@dataclass
class FalconMamba(mamba.Mamba):
    """The layer with norms without weights on what steps, B and C are made of."""

    mixer_rms_eps: float = setting()

    def normed(self, dt: mx.array, b: mx.array, c: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        dt, b, c = (self.ops.rms_norm(part, None, self.mixer_rms_eps) for part in (dt, b, c))
        return dt, b, c


@dataclass
class Block(nemotron_h.MixerBlock):
    """The block of a Mamba."""

    mixer: mamba.Mamba = weight("mixer")


@dataclass
class FalconBlock(nemotron_h.MixerBlock):
    """The block of a Falcon Mamba."""

    mixer: FalconMamba = weight("mixer")
