"""Config classes that families share: what nearly all decoders have, with LayerNorms, without rotary positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from runner.config import layer_types
from runner.config.activations import ACTIVATIONS, check_activation
from runner.config.base import SLIDING, Config, fixed
from runner.config.rope import RopeScaling, depends_on_length
from runner.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(Config):
    """Grouped heads, rotary positions and a feed-forward layer; defaults are those of `transformers.LlamaConfig`."""

    NULL: ClassVar[Mapping[str, object]] = {"num_key_value_heads": 0, "head_dim": 0}  # all heads; an even share
    ACTS: ClassVar[frozenset[str]] = frozenset(ACTIVATIONS)
    """What `hidden_act` can be."""
    intermediate_size: int
    num_key_value_heads: int = 0
    head_dim: int = 0
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        # A frozen class fills in what config.json may leave out.
        object.__setattr__(self, "num_key_value_heads", self.num_key_value_heads or self.num_attention_heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.hidden_size // self.num_attention_heads)
        super().__post_init__()
        if self.num_attention_heads % self.num_key_value_heads:
            heads = f"{self.num_attention_heads} attention heads, {self.num_key_value_heads} key-value heads"
            raise ConfigError(f"config.json: {heads}: the first must be a multiple of the second")
        check_activation(self.hidden_act, self.ACTS)

    @property
    def rotary_dim(self) -> int:
        """All of a head is rotated."""
        return self.head_dim

    @property
    def rope_depends_on_length(self) -> bool:
        return self.rope_scaling is not None and depends_on_length(self.rope_scaling)

    @property
    def norm_eps(self) -> float:
        """Of the norm before the head."""
        return self.rms_norm_eps

    @property
    def attention_scale(self) -> float:
        """What scores are multiplied by."""
        return float(self.head_dim**-0.5)


@dataclass(frozen=True, kw_only=True)
class WindowedConfig(DecoderConfig):
    """Some layers see a window, others everything."""

    sliding_window: int | None = 4096
    layer_types: tuple[str, ...] | None = None

    @property
    def usual_layer_types(self) -> Sequence[str]:
        """Those of a config that does not list them."""
        raise NotImplementedError

    def cache_window(self, index: int) -> int | None:
        kinds = layer_types.checked(self.layer_types, self.num_hidden_layers, self.usual_layer_types)
        return self.sliding_window if kinds[index] == SLIDING else None


@dataclass(frozen=True, kw_only=True)
class LayerNormConfig(DecoderConfig):
    """What families with LayerNorms share; the keys that only some of them have are theirs to declare."""

    rms_norm_eps: float = fixed(0.0)
    attention_bias: bool = fixed(False)
    mlp_bias: bool = fixed(False)
    layer_norm_eps: float = 1e-5
    partial_rotary_factor: float = 1.0

    @property
    def norm_eps(self) -> float:
        return self.layer_norm_eps

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)


@dataclass(frozen=True, kw_only=True)
class UnrotatedConfig(LayerNormConfig):
    """What families without rotary positions share: no key says anything about them, and all heads have keys."""

    num_key_value_heads: int = fixed(0)
    rope_theta: float = fixed(10000.0)
    rope_scaling: RopeScaling | None = field(init=False, default=None)
    partial_rotary_factor: float = fixed(0.0)
