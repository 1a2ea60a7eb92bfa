"""Config classes that model families share: decoders with RMSNorm, sliding windows, LayerNorm, or no RoPE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from runner.config import layer_types
from runner.config.activations import ACTIVATIONS, check_activation
from runner.config.base import Config, fixed
from runner.config.layer_types import SLIDING
from runner.config.memory import Memory, Rows
from runner.config.rope import RopeScaling, depends_on_length, stretched_length
from runner.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(Config):
    """Config of a decoder with grouped-query attention, RoPE and a feed-forward layer.

    Defaults are those of `transformers.LlamaConfig`. A `num_key_value_heads` of 0 stands for `num_attention_heads`, a
    `head_dim` of 0 for `hidden_size // num_attention_heads`; both are filled in after construction.
    """

    NULL: ClassVar[Mapping[str, object]] = {"num_key_value_heads": 0, "head_dim": 0}
    ACTS: ClassVar[frozenset[str]] = frozenset(ACTIVATIONS)
    """Values that `hidden_act` may have in this family."""
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
        # Before the inherited check, so that it sees the values in use; `__setattr__` of a frozen class raises.
        object.__setattr__(self, "num_key_value_heads", self.num_key_value_heads or self.num_attention_heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.hidden_size // self.num_attention_heads)
        super().__post_init__()
        self.check_heads()
        check_activation(self.hidden_act, self.ACTS, self.key_of("hidden_act"))

    def check_heads(self) -> None:
        """Check the sizes of heads, of the model or of one layer; raises `ConfigError` if they do not fit together."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"config.json: num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.rotary_dim % 2:
            raise ConfigError(
                f"config.json: {self.key_of('head_dim')} = {self.head_dim} lets RoPE turn {self.rotary_dim} numbers of "
                "a head in pairs: their count must be even"
            )

    @property
    def context_length(self) -> int:
        scaling = self.rope_scaling
        if scaling is None:
            return self.max_position_embeddings
        return max(self.max_position_embeddings, stretched_length(scaling, self.max_position_embeddings))

    @property
    def rotary_dim(self) -> int:
        """Number of elements of each head that RoPE rotates: all of them, unless a subclass says otherwise."""
        return self.head_dim

    @property
    def mixer(self) -> str:
        """What files call this layer's attention, or that which stands in its place."""
        return "self_attn"

    def memory(self, index: int) -> tuple[Memory, ...]:
        layer = self.for_layer(index)
        return (Rows(layer.num_key_value_heads, layer.head_dim, layer.head_dim, self.cache_window(index)),)

    @property
    def rope_border(self) -> int | None:
        if self.rope_scaling is None or self.rope_scaling.kind != "longrope":
            return None
        return self.rope_scaling.original_max_position_embeddings or self.max_position_embeddings

    @property
    def rope_depends_on_length(self) -> bool:
        return self.rope_scaling is not None and depends_on_length(self.rope_scaling)

    @property
    def norm_eps(self) -> float:
        """Epsilon of the final norm."""
        return self.rms_norm_eps

    @property
    def attention_scale(self) -> float:
        """Factor that the dot products of queries and keys are multiplied by."""
        return float(self.head_dim**-0.5)


@dataclass(frozen=True, kw_only=True)
class WindowedConfig(DecoderConfig):
    """Config of a decoder in which some layers attend to a sliding window and the others to all earlier tokens."""

    sliding_window: int | None = 4096
    layer_types: tuple[str, ...] | None = None

    @property
    def usual_layer_types(self) -> Sequence[str]:
        """The `layer_types` of a `config.json` that does not list them."""
        raise NotImplementedError

    @property
    def kinds(self) -> Sequence[str]:
        """The type of each layer; raises `ConfigError` if there are too few, or unknown ones."""
        return layer_types.checked(self.layer_types, self.num_hidden_layers, self.usual_layer_types)

    def cache_window(self, index: int) -> int | None:
        if self.kinds[index] != SLIDING:
            return None
        if not self.sliding_window:  # null, or 0 where a family allows it: not to be taken for no window at all
            raise ConfigError(
                f"config.json: layer {index} is of type {SLIDING}, but sliding_window is {self.sliding_window!r}: "
                "it must be at least 1"
            )
        return self.sliding_window


@dataclass(frozen=True, kw_only=True)
class LayerNormConfig(DecoderConfig):
    """Config of a decoder with LayerNorm instead of RMSNorm.

    Keys that only some of these families have (`attention_bias`, `mlp_bias`) are fixed here and declared again there.
    """

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
    """Config of a decoder with LayerNorm and no RoPE (hence no key about RoPE), whose heads all have their own keys."""

    num_key_value_heads: int = fixed(0)
    rope_theta: float = fixed(10000.0)
    rope_scaling: RopeScaling | None = field(init=False, default=None)
    partial_rotary_factor: float = fixed(0.0)
