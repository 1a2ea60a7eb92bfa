"""Mamba 2 (Codestral Mamba): blocks of one Mamba 2 layer each, and no attention.

Source: arXiv:2405.21060, and `transformers.models.mamba2`. Which of `residual_in_fp32` is set only says how finely the
sum of all layers is rounded, which is as finely as all else here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from runner.config.activations import check_activation
from runner.config.base import fixed, key
from runner.config.mamba import Mamba2Config
from runner.config.memory import Memory
from runner.models.nemotron_h import MambaBlock
from runner.models.nemotron_h import NemotronH as NemotronH


@dataclass(frozen=True, kw_only=True)
class StackedMamba2Config(Mamba2Config):
    """`config.json` of a Mamba 2. It knows no longest sequence: a million tokens stand for any number."""

    # How training began, the chunks of other programs, and keys that say again what the model is.
    INERT: ClassVar[frozenset[str]] = frozenset(
        {
            *("rescale_prenorm_residual", "residual_in_fp32", "time_step_min", "time_step_max", "time_step_floor"),
            *("time_step_rank", "rms_norm", "norm_before_gate", "intermediate_size"),
        }
    )
    num_attention_heads: int = fixed(1)
    max_position_embeddings: int = fixed(1 << 20)
    rms_norm_eps: float = key("layer_norm_epsilon", default=1e-5)
    mamba_n_heads: int = key("num_heads", default=128)
    mamba_d_head: int = key("head_dim", default=64)
    mamba_n_groups: int = key("n_groups", default=8)
    mamba_d_state: int = key("state_size", default=128)
    mamba_d_conv: int = key("conv_kernel", default=4)
    mamba_expand: int = key("expand", default=2)
    mamba_chunk_size: int = key("chunk_size", default=256)
    mamba_conv_bias: bool = key("use_conv_bias", default=True)
    mamba_proj_bias: bool = key("use_bias", default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_activation(self.hidden_act)

    @property
    def norm_eps(self) -> float:
        """Epsilon of all norms."""
        return self.rms_norm_eps

    def memory(self, index: int) -> tuple[Memory, ...]:
        return (self.mamba_state,)

    @property
    def block_class(self) -> type:
        return MambaBlock
