"""Config of models with Mamba layers of both kinds: the sizes of a layer and what it remembers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from runner.config.activations import check_activation
from runner.config.base import Config, Limit, fixed, key
from runner.config.memory import Memory, State
from runner.errors import ConfigError

ENDLESS = (Limit(0.0), Limit(float("inf")))
"""Limits of steps that let every step pass."""


TRAINED = frozenset(
    {"rescale_prenorm_residual", "residual_in_fp32", "time_step_min", "time_step_max", "time_step_floor"}
)
"""Keys about how training began, and how finely the sum of all layers is rounded: as finely as all else here."""


@dataclass(frozen=True, kw_only=True)
class RecurrentConfig(Config):
    """Config of a model with Mamba layers of either kind, by the names most files have."""

    hidden_act: str = "silu"
    mamba_d_state: int = 16
    mamba_d_conv: int = 4
    mamba_expand: int = 2
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False

    @property
    def mamba_inner(self) -> int:
        """Width of a layer inside: its channels, or those of all its heads together."""
        return self.mamba_expand * self.hidden_size

    @property
    def state(self) -> State:
        """What a Mamba layer remembers: the last inputs of its convolution, and its states."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class StackConfig(RecurrentConfig):
    """Config of a model of Mamba layers alone. It knows no longest sequence: a million tokens stand for any number."""

    INERT: ClassVar[frozenset[str]] = TRAINED
    num_attention_heads: int = fixed(1)
    max_position_embeddings: int = fixed(1 << 20)
    norm_eps: float = key("layer_norm_epsilon", default=1e-5)
    mamba_d_state: int = key("state_size", default=16)
    mamba_d_conv: int = key("conv_kernel", default=4)
    mamba_expand: int = key("expand", default=2)
    mamba_conv_bias: bool = key("use_conv_bias", default=True)
    mamba_proj_bias: bool = key("use_bias", default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_activation(self.hidden_act)

    def memory(self, index: int) -> tuple[Memory, ...]:
        return (self.state,)


@dataclass(frozen=True, kw_only=True)
class Mamba1Config(RecurrentConfig):
    """Config of a model with Mamba layers of the first kind; a `mamba_dt_rank` of "auto" is hidden_size / 16."""

    mamba_dt_rank: int | str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.mamba_dt_rank, str) and self.mamba_dt_rank != "auto":
            name = self.key_of("mamba_dt_rank")
            raise ConfigError(f'config.json: {name} must be a number or "auto", not {self.mamba_dt_rank!r}')

    @property
    def mamba_rank(self) -> int:
        """Width of what the steps are projected from."""
        return math.ceil(self.hidden_size / 16) if isinstance(self.mamba_dt_rank, str) else self.mamba_dt_rank

    @property
    def state(self) -> State:
        shapes = {"conv": (self.mamba_d_conv - 1, self.mamba_inner), "states": (self.mamba_inner, self.mamba_d_state)}
        return State(shapes, {"states": "float32"})


@dataclass(frozen=True, kw_only=True)
class Mamba2Config(RecurrentConfig):
    """Config of a model with Mamba 2 layers; where `mamba_d_head` is "auto" or left out, it is worked out.

    `mamba_chunk_size` says how transformers cuts the recurrence; no result depends on it. Where the keys about the norm
    behind the recurrence are not in the file, its input is gated and then normalized.
    """

    mamba_n_heads: int = 128
    mamba_d_head: int | str | None = "auto"
    mamba_n_groups: int = 1
    mamba_d_state: int = 256
    mamba_chunk_size: int = 256
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
    def mamba_activation(self) -> str:
        """What the convolution's outputs pass, by `hidden_act`'s names."""
        return self.hidden_act

    @property
    def mamba_channels(self) -> int:
        """Numbers of a token that are convolved: the heads' inputs, then B and C of each group."""
        return self.mamba_inner + 2 * self.mamba_n_groups * self.mamba_d_state

    @property
    def state(self) -> State:
        heads = self.mamba_n_heads
        states = (heads, self.mamba_inner // heads, self.mamba_d_state)
        rows = (self.mamba_d_conv - 1, self.mamba_channels)
        return State({"conv": rows, "states": states}, {"states": "float32"})

    @property
    def gated_norm_groups(self) -> int:
        """Equal parts in which a layer's output is normalized."""
        return self.mamba_n_groups
