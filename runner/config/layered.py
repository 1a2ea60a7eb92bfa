"""Configs whose layers differ in more than their window: in RoPE, in the sizes and the number of heads, in widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

from runner.config.base import MAX_DIMENSION, JsonObject, key
from runner.config.decoder import WindowedConfig
from runner.config.problems import short
from runner.config.ranges import check_range
from runner.config.rope import RopeScaling, depends_on_length, kind_of
from runner.config.rope_keys import BESIDE, OF_SLIDING
from runner.errors import ConfigError

N = TypeVar("N", int, float)
MAX_LAYERS = 4096
"""Most layers that can have settings of their own: many times what any model has."""


@dataclass(frozen=True)
class LayerRope(JsonObject):
    """RoPE of one type of layer; what is None is as in the rest of the model.

    Attributes:
        rope_theta: its base.
        partial_rotary_factor: the share of a head that turns.
        rope_scaling: how frequencies are scaled; None: not at all.
    """

    rope_theta: float | None = None
    partial_rotary_factor: float | None = None
    rope_scaling: RopeScaling | None = None

    @classmethod
    def from_dict(cls, raw: object) -> Self:
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{OF_SLIDING} must be an object, not {short(raw)}")
        scaling = dict(raw)
        numbers: dict[str, float | None] = {}
        # Of a proportional RoPE, the share is one of the scaling's own settings.
        for name in BESIDE if kind_of(raw) != "proportional" else BESIDE[:1]:
            value = scaling.pop(name, None)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ConfigError(f"{OF_SLIDING}: {name} must be a number, not {short(value)}")
            check_range(name, value, f"{name} in {OF_SLIDING}")
            numbers[name] = None if value is None else float(value)
        found = RopeScaling.from_dict(scaling)
        if depends_on_length(found):
            raise ConfigError(f"{OF_SLIDING}: rope type {found.kind!r} is not supported for one type of layer alone")
        return cls(**numbers, rope_scaling=None if found.kind == "default" else found)

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of a config that it stands for."""
        numbers = {name: getattr(self, name) for name in BESIDE}
        return {"rope_scaling": self.rope_scaling, **{name: n for name, n in numbers.items() if n is not None}}


@dataclass(frozen=True)
class LayerSettings(JsonObject):
    """The `per_layer_config` of transformers 5: sizes that single layers have of their own, by the layer's index."""

    layers: Mapping[int, Mapping[str, int]]

    @classmethod
    def from_dict(cls, raw: object) -> Self:
        if not isinstance(raw, Mapping) or len(raw) > MAX_LAYERS:
            raise ConfigError(f"per_layer_config must be an object with an entry for a layer, not {short(raw)}")
        layers: dict[int, Mapping[str, int]] = {}
        for index, sizes in raw.items():
            if not str(index).isdecimal() or len(str(index)) > 4 or not isinstance(sizes, Mapping):
                raise ConfigError(f"per_layer_config: {short(index)} is no layer with an object of settings")
            for name, size in sizes.items():
                if type(size) is not int or not 1 <= size <= MAX_DIMENSION:
                    raise ConfigError(f"per_layer_config: {short(name)} of layer {index} is {short(size)}, no size")
            layers[int(index)] = dict(sizes)
        return cls(layers)


@dataclass(frozen=True, kw_only=True)
class LayeredConfig(WindowedConfig):
    """Config of a decoder whose windowed layers have RoPE of their own, and perhaps other heads.

    The keys of the whole model are those of its full-attention layers.
    """

    SIZES: ClassVar[frozenset[str]] = frozenset()
    """Fields that `per_layer_config` may set in this family."""
    sliding_rope: LayerRope | None = key(OF_SLIDING, default=None)
    per_layer_config: LayerSettings | None = None
    partial_rotary_factor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per_layer_config is None:
            return
        for index, sizes in self.per_layer_config.layers.items():
            unknown = sorted(sizes.keys() - self.SIZES)
            if index >= self.num_hidden_layers or unknown:
                raise ConfigError(
                    f"config.json: per_layer_config sets {short(unknown or list(sizes))} of layer {index}; this model "
                    f"has {self.num_hidden_layers} layers, and can have {sorted(self.SIZES)} of a layer's own"
                )

    def for_layer(self, index: int) -> Self:
        layer = super().for_layer(index)
        layer.check_heads()
        return layer

    def layer_settings(self, index: int) -> Mapping[str, Any]:
        windowed = self.cache_window(index) is not None
        rope = self.sliding_rope.settings if windowed and self.sliding_rope is not None else {}
        sizes = {} if self.per_layer_config is None else self.per_layer_config.layers.get(index, {})
        return {**super().layer_settings(index), **rope, **sizes}

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)


@dataclass(frozen=True, kw_only=True)
class ListedRopeConfig(WindowedConfig):
    """Config of a decoder whose `layer_rope_theta` gives each layer's RoPE base; a layer with 0 has no RoPE."""

    layer_rope_theta: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for index in range(self.num_hidden_layers):
            if base := self.base(index):
                check_range("rope_theta", base, "layer_rope_theta")

    def base(self, index: int) -> float:
        """RoPE's base in layer `index`, 0 where it has none."""
        bases = self.rope_theta if self.layer_rope_theta is None else self.layer_rope_theta
        return of_layer(bases, index, self.num_hidden_layers, "layer_rope_theta")

    def layer_settings(self, index: int) -> Mapping[str, Any]:
        return {**super().layer_settings(index), "rope_theta": self.base(index) or self.rope_theta}

    @property
    def rotary_dim(self) -> int:
        return self.head_dim if self.layer_index is None or self.base(self.layer_index) else 0


def of_layer(values: Sequence[N] | N, index: int, layers: int, name: str) -> N:
    """The value that layer `index` has of a setting that is one number, or a list of one for each of `layers`.

    Raises:
        ConfigError: there are more or fewer numbers than layers; the message gives the `name` of the key.
    """
    if not isinstance(values, Sequence):
        return values
    if len(values) != layers:
        raise ConfigError(f"config.json: {name} has {len(values)} entries, but there are {layers} layers")
    return values[index]
