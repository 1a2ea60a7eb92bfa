"""Config of models with Mamba 2 layers: the sizes of a layer and what it remembers, by the names most files have."""

from __future__ import annotations

from dataclasses import dataclass

from runner.config.base import Config, Limit, fixed
from runner.config.memory import State
from runner.errors import ConfigError

ENDLESS = (Limit(0.0), Limit(float("inf")))
"""Limits of steps that let every step pass."""


@dataclass(frozen=True, kw_only=True)
class Mamba2Config(Config):
    """Config of a model with Mamba 2 layers; where `mamba_d_head` is "auto" or left out, it is worked out.

    `mamba_chunk_size` says how transformers cuts the recurrence; no result depends on it. Where the keys about the norm
    behind the recurrence are not in the file, its input is gated and then normalized.
    """

    hidden_act: str = "silu"
    mamba_n_heads: int = 128
    mamba_d_head: int | str | None = "auto"
    mamba_n_groups: int = 1
    mamba_d_state: int = 256
    mamba_d_conv: int = 4
    mamba_expand: int = 2
    mamba_chunk_size: int = 256
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False
    mamba_rms_norm: bool = fixed(True)
    mamba_norm_before_gate: bool = fixed(False)
    time_step_limit: tuple[Limit, ...] = ENDLESS

    def __post_init__(self) -> None:
        super().__post_init__()
        limits, heads = self.time_step_limit, self.mamba_n_heads
        if len(limits) != 2 or not 0 <= limits[0] <= limits[1]:
            raise ConfigError(f"config.json: time_step_limit must be two numbers from 0 on in order, not {limits}")
        if heads % self.mamba_n_groups:
            raise ConfigError(
                f"config.json: {self.key_of('mamba_n_heads')} ({heads}) must be a multiple of "
                f"{self.key_of('mamba_n_groups')} ({self.mamba_n_groups})"
            )
        if self.mamba_inner % heads or self.mamba_d_head not in ("auto", None, self.mamba_inner // heads):
            raise ConfigError(
                f"config.json: {heads} heads ({self.key_of('mamba_n_heads')}) of {self.mamba_d_head} "
                f"({self.key_of('mamba_d_head')}) do not make up the Mamba layer's width, {self.mamba_inner}"
            )

    @property
    def mamba_inner(self) -> int:
        """Width of the layer inside: of all heads together."""
        return self.mamba_expand * self.hidden_size

    @property
    def mamba_activation(self) -> str:
        """What the convolution's outputs pass, by `hidden_act`'s names."""
        return self.hidden_act

    @property
    def mamba_channels(self) -> int:
        """Numbers of a token that are convolved: the heads' inputs, then B and C of each group."""
        return self.mamba_inner + 2 * self.mamba_n_groups * self.mamba_d_state

    @property
    def mamba_state(self) -> State:
        """What a Mamba 2 layer remembers: the last inputs of its convolution, and the heads' states."""
        heads = self.mamba_n_heads
        states = (heads, self.mamba_inner // heads, self.mamba_d_state)
        rows = (self.mamba_d_conv - 1, self.mamba_channels)
        return State({"conv": rows, "states": states}, {"states": "float32"})

    @property
    def gated_norm_groups(self) -> int:
        """Equal parts in which a layer's output is normalized."""
        return self.mamba_n_groups
